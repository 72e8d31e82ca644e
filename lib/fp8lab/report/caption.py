"""What the captions, names and figures of a run say first where it was not measured on the GPU that its profile names."""

from ..runs import Run


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
    places = [run.manifest, *run.manifest.get("continued", [])]
    # A server takes the first GPU that is visible.
    first = [gpus[0] for place in places if (gpus := place.get("machine", {}).get("gpus"))]
    return next((name for name in first if not card.fits(name)), None)


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
