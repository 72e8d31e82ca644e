"""Quality: the variants' answers beside the reference's and beside the published result, and what rounding does to numbers."""

import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..experiment.quality import AGAIN, comparisons, reference_variant, summaries, tables
from ..metrics import quality
from ..metrics.quality import Estimate, distinguishable, identical_prefix
from ..results.run_folder import Run, a_run
from ..ui import Table
from .drawing import GREY, INK, STYLE, figure, note, style_of
from .verdict import card_note, claim_of

# The published reference (static, per-tensor scales); its value is claim Q1 of data/published.toml.
PUBLISHED = "Meta-Llama-3-8B-Instruct-FP8, Open LLM benchmark average: 68.71 in BF16, 68.22 in FP8 (99.28 % recovery)"
PUBLISHED_SOURCE = "model card of RedHatAI/Meta-Llama-3-8B-Instruct-FP8"
_COLUMNS = (
    ("perplexity_ratio", "perplexity, ratio", "{:.4f}"),
    ("kl_mean", "KL mean, nats, at least", "{:.5f}"),
    ("kl_p99", "KL p99, nats, at least", "{:.4f}"),
    ("top1_agreement", "same top token", "{:.2%}"),
    ("same_prefix", "greedy tokens the same", "{:.0f}"),
    ("same_answers", "answers the same", "{:.0%}"),
    ("output_ratio", "output tokens, ratio", "{:.3f}"),
)


def quality_table(run: Run) -> Table:
    """Every measurement in one line, with 95 % intervals; "none" marks what the noise floor hides."""
    held, reference = comparisons(run), reference_variant(run.profile)
    floor, model = held.get(reference + AGAIN), next(iter(summaries(run).values()))["model"]
    rows = []
    for name, one in held.items():
        cells = []
        for metric, _, pattern in _COLUMNS:
            hidden = floor and name != reference + AGAIN and not distinguishable(metric, one, floor)
            cells.append(_interval(getattr(one, metric), pattern) + " none" * bool(hidden))
        cells.insert(2, f"{one.unlisted_mass:.0%}")
        told = ["reference"] * len(cells) if name == reference else cells
        shown = f"{name} (noise floor)" if name == reference + AGAIN else name
        rows.append((shown, _interval(one.perplexity, "{:.3f}"), *told))
    titles = [title for _, title, _ in _COLUMNS]
    columns = ("variant", "perplexity", *titles[:2], "not listed", *titles[2:])
    caption = (
        f"{card_note(run)}What the number format does to the answers of {model}, against {reference}; 95 % intervals in "
        f'brackets; "none": no more than {reference} differs from itself in other batches. Run {run.path.name}'
    )
    return Table(caption, columns, rows)


def asked_table(run: Run) -> Table:
    """What was asked, of which model, and how long it took."""
    rows = []
    for name, summary in summaries(run).items():
        in_flight, seconds = summary["in_flight"], summary["read_s"] + summary["answer_s"]
        rows.append((name, f"{summary['documents']}", f"{summary['predicted_tokens']:,}", f"{in_flight['documents']}",
                     f"{summary['asked']['prompts']}", f"{in_flight['prompts']}", f"{seconds:.0f} s",
                     f"{summary['server']['startup_s']:.0f} s"))  # fmt: skip
    columns = ("measurement", "documents", "tokens predicted", "documents at once", "prompts", "prompts at once")
    first = next(iter(summaries(run).values()))
    text = f"text {first['asked']['text']}, documents of {first['asked']['document_tokens']} tokens"
    return Table(f"{card_note(run)}{first['model']}; {text}", (*columns, "measured in", "server start"), rows)


def answers_table(run: Run, variant: str = "", count: int = 3) -> Table:
    """Where the first `count` greedy answers of `variant` (default: the last measured) part from the reference's, in words."""
    reference = reference_variant(a_run(run).profile)
    variant = variant or [name for name in comparisons(run) if not name.endswith(AGAIN)][-1]
    ours, theirs = (tables(run, name)[1] for name in (reference, variant))
    rows = []
    for prompt, one, other in zip(ours["prompt"], ours["text"], theirs["text"], strict=True):
        if one != other and len(rows) < count:
            at = identical_prefix(list(one), list(other))
            start = max(0, at - 40)
            before = ("…" if start else "") + one[start:at]
            rows.append((f"{prompt}", before, *(text[at : at + 60] or "(ends here)" for text in (one, other))))
    columns = ("prompt", "both", f"{reference} goes on", f"{variant} goes on")
    return Table(f"{card_note(run)}Where answers of {variant} part from {reference}'s", columns, rows)


def published_table(run: Run) -> Table:
    """The published FP8 result beside this run's: not the same model, not the same measure, and it says so."""
    held, reference = comparisons(run), reference_variant(run.profile)
    rows = [("published", PUBLISHED, f"{claim_of('Q1')['fp8']['value']} % of the benchmark average", PUBLISHED_SOURCE)]
    for name, one in held.items():
        if name not in (reference, reference + AGAIN):
            kept = f"{_interval(one.kept, '{:.2%}')} of the perplexity"
            rows.append((name, summaries(run)[name]["model"], kept, f"run {run.path.name}"))
    return Table(f"{card_note(run)}How much is kept; the rows measure different things on different models",
                 ("", "model and measure", "kept", "source"), rows)  # fmt: skip


def formats_table() -> Table:
    """The values that each format has."""
    rows = []
    for name in quality.FORMATS:
        every = quality.values_of(name)
        positive = every[every > 0]
        between = int(((positive >= 1) & (positive < 2)).sum())
        rows.append((name, f"{len(every)}", f"{positive[-1]:,.0f}", f"{positive[0]:.2g}", f"{between}",
                     f"{1 / (2 * between):.1%}"))  # fmt: skip
    columns = ("format", "finite values", "largest", "smallest above 0", "values from 1 to 2", "worst error there")
    return Table("The two FP8 formats", columns, rows)


def weights_table(folder: Path) -> Table:
    """What rounding does to the model's weight matrices, by kind, with per-tensor scales."""
    from ..models.checkpoints import matrices

    found: dict[str, list[tuple]] = {}
    for kind, _, stored in matrices(folder):
        tensor = stored.float()
        peak = float(tensor.abs().max() / tensor.square().mean().sqrt())
        errors = (quality.rounding_error(tensor, name).relative for name in (*quality.FORMATS, "INT8"))
        found.setdefault(kind, []).append((peak, *errors))
    rows = []
    for kind, each in found.items():
        peaks, *errors = zip(*each, strict=True)
        rows.append((kind, f"{len(each)}", f"{max(peaks):.0f}", *(f"{statistics.mean(e):.2%}" for e in errors)))
    columns = ("weights", "matrices", "largest / RMS", "E4M3 error", "E5M2 error", "INT8 error")
    caption = "Relative error of rounding the weights, a scale for each tensor, mean over the matrices"
    return Table(caption, columns, rows)


def kv_rounding_table(folder: Path, text: str, tokens: int = 512) -> Table:
    """What rounding does to keys and values: with scale 1.0, as the published flags leave it, and calibrated."""
    from ..models.checkpoints import kv_cache

    rows = []
    for what, side in zip(("keys", "values"), zip(*kv_cache(folder, text, tokens), strict=True), strict=True):
        uncalibrated = [quality.rounding_error(layer, "E4M3", 1.0) for layer in side]
        others = [[quality.rounding_error(layer, name, scale).relative for layer in side]
                  for name, scale in (("E4M3", None), ("E5M2", 1.0))]  # fmt: skip
        peaks = [float(layer.abs().max()) for layer in side]
        rows.append((what, f"{min(peaks):.2g} to {max(peaks):.2g}", f"{max(e.clipped for e in uncalibrated):.2%}",
                     f"{statistics.mean(e.relative for e in uncalibrated):.2%}",
                     *(f"{statistics.mean(errors):.2%}" for errors in others)))  # fmt: skip
    columns = ("KV cache", "largest, by layer", "clipped, worst layer", "E4M3 error, scale 1.0")
    columns += ("E4M3 error, calibrated", "E5M2 error, scale 1.0")
    return Table(f"Relative error of rounding the KV cache of {tokens} tokens, mean over the layers", columns, rows)


def _interval(estimate: Estimate, pattern: str) -> str:
    value, low, high = (pattern.format(each) for each in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


@figure("quality_kl", "How far does each variant move the next token's distribution?")
def divergence_figure(axes, run: Run) -> str:
    """The share of positions at which a variant moves the next-token distribution by more than so many nats."""
    for name in _others(run):
        kl = np.sort(tables(run, name)[0]["kl"].to_numpy(float))
        points = _visible(len(kl), int((kl <= 0).sum()))
        label = _label(name) if len(points) else f"{_label(name)}: no difference at all"
        axes.plot(kl[points], 1 - points / len(kl), label=label, markevery=0.12, **_style(run, name))
    axes.set(xscale="log", yscale="log", xlabel="KL divergence from the reference, nats (at least)",
             ylabel="share of positions beyond it", ylim=(1e-4, 1.3))  # fmt: skip
    axes.legend(frameon=False, loc="lower left")
    return f"Every position of the text, next-token distribution against {reference_variant(run.profile)}'s."


@figure("quality_parting", "For how long do greedy answers stay the same?")
def parting_figure(axes, run: Run) -> str:
    """The share of greedy answers that are still the reference's, word for word, after so many tokens."""
    others = _others(run)
    reference = list(tables(run, reference_variant(run.profile))[1]["tokens"])
    longest = max(len(tokens) for tokens in reference)
    for name in others:
        answers = list(tables(run, name)[1]["tokens"])
        # An answer that never parts counts as the same to the right edge.
        shared = [(identical_prefix(a, b), a, b) for a, b in zip(reference, answers, strict=True)]
        parts = np.array([longest + 1 if same == len(a) == len(b) else same for same, a, b in shared])
        steps = np.arange(longest + 1)
        share = (parts[None, :] >= steps[:, None]).mean(axis=1)
        axes.step(steps, share, where="post", markevery=0.1, label=_label(name), **_style(run, name))
    axes.set(xlabel="tokens into the answer", ylabel="share of answers still the same")
    axes.set(xlim=(0, longest), ylim=(0, 1.05))
    axes.legend(frameon=False, loc="best")
    return (f"{len(reference)} greedy answers, each against {reference_variant(run.profile)}'s to the same prompt. Parting "
               "is no error: one close call decided the other way changes all that follows.")  # fmt: skip


@figure("quality_formats", "What is lost at each magnitude", columns=2)
def formats_figure(axes, folder: Path) -> str:
    """E4M3 and E5M2: rounding error by magnitude over where the model's scaled weights are, and an outlier's cost."""
    from ..models.checkpoints import matrices

    left, right = axes
    scaled = _scaled_weights(folder)
    magnitudes = np.geomspace(1e-5, 1e5, 4000)
    low, high = np.quantile(scaled, [0.01, 0.99])
    left.axvspan(low, high, color="#dddddd", label="98 % of the weights, scaled")
    colors = {"E4M3": STYLE["fp8"], "E5M2": STYLE["bf16"], "INT8": (GREY, "x")}
    for name in quality.FORMATS:
        left.plot(magnitudes, quality.relative_step(name, magnitudes), color=colors[name][0], lw=1.2, label=name)
    left.set(xlabel="magnitude after scaling", ylabel="worst relative rounding error")
    left.set(xscale="log", yscale="log", ylim=(5e-3, 2))
    left.legend(frameon=False, loc="lower left")
    weight = next(tensor for kind, _, tensor in matrices(folder) if kind == "q_proj")
    sizes = np.geomspace(10, 1e6, 11)
    for name, (color, marker) in colors.items():
        errors = [quality.outlier_error(weight, name, size) for size in sizes]
        right.plot(sizes, errors, color=color, marker=marker, ms=5, lw=1.6, label=name)
    right.set(xlabel="one outlier, times the matrix's RMS", ylabel="relative error of all others")
    right.set(xscale="log", yscale="log")
    right.legend(frameon=False, loc="center")
    right.set_title("What one outlier costs the rest", loc="left", fontsize=11, color=INK)
    return (f"Per-tensor scales: the largest magnitude becomes the format's largest value. Computed from this model's weights, of "
            f"which 98 % lie from {low:.2g} to {high:.2g} when scaled; the outlier is planted in the first query projection. A "
            "floating format gives up range before it gives up precision; INT8's even steps do not.")  # fmt: skip


def _visible(count: int, first: int) -> np.ndarray:
    """Indices from `first` below `count`, as many as the eye can tell apart: even ones, and ever closer to the end."""
    tail = count - np.unique(np.geomspace(1, max(count, 1), 400).astype(int))
    points = np.unique(np.concatenate([tail, np.linspace(0, count - 1, 200).astype(int)]))
    return points[points >= first]


def _scaled_weights(folder: Path) -> np.ndarray:
    """Magnitudes of a sample of every matrix's weights, each over its own E4M3 scale."""
    from ..models.checkpoints import matrices

    samples = []
    for _, _, tensor in matrices(folder):
        flat = tensor.float().flatten().abs()
        samples.append((flat[:: max(1, len(flat) // 2000)] / quality.per_tensor_scale(flat, "E4M3")).numpy())
    return np.concatenate(samples)


def _others(run: Run) -> Mapping:
    return {name: one for name, one in comparisons(run).items() if name != reference_variant(run.profile)}


def _style(run: Run, name: str) -> dict:
    own = {"color": GREY, "marker": "x"} if name.endswith(AGAIN) else style_of(run.profile, name)
    return own | {"ls": "-", "ms": 5, "lw": 1.6}


def _label(name: str) -> str:
    return f"{name.removesuffix(AGAIN)} again (noise floor)" if name.endswith(AGAIN) else name


@figure("number_line", "Which numbers do E4M3 and E5M2 have?", height=2.1)
def number_line_figure(axes) -> str:
    """The positive values of the two FP8 formats up to 16, and how far each goes."""
    axes.grid(axis="y", visible=False)
    told, top = [], 16
    for y, name in enumerate(quality.FORMATS):
        shown = [value for value in quality.values_of(name) if 0 <= value <= top]
        axes.vlines(shown, y - 0.3, y + 0.3, color=INK, lw=1)
        note(axes, f"… to {quality.largest_of(name):,.0f}", (top, y), (8, 0), va="center", fontsize=9)
        between = sum(1 <= value < 2 for value in shown)
        told.append(f"{name} has {between} values from 1 to below 2 and goes to {quality.largest_of(name):,.0f}")
    axes.set_yticks(range(len(quality.FORMATS)), list(quality.FORMATS))
    axes.set_ylim(len(quality.FORMATS) - 0.5, -0.5)
    powers = (0, 1, 2, 4, 8, top)
    axes.set_xticks(powers, [f"{power}" for power in powers])
    axes.set(xlabel="value (negative ones mirror these)", xlim=(-0.3, top + 3))
    return f"{'; '.join(told)}. A scale moves a tensor's largest value to the end of the line; what is small keeps its relative steps."
