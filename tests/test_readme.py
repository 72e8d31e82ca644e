"""The README is true: its tables come from the recorded runs, its commands and files exist."""

import math
import re
from statistics import fmean, geometric_mean

import pytest

from fp8lab import cli
from fp8lab.experiment.quality import comparisons
from fp8lab.metrics.quality import distinguishable
from fp8lab.metrics.slo import SLO, attains
from fp8lab.metrics.statistics import ratio
from fp8lab.paths import PROJECT
from fp8lab.report.claims import claims_across
from fp8lab.results.evidence import evidence
from fp8lab.results.run_folder import open_run
from fp8lab.ui.text import four_digits

README, CHINESE, CONTRIBUTING = (
    (PROJECT / name).read_text() for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")
)


RECORDED = ("h100-80gb", "h200-80gb")


def test_the_claims_table_is_that_of_the_recorded_runs():
    block = re.search(r"<!-- claims h100-80gb h200-80gb -->\n(.*?)\n<!-- end -->", README, re.DOTALL)[1]
    assert block.strip() == claims_across(*(open_run(source=name) for name in RECORDED)).to_markdown()


def busy_in_large_steps(seen, level_id: str) -> float:
    """The share of time with a kernel running while more than 512 requests decode and none waits for its prefill."""
    telemetry = seen.level(level_id).telemetry
    running, waiting = telemetry["running"].ffill(), telemetry["waiting"].ffill()
    # From 3 s on the burst is in; a batch that is still at its cap may hold prefills.
    return telemetry["gpu_util"][(telemetry["at_s"] > 3) & (waiting == 0) & (running > 512) & (running < 1000)].mean()


def held_back(seen, suffix: str, seeds: int) -> list[str]:
    """What the power limit leaves of the clocks in a burst: the variants' mean MHz, BF16's power, and the clocks' ratio."""
    held = {
        variant: [seen.summaries[f"{variant}{suffix}-infrps-r{seed}"] for seed in range(1, seeds + 1)]
        for variant in ("fp8", "bf16")
    }
    mhz = {variant: fmean(s.gpu_sm_mhz_steady for s in levels) for variant, levels in held.items()}
    for s in held["bf16"]:
        assert s.gpu_power_w_steady > 0.98 * 700 and s.power_limited_steady in (None, 1.0)  # "in all samples"
    return [f"{mhz['bf16']:,.0f}", f"{mhz['fp8'] / mhz['bf16']:.2f}×"]


def headline_numbers() -> list[str]:
    """The numbers that the READMEs' prose rests on, as it writes them."""
    h100, seen, long_prompts, starts = (
        evidence(open_run(source=name)) for name in (*RECORDED, "h100-80gb-long-prompts", "h100-80gb-starts")
    )
    metric, joules = "output_token_throughput", "joules_per_output_token"
    ratios = [
        ratio(one.seeds("bf16", 100, metric), one.seeds("bf16", 50, metric)) for one in (h100, seen)
    ]  # the load alone
    ratios += [one.compare("fp8", "bf16", 50, name) for one in (h100, seen) for name in (metric, joules)]
    ratios += [long_prompts.compare("fp8", "bf16", math.inf, name) for name in (metric, joules)]
    ratios += [h100.compare("fp8-rust-graphs", "bf16-rust-graphs", math.inf, name) for name in (metric, joules)]
    own_starts = [starts.compare("fp8-rust-graphs", "bf16-rust-graphs", math.inf, name) for name in (metric, joules)]
    assert all(one.starts == one.pairs == 2 for one in own_starts)  # "two each"
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
    apart = [abs(s.meters_apart) for one in (h100, seen, long_prompts, starts) for s in one.summaries.values()]
    told.append(f"{100 * max(apart):.1f} %")
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
    return [*told, f"{min(burst):.0f} to {max(burst):.0f}"]


@pytest.mark.parametrize("text", [README, CHINESE], ids=["README.md", "README.zh-CN.md"])
def test_headline_numbers_are_those_of_the_recorded_run(text):
    missing = [told for told in headline_numbers() if told not in " ".join(text.split())]
    assert not missing


def test_the_answers_are_those_of_the_recorded_run():
    held = comparisons(open_run(source="smollm2-h200"))
    for variant, name in {"fp8-weights": "FP8 weights", "fp8-kv": "FP8 KV cache, scale 1.0", "fp8": "both"}.items():
        one, floor = held[variant], held["bf16-again"]
        ratio, same, length = one.perplexity_ratio, one.top1_agreement.value, one.output_ratio
        row = f"| {name} | {ratio.value:.3f}× ({ratio.low:.3f} to {ratio.high:.3f}) | {100 * same:.1f} % "
        row += f"| {one.same_prefix.value:.0f} tokens | "
        differs = distinguishable("output_ratio", one, floor)
        row += f"{length.value:.2f}× ({length.low:.2f} to {length.high:.2f}) |" if differs else "no difference shown |"
        assert row in README
    assert f"{100 * floor.top1_agreement.value:.1f} %" in README
    assert f"after {floor.same_prefix.value:.0f} tokens" in " ".join(README.split())


def test_the_chinese_readme_keeps_step():
    rows = claims_across(*(open_run(source=name) for name in RECORDED)).rows
    block = re.search(r"<!-- claims h100-80gb h200-80gb zh -->\n(.*?)\n<!-- end -->", CHINESE, re.DOTALL)[1]
    shown = [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]
    assert [(row[0], *row[2:]) for row in rows] == [(row[0], *row[2:]) for row in shown]
    commands = re.findall(r"^    (?:make|fp8lab) .*$", CHINESE, re.MULTILINE)
    assert len(commands) > 8 and set(commands) <= set(README.splitlines())
    assert set(re.findall(r"^\| (reproduced.*?|not.*?|und.*?|inv.*?) \|", CHINESE, re.MULTILINE)) == set(
        re.findall(r"^\| (reproduced.*?|not.*?|und.*?|inv.*?) \|", README, re.MULTILINE)
    )


@pytest.mark.parametrize(
    "text", [README, CHINESE, CONTRIBUTING], ids=["README.md", "README.zh-CN.md", "CONTRIBUTING.md"]
)
def test_linked_files_exist(text):
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets and all((PROJECT / target).exists() for target in targets)


def test_named_tests_exist():
    named = set(re.findall(r"\btest_[a-z_]+\.py", CONTRIBUTING + README))
    assert named and all((PROJECT / "tests" / name).exists() for name in named)


def test_named_commands_exist():
    used = set(re.findall(r"^    fp8lab ([a-z-]+)", README, re.MULTILINE))
    assert used and used <= set(cli.EXAMPLES)
    made = set(re.findall(r"^    make ([a-z]+)", README, re.MULTILINE))
    makefile = (PROJECT / "Makefile").read_text()
    assert made and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in made)


def test_recorded_runs_are_whole_and_small():
    folders = list((PROJECT / "data" / "recorded").iterdir())
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()) < 12e6
    for folder in folders:
        run = open_run(source=folder)
        for level_id, summary in run.summaries().items():
            assert summary.valid and summary.failed == 0, level_id
        assert run.manifest["source"]["commit"] and run.manifest["software"]["packages"]
