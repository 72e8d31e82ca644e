"""What the captions, names and figures of a run say first where it was not measured on the GPU that its profile names."""

from ..results.run_folder import Run, other_card, unmeasured


def card_note(*runs: Run) -> str:
    """How every caption begins; empty where all was measured on the card that it speaks of."""
    notes = []
    for run in runs:
        if run.emulated:
            notes.append("EMULATED GPU, nothing measured. ")
        elif other_card(run):
            notes.append(f"{unmeasured(run)}. ")
    return "".join(dict.fromkeys(notes))


def card_mark(run: Run) -> str:
    """The same in two words at most, for a run's name and across a figure; empty where all is as it should be."""
    return "EMULATED" if run.emulated else "OTHER CARD" if other_card(run) else ""
