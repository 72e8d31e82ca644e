"""The choice among number formats as a figure: speed against answers kept."""

from ...results.run_folder import Run
from ..tables.recipes import chosen
from ..verdict import card_note
from .drawing import INK, figure, label_where_free, plainly

# Colours of the formats, told apart also by their names beside them.
_COLOURS = {"bf16": "#0072B2", "fp8": "#D55E00", "int8": "#009E73", "int4": "#CC79A7", "w4a8": "#E69F00"}


@figure("recipes", "Which number format is fast, and what does it cost?", columns=2)
def recipes_figure(axes, run: Run, answers: Run | None = None) -> str:
    """Tokens a second (all requests at once, or the most that was delivered; those of one request at the lowest rate) against the
    share of positions at which the trained model of `answers` has the same likeliest token as its reference, or, without
    `answers`, against tokens a joule; the area of a mark is the weights' memory."""
    label = "same likeliest token, % of positions" if answers else "output tokens a joule"
    rows = [
        (variant, tokens, alone, gib, 100 * one.top1_agreement.value if one else None if answers else per_joule)
        for variant, tokens, alone, gib, per_joule, one in chosen(run, answers)
    ]
    drawn = [row for row in rows if row[4] is not None]
    left_out = [row[0] for row in rows if row[4] is None]
    places = zip(axes, (1, 2), ("fullest load, output tokens/s", "lowest rate, tokens/s of a request"), strict=True)
    for one, place, across in places:
        points = [(row[0], row[place], row[4]) for row in drawn if row[place]]
        for (variant, x, y), row in zip(points, [row for row in drawn if row[place]], strict=True):
            colour = _COLOURS.get(variant.partition("-")[0], INK)
            one.scatter(x, y, s=12 * (row[3] or 4), color=colour, alpha=0.7, edgecolor=INK, lw=0.6)
        one.set(xlabel=across, ylabel=label)
        one.margins(0.25, 0.2)
        one.xaxis.set_major_formatter(plainly)
        label_where_free(one, points)
    said = f"Not drawn, theirs was not measured: {', '.join(left_out)}. " if left_out else ""
    model = f"Answers: run {answers.path.name}, {answers.profile.title}; {card_note(answers)}" if answers else ""
    least = "" if answers else "Tokens a joule are those of the fullest load. "
    return f"Right and up is better; a mark's area is the memory of its weights. {least}{said}{model}".strip()
