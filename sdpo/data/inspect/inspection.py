"""What a file of interactions holds, and where it came from.

One pass over the file (two with a tokenizer) fills an `Inspection`. Numbers are kept, texts are
not: memory is some tens of bytes per interaction. Languages, models, users, drops and duplicates
come from the manifest and the report that `sdpo data prepare` writes beside the file.
"""

import json
import random
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DataError
from ...hindsight import HindsightConfig, encode
from ...interactions import Interaction, conversation_of, iter_interactions
from ...io.files import sha256
from ..manifest import manifest_path, read_manifest, report_path
from ..prepare.config import PrepareConfig
from ..prepare.prepare import prepare
from ..prepare.report import VERSION
from ..read.formats import sniff

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENIZED = 10_000
"""Most interactions whose tokens are counted; from more, this many are drawn."""
SAMPLE_CHARACTERS = 4_000
"""Characters to which a sample's texts are cut."""
BINS = 40
"""Most bins of a histogram."""
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | {127: 0x2421}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Summary and histogram of numbers >= 0; `counts[i]` lie in [edges[i], edges[i + 1])."""

    min: int
    median: float
    mean: float
    p95: float
    max: int
    edges: list[int]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Lengths in tokens before training's limits, and how many interactions those cut."""

    tokenizer: str
    template: str
    interactions: int
    lengths: dict[str, Lengths]
    limits: dict[str, int]
    cut: dict[str, int]
    refused: int
    """Prompts that the chat template rejects, or answers without tokens; not in `lengths`."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of the interactions' losses, where not all are 1."""

    min: float
    mean: float
    max: float
    zero: int


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """How many conversations were dropped as copies for one reason, and the first of them."""

    conversations: int
    conversation_id: str
    source: str
    duplicate_of: str


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What the manifest says of the interactions' conversations, counted in interactions."""

    conversations: int
    users: int
    without_user: int
    top_users: dict[str, float]
    """n -> share of all interactions that come from the n busiest users."""
    languages: dict[str, int]
    models: dict[str, int]
    messages: Lengths | None
    duplicates: dict[str, Duplicates]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What the report says about how the file was made."""

    preset: str
    limits: dict[str, int]
    """Most characters of a message; a longer one drops its conversation."""
    examined: int
    kept: int
    interactions: int
    drops: dict[str, int]
    interaction_drops: dict[str, int]
    left_out: dict[str, int]
    pii: dict[str, int]
    guards: dict[str, str]
    bad_rows: list[str]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The texts of one interaction; the prompt as (role, text)."""

    id: str
    prompt: list[tuple[str, str]]
    completion: str
    user_response: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything that is shown of a file. What is not known is None."""

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
    """Inspect a file of interactions, or a log by way of the preset all-turns.

    Raises:
        DataError: the file cannot be read or holds no interactions.
    """
    path = Path(file)
    _refuse_empty(path, str(file))
    if (log_format := sniff(path)) == "triples":
        return _inspect_interactions(path, str(file), tokenizer, samples, sample_seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "interactions.jsonl"
        inputs = (str(path),)
        prepare(PrepareConfig(inputs=inputs, out=str(out), preset="all-turns", bad_rows="skip"))
        inspection = _inspect_interactions(out, str(file), tokenizer, samples, sample_seed)
    note = f"a conversation log ({log_format}): shown is what the preset all-turns makes of it"
    return replace(inspection, notes=[note, *inspection.notes])


def _refuse_empty(path: Path, name: str) -> None:
    """Say why no interaction is left, if the file's report knows."""
    report = _read_report(report_path(path)) if path.is_file() else None
    if not report or report[1].interactions or report[0] != sha256(path):
        return
    why = ", ".join(f"{n:,} {reason}" for reason, n in report[1].drops.items())
    raise DataError(
        f"no interactions, of {report[1].examined:,} conversations (dropped: {why or 'none'})",
        hint="Prepare the log by other rules",
        file=name,
    )


def _inspect_interactions(
    path: Path, name: str, tokenizer: str | None, samples: int, seed: int | None
) -> Inspection:
    """Inspect ``path``, which the user knows as ``name``."""
    _refuse_empty(path, name)
    preparation, origins, notes = _beside(path)
    tally = _Tally(samples, seed)
    for interaction in iter_interactions(path):
        tally.add(interaction)
    tokens = _count_tokens(path, tally.n, tokenizer, seed or 0) if tokenizer else None
    if tokens and tokens.interactions < tally.n:
        drawn = f"a draw of {tokens.interactions:,} interactions (seed {seed or 0})"
        notes.append(f"tokens are counted on {drawn}, not on all {tally.n:,}")
    turns = {
        "messages in the prompt": _lengths(tally.prompt_messages),
        "interactions per conversation": _lengths(tally.per_conversation()),
    }
    if origins and origins.messages:
        turns["messages per conversation"] = origins.messages
    return Inspection(
        file=name,
        notes=notes,
        interactions=tally.n,
        conversations=origins.conversations if origins else len(tally.per_conversation()),
        users=origins.users if origins else None,
        characters={name: _lengths(n) for name, n in tally.characters.items()},
        turns=turns,
        tokens=tokens,
        weights=tally.weights(),
        origins=origins,
        preparation=preparation,
        samples=tally.shown(),
    )


class _Tally:
    """Running numbers of one pass, and a sample of the texts."""

    def __init__(self, n_samples: int, seed: int | None):
        self.n, self.n_samples, self.seed = 0, n_samples, seed
        self.characters = {k: array("Q") for k in ("prompt x", "answer y", "follow-up o")}
        self.prompt_messages, self.conversation_hashes = array("Q"), array("q")
        self.weight = array("d")
        self.samples: list[tuple[int, Interaction]] = []
        self.rng = random.Random(seed)

    def add(self, interaction: Interaction) -> None:
        x, y, o = self.characters.values()
        x.append(sum(len(m.content) for m in interaction.prompt))
        y.append(len(interaction.response))
        o.append(len(interaction.followup))
        self.prompt_messages.append(len(interaction.prompt))
        self.conversation_hashes.append(hash(conversation_of(interaction)))
        self.weight.append(interaction.weight)
        self._offer(interaction)
        self.n += 1

    def _offer(self, interaction: Interaction) -> None:
        if len(self.samples) < self.n_samples:
            self.samples.append((self.n, interaction))
        elif self.seed is not None:  # reservoir sampling: all are kept with the same probability
            place = self.rng.randrange(self.n + 1)
            if place < self.n_samples:
                self.samples[place] = (self.n, interaction)

    def per_conversation(self) -> np.ndarray:
        """Interactions of each conversation, according to their ids."""
        return np.unique(np.frombuffer(self.conversation_hashes, np.int64), return_counts=True)[1]

    def weights(self) -> Weights | None:
        w = np.frombuffer(self.weight)
        if (w == 1).all():
            return None
        zero = int((w == 0).sum())
        return Weights(min=float(w.min()), mean=float(w.mean()), max=float(w.max()), zero=zero)

    def shown(self) -> list[Sample]:
        placed = sorted(self.samples, key=lambda sample: sample[0])
        return [
            Sample(
                id=_legible(interaction.id),
                prompt=[(m.role, _legible(m.content)) for m in interaction.prompt],
                completion=_legible(interaction.response),
                user_response=_legible(interaction.followup),
            )
            for _, interaction in placed
        ]


def _legible(text: str) -> str:
    """A text cut if very long, with symbols for the control characters that a terminal obeys."""
    kept = text[:SAMPLE_CHARACTERS].translate(_VISIBLE)
    return kept if len(text) <= SAMPLE_CHARACTERS else f"{kept}… ({len(text):,} characters)"


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
    """One bin per number if they are small; else bins that grow by a constant factor."""
    if largest <= BINS:
        return np.arange(largest + 2)
    powers = np.geomspace(1, largest + 1, BINS + 1).round().astype(np.int64)
    return np.unique(np.concatenate(([0], powers)))


def _count_tokens(path: Path, n: int, model: str, seed: int) -> Tokens:
    # torch and transformers: seconds, which counting characters need not pay
    from sdpo_parallel.huggingface import load_tokenizer, resolve_model

    config = HindsightConfig()
    limits = {
        "policy prompt": config.max_prompt_tokens,
        "hindsight prompt": config.max_hindsight_prompt_tokens,
        "response": config.max_response_tokens,
    }
    tokenizer = load_tokenizer(resolve_model(model))
    unlimited = HindsightConfig(
        max_prompt_tokens=sys.maxsize,
        max_hindsight_prompt_tokens=sys.maxsize,
        max_response_tokens=sys.maxsize,
    )
    found = [_token_lengths(i, tokenizer, unlimited) for i in _drawn(path, n, seed)]
    taken = np.array([lengths for lengths in found if lengths], dtype=np.int64).reshape(-1, 3)
    columns = dict(zip(limits, taken.T, strict=True))
    return Tokens(
        tokenizer=model,
        template=config.template,
        interactions=len(found),
        lengths={name: _lengths(column) for name, column in columns.items() if len(column)},
        limits=limits,
        cut={name: int((column > limits[name]).sum()) for name, column in columns.items()},
        refused=found.count(None),
    )


def _drawn(path: Path, n: int, seed: int) -> Iterator[Interaction]:
    """All n interactions of the file, or `MOST_TOKENIZED` of them, in the file's order."""
    if n <= MOST_TOKENIZED:
        return iter_interactions(path)
    chosen = np.random.default_rng(seed).choice(n, MOST_TOKENIZED, replace=False)
    places = set(chosen.tolist())
    return (i for place, i in enumerate(iter_interactions(path)) if place in places)


def _token_lengths(
    interaction: Interaction, tokenizer: "PreTrainedTokenizerBase", config: HindsightConfig
) -> tuple[int, int, int] | None:
    """Lengths of both prompts and the response; None if there is no training on them."""
    try:
        encoded = encode(interaction, tokenizer, config)
    except DataError:
        return None
    return len(encoded.policy), len(encoded.hindsight), len(encoded.response)


# The manifest and the report

_COLUMNS = (
    *("conversation_id", "source_file", "row", "user", "language"),
    *("model", "messages", "decision", "duplicate_of", "interaction_ids"),
)


def _beside(path: Path) -> tuple[Preparation | None, Origins | None, list[str]]:
    """What the report and the manifest say, if they are about this file, and what is missing."""
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
    """SHA-256 of the file that a report is about, and what it says."""
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["version"] not in (1, VERSION):
            raise ValueError(f"its version is {report['version']!r}, not {VERSION}")
        return report["sha256"], _preparation(report)
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    hint = "Move it away, or prepare again"
    raise DataError(f"not a report of `sdpo data prepare` ({problem})", hint=hint, file=str(path))


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
        left_out=by_count("left_out") if report["version"] > 1 else {},
        pii=by_count("pii"),
        guards=report["guards"],
        bad_rows=[_legible(row) for row in report["bad_rows"]],
    )


def _origins(manifest: Path) -> Origins:
    columns: dict[str, Counter] = {name: Counter() for name in ("user", "language", "model")}
    messages, conversations = array("Q"), 0
    duplicates: dict[str, Duplicates] = {}
    for batch in read_manifest(manifest, _COLUMNS):
        for row in batch.to_pylist():
            if row["duplicate_of"] is not None:
                _count_duplicate(duplicates, row)
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
        duplicates=duplicates,
    )


def _count_duplicate(found: dict[str, Duplicates], row: Mapping[str, Any]) -> None:
    """Count by decision, with the first row of each."""
    first = found.get(row["decision"]) or Duplicates(
        conversations=0,
        conversation_id=_legible(row["conversation_id"]),
        source=f"{row['source_file']}:{row['row']}",
        duplicate_of=row["duplicate_of"],
    )
    found[row["decision"]] = replace(first, conversations=first.conversations + 1)


def _top_shares(users: Counter, without_user: int) -> dict[str, float]:
    """Shares without names: not everyone who sees the page may know who the users are."""
    total = users.total() + without_user
    most = [n for _, n in users.most_common(100)]
    return {str(k): sum(most[:k]) / total for k in (1, 10, 100) if k <= len(users)}


def _named(counts: Counter) -> dict[str, int]:
    return {_legible(name or "unknown"): n for name, n in counts.most_common()}
