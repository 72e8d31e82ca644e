"""The figures of quality: how far next-token distributions move, when greedy answers part, what rounding does."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...experiment.quality import AGAIN, comparisons, reference_variant, tables
from ...metrics.quality import identical_prefix
from ...results.run_folder import Run
from .drawing import INK, STYLE, figure

_FLOOR = ("#767676", "x")
_FALLBACK = ("#56B4E9", "v")


@figure("quality_kl", "How far does each variant move the next token's distribution?")
def divergence_figure(axes, run: Run) -> str:
    """The share of positions at which a variant moves the next-token distribution by more than so many nats."""
    for name in _others(run):
        kl = np.sort(tables(run, name)[0]["kl"].to_numpy(float))
        points = _visible(len(kl), int((kl <= 0).sum()))
        (color, marker), label = _style(name), _label(name)
        label = label if len(points) else f"{label}: no difference at all"
        style = {"color": color, "marker": marker, "markevery": 0.12, "ms": 5, "lw": 1.6}
        axes.plot(kl[points], 1 - points / len(kl), label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="KL divergence from the reference, nats (at least)",
             ylabel="share of positions beyond it", ylim=(1e-4, 1.3))  # fmt: skip
    axes.legend(frameon=False, loc="lower left")
    return f"Every position of the text, next-token distribution against {reference_variant(run.profile)}'s."


@figure("quality_parting", "For how long do greedy answers stay the same?")
def parting_figure(axes, run: Run) -> str:
    """The share of greedy answers that are still the reference's, word for word, after so many tokens."""
    reference = list(tables(run, reference_variant(run.profile))[1]["tokens"])
    longest = max(len(tokens) for tokens in reference)
    for name in _others(run):
        answers = list(tables(run, name)[1]["tokens"])
        # An answer that never parts counts as the same to the right edge.
        shared = [(identical_prefix(a, b), a, b) for a, b in zip(reference, answers, strict=True)]
        parts = np.array([longest + 1 if same == len(a) == len(b) else same for same, a, b in shared])
        steps = np.arange(longest + 1)
        share = (parts[None, :] >= steps[:, None]).mean(axis=1)
        color, marker = _style(name)
        axes.step(steps, share, where="post", color=color, marker=marker, markevery=0.1, ms=5, label=_label(name))
    axes.set(xlabel="tokens into the answer", ylabel="share of answers still the same")
    axes.set(xlim=(0, longest), ylim=(0, 1.05))
    axes.legend(frameon=False, loc="best")
    return (f"{len(reference)} greedy answers, each against {reference_variant(run.profile)}'s to the same prompt. Parting "
               "is no error: one close call decided the other way changes all that follows.")  # fmt: skip


@figure("quality_formats", "What is lost at each magnitude", columns=2)
def formats_figure(axes, folder: Path) -> str:
    """E4M3 and E5M2: rounding error by magnitude over where the model's scaled weights are, and an outlier's cost."""
    from ...metrics import number_formats
    from ...models.checkpoints import matrices

    left, right = axes
    scaled = _scaled_weights(folder)
    magnitudes = np.geomspace(1e-5, 1e5, 4000)
    low, high = np.quantile(scaled, [0.01, 0.99])
    left.axvspan(low, high, color="#dddddd", label="98 % of the weights, scaled")
    colors = {"E4M3": STYLE["fp8"], "E5M2": STYLE["bf16"], "INT8": _FLOOR}
    for name in number_formats.FORMATS:
        left.plot(magnitudes, number_formats.relative_step(name, magnitudes), color=colors[name][0], lw=1.2, label=name)
    left.set(xlabel="magnitude after scaling", ylabel="worst relative rounding error")
    left.set(xscale="log", yscale="log", ylim=(5e-3, 2))
    left.legend(frameon=False, loc="lower left")
    weight = next(tensor for kind, _, tensor in matrices(folder) if kind == "q_proj")
    sizes = np.geomspace(10, 1e6, 11)
    for name, (color, marker) in colors.items():
        errors = [number_formats.outlier_error(weight, name, size) for size in sizes]
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
    from ...metrics import number_formats
    from ...models.checkpoints import matrices

    samples = []
    for _, _, tensor in matrices(folder):
        flat = tensor.float().flatten().abs()
        samples.append((flat[:: max(1, len(flat) // 2000)] / number_formats.per_tensor_scale(flat, "E4M3")).numpy())
    return np.concatenate(samples)


def _others(run: Run) -> Mapping:
    return {name: one for name, one in comparisons(run).items() if name != reference_variant(run.profile)}


def _style(name: str) -> tuple[str, str]:
    return _FLOOR if name.endswith(AGAIN) else STYLE.get(name, _FALLBACK)


def _label(name: str) -> str:
    return f"{name.removesuffix(AGAIN)} again (noise floor)" if name.endswith(AGAIN) else name
