"""What the report asks of a run, level by level: values by seed, what limited it, how far it was from the card's limit."""

import functools
import math
from collections.abc import Collection, Iterator, Mapping
from statistics import fmean

from ..config.dimensions import fp8_kv, fp8_weights
from ..config.flags import flag_of
from ..config.profile import Level
from ..metrics.bottleneck import Limit, keeps_up, what_limited
from ..metrics.performance import window_of
from ..metrics.resources import Clock, clock, meters_apart
from ..metrics.roofline import Roofline, roofline
from ..metrics.slo import SLO, Attainment, Bracket, attains, bracket
from ..metrics.statistics import Cells, Noise, Ratio, Seeds, contrast, pooled_noise
from .level import LevelResult
from .run_folder import Run, other_card

JOULES = ("joules_per_output_token", "joules_per_request")

# How a front end is told in a variant's name: "fp8-rust" is "fp8" behind vLLM's Rust front end. The last one also
# relieves the engine process, the next in line.
FRONT_ENDS = {
    "": "one Python process",
    "-api4": "four Python processes",
    "-rust": "Rust",
    "-rust-graphs": "Rust, larger CUDA graphs",
}


class Evidence:
    """One run's levels, read once. Made by `evidence(run)`."""

    def __init__(self, run: Run):
        self.run = run
        self.summaries: Mapping[str, dict] = run.summaries()

    @functools.lru_cache(maxsize=256)  # noqa: B019 - an Evidence lives as long as its run is shown
    def level(self, level_id: str) -> LevelResult | None:
        """The level with its tables; None when the run holds no records of it."""
        if not (self.run.path / "levels" / level_id / "records.parquet").exists():
            return None
        asked = self.summaries[level_id]["level"]
        return self.run.read(Level(**{key: asked[key] for key in ("variant", "rate", "requests", "repeat")}))

    def limit(self, level_id: str) -> Limit:
        """What limited a level."""
        level = self.level(level_id)
        if level is None:
            return Limit("unknown", "the run holds no records of it")
        # On an emulated card neither the GPU nor the front end is what it seems; only the client is real.
        found = what_limited(
            level.summary, level.records, level.telemetry, self.roofline(level_id), self._power_limit_w
        )
        if self.run.emulated and found.cause not in ("offered load", "client", "KV capacity"):
            return Limit("emulated card", f"EMULATED: the model of the card and of its front end; {found.evidence}")
        return found

    @property
    def _power_limit_w(self) -> float | None:
        return self.run.profile.gpu.power_w if self.run.profile.gpu else None

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def clock(self, level_id: str) -> Clock | None:
        """The card's clock over the level's steady window; None when nothing was sampled."""
        level = self.level(level_id)
        if level is None or level.telemetry is None:
            return None
        return clock(level.telemetry, window_of(level.summary), self._power_limit_w)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def roofline(self, level_id: str) -> Roofline | None:
        """What the level needed of the card; None without its datasheet, known shapes, or the server's counters."""
        profile, level = self.run.profile, self.level(level_id)
        if level is None or profile.gpu is None or level.telemetry is None or other_card(self.run):
            return None
        shape = profile.shape(level.level.variant)
        if shape is None:
            return None
        server = level.summary["server"]
        if not (level.summary["completed"] and server["kv_cache_tokens"]):
            return None
        return roofline(
            level.telemetry, window_of(level.summary), shape, profile.gpu,
            fp8_weights=fp8_weights(server["command"], shape), fp8_kv=fp8_kv(server["command"], shape),
            kv_cache_tokens=server["kv_cache_tokens"],
        )  # fmt: skip

    def kv_tokens_a_request(self) -> float | None:
        """KV tokens that a running request held, over all samples of all levels; None when none was sampled."""
        held = running = 0.0
        for level_id in self.summaries:
            level = self.level(level_id)
            tokens = level and level.summary["server"]["kv_cache_tokens"]
            if tokens and level.telemetry is not None:
                known = level.telemetry[["running", "kv_cache_usage"]].dropna()
                held += known["kv_cache_usage"].sum() * tokens
                running += known["running"].sum()
        return held / running if running else None

    def levels(self, variants: Collection[str], rate: float | None = None, *, valid: bool = True) -> dict[str, dict]:
        """The summaries of these variants' levels at `rate` (None: at any), by level id; with `valid` only of those
        that count."""
        return {
            level_id: s
            for level_id, s in self.summaries.items()
            if s["level"]["variant"] in variants
            and (rate is None or float(s["level"]["rate"]) == rate)
            and (s["valid"] or not valid)
        }

    def seeds(self, variant: str, rate: float, metric: str) -> Seeds:
        """A metric of every valid repeat of a level, by repeat."""
        held = self.levels((variant,), rate).values()
        return {s["level"]["repeat"]: s[metric] for s in held if s.get(metric)}

    def cells(self, variants, rate: float, metric: str) -> Cells:
        """The same for several variants; those without a level are left out."""
        found = {variant: self.seeds(variant, rate, metric) for variant in variants}
        return {variant: values for variant, values in found.items() if values}

    def parts(self, variants, rate: float) -> str:
        """In which parts of the run these variants were measured at `rate`: "1", "1, 4"; empty for a run in one part."""
        if not self.run.manifest.get("continued"):
            return ""
        # Of a level in which nothing completed no value is compared.
        held = [s for s in self.levels(variants, rate).values() if s["completed"] and "part" in s]
        return ", ".join(map(str, sorted({s["part"] for s in held})))

    def starts(self, variants, rate: float) -> int:
        """The fewest server starts over which the valid repeats of one of `variants` at `rate` are spread."""
        return min(len({self._start(level_id) for level_id in self.levels((variant,), rate)}) for variant in variants)

    def share_a_start(self, level_ids: Collection[str]) -> bool:
        """Whether some of these levels were measured on one server start."""
        held = [self._start(level_id) for level_id in level_ids if level_id in self.summaries]
        return len(set(held)) < len(held)

    def _start(self, level_id: str) -> str:
        """What tells the server start that a level was measured on: its served name, which no other start has."""
        return flag_of(self.summaries[level_id].get("server", {}).get("command", ()), "--served-model-name")

    def rates(self, *variants: str) -> list[float]:
        """The rates at which each of `variants` has a valid level, ascending."""
        sets = [{float(s["level"]["rate"]) for s in self.levels((v,)).values()} for v in variants]
        return sorted(set.intersection(*sets))

    def variants(self) -> list[str]:
        """The variants that the run holds levels of, in the profile's order."""
        held = {s["level"]["variant"] for s in self.summaries.values()}
        return [variant for variant in self.run.profile.variants if variant in held]

    def pairs(self) -> Iterator[tuple[str, str, str]]:
        """(BF16 variant, FP8 variant, their suffix in `FRONT_ENDS`) for each front end that the run holds both behind."""
        held = set(self.variants())
        for suffix in FRONT_ENDS:
            if {f"bf16{suffix}", f"fp8{suffix}"} <= held:
                yield f"bf16{suffix}", f"fp8{suffix}", suffix

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def saturated(self, *variants: str, rate: float) -> bool:
        """Whether some level of `variants` at `rate` was limited by something else than the offered load. Where the limit
        is unknown, the records say whether a backlog grew; without records it counts as kept up."""

        def kept_up(level_id: str) -> bool:
            cause, level = self.limit(level_id).cause, self.level(level_id)
            return cause == "offered load" or (cause == "unknown" and (level is None or keeps_up(level.records)))

        return not all(kept_up(level_id) for level_id in self.levels(variants, rate))

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def noise(self, metric: str, *, saturated: bool, burst: bool) -> Noise | None:
        """The repeat-to-repeat noise of a metric, pooled over the levels of one kind that have repeats.

        Below saturation it is small, beyond it larger, and a pile that grows scatters more than one that was sent at
        once: each has its own. Where a kind has no repeats, those of the same saturation stand in.
        """
        groups = {
            (rate, bf16): self.cells((bf16, fp8), rate, metric)
            for bf16, fp8, _ in self.pairs()
            for rate in self.rates(bf16, fp8)
            if self.saturated(bf16, fp8, rate=rate) == saturated
        }
        alike = [cells for (rate, _), cells in groups.items() if math.isinf(rate) == burst]
        return pooled_noise(alike) or pooled_noise(list(groups.values()))

    def compare(self, over: str, under: str, rate: float, metric: str) -> Ratio | None:
        """`over` / `under` at one rate, paired by seed; None when they share none."""
        return self.contrast({over: 1.0, under: -1.0}, rate, metric)

    def contrast(self, weights: Mapping[str, float], rate: float, metric: str) -> Ratio | None:
        """exp(sum of weight x log value) of variants at one rate, over the seeds that they share; None when they share none.

        Two meters measure a level's joules: the interval is no tighter than they are apart.
        """
        noise = self.noise(metric, saturated=self.saturated(*weights, rate=rate), burst=math.isinf(rate))
        cells = {variant: self.seeds(variant, rate, metric) for variant in weights}
        found = contrast(cells, weights, noise)
        if found is None:
            return None
        found = found.over(self.starts(weights, rate))
        return found.at_least(self._meters_apart(weights, rate)) if metric in JOULES else found

    def _meters_apart(self, weights: Mapping[str, float], rate: float) -> float:
        """How far the two energy meters are apart in a contrast, as a logarithm; 0 where one of them is missing."""
        apart = 0.0
        for variant, weight in weights.items():
            known = [one for s in self.levels((variant,), rate).values() if (one := meters_apart(s)) is not None]
            apart += weight * fmean(known) if known else 0.0
        return abs(apart)


def evidence(run: Run) -> Evidence:
    """The evidence of a run as it is now: a level that is measured (again) later needs a new one."""
    stamps = tuple(sorted((p.parent.name, p.stat().st_mtime_ns) for p in run.path.glob("levels/*/summary.json")))
    return _evidence(run.path.resolve(), stamps, run)


@functools.lru_cache(maxsize=4)
def _evidence(_path, _stamps: tuple, run: Run) -> Evidence:
    return Evidence(run)


def rate_name(rate: float) -> str:
    """A rate as text: "50 req/s", "all at once"."""
    return "all at once" if math.isinf(rate) else f"{rate:g} req/s"


def attainment(seen: Evidence, variant: str, slo: SLO) -> list[tuple[float, Attainment]]:
    """What every valid level of a variant that was offered a rate says of an objective, with its rate, ascending."""
    tried = []
    for level_id, s in seen.levels((variant,)).items():
        rate = float(s["level"]["rate"])
        if math.isfinite(rate) and (level := seen.level(level_id)):
            tried.append((rate, attains(level.records, slo)))
    return sorted(tried)


def limit(seen: Evidence, variant: str, slo: SLO) -> Bracket:
    """The rates between which a variant's limit lies, by all its levels."""
    return bracket((rate, found.bound) for rate, found in attainment(seen, variant, slo))
