"""What each variant answers: serve it, have it read a text and answer prompts, compare with the reference, store.

The reference is the profile's first variant. It is asked twice, the second time in other batches: that difference
is the noise floor. In the run folder, for every measurement (a variant's name, or the reference's with `-again`):

quality/<name>.json             what was asked, the server, the comparison (written last: it is complete)
quality/<name>.parquet          one row a predicted token: see `fp8lab.metrics.quality.position_table`
quality/<name>-answers.parquet  one row a prompt: tokens, finish_reason, text
quality/<name>-top.parquet      the k likeliest tokens at every position; not kept in recorded runs
"""

import dataclasses
import datetime
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..config.profile import Profile, names_of
from ..errors import BadInput, LevelFailed, RunMismatch
from ..load.answers import answer, read_documents, tokenize
from ..load.endpoint import Endpoint
from ..metrics.quality import Comparison, Estimate, Reading, compare, position_table
from ..models.checkpoints import without_widgets
from ..paths import DATA, portable, repository_relative
from ..results.run_folder import Run, a_run
from ..server.command import source_model
from ..server.launch import Server
from ..system import gpu
from ..ui import StatusLine
from .speed import serve

SHIPPED = DATA / "texts" / "opticks-book-1.txt"


@dataclass(frozen=True)
class Text:
    """A text with its name for tables and its SHA-256, so that a run says what was read without holding it."""

    name: str
    content: str
    sha256: str

    def passages(self, count: int) -> list[str]:
        """`count` passages of 80 words at even distances, white space made single; raises BadInput if too short."""
        every, words = self.content.split(), 80
        if len(every) < count + words:
            raise BadInput(f"text {self.name}: {len(every)} words are too few for {count} passages of {words}; "
                           "take a longer text or fewer prompts")  # fmt: skip
        step = (len(every) - words) // max(count, 1)
        return [" ".join(every[i * step : i * step + words]) for i in range(count)]


def read_text(path: str | Path = "") -> Text:
    """The text at `path`, plain UTF-8; empty means Newton's Opticks, Book I (data/texts/README.md). Raises BadInput for a file
    that is missing, empty or no text."""
    source = Path(path).expanduser() if path else SHIPPED
    if not source.is_file():
        raise BadInput(f"no text file at {str(source)!r}; give a plain UTF-8 text, or none for the shipped one")
    content = source.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"text {source.name} is not UTF-8 (byte {error.start}); give a plain UTF-8 text") from None
    if "\0" in text:
        raise BadInput(f"text {source.name} is a binary file (it holds zero bytes); give a plain UTF-8 text")
    if not text.strip():
        raise BadInput(f"text {source.name} is empty; give a plain UTF-8 text of some thousand words")
    name = repository_relative(source) if source == SHIPPED else source.name
    return Text(name, text, hashlib.sha256(content).hexdigest())


AGAIN = "-again"
_FOLDER = "quality"
MINIMUM_DOCUMENTS = 4
# The second time the reference is asked, so many documents and prompts are in flight: other batches, other rounding.
_AGAIN_IN_FLIGHT = (1, 16)


@dataclass(frozen=True, kw_only=True)
class QualityTask:
    """What every variant is asked: to read the text in documents of `document_tokens` tokens, `documents` of them at most (0:
    all), with the `top` likeliest tokens at every position, and to explain `prompts` passages of it in up to
    `answer_tokens` tokens, greedily; `in_flight` requests at once."""

    text: str = ""
    document_tokens: int = 1024
    documents: int = 0
    top: int = 20
    prompts: int = 64
    answer_tokens: int = 256
    in_flight: int = 64

    def __post_init__(self):
        lowest = {"document_tokens": 16, "documents": 0, "top": 1, "prompts": 2, "answer_tokens": 1, "in_flight": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise BadInput(f"{name} {getattr(self, name)} is too small; it must be at least {least}")

    def read(self) -> Text:
        """The text, long enough as far as that can be told before it is tokens; raises BadInput if not."""
        text = read_text(self.text)
        # A token is one byte at least.
        if (size := len(text.content.encode())) < MINIMUM_DOCUMENTS * self.document_tokens:
            raise BadInput(
                f"text {text.name} is too short: its {size:,} bytes cannot make {MINIMUM_DOCUMENTS} documents of "
                f"{self.document_tokens} tokens; take a longer text or smaller documents"
            )
        self.questions(text)
        return text

    def questions(self, text: Text) -> list[str]:
        """The prompts, made from passages at even distances."""
        passages = text.passages(self.prompts)
        return [f"Explain in your own words what this passage says:\n\n{passage}" for passage in passages]


def measure_quality(
    run: Run, profile: Profile, variants: str | Sequence[str] = (), *, task: QualityTask | None = None
) -> dict[str, Comparison]:
    """Measures every one of `variants` that `run` does not hold, and returns all comparisons, by measurement. By default they
    are those that differ in their numbers; the reference is always among them. What is finished is stored at once; a recorded
    run is only read. Raises BadInput for a model with random weights, RunMismatch when the run was asked something else."""
    if a_run(run).read_only:
        return comparisons(run)
    task = task or QualityTask()
    run.check_profile(profile)
    check_weights(profile)
    text = task.read()
    asked = dataclasses.asdict(task) | {"text": text.name, "text_sha256": text.sha256}
    reference = reference_variant(profile)
    for variant in dict.fromkeys([reference, *(names_of(variants) or default_variants(profile))]):
        names = [variant, *([variant + AGAIN] if variant == reference else [])]
        missing = [name for name in names if not _has(run, name, asked)]
        if missing:
            with serve(profile, variant, run=run) as server:
                for name in missing:
                    _measure(run, server, name, task, text, asked, reference)
    return comparisons(run)


def comparisons(run: Run) -> dict[str, Comparison]:
    """Every measurement of the run against the reference, the reference (against itself) first, then itself again. Raises
    BadInput for a run without any."""
    found = {}
    for name, summary in summaries(run).items():
        with run.reading(f"{_FOLDER}/{name}.json"):
            fields = summary["comparison"].items()
            found[name] = Comparison(**{key: Estimate(**one) if isinstance(one, dict) else one for key, one in fields})
    return found


def summaries(run: Run) -> dict[str, dict]:
    """What was asked of whom, by measurement; order and errors as in `comparisons`."""
    reference, held = reference_variant(a_run(run).profile), run.read_parts(_FOLDER)
    if reference not in held:
        raise BadInput(f"run {run.path.name} holds no quality measurement; make one with `fp8lab quality`")
    names = [reference, reference + AGAIN, *(name for name in run.profile.variants if name != reference)]
    return {name: held[name] for name in names if name in held}


def tables(run: Run, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is kept of one measurement: its positions and its answers, as the module's docstring lists them. Raises
    BadInput for one that the run does not hold."""
    if name not in (held := summaries(run)):
        raise BadInput(f"run {run.path.name} holds no answers of {name!r} (it holds those of: {', '.join(held)})")
    return run.read_table(_FOLDER, name), run.read_table(_FOLDER, f"{name}-answers")


def reference_variant(profile: Profile) -> str:
    """The variant that the others are compared with: the profile's first."""
    return next(iter(profile.variants))


def default_variants(profile: Profile) -> list[str]:
    """One variant for each checkpoint and choice of number formats; others with the same numbers answer the same."""
    kept: dict[tuple, str] = {}
    for variant, one in profile.variants.items():
        whole = dataclasses.replace(one, flags=tuple(profile.flags(variant)))
        kept.setdefault((profile.served(variant), *whole.formats), variant)
    return list(kept.values())


def quality_profile(name: str = "auto") -> str:
    """The profile's name; "auto" is smollm2-gpu where a GPU is visible, smollm2-cpu elsewhere."""
    if name != "auto":
        return name
    return "smollm2-gpu" if gpu.gpu_names() else "smollm2-cpu"


def check_weights(profile: Profile) -> None:
    """Raises BadInput unless the model was trained: rounding noise says nothing about what FP8 does to knowledge."""
    if profile.model.weights == "random":
        raise BadInput(
            f"profile {profile.name} serves random weights, whose answers are noise: no perplexity or agreement of "
            "theirs means anything. Use --profile smollm2-gpu (or smollm2-cpu), or --model with a trained model"
        )
    if profile.emulated:
        raise BadInput(f"profile {profile.name} emulates its GPU and computes no answers; use --profile smollm2-cpu")


def split(tokens: Sequence[int], length: int, limit: int = 0) -> list[list[int]]:
    """Documents of `length` tokens, `limit` at most (0: all); a rest shorter than that is left out. Raises BadInput when that
    gives fewer than MINIMUM_DOCUMENTS: intervals come from resampling documents."""
    documents = [list(tokens[start : start + length]) for start in range(0, len(tokens) - length + 1, length)]
    documents = documents[: limit or None]
    if len(documents) < MINIMUM_DOCUMENTS:
        raise BadInput(
            f"the text gives {len(documents)} documents of {length} tokens ({len(tokens):,} tokens in all); at least "
            f"{MINIMUM_DOCUMENTS} are needed: take a longer text or smaller documents"
        )
    return documents


def _measure(run: Run, server: Server, name: str, task: QualityTask, text: Text, asked: dict, reference: str) -> None:
    endpoint = Endpoint(server.base_url, server.model, server.api_key)
    status, started = StatusLine(), datetime.datetime.now(datetime.UTC)
    profile, model = server.profile, server.profile.model
    if server.info.weights_doubt:
        raise LevelFailed(f"{server.variant}: {server.info.weights_doubt}")

    def shown(what: str):
        return lambda done, of: status.update(f"{name}: {what}", f"{done} of {of}")

    readers, answerers = _AGAIN_IN_FLIGHT if name.endswith(AGAIN) else (task.in_flight, task.in_flight)
    begun = time.monotonic()
    tokens, before = tokenize(endpoint, text.content)
    documents = split(tokens, task.document_tokens, task.documents)
    prompts = task.questions(text)
    reading = read_documents(
        endpoint, documents, before=before, top=task.top, in_flight=readers, progress=shown("documents read")
    )
    read_s = time.monotonic() - begun
    answered = answer(
        endpoint, prompts, max_tokens=task.answer_tokens, in_flight=answerers, progress=shown("prompts answered")
    )
    seconds = time.monotonic() - begun
    before_all = None if name == reference else Reading.from_table(run.read_table(_FOLDER, f"{reference}-top"))
    positions = position_table(reading, before_all or reading)
    held = (positions, answered) if name == reference else tables(run, reference)
    summary = {
        "asked": asked, "documents": len(documents), "predicted_tokens": len(reading.token),
        "in_flight": {"documents": readers, "prompts": answerers}, "read_s": read_s, "answer_s": seconds - read_s,
        "started": started.isoformat(timespec="seconds"), "model": portable(profile.checkpoint(server.variant)) if model.weights == "checkpoint" else f"{model.shapes} ({model.weights})",
        "server": dataclasses.asdict(server.info), "comparison": compare(positions, answered, held),
    }  # fmt: skip
    stored = {name: positions, f"{name}-answers": answered, f"{name}-top": reading.to_table()}
    run.write_part(_FOLDER, name, summary, **stored)
    status.done(f"{name}: {len(reading.token):,} tokens read in {read_s:.0f} s, {len(answered)} prompts answered in "
                f"{seconds - read_s:.0f} s")  # fmt: skip


def _has(run: Run, name: str, asked: dict) -> bool:
    summary = run.read_parts(_FOLDER).get(name)
    if summary is None:
        return False
    held = {"in_flight": 64} | summary["asked"]  # earlier runs held it fixed
    if differing := sorted(key for key in asked if held.get(key) != asked[key]):
        raise RunMismatch(
            f"run {run.path.name} holds {name} with another {', '.join(differing)} "
            f"({', '.join(str(held.get(key)) for key in differing)}); choose another run folder, or delete its "
            "folder quality to measure anew"
        )
    StatusLine().done(f"{name}: already measured, read from {run.path.name}")
    return True


def checkpoint_folder(profile: Profile) -> Path:
    """The folder with the weights of the profile's first variant; a hub's model must have been served here before. Raises
    BadInput for random weights or a model that is not on this machine."""
    check_weights(profile)
    name = source_model(profile, reference_variant(profile))
    if Path(name).is_dir():
        return Path(name)
    with without_widgets():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        raise BadInput(f"the weights of {name} are not on this machine; serve it once, or give a folder") from None
