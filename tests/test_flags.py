"""vLLM's flags are read as vLLM reads them: held against its own parser."""

import contextlib
import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fp8lab.config.dimensions import FP8, fp8_kv, memory_share, most_running, weight_format
from fp8lab.config.flags import ALIASES, flag_of, joined, parse, problem
from fp8lab.config.profile_file import profile_names, read_profile
from fp8lab.server import log
from fp8lab.server.command import build_command


@pytest.fixture(scope="module")
def vllm():
    """vLLM's own parser of a server's command line."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def read(parser, words) -> dict | None:
    """What vLLM makes of `words`, as text that can be compared; None when it refuses them."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return {name: repr(value) for name, value in vars(parser.parse_args(list(words))).items()}
        except SystemExit:
            return None


# Every flag in the ways that it may be written; each entry is one flag, as words. (Keys of one flag under two of its names
# vLLM does not add up within a command; a command is made with whole names, so that it does.)
SEQS = [["--max-num-seqs", "256"], ["--max-num-seqs=512"], ["--max_num_seqs", "64"], ["--max-num-se", "8"]]
SHARE = [["--gpu-memory-utilization", "0.5"], ["--gpu_memory_utilization=0.9"], ["--device-memory-utilization", "0.7"]]
QUANTIZATION = [["--quantization", "fp8"], ["-q", "fp8"], ["-q=fp8_per_block"], ["-qfp8"], ["--quantization=awq"]]
KV = [["--kv-cache-dtype", "fp8"], ["--kv_cache_dtype=fp8_e4m3"], ["--kv-cache-dtype", "auto"]]
TOKENS = [["--max-num-batched-tokens", "8k"], ["--max-num-batched-tokens=4096"], ["--max-num-batched-t", "2048"]]
DTYPE = [["--dtype", "bfloat16"], ["--dtype=float32"]]
OTHERS = [
    ["--enforce-eager"], ["--no-enforce-eager"], ["--enable-prefix-caching"], ["--no-enable-prefix-caching"],
    ["--cudagraph-capture-sizes", "1", "2", "4"], ["--cudagraph-capture-sizes", "8"], ["-tp", "2"],
    ["--tensor-parallel-size=1"], ["-O3"], ["-O", "2"], ["-O=1"], ["--middleware", "a.B"], ["--middleware", "c.D"],
    ["--attention-config", '{"flash_attn_version": 3}'], ["-ac.flash_attn_version", "2"],
    ["-ac.flash_attn_max_num_splits_for_cuda_graph=4"], ["--max-model-len", "-1"], ["--max-model-len=4K"],
    ["--compilation-config.pass_config.fuse_norm_quant", "true"], ["--compilation-config.pass_config.fuse_act_quant=false"],
    ["--compilation-config.custom_ops+", "+quant_fp8"], ["--compilation-config.custom_ops+=+rms_norm"], ["--chat-template", "-- a b"],
    ["--api-server-count", "4"], ["-asc=2"], ["--stream-interval", "2"], ["-n1"], ["-ep"],
]  # fmt: skip
FLAG = st.sampled_from([*SEQS, *SHARE, *QUANTIZATION, *KV, *TOKENS, *DTYPE, *OTHERS])


def words(flags) -> list[str]:
    return [word for flag in flags for word in flag]


def one_list(flags) -> list[str]:
    """As many of `flags`, in order, as a profile's list may hold."""
    kept: list[list[str]] = []
    for flag in flags:
        if problem(words([*kept, flag]), {}) is None:
            kept.append(flag)
    return words(kept)


LIST = st.lists(FLAG, max_size=7).map(one_list)


def dest(flag) -> str:
    return flag.name[2:].replace("-", "_")


@settings(deadline=None, max_examples=300)
@given(LIST, LIST)
@example(["--max-num-seqs", "1024"], ["--max-num-seqs", "256"])
@example(["-ac.flash_attn_version", "2"], ["--attention-config", '{"flash_attn_version": 3}'])
@example(["-ac.flash_attn_version", "2"], ["--attention-config.flash_attn_version=3"])
@example(["--middleware", "a.B"], ["--middleware", "c.D"])
@example(["--enable-prefix-caching"], ["--no-enable-prefix-caching"])
def test_a_command_means_to_vllm_what_its_lists_mean_the_variants_last(vllm, shared, own):
    command = joined(shared, own)
    meant = read(vllm, command)
    assert meant is not None
    alone, before = read(vllm, own), read(vllm, shared)
    default = read(vllm, [])
    added = {dest(flag) for flag in parse([*shared, *own]) if flag.key or flag.name == "--middleware"}
    for name, value in alone.items():
        if value == default[name] and name not in map(dest, parse(own)):
            assert meant[name] == before[name], name
        elif name not in added:
            assert meant[name] == value, name


@settings(deadline=None, max_examples=300)
@given(LIST, LIST)
def test_what_is_read_from_a_command_is_what_vllm_takes(vllm, first, then):
    """Also of a recorded command, in which a flag may stand twice."""
    for command in (joined(first, then), [*first, *then]):
        taken = vllm.parse_args(command)
        assert most_running(command) == taken.max_num_seqs
        given = [flag for flag in parse(command) if flag.name == "--gpu-memory-utilization"]
        assert memory_share(command) == (taken.gpu_memory_utilization if given else None)
        assert flag_of(command, "--quantization") == (taken.quantization or "auto")
        assert flag_of(command, "--kv-cache-dtype") == taken.kv_cache_dtype
        assert flag_of(command, "--dtype") == taken.dtype
        assert (weight_format(command) is FP8, fp8_kv(command)) == (
            "fp8" in (taken.quantization or ""), taken.kv_cache_dtype.startswith("fp8"),
        )  # fmt: skip
        batched = [flag.values for flag in parse(command) if flag.name == "--max-num-batched-tokens"]
        last = read(vllm, ["--max-num-batched-tokens", *batched[-1]] if batched else [])
        assert last["max_num_batched_tokens"] == repr(taken.max_num_batched_tokens)


def test_a_flag_that_vllm_does_not_know_has_its_remedy(vllm, capsys):
    """What vLLM says of it, as a failed start finds it in the log."""
    with pytest.raises(SystemExit) as ended:
        vllm.parse_args(["--model", "m", "--dtype", "bfloat16", "--no-such-flag"])
    telling, remedy = log.root_cause(capsys.readouterr().err)
    assert ended.value.code == 2 and "unrecognized arguments: --no-such-flag" in telling[0]
    assert remedy == "this vLLM version does not know that flag"


def test_every_other_name_of_a_flag_is_vllms(vllm):
    for action in vllm._actions:
        whole = [name for name in action.option_strings if not name.startswith("--no-")]
        for name in whole:
            # What is asked for by its beginning must not be another flag.
            assert parse([name])[0].name in (action.option_strings or ["-h"]), name
        assert len({parse([name])[0].name for name in whole if name != "-h"}) <= 1, whole
    known = {name for action in vllm._actions for name in action.option_strings}
    assert set(ALIASES.values()) <= known and set(ALIASES) - {"-O"} <= known


@pytest.mark.parametrize("name", profile_names())
def test_every_command_of_the_house_is_one_that_vllm_reads(vllm, name):
    profile = read_profile(name)
    for variant in profile.variants if profile.model.weights == "random" else ():
        command = build_command(profile, variant, served_name="x", port=8000)
        known = [word for word in command[command.index("--model") :] if word != "-m"]
        taken = vllm.parse_args(known)
        assert (taken.max_num_seqs, taken.host, taken.port) == (most_running(command), "127.0.0.1", 8000)


@pytest.mark.parametrize("flags, said", [
    (["--max-num-seqs", "1", "--max_num_seqs=2"], "--max-num-seqs is given twice"),
    (["-q", "fp8", "--quantization", "fp8"], "--quantization is given twice"),
    (["-tp", "2", "--tensor-parallel-size", "1"], "--tensor-parallel-size is given twice"),
    (["--enable-prefix-caching", "--no-enable-prefix-caching"], "--enable-prefix-caching is given twice"),
    (["-ac.a", "1", "--attention-config.a=2"], "--attention-config.a is given twice"),
    (["-ac", "{}", "-ac.a", "1"], "--attention-config.a is given twice"),
    (["--port=1"], "--port is not the profile's to set: mine; leave it out"),
    (["--dtype bfloat16"], 'write them as two: ["--dtype", "..."]'),
    (["bfloat16"], "does not begin with a flag"),
    (["--middleware", "a", "--middleware", "b", "-cc.x+", "1", "-cc.x+", "2", "-cc.y", "3"], None),
    (["--max-model-len", "-1", "--max-num-seqs", "2"], None),
    ([], None),
])  # fmt: skip
def test_a_list_that_cannot_mean_what_it_says_is_refused(flags, said):
    found = problem(flags, {"--port": "mine"})
    assert found is None if said is None else said in found
