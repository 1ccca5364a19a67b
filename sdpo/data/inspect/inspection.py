"""What there is to know about a file of interactions, and where it came from.

One pass over the file (two with a tokenizer) fills an `Inspection`. Numbers are kept, texts are
not: memory is some tens of bytes an interaction. Languages, models, users, drops and duplicates
come from the manifest and the report that `sdpo data prepare` writes beside the file.
"""

import json as json_module
import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...conversations import DataError
from ...io.files import sha256
from ..manifest import manifest_path, report_path

if TYPE_CHECKING:
    from ...hindsight import HindsightConfig
    from ...interactions import Interaction

MOST_TOKENIZED = 10_000
"""Interactions whose tokens are counted; of more, a seeded draw of so many."""
SAMPLE_CHARACTERS = 4_000
"""A sample's longer texts are cut, and say so."""
BINS = 40
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | {127: 0x2421}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Summary and histogram of numbers >= 0: `counts[i]` lie in [edges[i], edges[i + 1])."""

    min: int
    median: float
    mean: float
    p95: float
    max: int
    edges: list[int]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Lengths in tokens as training sees them before its limits, and how many those cut."""

    tokenizer: str
    template: str
    interactions: int
    lengths: dict[str, Lengths]
    limits: dict[str, int]
    cut: dict[str, int]
    refused: int
    """Prompts that the chat template takes not: they are not in the lengths."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Of the interactions' losses, where not all are 1."""

    min: float
    mean: float
    max: float
    zero: int


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Conversations dropped for one reason as copies of an earlier one, and the first of them."""

    conversations: int
    conversation_id: str
    source: str
    duplicate_of: str


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What the manifest says of the interactions' conversations; counts are interactions."""

    conversations: int
    users: int
    without_user: int
    top_users: dict[str, float]
    """n -> the share of all interactions that the n busiest users have."""
    languages: dict[str, int]
    models: dict[str, int]
    messages: Lengths | None
    duplicates: dict[str, Duplicates]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What the report says of how the file was made."""

    preset: str
    limits: dict[str, int]
    """In characters; longer messages cost their conversation."""
    examined: int
    kept: int
    interactions: int
    drops: dict[str, int]
    interaction_drops: dict[str, int]
    pii: dict[str, int]
    guards: dict[str, str]
    bad_rows: list[str]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One interaction to read: (role, text) of the prompt, answer and follow-up."""

    id: str
    prompt: list[tuple[str, str]]
    completion: str
    user_response: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that is shown of a file. `users` is None, and so is what else is not known."""

    file: str
    notes: list[str]
    interactions: int
    conversations: int
    users: int | None
    characters: dict[str, Lengths]
    turns: dict[str, Lengths]
    tokens: Tokens | None
    weights: Weights | None
    origins: Origins | None
    preparation: Preparation | None
    samples: list[Sample]


def inspect(
    file: str | Path,
    *,
    tokenizer: str | None = None,
    samples: int = 2,
    sample_seed: int | None = None,
) -> Inspection:
    """Reads a file of interactions, or a log by way of the preset all-turns.

    Raises DataError for what cannot be read and for a file without interactions.
    """
    from ..read.formats import sniff

    path = Path(file)
    _check_is_not_empty(path, str(file))
    if (log_format := sniff(path)) == "triples":
        return _inspect_interactions(path, str(file), tokenizer, samples, sample_seed)
    with tempfile.TemporaryDirectory() as folder:
        made = _prepared(path, Path(folder))
        inspection = _inspect_interactions(made, str(file), tokenizer, samples, sample_seed)
    note = f"a conversation log ({log_format}): shown is what the preset all-turns makes of it"
    return replace(inspection, notes=[note, *inspection.notes])


def _check_is_not_empty(path: Path, name: str) -> None:
    """Says why nothing is left, where the file's report knows."""
    report = _read_report(report_path(path)) if path.is_file() else None
    if not report or report[1].interactions or report[0] != sha256(path):
        return
    why = ", ".join(f"{n:,} {reason}" for reason, n in report[1].drops.items())
    raise DataError(
        f"{name}: no interactions, of {report[1].examined:,} conversations (dropped: "
        f"{why or 'none'}); prepare it by other rules"
    )


def _prepared(log: Path, folder: Path) -> Path:
    from ..prepare.prepare import PrepareConfig, prepare

    out = folder / "interactions.jsonl"
    config = PrepareConfig(inputs=(str(log),), out=str(out), preset="all-turns", bad_rows="skip")
    prepare(config)
    return out


def _inspect_interactions(
    path: Path, name: str, tokenizer: str | None, samples: int, seed: int | None
) -> Inspection:
    """`name` is what the user knows the file as."""
    from ...interactions import iter_interactions

    _check_is_not_empty(path, name)
    preparation, origins, notes = _beside(path)
    tally = _Tally(samples, seed)
    for interaction in iter_interactions(path):
        tally.add(interaction)
    tokens = _count_tokens(path, tally.n, tokenizer, seed or 0) if tokenizer else None
    if tokens and tokens.interactions < tally.n:
        drawn = f"a draw of {tokens.interactions:,} interactions (seed {seed or 0})"
        notes.append(f"tokens are counted on {drawn}, not on all {tally.n:,}")
    return Inspection(
        file=name,
        notes=notes,
        interactions=tally.n,
        conversations=origins.conversations if origins else len(tally.per_conversation()),
        users=origins.users if origins else None,
        characters={name: _lengths(n) for name, n in tally.characters.items()},
        turns=_turns(tally, origins),
        tokens=tokens,
        weights=tally.weights(),
        origins=origins,
        preparation=preparation,
        samples=tally.shown(),
    )


@dataclass
class _Tally:
    """Running numbers of one pass, and a sample of the texts."""

    n_samples: int
    seed: int | None
    n: int = 0
    characters: dict[str, array] = field(
        default_factory=lambda: {k: array("Q") for k in ("prompt x", "answer y", "follow-up o")}
    )
    prompt_messages: array = field(default_factory=lambda: array("Q"))
    conversation_hashes: array = field(default_factory=lambda: array("q"))
    weight: array = field(default_factory=lambda: array("d"))
    samples: list[tuple[int, "Interaction"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def add(self, interaction: "Interaction") -> None:
        x, y, o = self.characters.values()
        x.append(sum(len(m.content) for m in interaction.prompt))
        y.append(len(interaction.response))
        o.append(len(interaction.followup))
        self.prompt_messages.append(len(interaction.prompt))
        self.conversation_hashes.append(hash(_conversation_of(interaction)))
        self.weight.append(interaction.weight)
        self._offer(interaction)
        self.n += 1

    def _offer(self, interaction: "Interaction") -> None:
        if len(self.samples) < self.n_samples:
            self.samples.append((self.n, interaction))
        elif self.seed is not None:  # reservoir sampling: each is kept with the same chance
            place = self.rng.randrange(self.n + 1)
            if place < self.n_samples:
                self.samples[place] = (self.n, interaction)

    def per_conversation(self) -> np.ndarray:
        """Interactions of each conversation, as far as the ids tell."""
        return np.unique(np.frombuffer(self.conversation_hashes, np.int64), return_counts=True)[1]

    def weights(self) -> Weights | None:
        w = np.frombuffer(self.weight)
        if (w == 1).all():
            return None
        zero = int((w == 0).sum())
        return Weights(min=float(w.min()), mean=float(w.mean()), max=float(w.max()), zero=zero)

    def shown(self) -> list[Sample]:
        return [_sample(i) for _, i in sorted(self.samples, key=lambda placed: placed[0])]


def _conversation_of(interaction: "Interaction") -> str:
    """Its id without the turn: "c1" of "c1_3" and of "c1_3~2"."""
    stem, _, turn = interaction.id.rpartition("_")
    return stem if stem and turn.partition("~")[0] == str(interaction.turn_id) else interaction.id


def _sample(interaction: "Interaction") -> Sample:
    return Sample(
        id=_legible(interaction.id),
        prompt=[(m.role, _legible(m.content)) for m in interaction.prompt],
        completion=_legible(interaction.response),
        user_response=_legible(interaction.followup),
    )


def _legible(text: str) -> str:
    """Cut where very long; control characters as symbols, since a terminal would obey them."""
    kept = text[:SAMPLE_CHARACTERS].translate(_VISIBLE)
    return kept if len(text) <= SAMPLE_CHARACTERS else f"{kept}… ({len(text):,} characters)"


def _turns(tally: _Tally, origins: Origins | None) -> dict[str, Lengths]:
    turns = {
        "messages in the prompt": _lengths(tally.prompt_messages),
        "interactions per conversation": _lengths(tally.per_conversation()),
    }
    if origins and origins.messages:
        turns["messages per conversation"] = origins.messages
    return turns


def _lengths(values: Sequence[int] | np.ndarray) -> Lengths:
    numbers = np.asarray(values, dtype=np.int64)
    edges = _edges(int(numbers.max()))
    median, p95 = np.percentile(numbers, (50, 95))
    return Lengths(
        min=int(numbers.min()),
        median=float(median),
        mean=float(numbers.mean()),
        p95=float(p95),
        max=int(numbers.max()),
        edges=edges.tolist(),
        counts=np.histogram(numbers, edges)[0].tolist(),
    )


def _edges(largest: int) -> np.ndarray:
    """One bin a number for small ones; else bins that grow by a constant factor."""
    if largest <= BINS:
        return np.arange(largest + 2)
    powers = np.geomspace(1, largest + 1, BINS + 1).round().astype(np.int64)
    return np.unique(np.concatenate(([0], powers)))


def _count_tokens(path: Path, n: int, folder: str, seed: int) -> Tokens:
    from ...hindsight import HindsightConfig, load_tokenizer

    config = HindsightConfig()
    limits = {
        "policy prompt": config.max_prompt_tokens,
        "hindsight prompt": config.max_hindsight_prompt_tokens,
        "response": config.max_response_tokens,
    }
    tokenizer = load_tokenizer(folder)
    found = [_token_lengths(i, tokenizer, config) for i in _drawn(path, n, seed)]
    taken = np.array([lengths for lengths in found if lengths], dtype=np.int64).reshape(-1, 3)
    columns = dict(zip(limits, taken.T, strict=True))
    return Tokens(
        tokenizer=folder,
        template=config.template,
        interactions=len(found),
        lengths={name: _lengths(column) for name, column in columns.items() if len(column)},
        limits=limits,
        cut={name: int((column > limits[name]).sum()) for name, column in columns.items()},
        refused=found.count(None),
    )


def _drawn(path: Path, n: int, seed: int) -> Iterator["Interaction"]:
    """All of the file's n interactions, or `MOST_TOKENIZED` of them in the file's order."""
    from ...interactions import iter_interactions

    if n <= MOST_TOKENIZED:
        return iter_interactions(path)
    chosen = np.random.default_rng(seed).choice(n, MOST_TOKENIZED, replace=False)
    places = set(chosen.tolist())
    return (i for place, i in enumerate(iter_interactions(path)) if place in places)


def _token_lengths(
    interaction: "Interaction", tokenizer: Any, config: "HindsightConfig"
) -> tuple[int, int, int] | None:
    """Of both prompts and the response; None if the chat template refuses the prompt."""
    from ...hindsight import hindsight_prompt, prompt_ids, response_ids

    note = hindsight_prompt(interaction.prompt, interaction.followup, config.template)
    try:
        prompts = prompt_ids(tokenizer, interaction.prompt), prompt_ids(tokenizer, note)
    except DataError:
        return None
    response = interaction.response_token_ids
    if response is None:
        response = response_ids(tokenizer, interaction.response)
    return len(prompts[0]), len(prompts[1]), len(response)


# The manifest and the report


def _beside(path: Path) -> tuple[Preparation | None, Origins | None, list[str]]:
    """What stands beside the file, as long as it is about this file; notes say what is missing."""
    report = _read_report(report_path(path))
    if report and report[0] != sha256(path):
        stale = f"{report_path(path).name} is about another file than this, which has changed since"
        return None, None, [f"{stale}: neither it nor the manifest is shown; prepare the log again"]
    manifest, notes = manifest_path(path), []
    if not report:
        notes.append(f"no {report_path(path).name} beside the file: drops and guards are unknown")
    if not manifest.is_file():
        notes.append(f"no {manifest.name} beside the file: languages, models, users are unknown")
    origins = _origins(manifest) if manifest.is_file() else None
    return report[1] if report else None, origins, notes


def _read_report(path: Path) -> tuple[str, Preparation] | None:
    """The digest of the file that the report is about, and what it says."""
    if not path.is_file():
        return None
    try:
        report = json_module.loads(path.read_text(encoding="utf-8"))
        if report["version"] != 1:
            raise ValueError(f"its version is {report['version']!r}, not 1")
        return report["sha256"], _preparation(report)
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise DataError(
        f"{path}: not a report of `sdpo data prepare` ({problem}); move it away, or prepare again"
    )


def _preparation(report: Mapping[str, Any]) -> Preparation:
    def by_count(name: str) -> dict[str, int]:
        return dict(Counter(report[name]).most_common())

    rules = {"answer y": "max_assistant_chars", "follow-up o": "max_user_chars"}
    limits = {name: report["rules"].get(rule) for name, rule in rules.items()}
    return Preparation(
        preset=report["preset"],
        limits={name: limit for name, limit in limits.items() if limit is not None},
        examined=report["counts"]["conversations_examined"],
        kept=report["counts"]["conversations_kept"],
        interactions=report["counts"]["interactions"],
        drops=by_count("drops"),
        interaction_drops=by_count("interaction_drops"),
        pii=by_count("pii"),
        guards=report["guards"],
        bad_rows=[_legible(row) for row in report["bad_rows"]],
    )


def _origins(manifest: Path) -> Origins:
    columns: dict[str, Counter] = {name: Counter() for name in ("user", "language", "model")}
    messages, conversations, duplicates = array("Q"), 0, _Duplicates()
    for row in _manifest_rows(manifest):
        if row["duplicate_of"] is not None:
            duplicates.add(row)
        if n := len(row["interaction_ids"] or ()):
            conversations += 1
            messages.append(row["messages"])
            for name, counts in columns.items():
                counts[row[name]] += n
    without_user = columns["user"].pop(None, 0)
    return Origins(
        conversations=conversations,
        users=len(columns["user"]),
        without_user=without_user,
        top_users=_top_shares(columns["user"], without_user),
        languages=_named(columns["language"]),
        models=_named(columns["model"]),
        messages=_lengths(messages) if conversations else None,
        duplicates=duplicates.found,
    )


def _manifest_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    needed = ["conversation_id", "source_file", "row", "user", "language", "model", "messages"]
    needed += ["decision", "duplicate_of", "interaction_ids"]
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(4096, columns=needed):
                yield from batch.select(needed).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: no manifest ({reason}); remove it or prepare again") from None


class _Duplicates:
    """Counts by decision, with the first row of each."""

    def __init__(self) -> None:
        self.found: dict[str, Duplicates] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        first = self.found.get(row["decision"]) or Duplicates(
            conversations=0,
            conversation_id=_legible(row["conversation_id"]),
            source=f"{row['source_file']}:{row['row']}",
            duplicate_of=row["duplicate_of"],
        )
        self.found[row["decision"]] = replace(first, conversations=first.conversations + 1)


def _top_shares(users: Counter, without_user: int) -> dict[str, float]:
    """Shares, not names: the page may be shown to people who should not see who a user is."""
    total = users.total() + without_user
    most = [n for _, n in users.most_common(100)]
    return {str(k): sum(most[:k]) / total for k in (1, 10, 100) if k <= len(users)}


def _named(counts: Counter) -> dict[str, int]:
    return {_legible(name or "unknown"): n for name, n in counts.most_common()}
