"""A run's levels, read once: as a table, by seed, what limited each, how far it was from the card's limits."""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Mapping
from statistics import fmean
from typing import NamedTuple

import pandas as pd

from ..config.dimensions import fp8_kv, weight_format
from ..metrics.bottleneck import Limit, keeps_up, what_limited
from ..metrics.resources import Clock, Roofline, clock, roofline
from ..metrics.slo import SLO, Attainment, Bracket, attains, bracket
from ..metrics.statistics import ABLATION, Cells, Noise, Ratio, Seeds, contrast, pooled_noise
from ..metrics.summary import MeasuredLevel, Summary
from .run_folder import LevelResult, Run, a_run

JOULES = ("joules_per_output_token", "joules_per_request")
# The longest setup that is told in a cell of a table.
_BRIEF = 60


class Evidence:
    """One run's levels, read once. Made by `evidence(run)`. Of several variants that differ from others in one setup, the
    levels may stand `instead` of those others', under their names: {"fp8": "fp8-rust"}; the run then holds nothing else."""

    def __init__(self, run: Run, instead: Mapping[str, str] | None = None):
        self.run = run
        self.summaries: Mapping[str, Summary] = run.summaries()
        self._asked = {level_id: s.level.asked for level_id, s in self.summaries.items()}
        self.instead = instead or {}
        if instead:
            names, held = {stored: name for name, stored in instead.items()}, self.summaries.values()
            named = [
                (s, dataclasses.replace(s.level, variant=names[v])) for s in held if (v := s.level.variant) in names
            ]
            self._asked = {level.id: s.level.asked for s, level in named}
            self.summaries = {level.id: dataclasses.replace(s, level=level) for s, level in named}

    def own(self, level_id: str) -> str:
        """The id that the run itself has for a level, held or not."""
        variant, rate, repeat = level_id.rsplit("-", 2)
        return f"{self.instead.get(variant, variant)}-{rate}-{repeat}"

    @functools.lru_cache(maxsize=256)  # noqa: B019 - an Evidence lives as long as its run is shown
    def level(self, level_id: str) -> LevelResult | None:
        """The level with its tables; None when the run holds no records of it."""
        asked = self._asked[level_id]
        if not (self.run.path / "levels" / asked.id / "records.parquet").exists():
            return None
        return self.run.read(asked)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def limit(self, level_id: str) -> Limit:
        """What limited a level."""
        level = self.level(level_id)
        if level is None:
            return Limit("unknown", "the run holds no records of it")
        read = (level.summary, level.records, level.telemetry)
        found = what_limited(*read, self.roofline(level_id), self._power_limit_w(level.summary))
        # On an emulated card neither the GPU nor the API server is what it seems; only the client is real.
        if self.run.emulated and found.cause not in ("offered load", "client", "KV capacity"):
            return Limit("emulated card", f"EMULATED: the model of the card and of its API server; {found.evidence}")
        return found

    def _power_limit_w(self, summary: Summary) -> float | None:
        card = self.run.profile.gpu
        return card.power_w * summary.cards if card and card.power_w else None

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def clock(self, level_id: str) -> Clock | None:
        """The card's clock over the level's steady window; None when nothing was sampled."""
        level = self.level(level_id)
        if level is None or level.telemetry is None:
            return None
        return clock(level.telemetry, level.summary.window, self._power_limit_w(level.summary))

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def roofline(self, level_id: str) -> Roofline | None:
        """What the level needed of the card; None without its datasheet, known shapes, or the server's counters."""
        profile, level = self.run.profile, self.level(level_id)
        if level is None or profile.gpu is None or level.telemetry is None or other_card(self.run):
            return None
        shape, s = profile.shape(level.level.variant), level.summary
        if shape is None or not (s.completed and s.kv_cache_tokens):
            return None
        return roofline(
            level.telemetry, s.window, shape, profile.gpu, weights=weight_format(s.command, shape),
            fp8_kv=fp8_kv(s.command, shape), kv_cache_tokens=s.kv_cache_tokens, cards=s.cards, replicas=s.replicas,
        )  # fmt: skip

    def kv_tokens_a_request(self) -> float | None:
        """KV tokens that a running request held, over all samples of all levels; None when none was sampled."""
        held = running = 0.0
        for level_id, s in self.summaries.items():
            level = self.level(level_id)
            if level and level.telemetry is not None and s.kv_cache_tokens:
                known = level.telemetry[["running", "kv_cache_usage"]].dropna()
                held += known["kv_cache_usage"].sum() * s.kv_cache_tokens
                running += known["running"].sum()
        return held / running if running else None

    def levels(self, variants: Collection[str], rate: float | None = None, *, valid: bool = True) -> dict[str, Summary]:
        """The summaries of these variants' levels at `rate` (None: any), by level id; with `valid` those that count."""
        held = {level_id: s for level_id, s in self.summaries.items() if s.level.variant in variants}
        held = {level_id: s for level_id, s in held.items() if rate is None or s.level.rate == rate}
        return {level_id: s for level_id, s in held.items() if s.valid or not valid}

    def seeds(self, variant: str, rate: float, metric: str) -> Seeds:
        """A metric of every valid repeat of a level, by repeat."""
        held = self.levels((variant,), rate).values()
        return {s.level.repeat: value for s in held if (value := getattr(s, metric))}

    def by_rate(self, variant: str, metric: str) -> dict[float, list[float]]:
        """A metric of every valid level of a variant: by rate, ascending, the value of each repeat."""
        held = {rate: list(self.seeds(variant, rate, metric).values()) for rate in self.rates(variant)}
        return {rate: values for rate, values in held.items() if values}

    def cells(self, variants: Collection[str], rate: float, metric: str) -> Cells:
        """The same for several variants; those without a level are left out."""
        found = {variant: self.seeds(variant, rate, metric) for variant in variants}
        return {variant: values for variant, values in found.items() if values}

    def parts(self, variants: Collection[str], rate: float) -> str:
        """In which parts of the run these variants were measured at `rate`: "1", "1, 4"; empty for a run in one part."""
        if not self.run.manifest.get("continued"):
            return ""
        # Of a level in which nothing completed no value is compared.
        held = {s.part for s in self.levels(variants, rate).values() if s.completed and s.part is not None}
        return ", ".join(map(str, sorted(held)))

    def starts(self, variants: Collection[str], rate: float) -> int:
        """The fewest server starts over which one of `variants` spreads its repeats at `rate` that are `alike`."""
        alike = self.alike(variants, rate)
        held = [self.levels((variant,), rate).values() for variant in variants]
        return min(len({s.start for s in each if s.level.repeat in alike}) for each in held)

    def alike(self, variants: Collection[str], rate: float) -> set[int]:
        """The valid repeats at `rate` in which all of `variants` were sent the same requests, or as many a card."""
        held = [{s.level.repeat: s for s in self.levels((variant,), rate).values()} for variant in variants]

        def one_load(each: list[Summary]) -> bool:
            same = {(s.level.requests, s.level.trace_digest) for s in each}
            return len(same) == 1 or len({s.level.requests / s.cards for s in each}) == 1

        return {r for r in set.intersection(*map(set, held)) if one_load([each[r] for each in held])}

    def share_a_start(self, level_ids: Collection[str]) -> bool:
        """Whether some of these levels were measured on one server start."""
        held = [self.summaries[level_id].start for level_id in level_ids if level_id in self.summaries]
        return len(set(held)) < len(held)

    def rates(self, *variants: str) -> list[float]:
        """The rates at which each of `variants` has a valid level, ascending."""
        return sorted(set.intersection(*({s.level.rate for s in self.levels((v,)).values()} for v in variants)))

    def variants(self) -> list[str]:
        """The variants that the run holds levels of, in the profile's order."""
        held = {s.level.variant for s in self.summaries.values()}
        return [variant for variant in self.run.profile.variants if variant in held]

    def setups(self, *bases: str) -> dict[str, dict[str, str]]:
        """Setups (`Profile.setup`) that the run holds all of `bases` in, in the profile's order: by setup the variant of each
        base. Variants of one setup differ in their bases alone."""
        profile, found = self.run.profile, {}
        for variant in self.variants():
            if profile.base(variant) in bases:
                found.setdefault(profile.setup(variant), {}).setdefault(profile.base(variant), variant)
        return {setup: variants for setup, variants in found.items() if set(variants) == set(bases)}

    def pairs(self) -> Iterator[tuple[str, str, str]]:
        """(BF16 variant, FP8 variant, their setup) for each setup that the run holds both in."""
        for setup, variants in self.setups("bf16", "fp8").items():
            yield variants["bf16"], variants["fp8"], setup

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def saturated(self, *variants: str, rate: float) -> bool:
        """Whether some level of `variants` at `rate` was limited by something else than the offered load. Where the limit
        is unknown, the records say whether a backlog grew; without records it counts as kept up."""

        def kept_up(level_id: str) -> bool:
            if (cause := self.limit(level_id).cause) != "unknown":
                return cause == "offered load"
            level = self.level(level_id)
            return level is None or keeps_up(level.records) is not False

        return not all(kept_up(level_id) for level_id in self.levels(variants, rate))

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def noise(self, metric: str, *, saturated: bool, burst: bool) -> Noise | None:
        """The repeat-to-repeat noise of a metric, pooled over levels of one kind that have repeats, else of the same
        saturation: it is small below that, and larger where a pile grows than where it was sent at once."""
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
        """exp(sum of weight x log value) of variants at one rate, over the seeds at which all were sent one load; None for none.
        Of joules, which two meters measure, the interval is no tighter than these are apart."""
        noise = self.noise(metric, saturated=self.saturated(*weights, rate=rate), burst=math.isinf(rate))
        alike = self.alike(weights, rate)
        seeds = {variant: self.seeds(variant, rate, metric) for variant in weights}
        found = contrast(
            {v: {r: x for r, x in each.items() if r in alike} for v, each in seeds.items()}, weights, noise
        )
        if found is None:
            return None
        found = found.over(self.starts(weights, rate))
        return found.at_least(self._meters_apart(weights, rate)) if metric in JOULES else found

    def _meters_apart(self, weights: Mapping[str, float], rate: float) -> float:
        """How far the two energy meters are apart in a contrast, as a logarithm; 0 where one of them is missing."""
        apart = 0.0
        for variant, weight in weights.items():
            known = [one for s in self.levels((variant,), rate).values() if (one := s.meters_apart) is not None]
            apart += weight * fmean(known) if known else 0.0
        return abs(apart)

    def attainment(self, variant: str, slo: SLO) -> list[tuple[float, Attainment]]:
        """What every valid level of a variant that was offered a rate says of an objective, with its rate, ascending."""
        held = {level_id: s.level.rate for level_id, s in self.levels((variant,)).items()}
        read = [(rate, self.level(level_id)) for level_id, rate in held.items() if math.isfinite(rate)]
        return sorted((rate, attains(level.records, slo)) for rate, level in read if level)

    def slo_limit(self, variant: str, slo: SLO) -> Bracket:
        """The rates between which a variant's SLO limit lies, by all its levels."""
        return bracket((rate, found.bound) for rate, found in self.attainment(variant, slo))

    def equal_load(self, metric: str) -> list["Compared"]:
        """FP8 over BF16 for every setup and rate that both were measured in."""
        return [
            Compared(setup, rate, "", {"bf16": bf16, "fp8": fp8}, one)
            for bf16, fp8, setup in self.pairs()
            for rate in self.rates(bf16, fp8)
            if (one := self.compare(fp8, bf16, rate, metric))
        ]

    def ablation(self, metric: str) -> list["Compared"]:
        """The effects of FP8's halves (`ABLATION`) for every setup and rate that all four variants were measured in."""
        return [
            Compared(setup, rate, effect, variants, one)
            for setup, variants in self.setups(*ABLATION["interaction"]).items()
            for rate in self.rates(*variants.values())
            for effect, weights in ABLATION.items()
            if (one := self.contrast({variants[base]: w for base, w in weights.items()}, rate, metric))
        ]

    def in_flight(self) -> dict[str, tuple[float, float]]:
        """By level id the mean number of requests in flight over the whole run: what Little's law expects of the completed
        ones, and what the EngineCore counted, running and waiting. Left out are levels without samples, and those with so few
        in flight that it is chance how many a sample meets (fewer than 100 in all samples)."""
        held = {}
        for level_id, s in self.summaries.items():
            level, expected = self.level(level_id), s.mean_concurrent_requests
            if level is not None and level.telemetry is not None and expected:
                sampled = level.telemetry[level.telemetry["at_s"].between(0, s.duration_s)]
                counted = (sampled["running"] + sampled["waiting"]).dropna()
                if expected * len(counted) >= 100:
                    held[level_id] = (expected, float(counted.mean()))
        return held

    def a_base_each(self) -> list[str]:
        """The first variant of each base that the run holds levels of, in the profile's order."""
        first: dict[str, str] = {}
        for variant in self.variants():
            first.setdefault(self.run.profile.base(variant), variant)
        return list(first.values())

    def fullest(self) -> list[str]:
        """The ids of one level each of BF16 and FP8, in the setup least in the way, at each one's highest rate; where the run
        holds no two variants that differ in nothing else, of each base's first."""
        pairs = [pair[:2] for pair in self.pairs() if self.rates(*pair[:2])]
        last = pairs[-1] if pairs else [variant for variant in self.a_base_each() if self.rates(variant)]
        return [next(iter(self.levels((variant,), self.rates(variant)[-1]))) for variant in last]

    def kv_room(self) -> list[tuple[str, int, float, float, float | None]]:
        """(variant, KV tokens, requests they can hold, most running, fullest share) of every variant that was sampled."""
        each, rows = self.kv_tokens_a_request(), []
        for variant in self.variants() if each else ():
            held = list(self.levels((variant,), valid=False).values())
            tokens = held[0].kv_cache_tokens
            most = max((s.running_max for s in held if s.running_max is not None), default=None)
            fullest = max((s.kv_cache_usage_max for s in held if s.kv_cache_usage_max is not None), default=None)
            if tokens and most is not None:
                rows.append((variant, tokens, tokens / each, most, fullest))
        return rows

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """One row a level, by level id: the fields of `Summary`, its level and its server, the variant's base and setup."""
        profile, rows = self.run.profile, {}
        for level_id, s in self.summaries.items():
            server = dataclasses.asdict(s.server) if s.server else {}
            base, setup = profile.base(s.level.variant), profile.setup(s.level.variant)
            derived = {"base": base, "setup": setup, "frontend_us_per_token": s.frontend_us_per_token}
            fields = dataclasses.asdict(s) | dataclasses.asdict(s.level)
            row = {"level_id": level_id} | server | fields | derived
            # Parquet has no column of nothing but empty tables.
            rows[level_id] = {name: None if value == {} else value for name, value in row.items()}
        columns = dict.fromkeys(f.name for kind in (MeasuredLevel, Summary) for f in dataclasses.fields(kind))
        frame = pd.DataFrame.from_dict(rows, orient="index") if rows else pd.DataFrame(columns=["level_id", *columns])
        return frame.drop(columns=["level", "server"], errors="ignore")


class Compared(NamedTuple):
    """A ratio of variants of one setup at one rate. `effect` names it ("": FP8 over BF16); `variants` are by base."""

    setup: str
    rate: float
    effect: str
    variants: Mapping[str, str]
    ratio: Ratio

    @property
    def brief(self) -> str:
        """The setup, or the variants' names where it changes more than a cell of a table takes."""
        return self.setup if len(self.setup) <= _BRIEF else " / ".join(self.variants[v] for v in ("fp8", "bf16"))


def levels(run: Run) -> pd.DataFrame:
    """The run's levels as a DataFrame, one row a level, by level id. Columns: the fields of `metrics.summary.Summary` (which
    gives units and definitions), of its level and of its server; the variant's `base` and `setup`; `limited_by`, what limited
    the level; `roofline_memory` and `roofline_compute`, the share of the card's bandwidth and matrix peak that it needed."""
    seen = evidence(run)
    near = {level_id: seen.roofline(level_id) for level_id in seen.summaries}
    shares = {f"roofline_{name}": [getattr(one, name, None) for one in near.values()] for name in ("memory", "compute")}
    return seen.frame.assign(limited_by=[seen.limit(level_id).cause for level_id in near], **shares)


def evidence(run: Run, instead: Mapping[str, str] | None = None) -> Evidence:
    """The evidence of a run as it is now: a level that is measured (again) later needs a new one. Raises BadInput."""
    stamps = tuple(sorted((p.parent.name, p.stat().st_mtime_ns) for p in a_run(run).path.glob("levels/*/summary.json")))
    return _evidence(run.path.resolve(), stamps, run, tuple(sorted((instead or {}).items())))


@functools.lru_cache(maxsize=8)  # a page compares as many runs
def _evidence(_path, _stamps: tuple, run: Run, instead: tuple) -> Evidence:
    return Evidence(run, dict(instead))


def unmeasured(run: Run) -> str | None:
    """Why a run can carry no verdict, whatever it holds; None when it can."""
    if run.emulated:
        return "EMULATED GPU"
    if run.profile.device != "cuda":
        return "no GPU"
    return f"OTHER CARD: {name}, not the profile's {run.profile.gpu.name}" if (name := other_card(run)) else None


def other_card(run: Run) -> str | None:
    """The GPU that (a part of) a run was measured on, where its profile names another."""
    card = run.profile.gpu
    if card is None or run.profile.device != "cuda":
        return None
    # A server takes the first GPU that is visible.
    first = [gpus[0] for place in run.parts if (gpus := (place.get("machine") or {}).get("gpus"))]
    return next((name for name in first if not card.fits(name)), None)
