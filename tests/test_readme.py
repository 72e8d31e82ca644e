"""The README is true: its tables come from the recorded runs, its commands and files exist."""

import dataclasses
import math
import re
import shlex
from statistics import fmean, geometric_mean, median

import numpy as np
import pytest

import fp8lab as lab
from conftest import recorded, whole_run_mhz
from fp8lab import cli
from fp8lab.experiment.anatomy import anatomies, floors_of
from fp8lab.experiment.predict import PYTHON_US, highest_rate, step_models
from fp8lab.experiment.quality import comparisons
from fp8lab.experiment.step_fit import replay
from fp8lab.metrics.anatomy import ATTENTION, LAYERS, NORMS, QUANTISATION
from fp8lab.metrics.bottleneck import backlog_growth
from fp8lab.metrics.quality import distinguishable
from fp8lab.metrics.slo import SLO, attains
from fp8lab.metrics.statistics import ratio
from fp8lab.paths import PROJECT
from fp8lab.report.anatomy import host_adds
from fp8lab.report.claims import claims_across, judge
from fp8lab.report.comparison import causes, mean_of
from fp8lab.results.evidence import evidence
from fp8lab.results.run_folder import open_run
from fp8lab.ui import four_digits

NAMES = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "data/README.md", "lib/README.md", "notebooks/README.md")
TEXTS = {name: (PROJECT / name).read_text() for name in NAMES}
README, CHINESE, CONTRIBUTING, DATA_README, LIB_README, NOTEBOOKS_README = TEXTS.values()
VERDICTS = {"not reproduced": "未能复现", "undecided": "无法判定"}


RECORDED = ("h100-80gb", "h200-80gb")
UNSEALED = ("unsealed", "azure-conv", "azure-code")
GOAL = SLO("both", 200, 50)


def test_the_claims_table_is_that_of_the_recorded_runs():
    block = re.search(r"<!-- claims h100-80gb h200-80gb -->\n(.*?)\n<!-- end -->", DATA_README, re.DOTALL)[1]
    assert block.strip() == claims_across(*(recorded(name) for name in RECORDED)).to_markdown()


def test_what_the_claims_table_leaves_open_other_runs_judge():
    judged = {
        name: {one.id: one.verdict for one in judge(recorded(name))}
        for name in ("h100-80gb-recipes", "h200-80gb-recipes")
    }
    for each in judged.values():
        assert [each[id] for id in ("B3", "B4", "R4")] == ["not reproduced", "not reproduced", "undecided"]
    assert {one.id: one.verdict for one in judge(recorded("h200-80gb-x2-8b"))}["R5"] == "undecided"
    assert "B3 and B4 are not reproduced and R4 is undecided in `h100-80gb-recipes`" in " ".join(DATA_README.split())


def busy_in_large_steps(seen, level_id: str) -> float:
    """The share of time with a kernel running while more than 512 requests decode and none waits for its prefill."""
    telemetry = seen.level(level_id).telemetry
    running, waiting = telemetry["running"].ffill(), telemetry["waiting"].ffill()
    # From 3 s on the burst is in; a batch that is still at its cap may hold prefills.
    return telemetry["gpu_util"][(telemetry["at_s"] > 3) & (waiting == 0) & (running > 512) & (running < 1000)].mean()


def read_in_steady_state(seen, level_id: str) -> float:
    """The share of a level's prompt tokens that the server read in the steady window, by its own counter."""
    s, telemetry = seen.summaries[level_id], seen.level(level_id).telemetry.dropna(subset=["prompt_tokens"])
    begin, end = np.interp([s.steady_begin_s, s.steady_end_s], telemetry["at_s"], telemetry["prompt_tokens"])
    return (end - begin) / s.prompt_tokens


def held_back(seen, suffix: str, seeds: int) -> list[str]:
    """What the power limit leaves of the clocks in a burst: the variants' mean MHz, BF16's power, and the clocks' ratio."""
    held = {
        variant: [seen.summaries[f"{variant}{suffix}-infrps-r{seed}"] for seed in range(1, seeds + 1)]
        for variant in ("fp8", "bf16")
    }
    mhz = {variant: fmean(s.gpu_sm_mhz_steady for s in levels) for variant, levels in held.items()}
    whole = {variant: fmean(whole_run_mhz(seen, s.level.id) for s in levels) for variant, levels in held.items()}
    for s in held["bf16"]:
        assert s.gpu_power_w_steady > 0.98 * 700 and s.power_limited_steady in (None, 1.0)  # "in all samples"
    ratios = [f"{one['fp8'] / one['bf16']:.2f}×" for one in (mhz, whole)]
    words = {
        "h100-80gb": "its clock is {} as fast, over the whole run {}.",
        "h100-80gb-starts": "with a clock {1} as fast (`h100-80gb-starts`). In the steady state, where FP8 reads no prompt any more, its clock is {0} as",
        "h100-80gb-long-prompts": "in the steady state ({}), where BF16 stands at 694 of 700 W, and {} as fast over the whole run",
        "h100-80gb-unsealed": "at a clock {1} as fast ({0} in the steady state), with BF16 at its power limit",
    }
    return [f"{mhz['bf16']:,.0f}", words[seen.run.path.name].format(*ratios)]


def headline_numbers() -> list[str]:
    """The numbers that the READMEs' prose rests on, as it writes them."""
    h100, seen, long_prompts, starts = (
        evidence(recorded(name)) for name in (*RECORDED, "h100-80gb-long-prompts", "h100-80gb-starts")
    )
    metric, joules = "output_token_throughput", "joules_per_output_token"
    ratios = [
        ratio(one.seeds("bf16", 100, metric), one.seeds("bf16", 50, metric)) for one in (h100, seen)
    ]  # the load alone
    ratios += [one.compare("fp8", "bf16", 50, name) for one in (h100, seen) for name in (metric, joules)]
    ratios += [long_prompts.compare("fp8", "bf16", math.inf, name) for name in (metric, joules)]
    ratios += [h100.compare("fp8-rust-graphs", "bf16-rust-graphs", math.inf, name) for name in (metric, joules)]
    own_starts = [starts.compare("fp8-rust-graphs", "bf16-rust-graphs", math.inf, name) for name in (metric, joules)]
    assert all(one.starts == one.pairs == 2 for one in own_starts)  # "two for FP8"
    ratios += own_starts
    ratios.append(h100.compare("fp8-rust", "bf16-rust", math.inf, metric))
    ratios.append(seen.compare("fp8-rust", "bf16-rust", math.inf, metric))
    behind_rust = {c.effect: c.ratio for c in seen.ablation(metric) if c.setup == "Rust"}
    ratios += [behind_rust["FP8 weights"], behind_rust["FP8 KV cache"]]
    halves = {c.effect: c.ratio for c in seen.ablation(joules) if c.rate == 50}
    long_halves = {c.effect: c.ratio for c in long_prompts.ablation(metric)}
    halved = [half[name] for half in (halves, long_halves) for name in ("FP8 weights", "FP8 KV cache")]
    told = [f"{one.value:.2f}×" for one in (*ratios, *halved)]
    told += [f"{one.low:.2f} to {one.high:.2f}" for one in ratios]
    told += held_back(h100, "-rust-graphs", 3) + held_back(starts, "-rust-graphs", 2) + held_back(long_prompts, "", 3)
    apart, alone = [], []
    for folder in (PROJECT / "data" / "recorded").iterdir():
        for level, s in open_run(source=folder.name).summaries().items():
            if s.meters_apart is not None:
                (alone if "-0.5rps-" in level else apart).append(abs(s.meters_apart))
    told.append(
        f"is within {100 * max(apart):.1f} % of it in every level, and within {100 * max(alone):.1f} % where requests"
    )
    for one in (h100, seen):
        assert not one.compare("fp8", "bf16", 100, metric).shown  # "no difference"
        fp8 = [s for level, s in one.summaries.items() if level.startswith("fp8-100rps")]
        assert len(fp8) == 3 and all(s.frontend_cpu_max_steady >= 0.95 for s in fp8)  # "at a whole core"
        told.append(four_digits(geometric_mean(s.request_throughput for s in fp8)))
        costs = [
            round(s.frontend_us_per_token) for level, s in one.summaries.items() if re.match("(bf16|fp8)-100rps", level)
        ]
        told.append(f"{min(costs)} to {max(costs)} µs")
    rust = [
        round(s.frontend_us_per_token)
        for one in (h100, seen)
        for level, s in one.summaries.items()
        if "-rust-" in level
    ]
    told.append(f"{min(rust)} to {max(rust)} µs")
    odd = [round(seen.summaries[f"fp8-100rps-r{seed}"].frontend_us_per_token) for seed in (3, 1, 2)]
    told += [f"{odd[0]} µs", f"{odd[1]}", f"{odd[2]}"]
    published = [s for one in (h100, seen) for s in one.summaries.values() if s.level.rate <= 100 and s.level.variant in (
        "bf16", "bf16-api4", "bf16-rust")]  # fmt: skip
    told.append(
        f"at the published rates BF16's was at most {100 * max(s.kv_cache_usage_max for s in published):.0f} % full"
    )
    fullest = h100.kv_room() + seen.kv_room()
    for names in (("bf16", "bf16-api4", "bf16-rust"), ("fp8", "fp8-api4", "fp8-rust")):
        told.append(f"{max(row[4] for row in fullest if row[0] in names):.0%}".replace("%", " %"))
    preempted = {s.level.variant: s.preemptions for s in long_prompts.summaries.values()}
    assert preempted == {"bf16": 40, "fp8": 0, "fp8-weights": 44, "fp8-kv": 0}
    assert max(row[3] for row in long_prompts.kv_room()) == 300
    busy = [round(100 * h100.summaries[f"bf16-rust-graphs-infrps-r{n}"].gpu_util_steady) for n in (1, 2, 3)]
    told.append(f"{min(busy)} to {max(busy)} %")
    for variant in ("fp8-rust", "fp8-rust-graphs"):
        busy = [round(100 * busy_in_large_steps(h100, f"{variant}-infrps-r{seed}")) for seed in (1, 2, 3)]
        told.append(f"{min(busy)} to {max(busy)} %")
    engine = [h100.summaries[f"fp8-rust-graphs-infrps-r{seed}"].engine_cpu_max_steady for seed in (1, 2, 3)]
    told.append(f"{min(engine):.2f} to {max(engine):.2f}")
    engine = [
        s.engine_cpu_max_steady for level, s in seen.summaries.items() if re.match("fp8(-weights)?-rust-inf", level)
    ]
    told += [f"{min(engine):.2f}", f"{max(engine):.2f}"]
    service_line = SLO("as recommended", 120, math.inf)
    outside = {
        variant: attains(seen.level(f"{variant}-60rps-r1").records, service_line)
        for variant in ("fp8", "fp8-rust", "bf16", "bf16-rust")
    }
    assert [one.state for one in outside.values()] == ["missed", "missed", "missed", "met"]
    assert outside["bf16-rust"].violations == 0  # "none"
    told += [f"{outside[variant].violations:,}" for variant in ("fp8", "fp8-rust", "bf16")]
    for one in (h100, seen):
        steady = one.compare("fp8", "bf16", 50, "steady_output_token_throughput")
        assert not steady.shown
        told.append(f"{steady.value:.2f}×")
    completed = {level: s.request_throughput for level, s in seen.summaries.items()}
    told += [f"{completed[f'fp8-{front}-100rps-r1']:.1f}" for front in ("api4", "rust")]
    burst = [completed[level] for level in completed if re.match("fp8-(rust|api4)-inf", level)]
    most = [s.running_max for level, s in seen.summaries.items() if "-inf" in level]
    assert min(most) > 1000 and max(most) <= 1024  # "capped by --max-num-seqs 1024"
    return [*told, f"{min(burst):.0f} to {max(burst):.0f}", *rust_numbers(), *unsealed_numbers()]


def rust_numbers() -> list[str]:
    """What `h100-80gb-rust` says of the recommendations R1 and R2, on one H100."""
    seen, metric, outside = evidence(recorded("h100-80gb-rust")), "output_token_throughput", {}
    for variant in ("fp8", "bf16", "fp8-rust", "bf16-rust"):
        held = attains(seen.level(f"{variant}-60rps-r1").records, SLO("as recommended", 120, math.inf))
        outside[variant] = held.violations
        assert held.state == "missed" and held.requests == 2000
    assert seen.limit("fp8-60rps-r1").cause == "API server"
    verdicts = {one.id: one for one in judge(seen.run)}
    assert (verdicts["R1"].verdict, verdicts["R2"].verdict) == ("not reproduced", "reproduced")
    halves = {one.effect: one.ratio for one in seen.ablation(metric)}
    ratios = [halves["FP8 weights"], halves["FP8 KV cache"], seen.compare("fp8-rust", "bf16-rust", math.inf, metric)]
    joules = seen.compare("fp8-rust", "bf16-rust", math.inf, "joules_per_output_token")
    engine = [s.engine_cpu_max_steady for level, s in seen.summaries.items() if "-inf" in level and "weights" in level]
    both = [s.engine_cpu_max_steady for level, s in seen.summaries.items() if level.startswith("fp8-rust-inf")]
    assert min(engine + both) > 0.98  # "at a whole core"
    return [
        f"as recommended {outside['fp8']:,} are outside, with 99 % within {verdicts['R1'].measured:,.0f} ms, as its API server is full; "
        f"in BF16 {outside['bf16']:,}; behind the Rust one {outside['fp8-rust']:,} in FP8 and {outside['bf16-rust']:,} in BF16",
        "FP8 weights give {}, the FP8 KV cache {}, both {} for {} the joules".format(*map(str, ratios), f"{joules.value:.2f}×"),
    ]  # fmt: skip


def unsealed_numbers() -> list[str]:
    """Those of the card with nothing in its way, and of a step taken apart."""
    metrics = "output_token_throughput", "steady_output_token_throughput"
    seen, both, first, conv, code, short = (
        evidence(recorded(f"h100-80gb{name}"))
        for name in ("-unseal", "-unsealed", "", "-azure-conv", "-azure-code", "-128-128")
    )
    told, limits = [], ["API server", "EngineCore", "GPU", "GPU", "GPU", "GPU"]
    steps = ("fp8", "fp8-rust", "fp8-rust-graphs", "fp8-mp", "fp8-mixed-graphs", "fp8-unsealed")
    for variant, limit in zip(steps, limits, strict=True):
        assert {limit in seen.limit(level).cause for level in seen.levels((variant,), math.inf)} == {True}
        told.append(" | ".join(f"{mean_of(seen, variant, metric):,.0f}" for metric in metrics) + f" | the {limit} |")
    ratios = [seen.compare("fp8-unsealed", "fp8", math.inf, metric) for metric in metrics]
    names = (metrics[0], "joules_per_output_token")
    ratios += [
        both.compare("fp8-unsealed", "bf16-unsealed", rate, name) for rate in (math.inf, 100, 50) for name in names
    ]
    told += [f"{one.value:.2f}× ({one.low:.2f} to {one.high:.2f})" for one in ratios]
    others = [evidence(recorded(f"h100-80gb-{name}")) for name in ("what-else", "attention")]
    last = sorted(mean_of(one, "fp8-unsealed", metrics[0]) for one in (both, seen, *others))
    told.append("The last row gives {:,.0f}, {:,.0f}, {:,.0f} and {:,.0f} in four runs.".format(*last))
    there = [evidence(recorded(f"h200-80gb{name}")) for name in ("", "-versions", "-x2-8b")]
    ends = [mean_of(there[0], "fp8", metrics[0])]
    ends += [mean_of(one, "fp8-unsealed", metric) for metric in metrics for one in there[1:]]
    told.append(
        "the first gives {:,.0f} (one seed) and the last {:,.0f} and {:,.0f}, in the steady state {:,.0f} and {:,.0f}.".format(
            *ends
        )
    )
    assert {both.limit(level).cause for level in both.levels(("bf16-unsealed",), math.inf)} == {"GPU power limit"}
    told += held_back(both, "-unsealed", 3)[1:]
    named = ("request_throughput", "mean_tpot_ms")
    at100 = [geometric_mean(both.seeds("fp8-unsealed", 100, name).values()) for name in named]
    told.append("completes {:.1f} req/s at a mean TPOT of {:.2f} ms, limited by the GPU".format(*at100))
    assert all(both.limit(level).cause.startswith("GPU") for level in both.levels(("fp8-unsealed",), 100))
    assert not both.compare("fp8-unsealed", "bf16-unsealed", 50, metrics[1]).shown  # "shows no difference"
    at60 = [both.summaries[f"{base}-unsealed-60rps-r1"].p99_ttft_ms for base in ("fp8", "bf16")]
    told.append("within {:.0f} ms in FP8 and {:.0f} in BF16. On".format(*at60))
    for one, words in (
        (seen, "{:,.0f} tokens/s here, where its one Python API server needs {} µs"),
        (first, "{:,.0f} in `h100-80gb` ({} µs)"),
    ):
        costs = sorted({round(s.frontend_us_per_token) for s in one.levels(("fp8",), math.inf).values()})
        told.append(
            words.format(mean_of(one, "fp8", metrics[0]), " to ".join(map(str, costs[:: max(1, len(costs) - 1)])))
        )
    for one, words in ((conv, "{:.2f}× for {:.2f}× the joules in"), (code, "{:.2f}× for {:.2f}× in")):
        worth = [one.compare("fp8-unsealed", "bf16-unsealed", math.inf, name).value for name in names]
        told.append(words.format(*worth))
    assert conv.limit("bf16-unsealed-infrps-r1").cause == "KV capacity"
    fp8, bf16 = (conv.summaries[f"{base}-unsealed-16rps-r1"] for base in ("fp8", "bf16"))
    told.append(
        f"within {fp8.p99_ttft_ms:.0f} ms in FP8 and {bf16.p99_ttft_ms:.0f} in BF16, and a TPOT within "
        f"{fp8.p99_tpot_ms:.1f} and {bf16.p99_tpot_ms:.1f} ms"
    )
    at90 = [f"fp8-unsealed-90rps-r{seed}" for seed in (1, 2, 3)]
    assert [attains(seen.level(level).records, GOAL).state for level in at90] == ["missed", "missed", "undecided"]
    for text, values in (
        ("within {:.0f} to {:.0f} ms", [seen.summaries[level].p99_ttft_ms for level in at90]),
        ("a TPOT within {:.1f} to {:.1f}, but", [seen.summaries[level].p99_tpot_ms for level in at90]),
        ("grew by {:.0f} to {:.0f} % of the rate", [100 * backlog_growth(seen.level(level).records) for level in at90]),
    ):
        told.append(text.format(min(values), max(values)))
    fp8, bf16 = (both.slo_limit(f"{base}-unsealed", GOAL) for base in ("fp8", "bf16"))
    told += [
        f"FP8 meets it at {fp8.low:g} req/s and misses it at {fp8.high:g}, BF16 meets it at {bf16.low:g} and is not shown to"
    ]
    told += [f"meet it at {bf16.high:g};"]
    assert set(causes(short, "fp8-unsealed", math.inf)) == {"GPU power limit"}
    told.append(
        "delivers {:,.0f} tokens/s over the whole run and {:,.0f} in the steady state".format(
            *(mean_of(short, "fp8-unsealed", metric) for metric in metrics)
        )
    )
    prompts = [read_in_steady_state(seen, f"{variant}-infrps-r1") for variant in steps]
    assert prompts[-1] < 0.005 and all(0.25 < share < 0.4 for share in prompts[:-1])  # "no prompt", "a third of them"
    run = both.run
    bf16, fp8 = (anatomies(run)[variant][-1] for variant in ("bf16", "fp8"))
    reached = [
        floors_of(run, v, one.decode.work)["attention"] / one.decode.times["attention"]
        for v, one in (("fp8", fp8), ("bf16", bf16))
    ]
    told += [
        f"takes {fp8.wall_ms:.1f} ms, of which the GPU works for {fp8.decode.busy_ms:.1f}:",
        f"The host adds at most {float(host_adds(fp8).removeprefix('≤ ')):.1f} ms",
    ]
    last = anatomies(run)["fp8-unsealed"][-1]
    told.append(
        f"it adds {float(host_adds(last)):.1f} ms to {last.decode.busy_ms:.1f} of the GPU, so that a step takes {last.wall_ms:.1f}."
    )
    told += [
        f"{fp8.decode.times['attention']:.1f} on attention, at {100 * reached[0]:.0f} % of",
        f"reaches {100 * reached[1]:.0f} %",
    ]
    told += [
        f"{fp8.decode.times[LAYERS]:.1f} on the layers'",
        f"{fp8.decode.times['quantisation']:.1f} on quantising",
    ]
    b1, b2 = (one for one in judge(run) if one.id in ("B1", "B2"))
    assert b1.verdict == b2.verdict == "not reproduced"
    each = [re.findall(r"([\d.]+)×", part) for part in b2.reason.split(";")]
    told += [f"{min(each[1])} to {max(each[1])} times as fast", f"{min(each[3])} to {max(each[3])} times (B2)"]
    return [
        *told,
        f"need {b1.measured:.0f} % of the matrix peak",
        *recipe_numbers(),
        *what_else_numbers(),
        *attention_numbers(),
        *card_numbers(),
    ]


def recipe_numbers() -> list[str]:
    """Those of the number formats side by side."""
    seen = evidence(recorded("h200-80gb-recipes"))
    tokens, joules, tpot = "output_token_throughput", "joules_per_output_token", "mean_tpot_ms"
    took = {row[0]: row[3] for row in lab.checkpoints_table(seen.run).rows}
    told = [f"| `bf16` | {took['bf16']} | {mean_of(seen, 'bf16', tokens):,.0f} tokens/s | {mean_of(seen, 'bf16', joules):.4f} J | "
            f"{mean_of(seen, 'bf16', tpot, 0.5):.2f} ms | {mean_of(seen, 'bf16', tpot, 25):.2f} ms |"]  # fmt: skip
    for variant in took.keys() - {"bf16"}:
        worth, cost = (seen.compare(variant, "bf16", math.inf, metric) for metric in (tokens, joules))
        assert worth.starts == worth.pairs == 3
        alone, at25 = (mean_of(seen, variant, tpot, rate) for rate in (0.5, 25))
        told.append(f"| `{variant}` | {took[variant]} | {worth} | {cost} | {alone:.2f} | {at25:.2f} |")
    found = {one.id: one for one in judge(seen.run)}
    assert (found["B4"].verdict, found["R4"].verdict) == ("not reproduced", "undecided")
    fewer = [seen.compare("int8", f"fp8-{form}", math.inf, joules) for form in ("channel", "static", "online")]
    assert fewer[0].high < 1 and fewer[1].high < 1 <= fewer[2].high
    less = sorted(100 * (1 - one.value) for one in fewer[:2])
    told.append(f"for {less[0]:.0f} to {less[1]:.0f} % fewer joules than FP8 from a checkpoint")
    assert (
        min(seen.compare("int8", f"fp8-{form}", math.inf, tokens).high for form in ("channel", "static", "online")) >= 1
    )
    told.append(f"what it says holds, {seen.compare('int4', 'fp8-kv', math.inf, tokens)}.")
    told.append(f"the same KV cache is {seen.compare('int8', 'fp8-kv', math.inf, tokens)};")
    (static, first), (channel, last) = re.findall(
        r"fp8-\w+ in [\d.]+ s, (.*?×.*?\)), of a start of (\d+)", found["R4"].reason
    )
    told.append(f"loads in {static} of the time with one scale a tensor and in {channel} by channel, about a second of a start of "
                f"{first} to {last}.")  # fmt: skip
    card = evidence(recorded("h100-80gb-recipes"))
    took = {row[0]: row[3] for row in lab.checkpoints_table(card.run).rows}
    assert len(took) == 12  # "twelve number formats"
    rates = ((0.5, 2), (25, 2), (100, 1))
    for variant, gib in took.items():
        each = [f"{mean_of(card, variant, tpot, rate):.{digits}f}" for rate, digits in rates]
        worth, cost = (card.compare(variant, "bf16", math.inf, metric) for metric in (tokens, joules))
        if variant == "bf16":
            worth, cost = (f"{mean_of(card, variant, tokens):,.0f} tokens/s", f"{mean_of(card, variant, joules):.4f} J")
            each = [f"{one} ms" for one in each]
        else:
            assert (worth.starts, worth.pairs) == (1, 3)
        told.append(f"| `{variant}` | {gib} | {worth} | {cost} | {' | '.join(each)} |")
    hosts = [
        card.parts((name,), math.inf)
        for name in ("fp8-online", "int8", "int4", "fp8-head", "w4a8", "int4-awq", "fp8-block")
    ]
    assert hosts == ["1", "1", "2", "3", "3", "4", "5"] and card.parts(("w4a8",), 25) == "4"
    for one in (seen, card):
        assert max(s.peak_concurrent_requests for s in one.summaries.values() if s.level.rate == 0.5) <= 3
    head, static, eight, gptq, awq, int8, int4 = (
        card.compare(*pair.split(), math.inf, tokens)
        for pair in ("fp8-head fp8-channel", "fp8-static fp8-online", "int8 fp8-static", "int4-gptq int4", "int4-awq int4",
                     "int8 fp8-kv", "int4 fp8-kv")
    )  # fmt: skip
    assert not any(one.shown for one in (head, static, eight, gptq, card.compare("w4a8", "int8", math.inf, tokens)))
    at100 = {variant: mean_of(card, variant, tpot, 100) for variant in took}
    assert min(at100, key=at100.get) == "w4a8"
    less = float(took["fp8-channel"]) - float(took["fp8-head"])
    block = [card.summaries[f"fp8-block-infrps-r{seed}"] for seed in (1, 2, 3)]
    assert min(one.heat_limited_steady for one in block) > 0.8 and "DeepGemm" in block[0].server.kernels[0]
    clocks = [mean_of(card, variant, "gpu_sm_mhz_steady") for variant in ("fp8-block", "fp8-static")]
    found = {one.id: one for one in judge(card.run)}
    assert (found["B4"].verdict, found["R4"].verdict) == ("not reproduced", "undecided")
    return [
        *told,
        f"most directly: {head} the tokens/s, no difference shown, for {less:.2f} GiB less. A fixed scale serves {static} of",
        f"serves {card.compare('fp8-block', 'fp8-static', math.inf, tokens)} of what `fp8-static` does, on a card that heat held",
        f"to a clock {100 * (1 - clocks[0] / clocks[1]):.0f} % lower; its first start takes {block[0].server.startup_s:.0f} s,",
        f"INT8 serves {eight} of what `fp8-static` does for {card.compare('int8', 'fp8-static', math.inf, joules)} the joules.",
        f"its weights take {card.summaries['w4a8-infrps-r1'].server.load_s:.0f} s to load.",
        f"are one: {gptq} and {awq} of `int4`'s tokens/s.",
        f"with the same KV cache is {int8}; INT4 is {int4}. R4 is undecided, with one start each.",
    ]


def what_else_numbers() -> list[str]:
    """Those of what is said to help, beside the fastest variant."""
    seen, best = evidence(recorded("h100-80gb-what-else")), "fp8-unsealed"
    tokens, steady, joules = "output_token_throughput", "steady_output_token_throughput", "joules_per_output_token"
    means = {variant: mean_of(seen, variant, tokens) for variant in seen.variants()}
    worth = {variant: seen.compare(variant, best, math.inf, tokens) for variant in means}
    assert worth["fp8-triton"].high < 1 and all(worth[f"fp8-{name}"].low <= 1 for name in ("budget", "kv16"))
    assert set(causes(seen, "fp8-kv16", math.inf)) == {"GPU power limit"}
    slow, fast = (mean_of(seen, variant, "mean_tpot_ms") for variant in ("fp8-budget", best))
    return [
        f"serves {means[best]:,.0f} tokens/s, {mean_of(seen, best, steady):,.0f} in the steady state: twice the batch budget "
        f"{worth['fp8-budget']}, with a TPOT of {slow:.1f} ms in place of {fast:.1f}; Triton's attention {worth['fp8-triton']};",
        f"{means['fp8-kv16']:,.0f} tokens/s, {worth['fp8-kv16']}, for {seen.compare('fp8-kv16', best, math.inf, joules)} the joules",
        f"(`--stream-interval 10`): {means['fp8-intervals']:,.0f} tokens/s",
    ]


def attention_numbers() -> list[str]:
    """Those of another attention kernel, beside the fastest variant."""
    seen, short, beside = (evidence(recorded(f"h100-80gb-{name}")) for name in ("attention", "128-128", "unsealed"))
    tokens, steady, joules = "output_token_throughput", "steady_output_token_throughput", "joules_per_output_token"
    whole, then, cost = (seen.compare("fp8-xqa", "fp8-unsealed", math.inf, m) for m in (tokens, steady, joules))
    assert (whole.starts, whole.pairs) == (1, 3)
    bursts = [f"fp8-xqa-infrps-r{seed}" for seed in (1, 2, 3)]
    assert {seen.limit(level).cause for level in bursts} == {"GPU and EngineCore"}
    heat = [
        seen.summaries[level.replace("fp8-xqa", v)].heat_limited_steady
        for v in ("fp8-xqa", "fp8-unsealed")
        for level in bursts
    ]
    assert max(heat[0], heat[3]) == 0 and min(*heat[1:3], *heat[4:]) > 0.7
    assert max(short.summaries[f"fp8-xqa-infrps-r{seed}"].heat_limited_steady for seed in (1, 2)) > 0.9
    idle = [100 * (1 - seen.summaries[level].gpu_util_steady) for level in bursts]
    step = anatomies(seen.run)["fp8-xqa"][-1]
    reached = floors_of(seen.run, "fp8-xqa", step.decode.work)["attention"] / step.decode.times["attention"]
    host = lab.host_table(seen.run)
    waits = dict(zip(host.columns, host.rows[-1], strict=True))["wait for the model"].rstrip("%")
    rates = [seen.summaries[f"fp8-xqa-{rate}rps-r1"] for rate in (100, 90)]
    states = [attains(seen.level(one.level.id).records, GOAL).state for one in rates]
    assert states == ["met", "missed"] and rates[1].heat_limited_steady > 0.5
    grew = 100 * backlog_growth(seen.level(rates[1].level.id).records)
    return [
        f"{mean_of(seen, 'fp8-xqa', tokens):,.0f} tokens/s where `fp8-unsealed` beside it serves "
        f"{mean_of(seen, 'fp8-unsealed', tokens):,.0f}, {whole}, and {mean_of(seen, 'fp8-xqa', steady):,.0f} in the steady state, "
        f"{then}, for {cost} the joules.",
        f"attention takes {step.decode.times['attention']:.1f} ms, at {100 * reached:.0f} % of the memory's bandwidth, and a step "
        f"{step.wall_ms:.1f}.",
        f"no kernel running {min(idle):.0f} to {max(idle):.0f} % of the time",
        f"the host adds {step.wall_ms - step.decode.busy_ms:.2f} ms, and the EngineCore waits for the model {waits} % of its time.",
        f"{mean_of(seen, 'bf16-xqa', tokens):,.0f} tokens/s with that kernel (two seeds), "
        f"{mean_of(beside, 'bf16-unsealed', tokens):,.0f} with its own on another card",
        "`fp8-xqa` gives {:,.0f} and {:,.0f} there".format(
            *(mean_of(short, "fp8-xqa", metric) for metric in (tokens, steady))
        ),
        f"first token within {rates[0].p99_ttft_ms:.0f} ms and a TPOT within {rates[0].p99_tpot_ms:.1f}, and no backlog grows",
        f"within {rates[1].p99_ttft_ms:.0f} and {rates[1].p99_tpot_ms:.1f}, the backlog grew by {grew:.1f} % of the rate",
    ]


def card_numbers() -> list[str]:
    """Those of one card and two, and of whose weights take how many joules."""
    seen, formats = (evidence(recorded(f"h200-80gb-{name}")) for name in ("x2-8b", "recipes"))
    tokens, steady, joules = "output_token_throughput", "steady_output_token_throughput", "joules_per_output_token"
    own = [mean_of(seen, "fp8-unsealed", m) / mean_of(formats, "fp8-online", m) for m in (joules, steady, tokens)]
    told = [
        f"take {own[0]:.2f} of the joules",
        f"for {own[1]:.2f} times the tokens/s",
        f"and {own[2]:.2f} of the whole run, on one host.",
    ]
    random, drawn = (evidence(recorded(f"h100-80gb-{name}")) for name in ("unsealed", "recipes"))
    each = [
        f"{mean_of(random, theirs, m) / mean_of(drawn, ours, m):.2f}"
        for theirs, ours in (("fp8-unsealed", "fp8-online"), ("bf16-unsealed", "bf16"))
        for m in (joules, tokens)
    ]
    told.append("it is {} for {} times the tokens/s of the whole run in FP8, {} for {} in BF16.".format(*each))
    worth, cost = (drawn.compare("fp8-online", "bf16", math.inf, m) for m in (tokens, joules))
    told.append(f"it is {worth} for {cost} the joules. At 100 req/s")
    read = {v: read_in_steady_state(seen, f"{v}-infrps-r1") for v in ("fp8-unsealed", "fp8-dp2", "fp8-tp2")}
    assert max(read["fp8-unsealed"], read["fp8-dp2"]) < 0.02 and 0.3 < read["fp8-tp2"] < 0.36  # "a third", "none"
    for variant in ("fp8-dp2", "fp8-tp2"):
        worth, cost, then = (seen.compare(variant, "fp8-unsealed", math.inf, m) for m in (tokens, joules, steady))
        told += [f"{worth}", f"{then} in the steady state"]
        told += (
            [f"{worth} the tokens/s of one for {cost} the joules"] if variant == "fp8-dp2" else [f"{worth} for {cost},"]
        )
    met = {variant: seen.slo_limit(variant, GOAL) for variant in ("fp8-unsealed", "fp8-dp2", "fp8-tp2")}
    assert {one.high for one in met.values()} == {math.inf}
    one, copies, shared = (f"{limit.low:g}" for limit in met.values())
    told.append(
        f"are met at {one} req/s by one card, at {copies} by two copies and at {shared} by two that share layers."
    )
    above = {v: [one for one in seen.attainment(v, GOAL) if one[0] > met[v].low] for v in met}
    assert {one.violations for held in above.values() for _, one in held} == {0}
    told.append("At {:g}, {:g} and {:g} all".format(*(rate for ((rate, _),) in above.values())))
    idle = [1 - s.gpu_util_steady for s in seen.levels(("fp8-tp2",), math.inf).values()]
    assert all("EngineCore" in seen.limit(level).cause for level in seen.levels(("fp8-tp2",), math.inf))
    assert next(one for one in judge(seen.run) if one.id == "R5").verdict == "undecided"
    return [
        *told,
        *half_numbers(),
        *version_numbers(),
        *format_steps(),
        f"end {100 * min(idle):.0f} to {100 * max(idle):.0f} % of the time",
    ]


def format_steps() -> list[str]:
    """Those of a step in four number formats."""
    found = anatomies(recorded("h200-80gb-recipes"))
    full, small = (
        {v: one.decode.times for v, batches in found.items() for one in batches if one.batch == n} for n in (1024, 64)
    )
    layers = {v: times[LAYERS] for v, times in full.items()}
    passes = {v: times.get(QUANTISATION, 0) + times[NORMS] for v, times in full.items()}
    adds = [passes[v] - passes["bf16"] for v in ("fp8-online", "int8")]
    work = {v: one.decode.work for v, batches in found.items() for one in batches if one.batch == 1024}
    read = {v: 1e6 * full[v][ATTENTION] / work[v].decode_context for v in full}  # ns a token of context
    shares = [read[v] / read["bf16"] for v in full if v != "bf16"]
    few = {v: times[LAYERS] for v, times in small.items()}
    return [
        f"take {layers['bf16']:.1f} ms in BF16, {layers['fp8-online']:.1f} in FP8 (online), {layers['int8']:.1f} in INT8 and {layers['int4']:.1f} in INT4",
        f"quantising what goes into them adds {adds[0]:.1f} and {adds[1]:.1f} ms",
        f"takes {min(shares):.2f} to {max(shares):.2f} of the time that BF16's takes for a token of context",
        f"take {few['int4']:.1f} ms, BF16's {few['bf16']:.1f} and FP8's {few['fp8-online']:.1f}",
    ]


def half_numbers() -> list[str]:
    """Those of a model in BF16 on some cards and in FP8 on half of them, and of two such copies."""
    tokens, steady, joules = "output_token_throughput", "steady_output_token_throughput", "joules_per_output_token"
    told = []
    for name, fp8, bf16, cards in (("x2-32b", "fp8", "bf16-tp2", "two"), ("x4-70b", "fp8-tp2", "bf16-tp4", "four")):
        seen = evidence(recorded(f"h200-80gb-{name}"))
        assert {seen.limit(level).cause for level in seen.levels((bf16,), math.inf)} == {"GPU power limit"}
        half, whole = (mean_of(seen, variant, tokens) for variant in (fp8, bf16))
        worth, then, cost = (seen.compare(fp8, bf16, math.inf, metric) for metric in (tokens, steady, joules))
        told.append(
            f"serves {half:,.0f} tokens/s where BF16 on {cards} serves {whole:,.0f}, which is {worth.times(2)} a card over the "
            f"whole run and {then.times(2)} in the steady state, for {cost} the joules"
        )
        for rate in (5, 10):
            assert {seen.limit(level).cause for level in seen.levels(seen.variants(), rate)} == {"offered load"}
            told.append(f"{seen.compare(fp8, bf16, rate, joules).value:.2f}×")
            one, other = (mean_of(seen, variant, "mean_tpot_ms", rate) for variant in (fp8, bf16))
            told.append(f"of {one:.1f} against {other:.1f} ms")
    assert seen.compare("fp8-tp2-dp2", "bf16-tp4", math.inf, tokens) is None
    told.append(
        f"serve {mean_of(seen, 'fp8-tp2-dp2', tokens):,.0f}, {mean_of(seen, 'fp8-tp2-dp2', steady):,.0f} in the steady state, and "
        f"BF16 on four {mean_of(seen, 'bf16-tp4', steady):,.0f} there; BF16 was not sent as many"
    )
    limit, tried = seen.slo_limit("bf16-tp4", GOAL), dict(seen.attainment("bf16-tp4", GOAL))
    missed = tried[limit.high]
    told.append(
        f"are shown to meet at {limit.low:g} req/s and not at {limit.high:g} ({missed.violations} of {missed.requests:,} outside). Of two"
    )
    near, over = [], []
    for rate, one in seen.attainment("fp8-tp2", GOAL):
        assert one.state == "undecided"  # "no rate was measured for long enough"
        if one.at_limit:
            within = one.violations < 0.01 * one.requests
            (near if within else over).append((rate, f"{one.violations} of {one.requests}"))
    for several in (near, over):
        ((first, out), (second, too)) = several
        told.append(f"at {first:g} and {second:g} {out} and {too}")
    quick = [seen.summaries[f"{variant}-5rps-r1"].p99_ttft_ms for variant in ("fp8-tp2", "bf16-tp4")]
    told.append(f"within {quick[0]:.0f} ms on two and {quick[1]:.0f} on four.")
    beside = seen.run.manifest["continued"][0]["machine"]["beside"]
    first = seen.summaries["bf16-tp4-infrps-r1"].output_token_throughput
    control = re.search(r"once more there: ([\d,]+) tok/s", beside)[1]
    return [*told, f"gave {first:,.0f} tokens/s on its host and {control} on that of FP8"]


def version_numbers() -> list[str]:
    """Those of a newer vLLM beside the one of the recorded runs."""
    told = []
    for run, variant in (("h100-80gb-versions", "fp8-online"), ("h200-80gb-versions", "fp8-unsealed")):
        seen, newer = evidence(recorded(run)), f"{variant}-033"
        names = ("output_token_throughput", "steady_output_token_throughput", "joules_per_output_token")
        whole, steady, cost = (seen.compare(newer, variant, math.inf, name) for name in names)
        new, old = (mean_of(seen, one, names[0]) for one in (newer, variant))
        told.append(
            f"{new:,.0f} tokens/s where 0.26.0 serves {old:,.0f}, {whole}, {steady} in the steady state, for {cost}"
        )
        rooms = [seen.summaries[f"{one}-infrps-r1"].server.kv_cache_tokens for one in (newer, variant)]
        told.append(f"KV cache is {100 * (1 - rooms[0] / rooms[1]):.0f} % smaller.")
        if run == "h100-80gb-versions":
            assert (whole.starts, whole.pairs) == (2, 4)
            (new, first), (old, then) = (
                [mean_of(seen, one, name, 25) for name in ("mean_tpot_ms", "mean_ttft_ms")] for one in (newer, variant)
            )
            told.append(
                f"takes {new:.1f} ms against {old:.1f}, the first of a request {first:.0f} ms against {then:.0f}."
            )
    return told


def test_headline_numbers_are_those_of_the_recorded_run():
    missing = [told for told in headline_numbers() if told not in " ".join(DATA_README.split())]
    assert not missing


def test_what_is_foretold_is_as_far_off_as_is_said():
    # Variants of another run that are those of the fit by another name.
    other_names = {"bf16": "bf16-unsealed", "fp8-online": "fp8-unsealed"}
    rows = re.findall(
        r"^\| `([\w-]+)`(, by the datasheets)? \| (the same run|`[\w-]+`): .*? \| (\d+) \| (.*) \|$", DATA_README, re.M
    )
    assert len(rows) == 17
    named, near, full, worst, late, joules, short, ttft = [], [], [], [0.0, 0.0], [], [], [], []
    for fitted, scaled, of, count, told in rows:
        run = recorded(fitted if of == "the same run" else of.strip("`"))
        models = step_models(fitted, card=f"{run.path.name[:4]}-80gb" if scaled else "")
        if run.path.name.endswith(("-recipes", "-versions")) and fitted == "h100-80gb-unsealed":
            models |= {name: models[fit] for name, fit in other_names.items()}
        seen, off = evidence(run), []
        for level, s in run.summaries().items():
            if s.level.variant in models and not (run.path.name == fitted and level in models[s.level.variant].levels):
                played, cause = replay(models[s.level.variant], run.read(s.level)), seen.limit(level).cause
                off.append({name: abs(value / getattr(s, name) - 1) for name, value in played.found.items()})
                if fitted == "h100-80gb-unsealed" and not scaled:
                    worst = [max(*pair) for pair in zip(worst, list(off[-1].values())[:2], strict=True)]
                    ttft.append(off[-1].get("p99_ttft_ms", 0.0))
                    full += [off[-1]["output_token_throughput"]] * (of == "the same run" and cause != "offered load")
                    if "azure" in of and s.level.rate == math.inf:
                        late.append(played.found["mean_ttft_ms"] / s.mean_ttft_ms - 1)
                    if of == "`h100-80gb-recipes`" and off[-1]["mean_tpot_ms"] > 0.1:
                        short.append((s.level.variant, s.level.rate, f"{100 * (1 - played.found['mean_tpot_ms'] / s.mean_tpot_ms):.0f}"))  # fmt: skip
                if not scaled and s.level.rate == math.inf and s.level.variant.startswith("fp8"):
                    joules.append(played.found["joules_per_output_token"] / s.joules_per_output_token - 1)
                gpu = played.limit == "GPU" and ("GPU" in cause or cause == "EngineCore")
                named += [] if scaled else [gpu or played.limit == cause]
                near += [] if scaled else [off[-1]["mean_tpot_ms"] <= 0.1]
        metrics = ("output_token_throughput", "mean_tpot_ms", "p99_ttft_ms", "joules_per_output_token")
        each = [sorted(one[name] for one in off if name in one) for name in metrics]
        if of == "the same run" and fitted == "h100-80gb-unsealed":
            told_of = (100 * median(full), 100 * median(each[1]))
        assert (count, told) == (
            f"{len(off)}",
            " | ".join(f"{100 * median(v):.1f} % ({100 * v[-1]:.{int(v[-1] < 0.01)}f} %)" if v else "–" for v in each),
        ), of
    (tokens, tpot), far = told_of, [f"{100 * one:.0f}" for one in worst]
    said = f"within {tokens:.1f} % of a full card's tokens/s and {tpot:.1f} % of the TPOT; on other lengths or another host within {' and '.join(far)} % at worst"
    assert f"{said}, a late first token (TTFT p99) once only within {100 * max(ttft):.0f} %" in " ".join(README.split())
    assert (
        f"满载时 tokens/s {tokens:.1f} %、TPOT {tpot:.1f} %；换成别的长度或别的机器，最坏是 {' % 和 '.join(far)} %，首个 token 的 TTFT p99 有一次差 {100 * max(ttft):.0f} %"
        in CHINESE
    )
    assert f"bursts in FP8 are foretold up to {100 * max(joules):.0f} % too many joules" in " ".join(
        DATA_README.split()
    )
    assert f"foretold {100 * min(late):.0f} to {100 * max(late):.0f} % too long" in " ".join(DATA_README.split())
    assert f"is named rightly in {sum(named)} of the {len(named)} that" in " ".join(DATA_README.split())
    recipes = evidence(recorded("h200-80gb-recipes"))
    odd = [mean_of(recipes, f"fp8-{form}", "mean_tpot_ms", 50) for form in ("online", "static", "channel")]
    said = f"took {odd[0]:.1f} ms a token where FP8's other two forms took {odd[1]:.1f} and {odd[2]:.1f}."
    assert sorted(short) == [("fp8-online", 0.5, "-10"), ("fp8-online", 100, "13")]
    assert f"Their TPOT is within 10 % in {sum(near)}." in " ".join(DATA_README.split())
    assert len(near) - sum(near) == 7 and said in " ".join(DATA_README.split())
    bursts = [
        s.output_token_throughput
        for level, s in recorded("h200-80gb").summaries().items()
        if level.startswith("fp8-rust-inf")
    ]
    said = "which served {:,.0f}, {:,.0f} and {:,.0f} tokens/s: the fit saw the slowest".format(*bursts)
    assert said in " ".join(DATA_README.split()) and min(bursts) == bursts[0]


@pytest.mark.servers  # half a minute, though it starts none
def test_a_highest_rate_was_foretold_as_is_said():
    seen, draw, told = evidence(recorded("h200-80gb-x4-70b")), lab.drawing(), " ".join(DATA_README.split())
    (bf16, fp8), measured = (
        [highest_rate(variant, model, draw, GOAL) for variant, model in step_models("h200-80gb-x4-70b").items()],
        seen.slo_limit("bf16-tp4", GOAL),
    )
    assert (
        f"at {bf16.low:g} to {bf16.high:g} req/s in BF16 on four cards, where it is met at {measured.low:g} and not"
        in told
    )
    assert f"at {fp8.low:g} to {fp8.high:g} in FP8 on two" in told
    assert f"is met at {measured.low:g} and not shown to be at {measured.high:g};" in told
    over = [rate for rate, one in seen.attainment("fp8-tp2", GOAL) if one.violations > 0.01 * one.requests]
    assert f"a little too high: at {over[0]:g} and {over[1]:g} more than 1 % were outside." in told and len(over) == 2


def test_what_one_python_api_server_hands_out_is_as_far_off_as_is_said():
    models, run, off = (
        step_models("h100-80gb-unsealed"),
        recorded("h100-80gb"),
        {"all": [], "own": [], "free": []},
    )
    full = [
        s for s in run.summaries().values()
        if s.level.variant in ("bf16", "fp8") and s.valid and s.frontend_cpu_max_steady > 0.99
    ]  # fmt: skip
    for s in full:
        model = dataclasses.replace(models[f"{s.level.variant}-unsealed"], requests=1024)
        for name, one in (
            ("all", model.behind(PYTHON_US)),
            ("own", model.behind(s.frontend_us_per_token)),
            ("free", model),
        ):
            played = replay(one, run.read(s.level))
            off[name].append(played.found["output_token_throughput"] / s.output_token_throughput - 1)
            assert name == "free" or played.limit == "API server"
    each = [s.frontend_us_per_token for s in full]
    apart = {name: (100 * median(map(abs, values)), 100 * max(map(abs, values))) for name, values in off.items()}
    assert (
        f"{PYTHON_US:g} µs of CPU a token for all, the tokens/s of the published command's {len(full)} full levels on another host "
        f"(`h100-80gb`) are foretold within {apart['all'][0]:.1f} % in the median, {apart['all'][1]:.0f} % at worst; with what each "
        f"level's own API server took, {min(each):.0f} to {max(each):.0f} µs, which is known only afterwards, within "
        f"{apart['own'][0]:.1f} %, {apart['own'][1]:.0f} % at worst: those are of the steady state, and a server that falls behind merges "
        f"more tokens into a chunk towards the end. With an API server that is never full they would be "
        f"{100 * min(off['free']):.0f} to {100 * max(off['free']):.0f} % too many."
    ) in " ".join(DATA_README.split())


@pytest.fixture(scope="module")
def answer():
    """The numbers of README's table and of the sentence under it, by what they are."""
    h100, h200, long_prompts, starts, steps, *unsealed = (
        evidence(recorded(name))
        for name in (*RECORDED, *(f"h100-80gb-{name}" for name in ("long-prompts", "starts", "unseal", *UNSEALED)))
    )
    metric, peak = "output_token_throughput", "peak_concurrent_requests_vllm"
    both = (h100, h200)
    assert not any(seen.compare("fp8", "bf16", 100, peak).shown for seen in both)
    assert not any(seen.compare("fp8", "bf16", 50, f"steady_{metric}").shown for seen in both)
    costs = {
        (seen, base): f"{base}-rust-60rps-r1"
        for seen in (h200, evidence(recorded("h100-80gb-rust")))
        for base in ("fp8", "bf16")
    }
    assert {seen.limit(level_id).cause for (seen, _), level_id in costs.items()} == {"offered load"}  # "all keep up"
    cost = [(base, seen.summaries[level_id]) for (seen, base), level_id in costs.items()]
    assert min(s.engine_cpu_max_steady for base, s in cost if base == "fp8") > 1  # "at a whole core"
    judged = [{one.id: one for one in judge(seen.run)} for seen in both]
    full = max(row[4] for seen in both for row in seen.kv_room())
    return {
        "verdicts": {id: [each[id].verdict for each in judged] for id in ("C1", "C2", "C3", "C4")},
        "load": [ratio(seen.seeds("bf16", 100, metric), seen.seeds("bf16", 50, metric)) for seen in both],
        "equal": [f"{seen.compare('fp8', 'bf16', 50, metric).value:.2f}" for seen in both],
        "peak": [f"{seen.compare('fp8', 'bf16', 100, peak).value:.2f}" for seen in both],
        "full": f"{100 * full:.0f} %",
        "C3": [four_digits(each["C3"].measured) for each in judged],
        "C4": [four_digits(each["C4"].measured) for each in judged],
        "long": f"{long_prompts.compare('fp8', 'bf16', math.inf, metric).value:.2f}",
        "burst": f"{starts.compare('fp8-rust-graphs', 'bf16-rust-graphs', math.inf, metric).value:.2f}",
        "xqa": f"{evidence(recorded('h100-80gb-attention')).compare('fp8-xqa', 'fp8-unsealed', math.inf, metric).value:.2f}",
        "unsealed": [four_digits(mean_of(steps, variant, metric)) for variant in ("fp8-unsealed", "fp8")],
        "cost": [f"{s.mean_tpot_ms:.1f}" for _, s in cost],
        "cores": [f"{s.engine_cpu_max_steady:.2f}" for base, s in cost if base == "bf16"],
        "both unsealed": [
            f"{one.compare('fp8-unsealed', 'bf16-unsealed', math.inf, metric).value:.2f}" for one in unsealed
        ],
        "drawn": f"{evidence(recorded('h100-80gb-recipes')).compare('fp8-online', 'bf16', math.inf, metric).value:.2f}",
        "joules": f"{h100.compare('fp8', 'bf16', 50, 'joules_per_output_token').value:.2f}",
        "half": [
            f"{2 * evidence(recorded(f'h200-80gb-{run}')).compare(fp8, bf16, math.inf, name).value:.2f}"
            for run, fp8, bf16 in (("x2-32b", "fp8", "bf16-tp2"), ("x4-70b", "fp8-tp2", "bf16-tp4"))
            for name in (metric, "steady_output_token_throughput")
        ],
    }


def test_readmes_answer_is_that_of_the_recorded_runs(answer):
    """Each number in its own place, in both languages."""
    english, chinese = " ".join(README.split()), " ".join(CHINESE.split())
    each = answer["both unsealed"]
    a, said = answer, {id: ", ".join(words) for id, words in answer["verdicts"].items()}
    shown = {id: "，".join(VERDICTS[word] for word in words) for id, words in answer["verdicts"].items()}
    bars = a["equal"][0], a["burst"], a["long"]
    assert (
        "{} at the published 50 req/s, {} all at once, {} on long prompts; the published 1.60 as".format(*bars)
        in english
    )
    assert "公开实验的 50 req/s 下 {}，请求全部同时到达 {}，长提示 {}；公开的 1.60 以".format(*bars) in chinese
    assert f"(at {bars[0]} FP8 keeps up and BF16 barely, and FP8's last answers end sooner)" in english
    assert f"{bars[0]} 倍那条，FP8 跟得上，BF16 只是勉强跟上，FP8 的最后一批回答也结束得更早" in chinese
    for row in (
        f"| C1: 60 % more tokens/s | {said['C1']} | the load rose with it: BF16 alone, from 50 to 100 req/s, gives "
        f"{a['load'][0]} and {a['load'][1]} | at the same 50 req/s FP8 gives {a['equal'][0]}× and {a['equal'][1]}×, with no difference shown in the steady state |",
        f"| C2: 5 times more in flight (170 to 1,033) | {said['C2']} | who is offered more holds more in flight; the KV cache was at most "
        f"{a['full']} full | at the same 100 req/s {a['peak'][0]}× and {a['peak'][1]}×: "
        "no difference shown |",
        f"| C3: 63 req/s is the card's limit | {said['C3']} | one Python API server was full, not the card | {a['C3'][0]} and "
        f"{a['C3'][1]} req/s: two hosts |",
        f"| C4: 39 ms a token stays usable | {said['C4']} | it waits for the same API server | {a['C4'][0]} and {a['C4'][1]} ms |",
        f"| the published command at 50 req/s | {a['equal'][0]}× | for {a['joules']}× the joules a token |",
        f"larger CUDA graphs | {a['burst']}× | BF16 stands at the card's power limit |",
        f"| the same with nothing in the card's way | {each[0]}× ({a['drawn']}× with normally distributed weights, on another machine) | five changes to how vLLM "
        f"is started: {a['unsealed'][0]} tokens/s where the published command gives {a['unsealed'][1]} on the same machine; "
        f"on another H100 NVIDIA's XQA attention kernel then gives FP8 {a['xqa']}× more (",
        f"| so too, on the lengths of two real services | {each[1]}× and {each[2]}× | conversation and coding |",
        f"| long prompts | {a['long']}× | BF16's KV cache was full |",
        "{0}× and {2}× a card ({1}× and {3}× in the steady state) | H200s held to 80 GB; 70 B on two hosts |".format(
            *a["half"]
        ),
        "| {} ms a token on the H200, BF16's {}; {} on the H100, BF16's {} | all keep up, FP8 with its EngineCore process at a "
        "whole core (BF16's at {} and {}) |".format(*a["cost"], *a["cores"]),
    ):
        assert row in english
    load = [f"{one.value:.2f} 倍（{one.low:.2f} 到 {one.high:.2f}）" for one in a["load"]]
    for row in (
        f"| C1：吞吐多 6 成 | {shown['C1']} | 负载也翻了一倍：单是 BF16 从 50 加到 100 req/s，就有 {load[0]}和 {load[1]} | "
        f"同为 50 req/s 时，FP8 是 {a['equal'][0]} 倍和 {a['equal'][1]} 倍，稳态下看不出差别 |",
        f"| C2：并发多出 5 倍（170 到 1,033） | {shown['C2']} | 来的请求多，在途的自然多；KV 缓存最多只用到 {a['full']} | 同为 100 req/s 时，是 {a['peak'][0]} 倍和 {a['peak'][1]} 倍，看不出差别 |",
        f"| C3：63 req/s 是这张卡的极限 | {shown['C3']} | 占满的是一个 Python API server 进程，不是显卡 | 两台主机上各为 {a['C3'][0]} 和 {a['C3'][1]} req/s |",
        f"| C4：每个 token 39 ms，仍可用 | {shown['C4']} | 卡在同一个 API server 上 | {a['C4'][0]} 和 {a['C4'][1]} ms |",
        f"| 公开实验的命令，50 req/s | {a['equal'][0]} 倍 | 每个 token 的能耗只有 {a['joules']} 倍 |",
        f"更大的 CUDA graph | {a['burst']} 倍 | BF16 顶着显卡功耗上限 |",
        f"| {each[0]} 倍（权重改为按正态分布抽取，在另一台机器上是 {a['drawn']} 倍） | vLLM 的启动方式改五处：同一台机器上从 {a['unsealed'][1]} tokens/s 升到 "
        f"{a['unsealed'][0]}；另一张 H100 上再换用 NVIDIA 的 XQA 注意力内核，FP8 还能升到 {a['xqa']} 倍（",
        f"| 同上，换成两种真实服务的长度 | {each[1]} 倍和 {each[2]} 倍 | 对话服务和编程服务 |",
        f"| 长提示 | {a['long']} 倍 | BF16 的 KV 缓存已满 |",
        "| 平均每张卡 {0} 倍和 {2} 倍（稳态 {1} 倍和 {3} 倍） | H200，限制为 80 GB；70 B 用了两台主机 |".format(
            *a["half"]
        ),
        "| 每个 token，H200 上要 {} ms，BF16 只要 {} ms；H100 上是 {} ms，BF16 是 {} ms | 都跟得上，但 FP8 的 EngineCore 进程占满了一个核"
        "（BF16 的只用 {} 和 {} 个核） |".format(*a["cost"], *a["cores"]),
    ):
        assert row in chinese
    told = "a token took longer: {} ms against BF16's {} on the H200, {} against {} on the H100."
    assert told.format(*a["cost"]) in " ".join(DATA_README.split())


def test_who_keeps_up_at_the_published_50_requests_a_second():
    h100, h200 = (evidence(recorded(name)) for name in RECORDED)
    limits = {
        (seen, variant): [seen.limit(level_id) for level_id in seen.levels((variant,), 50)]
        for seen in (h100, h200)
        for variant in ("fp8", "bf16")
    }
    barely = limits.pop((h100, "bf16"))
    assert {one.cause for each in limits.values() for one in each} == {"offered load"}
    assert [one.cause for one in barely] == ["API server", "GPU and EngineCore", "offered load"]
    assert "it just kept up" in barely[0].evidence
    grew = 100 * backlog_growth(h100.level("bf16-50rps-r2").records)
    assert (
        "On the H200 both keep up; on the H100 FP8 does and BF16 barely, limited seed by seed by the API server, by the GPU and the "
        f"EngineCore (in flight grew by {grew:.0f} % of the rate), and by the offered load. FP8's last answers end sooner."
    ) in " ".join(DATA_README.split())
    baseline = (PROJECT / "notebooks" / "02_bf16_baseline.ipynb").read_text()
    assert f"recorded seeds by {grew:.0f} % of the rate)" in baseline
    rates = [s.request_throughput for seen in (h100, h200) for s in seen.levels(("bf16",), 50).values()]
    assert f"{min(rates):.0f} to {max(rates):.0f} in the recorded runs." in baseline
    for seen in (h100, h200):  # "sooner"
        ends = [seen.seeds(variant, 50, "duration_s") for variant in ("fp8", "bf16")]
        assert max(ends[0].values()) < min(ends[1].values())


def test_what_limited_the_levels_behind_the_answer():
    """Where README's table names a cause, the kit does."""
    for name in RECORDED:
        seen = evidence(recorded(name))
        causes = [seen.limit(level_id).cause for level_id in seen.levels(("fp8",), 100)]
        assert causes.count("API server") == len(causes)
    starts, long_prompts = (evidence(recorded(name)) for name in ("h100-80gb-starts", "h100-80gb-long-prompts"))
    assert {starts.limit(level_id).cause for level_id in starts.levels(("bf16-rust-graphs",))} == {"GPU power limit"}
    assert {long_prompts.limit(level_id).cause for level_id in long_prompts.levels(("bf16",))} == {"KV capacity"}


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_a_readme_is_read_in_a_few_minutes(name):
    assert len(TEXTS[name].splitlines()) <= 90


def test_the_answers_are_those_of_the_recorded_run():
    held = comparisons(recorded("smollm2-h200"))
    for variant, name in {"fp8-weights": "FP8 weights", "fp8-kv": "FP8 KV cache, scale 1.0", "fp8": "both"}.items():
        one, floor = held[variant], held["bf16-again"]
        ratio, same, length = one.perplexity_ratio, one.top1_agreement.value, one.output_ratio
        row = f"| {name} | {ratio.value:.3f}× ({ratio.low:.3f} to {ratio.high:.3f}) | {100 * same:.1f} % "
        row += f"| {one.same_prefix.value:.0f} tokens | "
        differs = distinguishable("output_ratio", one, floor)
        row += f"{length.value:.2f}× ({length.low:.2f} to {length.high:.2f}) |" if differs else "no difference shown |"
        assert row in DATA_README
    assert f"{100 * floor.top1_agreement.value:.1f} %" in DATA_README
    assert f"after {floor.same_prefix.value:.0f} tokens" in " ".join(DATA_README.split())


def test_what_other_formats_do_to_answers_is_that_of_the_recorded_run():
    held, told = comparisons(recorded("smollm2-h200-recipes")), " ".join(DATA_README.split())
    floor = held["bf16-again"]
    int4 = "INT4 in groups of 64"
    names = {
        "int8": "INT8, rounded",
        "int8-by-gptq": "INT8 by GPTQ",
        "int4": f"{int4}, rounded",
        "int4-by-gptq": f"{int4} by GPTQ",
    }
    for variant, name in names.items():
        one = held[variant]
        ratio, length = one.perplexity_ratio, one.output_ratio
        assert distinguishable("output_ratio", one, floor)
        row = f"| {name} | {ratio.value:.3f}× ({ratio.low:.3f} to {ratio.high:.3f}) | {100 * one.top1_agreement.value:.1f} % "
        row += f"| {one.kl_mean.value:.4f} | {length.value:.2f}× ({length.low:.2f} to {length.high:.2f}) |"
        assert row in DATA_README
    same, apart = 100 * floor.top1_agreement.value, floor.kl_mean.value
    assert f"BF16 agrees with itself there at {same:.1f} % of positions, {apart:.4f} nats apart." in told
    # "By perplexity and likeliest token ... about as much as FP8 weights do", whose answers are no longer
    fp8 = comparisons(recorded("smollm2-h200"))
    assert abs(held["int8"].perplexity_ratio.value - fp8["fp8-weights"].perplexity_ratio.value) < 0.005
    assert abs(held["int8"].top1_agreement.value - fp8["fp8-weights"].top1_agreement.value) < 0.01
    assert not distinguishable("output_ratio", fp8["fp8-weights"], fp8["bf16-again"])


def test_the_fastest_commands_give_the_answers_of_the_published_ones():
    for name, reference, where in (
        ("smollm2-h100-unsealed", "bf16", "(`smollm2-h100-unsealed`) the likeliest token is the same at"),
        ("smollm2-h100-unsealed-fp8", "fp8", "(`smollm2-h100-unsealed-fp8`) at"),
    ):
        run = recorded(name)
        held = comparisons(run)
        one, floor = held[f"{reference}-unsealed"], held[f"{reference}-again"]
        same, again = (100 * each.top1_agreement.value for each in (one, floor))
        assert re.search(rf"{re.escape(where)} {same:.2f} %.*?at {again:.2f} %", " ".join(DATA_README.split()))
        assert run.read_parts("quality")[f"{reference}-unsealed"]["in_flight"]["prompts"] == 512
        measures = {field.name for field in dataclasses.fields(one)} - {"perplexity", "unlisted_mass"}
        assert not [measure for measure in measures if distinguishable(measure, one, floor)]


def test_the_chinese_readme_keeps_step():
    def commands(text):
        return re.findall(r"^    .*$", text, re.MULTILINE)

    assert len(commands(README)) > 20 and commands(CHINESE) == commands(README)
    assert re.findall(r"^#+", CHINESE, re.MULTILINE) == re.findall(r"^#+", README, re.MULTILINE)
    linked = [set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.zh-CN.md"} for text in (CHINESE, README)]
    assert linked[0] == linked[1]


@pytest.mark.parametrize("name", NAMES)
def test_linked_files_exist(name):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[name])
    assert all((PROJECT / name).parent.joinpath(target).exists() for target in targets)


def test_named_tests_exist():
    named = set(re.findall(r"\btest_[a-z_]+\.py", CONTRIBUTING + LIB_README))
    assert named and all((PROJECT / "tests" / name).exists() for name in named)


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_as_the_command_line_takes_them(name):
    for line in re.findall(r"^    fp8lab (.*?)(?:\s{2,}#.*|\s+# .*)?$", TEXTS[name], re.MULTILINE):
        if "<" not in line:
            cli._parser().parse_args(shlex.split(line))
    makefile = (PROJECT / "Makefile").read_text()
    for target in re.findall(r"^    make ([a-z]+)", TEXTS[name], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_what_of_the_recorded_runs_was_computed_again_is_said():
    window, tpot = set(), set()
    for folder in (PROJECT / "data" / "recorded").iterdir():
        manifest = recorded(folder.name).manifest
        edited = manifest.get("edited", {})
        if "steady" in edited or "The steady window" in manifest.get("corrected", ""):
            window.add(f"`{folder.name}`")
        tpot |= {folder.name} if "tpot" in edited else set()
        assert set(edited) <= {"steady", "tpot", "load_s", "valid"}
    told = " ".join(DATA_README.split())
    assert len({name.strip("`") for name in window} | tpot) == 11 and "Of eleven runs some summaries were" in told
    named = re.search(r"In four \((.*?)\) it was the steady window", told)[1]
    assert set(named.split(", ")) == window and len(window) == 4
    assert len(tpot) == 9 and "In nine it was TPOT" in told


def test_make_help_names_every_target():
    makefile = (PROJECT / "Makefile").read_text()
    told = re.findall(r"^# make ([a-z-]+)", makefile.partition("\n\n")[0], re.MULTILINE)
    assert sorted(["help", *told]) == sorted(re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split())


def test_recorded_runs_are_whole_and_small():
    folders = list((PROJECT / "data" / "recorded").iterdir())
    table = re.search(r"^\| run \| what \|\n\|---\|---\|\n((?:\|.*\n)+)", DATA_README, re.MULTILINE)[1]
    listed = [name for row in table.splitlines() for name in re.findall(r"`([\w-]+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(folder.name for folder in folders)
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()) < 30e6
    for folder in folders:
        run = open_run(source=folder)
        for level_id, summary in run.summaries().items():
            assert summary.valid and summary.failed == 0, level_id
        assert run.manifest["source"]["commit"] and run.manifest["software"]["packages"]
