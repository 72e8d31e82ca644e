"""What was foretold, as a figure: never in the colours and markers of what was measured."""

from collections.abc import Callable, Mapping, Sequence

from ...config.trace import Trace
from ...errors import BadInput
from ...experiment.predict import predict
from ...metrics.step_model import StepModel
from .drawing import INK, figure, plainly

# Colours that no measured variant has, with markers that are lines and dashes that are no setup's.
_STYLES = (("#7A4B00", "x"), ("#4B2E83", "+"), ("#00576B", "1"), ("#8C1D40", "2"), ("#3D5A00", "3"), ("#555555", "4"),
           ("#A0522D", "|"), ("#6A1B9A", "_"))  # fmt: skip


@figure("predicted", "PREDICTED: what a card would do, by the rate that is offered", columns=2)
def predicted_figure(
    axes, models: Mapping[str, StepModel], draw: Callable[[int], Trace], rates: Sequence[float], *, requests: int = 2000
) -> str:
    """Output tokens/s, and the time that 99 % of first tokens come within (logarithmic), of each variant at these rates
    (requests/s)."""
    trace = draw(requests)
    for (variant, model), (colour, marker) in zip(models.items(), _STYLES, strict=False):
        levels = [predict(variant, model, trace, rate) for rate in sorted(rates)]
        for one, name in zip(axes, ("output_token_throughput", "p99_ttft_ms"), strict=True):
            values = [level.played.found[name] for level in levels]
            one.plot(
                sorted(rates), values, color=colour, marker=marker, ls=(0, (6, 2, 1, 2)), lw=1.4, ms=7, label=variant
            )
    axes[0].set(xlabel="offered, requests/s", ylabel="output tokens/s", ylim=(0, None))
    axes[1].set(xlabel="offered, requests/s", ylabel="TTFT p99, ms", yscale="log")
    for one in axes:
        one.xaxis.set_major_formatter(plainly)
        one.text(0.98, 0.04, "PREDICTED", transform=one.transAxes, ha="right", color=INK, alpha=0.35, fontsize=14)
    axes[0].yaxis.set_major_formatter(plainly)
    for ticks in (axes[1].yaxis.set_major_formatter, axes[1].yaxis.set_minor_formatter):
        ticks(plainly)
    axes[0].legend(frameon=False, fontsize=9)
    if left_out := list(models)[len(_STYLES) :]:
        raise BadInput(f"{len(models)} variants are more than {len(_STYLES)} lines; draw without {', '.join(left_out)}")
    scaled = "; ".join(dict.fromkeys(model.note for model in models.values() if model.note))
    return f"{requests:,} requests of {trace.name} at each rate. " + (f"{scaled}. " if scaled else "")
