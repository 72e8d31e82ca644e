"""How long a step takes, from what it computes: a few numbers with a meaning, fitted to recorded levels (`experiment.step_fit`).

    base + (weights^4 + (token x tokens)^4)^(1/4) + request x requests that get a token
         + context x tokens of context, in a step that only decodes
           + eager, if it decodes more requests than CUDA graphs were captured for
         + mixed + mixed_context x tokens of context, in one that reads prompts too
           + pair x pairs of a prompt's token with one that it attends to

Weights have to be read whatever the batch; once it is large, products take longer than that: whichever is longer counts, with
a smooth passage. In a step with prompts attention may read the contexts of those that decode less well. Neither weights nor
contexts are read faster than the datasheet's bandwidth allows; what else one number takes from another the levels may not tell.

Levels of one trace tell neither a token of context from the request that has it nor a prompt's pairs from its tokens. A pair is
not fitted: it takes what it does at the card's BF16 peak. Nor is a token of context where the run holds steps of three batch
sizes taken apart: it takes what it adds to their attention's kernels.

The API server is a wait before the first token. One Python process, with about a core, is a queue too (`behind`): tokens are handed
out in the order in which they come, each after so many µs of CPU. Latencies of one that is full turn on more than that, so that no
model is fitted to it. vLLM's EngineCore looks for work all the time, so that its CPU says nothing; what it adds to a step is
in `base` and `request`, and told by itself where steps were taken apart.

What a level takes of energy is idle x seconds + busy x seconds in which a step ran + token x tokens computed + context x tokens of
context read, and never more than the card's power limit allows.
"""

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_type_hints

from ..config.profile import Card
from ..errors import BadInput
from ..paths import DATA
from ..ui import toml
from .virtual import Course, Limits, Step

FITS = DATA / "fits"
_SMOOTH, _BLOCK = 4, 16


@dataclass(frozen=True)
class StepModel:
    """Of one variant on one card and host, fitted to `levels` of the recorded `run`. `low` and `high` say how well
    these tell the fitted numbers, by name, from the fit's curvature; where the two are the same it is at its bound."""

    base_ms: Annotated[float, "ms, each step, whatever it computes"]
    weights_ms: Annotated[float, "ms, to read the weights once"]
    token_us: Annotated[float, "µs, a token's matrix products, where they take longer than that"]
    request_us: Annotated[float, "µs, a request that gets a token"]
    context_ns: Annotated[float, "ns, a token of context, in a step that only decodes"]
    mixed_ms: Annotated[float, "ms, a step that reads prompts too"]
    mixed_context_ns: Annotated[float, "ns, a token of context in such a step"]
    api_ms: Annotated[float, "ms, a request's way through the API server"]
    requests: int  # most that run at once (--max-num-seqs)
    step_tokens: int  # most tokens of a step (--max-num-batched-tokens)
    kv_tokens: int  # room in the KV cache
    card: str  # the profile that has the card's datasheet
    run: str  # recorded, to whose `levels` it was fitted
    levels: tuple[str, ...]
    host: str = ""  # the CPU that EngineCore and API server ran on, in the levels fitted
    trace: str = ""  # whose lengths their requests had, as `Trace.lengths`
    context: int = 0  # most tokens of a request, in and out together; 0: not known
    pair_ns: Annotated[float, "ns, a prompt's token and one that it attends to, at the BF16 peak"] = 0.0
    eager_ms: Annotated[float, "ms, a step that decodes more requests than CUDA graphs hold"] = 0.0
    graphs: int = 0  # requests of the largest CUDA graph; 0: as many as run
    api_us: Annotated[float, "µs of the API server's CPU, a token, measured"] = 0.0
    queue_us: float = 0.0  # µs for which a token keeps an API server of one process busy; 0: it is never full
    host_ms: Annotated[
        float, "ms that the host adds to the GPU's time of each step, by the run's steps taken apart"
    ] = 0.0
    host_us: Annotated[float, "µs that it adds for each request of the step"] = 0.0
    mhz_low: Annotated[float, "MHz, the mean SM clock of a level's steady state, in the lowest"] = 0.0
    mhz_high: Annotated[float, "MHz, in the highest"] = 0.0
    idle_w: Annotated[float, "W, whatever it computes"] = 0.0
    busy_w: Annotated[float, "W more while a step runs"] = 0.0
    token_mj: Annotated[float, "mJ, a token's matrix products"] = 0.0
    context_uj: Annotated[float, "µJ, a token of context, read"] = 0.0
    limit_w: float = math.inf  # the power limit of the cards
    cards: int = 1  # that it runs on
    card_name: str = ""  # the datasheet's, with its bandwidth (bytes/s) and its BF16 peak (FLOP/s)
    hbm_bytes_per_s: float = 0.0
    bf16_flops: float = 0.0
    low: Mapping[str, float] = field(default_factory=dict)
    high: Mapping[str, float] = field(default_factory=dict)
    # How far off what is foretold of levels that were held out: shares (0 to 1) by metric; empty without any.
    median: Mapping[str, float] = field(default_factory=dict)
    worst: Mapping[str, float] = field(default_factory=dict)
    note: str = ""  # what else is to be said where it is shown

    def seconds(self, step: Step) -> float:
        """How long a step takes (s)."""
        tokens = step.decoding + step.prompt
        products = (self.weights_ms**_SMOOTH + (1e-3 * self.token_us * tokens) ** _SMOOTH) ** (1 / _SMOOTH)
        read = 1e-6 * self.context_ns * step.context
        if step.prompt:
            read = self.mixed_ms + 1e-6 * self.mixed_context_ns * step.context
        elif 0 < self.graphs < step.decoding:
            read += self.eager_ms
        read += 1e-6 * self.pair_ns * step.pairs
        return 1e-3 * (self.base_ms + products + 1e-3 * self.request_us * step.emitted + read)

    def joules(self, course: Course, span_s: float) -> float | None:
        """What the card takes for a load that was played, in so many seconds from its first request to its last token; None
        where the levels that were fitted had no power."""
        found = self.idle_w * span_s + self.busy_w * course.busy_s
        found += 1e-3 * self.token_mj * course.tokens + 1e-6 * self.context_uj * course.context
        return min(found, self.limit_w * span_s) or None

    @property
    def limits(self) -> Limits:
        """What its server takes on; asynchronous scheduling is vLLM's default."""
        api = 1e-6 * self.queue_us
        return Limits(self.requests, self.step_tokens, self.kv_tokens // _BLOCK, _BLOCK, api_s=api)

    def behind(self, us: float) -> "StepModel":
        """The same behind an API server of one process, busy `us` µs a token. Raises BadInput for 0 or above `MOST`."""
        if not 0 < us <= MOST:
            raise BadInput(f"{us:g} µs a token: an API server takes more than 0 and at most {MOST:g}")
        note = f"{self.origin}, behind one API server process of {us:g} µs a token; of latencies that says little once that is full"
        return dataclasses.replace(self, queue_us=us, note=note, median={}, worst={})

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        return self.note or f"fitted to run {self.run}{f' on {self.host}' if self.host else ''}"

    def on(self, other: Card, name: str) -> "StepModel":
        """The same on another card, by the datasheets alone: what is read takes the time that the other's memory does, what
        is multiplied that of its matrix units. Host and KV cache stay as they were; energy is on no datasheet. Raises BadInput
        for a fit without its own card's datasheet."""
        if not (self.hbm_bytes_per_s and self.bf16_flops):
            raise BadInput(
                f"the fit of run {self.run} has no datasheet of its card ([gpu] of the profile): fit it anew with one"
            )
        read, products = self.hbm_bytes_per_s / other.hbm_bytes_per_s, self.bf16_flops / other.bf16_flops
        scaled = {one: getattr(self, one) * read for one in ("weights_ms", "context_ns", "mixed_context_ns")}
        scaled |= {one: getattr(self, one) * products for one in ("token_us", "pair_ns")}
        scaled |= dict.fromkeys((*ENERGY, "mhz_low", "mhz_high"), 0.0)
        unknown = {key: {} for key in ("low", "high", "median", "worst")}
        note = f"scaled from {self.card_name} to {other.name} by the datasheets, not fitted there, with room for as many tokens as here"
        note = f"{self.note}; {note}" if self.note else note
        sheet = {"card_name": other.name, "hbm_bytes_per_s": other.hbm_bytes_per_s, "bf16_flops": other.bf16_flops}
        return dataclasses.replace(self, **scaled, **unknown, **sheet, card=name, note=note, limit_w=math.inf)

    def as_toml(self, variant: str) -> str:
        """Its table of a fit's file, six digits a number."""
        names = [one.name for one in dataclasses.fields(self) if one.name != "note"]
        lines = [f"[{json.dumps(variant)}]", *(f"{name} = {toml(getattr(self, name), '.6g')}" for name in names)]
        return "\n".join(lines) + "\n"


# What each number is, with its unit.
MEANS = {name: hint.__metadata__[0] for name, hint in get_type_hints(StepModel, include_extras=True).items()
         if hasattr(hint, "__metadata__")}  # fmt: skip
# The fitted numbers, in order.
STEPS = ("base_ms", "weights_ms", "token_us", "request_us", "context_ns", "mixed_ms", "mixed_context_ns", "eager_ms")
FITTED = (*STEPS, "api_ms")
# What else is known: by the datasheet, of the host, and the clock.
MEASURED = ("pair_ns", "api_us", "host_ms", "host_us", "mhz_low", "mhz_high")
# What a fit of steps is held against in a level, and how much each counts: latencies of a saturated level are many times as
# sensitive to a step's length as what it delivers.
TIMES = {
    "output_token_throughput": 2.0, "mean_tpot_ms": 1.0, "p99_tpot_ms": 0.5, "mean_ttft_ms": 0.5, "p99_ttft_ms": 0.5,
}  # fmt: skip
JOULES = "joules_per_output_token"
JUDGED = (*TIMES, JOULES)
# A number that may be so many times more or less is told by no level.
UNTOLD = 100.0
# Beyond this (ms, µs, ns, W, ...) no fitted number lies.
MOST = 1e4
ENERGY = ("idle_w", "busy_w", "token_mj", "context_uj")


def read_fits(name: str) -> dict[str, StepModel]:
    """The models of a fit in `data/fits/` (or of a .toml file), by variant. Raises BadInput where there is none."""
    path = Path(name) if name.endswith(".toml") else FITS / f"{name}.toml"
    if not path.is_file() or path == FITS / "held_out.toml":
        known = ", ".join(sorted(one.stem for one in FITS.glob("*.toml") if one.stem != "held_out")) or "none"
        raise BadInput(f"no fit {name!r} (there are: {known}); `fp8lab fit-model RUN` makes one of a run")
    try:
        tables = tomllib.loads(path.read_text("utf-8-sig"))
        models = {name: StepModel(**values | {"levels": tuple(values["levels"])}) for name, values in tables.items()}
        for variant, model in models.items():
            _check(variant, model)
        if not models:
            raise ValueError("it holds no variant")
        return models
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # What Python says of other kinds of values than a fit's is no help.
        own = isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError)
        said = error if own else "expected a table for each variant, with base_ms, weights_ms and the other numbers"
        raise BadInput(
            f"{path} is no fit of step models: {said}; `fp8lab fit-model RUN --out FILE` makes one"
        ) from None


def _check(variant: str, model: StepModel) -> None:
    """Raises ValueError for what no fit has written."""
    bounds = dict.fromkeys((*FITTED, *MEASURED, *ENERGY, "queue_us"), (int | float, 0, MOST))
    bounds |= dict.fromkeys(("hbm_bytes_per_s", "bf16_flops"), (int | float, 0, 1e20))
    bounds |= dict.fromkeys(("requests", "step_tokens", "kv_tokens", "cards"), (int, 1, 10**9))
    bounds |= dict.fromkeys(("graphs", "context"), (int, 0, 10**9)) | {"base_ms": (int | float, 1 / MOST, MOST)}
    bounds |= {"limit_w": (int | float, 1, math.inf)}
    for name, (kind, least, most) in bounds.items():
        value = getattr(model, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            raise ValueError(f"{variant}: {name} is {value!r}, expected a number from {least:g} to {most:g}")
    for name in ("card", "run", "host", "trace", "card_name"):
        if not isinstance(getattr(model, name), str):
            raise ValueError(f"{variant}: {name} is {getattr(model, name)!r}, expected a name")
    for each, known in ((model.low, FITTED), (model.high, FITTED), (model.median, JUDGED), (model.worst, JUDGED)):
        if wrong := {
            k: v for k, v in each.items() if k not in known or not isinstance(v, int | float) or not 0 <= v < math.inf
        }:
            raise ValueError(f"{variant}: {wrong} is none of {', '.join(known)} with a number")
    if model.median.keys() != model.worst.keys() or model.low.keys() != model.high.keys():
        raise ValueError(f"{variant}: median and worst, or low and high, are of other names")
