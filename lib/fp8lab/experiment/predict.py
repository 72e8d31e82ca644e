"""What a server would do under a load that nobody measured: played in virtual time with a fitted step model. PREDICTED."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..config.profile_file import read_profile
from ..config.trace import Trace, arrival_times, begun_anew, named_trace
from ..errors import BadInput
from ..metrics.slo import SLO, Bracket, attains, probe_requests, search
from ..metrics.step_model import StepModel, read_fits
from .step_fit import Played, play_level

# A level goes on for so long that what is slow shows, and a backlog; to find a highest rate for longer, and over several seeds
# of arrivals: chance moves where a bracket ends by more than its width.
_LEVEL_S, _SEARCHED_S, _SEEDS = 60.0, 300.0, 3
_SLOWEST, _FASTEST = 1e-3, 1e6  # requests/s
_MOST_REQUESTS = 10_000
_PROBES = 16
# A seed's bracket is made this narrow, if each rate in it can be decided.
_NARROW = 0.02


@dataclass(frozen=True)
class Predicted:
    """A variant under a load: `rate` in requests/s (inf: all at once), and what comes of it."""

    variant: str
    rate: float
    played: Played


# Whose scheduling is played: `metrics.virtual`, or the installed vLLM's own (`vllm_scheduler`), the same and slower.
SCHEDULERS = ("virtual", "vllm")


def predict(
    variant: str, model: StepModel, trace: Trace, rate: float, *, seed: int = 0, scheduler: str = "virtual"
) -> Predicted:
    """What `variant` does when the requests of `trace` come at `rate`. Raises BadInput for a request that the KV cache cannot
    hold, and for a rate beyond any."""
    _check_rate(rate)
    if scheduler == "vllm":
        from .vllm_scheduler import play
    elif scheduler == "virtual":
        from ..metrics.virtual import play
    else:
        raise BadInput(f"scheduler {scheduler!r} is none of {', '.join(SCHEDULERS)}")
    due = arrival_times(len(trace), rate, seed=seed)
    return Predicted(variant, rate, play_level(model, trace.prompt_tokens, trace.output_tokens, due, by=play))


def _check_rate(rate: float) -> None:
    if not (rate == math.inf or _SLOWEST <= rate <= _FASTEST):
        raise BadInput(
            f"rate {rate:g}: expected {_SLOWEST:g} to {_FASTEST:g} requests/s, or inf, which sends all at once"
        )


def predict_rates(
    models: Mapping[str, StepModel], draw: Callable[[int], Trace], rates: Sequence[float]
) -> list[Predicted]:
    """What each variant does with a minute of arrivals at each of these rates (requests/s; inf: 2,000 at once), ten requests at
    least and ten thousand at most. Raises BadInput as `predict`."""
    for rate in rates:
        _check_rate(rate)
    counts = [2000 if rate == math.inf else round(min(max(_LEVEL_S * rate, 10), _MOST_REQUESTS)) for rate in rates]
    return [
        predict(variant, model, draw(count), rate)
        for variant, model in models.items()
        for rate, count in zip(rates, counts, strict=True)
    ]


def highest_rate(
    variant: str, model: StepModel, draw: Callable[[int], Trace], slo: SLO, *, start: float = 10.0, seed: int = 0
) -> Bracket:
    """The rates between which the highest one lies that meets `slo`: the lowest and the highest end of the brackets of several
    seeds of arrivals, each level minutes long. `draw` gives so many requests."""
    trace, found = draw(probe_requests(slo)), []
    alone = predict(variant, model, trace, 1e-3, seed=seed).played.records
    if attains(alone, slo).bound == "missed":
        return Bracket(0.0, 0.0)
    for one in range(seed, seed + _SEEDS):

        def probe(rate: float, seed: int = one) -> str:
            requests = max(probe_requests(slo), math.ceil(rate * _SEARCHED_S))
            return attains(predict(variant, model, draw(requests), rate, seed=seed).played.records, slo).bound

        found.append(search(probe, start, tolerance=_NARROW, max_probes=_PROBES)[0])
        start = found[-1].low or start
    return Bracket(min(one.low for one in found), max(one.high for one in found))


def step_models(fit: str, variants: Sequence[str] | None = None, *, card: str = "") -> dict[str, StepModel]:
    """The step models of a fit in `data/fits` (or a .toml file) for these variants, or for all; `fitted=name` gives one another
    name, such as a run's. With a `card`, a profile's name, they are as they would be there by the datasheets. Raises BadInput
    for a fit, variant or card that there is not."""
    fits = read_fits(fit)
    named = [one.partition("=") for one in variants or fits]
    if unknown := [one for one, _, _ in named if one not in fits]:
        raise BadInput(f"the fit holds no variant {', '.join(unknown)} (it holds: {', '.join(fits)})")
    models = {name or one: fits[one] for one, _, name in named}
    if not card:
        return models
    if (other := read_profile(card).gpu) is None:
        raise BadInput(f"card {card} has no datasheet ([gpu]); name a profile of a card")
    return {variant: model.on(other, card) for variant, model in models.items()}


def drawing(
    trace: str = "sharegpt-like", *, input_tokens: int = 1024, output_tokens: int = 128, seed: int = 0,
    tokenizer: str | None = None, max_context: int | None = None,
) -> Callable[[int], Trace]:  # fmt: skip
    """What draws so many requests of a trace, a file that holds fewer begun anew; its arrival times are left out. Raises BadInput, when it draws, for one that
    cannot be read."""

    def draw(requests: int, by: int) -> Trace:
        return named_trace(
            trace, requests, seed=by, input_tokens=input_tokens, output_tokens=output_tokens, tokenizer=tokenizer,
            times="dropped", max_context=max_context, fewer=True,
        )  # fmt: skip

    held = []

    def first(requests: int) -> Trace:
        # A trace is the beginning of any longer one: a search asks for many, and the words of prompts take longer than playing.
        if not held or len(held[0]) < requests:
            held[:] = [begun_anew(draw, requests, seed)]
        return held[0].head(requests)

    return first


def what_if(model: StepModel) -> dict[str, StepModel]:
    """The model as it would be with something twice as fast, by what that is."""
    halves = {
        "what each step costs, batch or not": ("base_ms", "mixed_ms"),
        "memory": ("weights_ms", "context_ns", "mixed_context_ns"),
        "matrix products": ("token_us",),
        "what each token costs beside them": ("request_us",),
    }
    return {
        f"{what}: half the time": dataclasses.replace(model, **{name: getattr(model, name) / 2 for name in names})
        for what, names in halves.items()
    }


def longer(trace: Trace, *, prompts: int = 1, answers: int = 1) -> Trace:
    """The same requests with so many times the tokens."""
    return dataclasses.replace(
        trace, prompt_tokens=tuple(prompts * n for n in trace.prompt_tokens),
        output_tokens=tuple(answers * n for n in trace.output_tokens),
    )  # fmt: skip
