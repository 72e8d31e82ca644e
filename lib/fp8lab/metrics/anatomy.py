"""Where a step's time goes: its GPU kernels by kind, each beside the least time that the datasheet allows, and the CPU of
the process that launches them. Pure functions: a profiler's trace and a sampler's stacks in, numbers out.

vLLM's torch profiler writes Chrome's trace format. Each step is marked by an annotation that says what was in it
(`detailed_trace_annotation`, vllm/v1/worker/gpu_worker.py, `annotate_profile`).
"""

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean

from ..config.dimensions import ModelShape, WeightFormat
from ..config.profile import Card

ATTENTION, LAYERS, HEAD, QUANTISATION = "attention", "layers' matrix products", "output head", "quantisation"
KV_WRITE, SAMPLING, NORMS, COPIES, OTHER = "KV write", "sampling", "norms and activations", "copies", "other"
KINDS = (ATTENTION, LAYERS, HEAD, QUANTISATION, KV_WRITE, SAMPLING, NORMS, COPIES, OTHER)

# The first pattern that is found in a kernel's name decides: attention kernels are CUTLASS templates too, and a fused
# kernel that quantises is named after all that it does and, with `scaled_mm`, after the product that it does it for. Names
# of vLLM 0.26 to 0.33 on Hopper.
_KINDS = (
    (QUANTISATION, r"^triton_\w*fused\w*(clamp|quant|float8|scaled_mm)"),
    (KV_WRITE, r"reshape_and_cache|concat_and_cache"),
    (ATTENTION, r"flash|mha|attn|attention|varlen"),  # kernel_mha is XQA
    (SAMPLING, r"gumbel|sampl|argmax|top_?[kp]\b|top_?[kp]_|min_p|penalt|logprob|bincount"),
    (NORMS, r"^triton_(red|poi|per)_fused"),  # what is done before or after a product bears its name too
    (LAYERS, r"gemm|gemv|nvjet|cutlass|cublas|split_?k|matmul|machete|marlin"),
    (QUANTISATION, r"quant|scaled_fp8|float8|amax|clamp"),
    (NORMS, r"norm|silu|rotary|rope|embedding"),
    (COPIES, r"memcpy|memset|copy|fill|index|scatter|gather|elementwise"),
)

_PART = r"{0}_(\d+)\(sq(\d+)sk(\d+)sqsq\d+sqsk(\d+)\)"
_STEP = re.compile(rf"execute_\d+_{_PART.format('context')}_{_PART.format('generation')}")
_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name; `OTHER` for an unknown one. A matrix product counts as the layers'."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


@dataclass(frozen=True)
class Work:
    """What a step, or the mean of several, computes: the `prompts` read in it with their tokens, and the requests `running`
    that get a token each. `*_context` is the KV cache that they read, in tokens; `prompt_pairs` the sum over prompts of tokens
    times context, which attention's products grow with."""

    prompts: float = 0.0
    prompt_tokens: float = 0.0
    prompt_context: float = 0.0
    prompt_pairs: float = 0.0
    running: float = 0.0
    decode_tokens: float = 0.0
    decode_context: float = 0.0

    @property
    def name(self) -> str:
        """ "decode", "prefill", or "mixed"."""
        return "decode" if not self.prompt_tokens else "mixed" if self.running else "prefill"

    @classmethod
    def mean(cls, works: Sequence["Work"]) -> "Work":
        return cls(*(fmean(getattr(work, field.name) for work in works) for field in fields(cls)))


@dataclass(frozen=True)
class Kernel:
    """A kernel within a step. `head`: it is the output head's matrix product."""

    name: str
    begin_us: float
    duration_us: float
    head: bool = False


@dataclass(frozen=True)
class Step:
    """One step as the profiler saw it."""

    work: Work
    kernels: tuple[Kernel, ...]

    @property
    def busy_us(self) -> float:
        """The time in which a kernel ran; kernels beside each other count once."""
        busy, until = 0.0, 0.0
        for kernel in sorted(self.kernels, key=lambda one: one.begin_us):
            end = kernel.begin_us + kernel.duration_us
            busy += max(0.0, end - max(until, kernel.begin_us))
            until = max(until, end)
        return busy


def read_steps(trace: Mapping) -> list[Step]:
    """The whole steps of a profiler's trace, in order. A kernel belongs to the step in which it, or the CUDA graph that it
    is part of, was launched; the last matrix product of a step that emits tokens is the output head's. The first and the
    last step, which the profiler may have cut, are left out, and steps without a kernel."""
    events = [event for event in trace.get("traceEvents", ()) if event.get("ph") == "X"]
    # The last number is the pairs of those that decode, which their context says as well.
    marks = sorted(
        (event["ts"], Work(*map(float, found.groups()[:-1])))
        for event in events
        if event.get("cat") == "user_annotation" and (found := _STEP.fullmatch(event["name"]))
    )
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    of_step = defaultdict(list)
    begins = [ts for ts, _ in marks]
    for event in events:
        if event.get("cat") in _GPU and (ts := launched.get(event.get("args", {}).get("correlation"))) is not None:
            of_step[bisect.bisect_right(begins, ts) - 1].append(event)
    steps = [Step(work, _kernels(of_step[number], work)) for number, (_, work) in enumerate(marks)]
    return [step for step in steps[1:-1] if step.kernels]


def _kernels(events: Iterable[Mapping], work: Work) -> tuple[Kernel, ...]:
    ordered = sorted(events, key=lambda event: event["ts"])
    products = [i for i, event in enumerate(ordered) if kind_of(event["name"]) == LAYERS]
    head = products[-1] if products and (work.running or work.prompts) else None
    return tuple(Kernel(event["name"], event["ts"], event["dur"], i == head) for i, event in enumerate(ordered))


def kernel_times(steps: Sequence[Step]) -> dict[str, dict[str, float]]:
    """By kind the kernels' names and each one's mean milliseconds a step, the longest first."""
    held: dict[str, Counter] = defaultdict(Counter)
    for step in steps:
        for kernel in step.kernels:
            kind = HEAD if kernel.head else kind_of(kernel.name)
            held[kind][kernel.name] += kernel.duration_us / 1e3 / len(steps)
    return _ordered(held)


def by_kind(kernels: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`kernel_times` of a run perhaps older than the table of names. The output head, which no name tells, stays."""
    held: dict[str, Counter] = defaultdict(Counter)
    for stored, names in kernels.items():
        for name, ms in names.items():
            held[HEAD if stored == HEAD else kind_of(name)][name] += ms
    return _ordered(held)


def _ordered(held: Mapping[str, Counter]) -> dict[str, dict[str, float]]:
    return {kind: dict(held[kind].most_common()) for kind in KINDS if kind in held}


def floors_ms(
    work: Work, shape: ModelShape, card: Card, *, weights: WeightFormat, fp8_kv: bool, shared_by: int = 1
) -> dict[str, float]:
    """By kind the least milliseconds that the card's datasheet allows a step: the longer of its bytes over the bandwidth
    and its FLOPs over the matrix peak. Attention computes in the KV cache's format at the BF16 peak, quantisation reads
    each matrix product's input in BF16 and writes it in 8 bits, the sampler reads each logit once in FP32. Kinds that are
    not named have no floor. Of `shared_by` cards that share each layer each does its part."""
    tokens = work.prompt_tokens + work.decode_tokens
    emitted = work.running + work.prompts
    layers, head = shape.flops(tokens, emitted)
    kv_token = shape.kv_bytes_per_token(1 if fp8_kv else 2)
    # A prompt's token looks at itself and those before it: half of tokens x context, where a prompt is read in one piece
    # (of one read in several it is more, so that this is no more than the least).
    pairs = (work.prompt_pairs + work.prompt_tokens) / 2 + work.decode_context
    inputs = shape.product_inputs * tokens

    def least(moved: float, flops: float = 0.0, peak: float = card.bf16_flops) -> float:
        return 1e3 * max(moved / card.hbm_bytes_per_s, flops / peak) / shared_by

    found = {
        ATTENTION: least((work.prompt_context + work.decode_context) * kv_token, shape.pair_flops * pairs),
        LAYERS: least(shape.layer_parameters * weights.weight_bytes, layers, card.flops(weights.eight_bit)),
        HEAD: least(shape.vocabulary_parameters * weights.head_bytes, head, card.flops(weights.head)),
        KV_WRITE: least(tokens * (kv_token + shape.kv_bytes_per_token(2))),
        SAMPLING: least(4.0 * emitted * shape.vocabulary),
    }  # fmt: skip
    return found | ({QUANTISATION: least(3.0 * inputs)} if weights.eight_bit else {})


# What the EngineCore's own thread does, by the first of these functions from the outermost frame inwards. Names of vLLM
# 0.26 to 0.33.
_STAGES = {
    "schedule": "schedule", "update_from_output": "take in results", "execute_model": "prepare and launch",
    "sample_tokens": "prepare and launch", "_process_input_queue": "take in requests",
    "_process_aborts_queue": "take in requests", "put_nowait": "hand out results",
}  # fmt: skip
_LOOP = "run_busy_loop"
# Where a stack ends that waits: for the GPU or, when the model runs in a process of its own, for that one's answer.
_WAITS = {"wait", "_wait", "synchronize", "get_output", "result", "poll", "select", "get"}
_WAITS |= {"sched_yield", "timeout_ms", "acquire_read", "dequeue", "wait_for_response"}
WAITING, IDLE, BESIDE = "wait for the model", "idle, no request", "threads beside it"
STAGES = (*dict.fromkeys(_STAGES.values()), OTHER, WAITING, IDLE, BESIDE)
_FRAME = re.compile(r"(?:.*\.)?([^.]+?) \(.*\)")


def host_stages(stacks: Iterable[str]) -> dict[str, dict[str, float]]:
    """By stage of the EngineCore its innermost functions and each one's share (0 to 1) of the time of its own thread, the
    largest first; `BESIDE` is what its other threads (sockets, serialising) do, in the same unit, their waiting left out.

    `stacks` are lines of `py-spy record --format raw`: frames "function (path:line)" joined by ";", outermost first, and how
    often they were seen. Empty when none is the EngineCore's."""
    held: dict[str, Counter] = defaultdict(Counter)
    for line in stacks:
        stack, _, count = line.strip().rpartition(" ")
        functions = [found[1] for frame in stack.split(";") if (found := _FRAME.fullmatch(frame))]
        if functions and count.isdecimal() and (stage := _stage(functions)):
            held[stage][functions[-1]] += int(count)
    own = sum(sum(each.values()) for stage, each in held.items() if stage != BESIDE)
    return {
        stage: {function: count / own for function, count in held[stage].most_common()}
        for stage in STAGES
        if own and stage in held
    }


def _stage(functions: Sequence[str]) -> str:
    """The stage of a stack; "" for one of another thread that waits."""
    waits = functions[-1] in _WAITS
    if _LOOP not in functions:
        return "" if waits else BESIDE
    if waits:
        return IDLE if "_process_input_queue" in functions else WAITING
    return next((_STAGES[function] for function in functions if function in _STAGES), OTHER)
