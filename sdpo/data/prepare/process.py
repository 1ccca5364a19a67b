"""What a worker makes of one unit: the rendered rows, and a table of what became of each row.

Both are files of the work folder, `0-00012.jsonl` and `0-00012.arrow` (0: the first place that was
looked for). The table is renamed into place last: where it stands, the unit is done.
"""

import gc
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from ...conversations import Conversation, Message
from ...errors import DataError
from ...interactions import Interaction, to_row
from ..filters import duplicates, pii
from ..filters.guardrails import GuardrailConfig
from ..filters.injections import injection
from ..read.formats import Ready
from .plan import Rows, Unit, read_unit
from .rules import Drop, Extraction, ExtractionRules, Turn, examine

KEPT = "kept"
SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "number": pa.int64(),
        "conversation_id": pa.string(),
        "user": pa.string(),
        "language": pa.string(),
        "model": pa.string(),
        "messages": pa.int32(),
        "characters": pa.int64(),
        "decision": pa.string(),
        "error": pa.string(),
        "ready": pa.bool_(),
        "without_history": pa.int32(),
        "blank": pa.int32(),
        "injections": pa.int32(),
        "opted_out": pa.int32(),
        "pii": pa.map_(pa.string(), pa.int32()),
        "user_key": pa.uint64(),
        "fingerprint_high": pa.uint64(),
        "fingerprint_low": pa.uint64(),
        "sketch": pa.list_(pa.uint32(), duplicates.SKETCH),
        "interaction_ids": pa.list_(pa.string()),
        "id_keys": pa.list_(pa.uint64()),
        "ends": pa.list_(pa.int64()),
    }
)
"""`ends`: where each of a row's interactions ends in the unit's lines. `*_key`: 64 bits of a hash
(0: none)."""

_NAME_OF = {"user": b"human", "assistant": b"gpt", "system": b"system"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all units of a run have in common."""

    folder: Path
    rules: ExtractionRules
    guardrails: GuardrailConfig
    opted_out: frozenset[str]
    lenient: bool
    order: Path | None
    """.npy of every row's place in the extraction's order; None: as they come."""
    places: tuple[int, int]
    """Only rows of these places are read, [from, to)."""

    def table_of(self, unit: int) -> Path:
        """Where the unit's table stands once it is done."""
        return self.folder / f"{self.places[0]}-{unit:05d}.arrow"

    def lines_of(self, unit: int) -> Path:
        """Where its rendered rows stand."""
        return self.table_of(unit).with_suffix(".jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A unit that is done: its table, memory-mapped, and its rendered rows."""

    unit: int
    table: pa.Table
    lines: Path

    @classmethod
    def of(cls, job: Job, unit: Unit) -> "Shard":
        """What `process` has made."""
        mapped = pa.memory_map(str(job.table_of(unit.index)))
        table = pa.ipc.open_file(mapped).read_all()
        return cls(unit=unit.index, table=table, lines=job.lines_of(unit.index))


def whole_table(shards: list[Shard]) -> pa.Table:
    """All shards' tables, one after the other."""
    return pa.concat_tables([SCHEMA.empty_table(), *(shard.table for shard in shards)])


@dataclass(slots=True)
class _Row:
    """One row on its way: what is known of it, and what it will be in the table."""

    table: dict[str, Any]
    id: str = ""
    found: Extraction | None = None
    texts: list[str] = field(default_factory=list)
    ready: Interaction | None = None


def process(unit: Unit, job: Job) -> int:
    """Does a unit unless it is done; returns its rows. Raises DataError for an unreadable row
    unless the job is lenient."""
    table = job.table_of(unit.index)
    if table.exists():
        return unit.piece.rows
    places = _places(unit, job)
    wanted = (places >= job.places[0]) & (places < job.places[1])
    redactor = _redactor(job.guardrails.pii)
    lines = job.lines_of(unit.index)
    partials = {path: _partial(path) for path in (lines, table)}
    with (
        _no_collections(),
        partials[lines].open("wb") as out,
        pa.OSFile(str(partials[table]), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for rows in read_unit(unit, wanted, job.lenient, job.rules.languages):
            stems = places[rows.indices - unit.offset]
            done = _process_rows(rows, stems.tolist(), job, redactor, out)
            columns = {name: [row.table.get(name) for row in done] for name in SCHEMA.names}
            writer.write_batch(pa.record_batch(columns, SCHEMA))
    for path, partial in partials.items():
        os.replace(partial, path)
    return unit.piece.rows


def _partial(path: Path) -> Path:
    """Of this process: one that outlives its parent for a moment must not write into another's."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def end_with_parent() -> None:
    """Has this worker end when its parent does, however that ends."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _no_collections() -> Iterator[None]:
    """A unit makes millions of objects and no cycles; looking for some is a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _places(unit: Unit, job: Job) -> np.ndarray:
    rows = slice(unit.offset, unit.offset + unit.piece.rows)
    if job.order is None:
        return np.arange(rows.start, rows.stop)
    return np.array(np.load(job.order, mmap_mode="r")[rows])


def _redactor(kind: str | None) -> pii.Redactor | None:
    if kind == "off":
        return None
    return pii.Redactor(pii.presidio_finder() if kind == "presidio" else pii.find_pii)


def _process_rows(
    batch: Rows, places: list[int], job: Job, redactor: pii.Redactor | None, out
) -> list[_Row]:
    rows = []
    for number, index, place, item in zip(
        batch.numbers, batch.indices.tolist(), places, batch.items, strict=True
    ):
        row = _examined(item, place, job)
        row.table |= {"index": index, "number": number}
        rows.append(row)
    kept = [row for row in rows if row.found is not None]
    _sketch(kept, job.guardrails)
    if redactor is not None:
        _redact(kept, redactor, job.guardrails.pii == "presidio")
    for row in kept:
        _render(row, job, out)
    return rows


def _examined(item: Any, place: int, job: Job) -> _Row:
    if isinstance(item, DataError):
        if not job.lenient:
            raise item
        return _Row({"decision": Drop.UNREADABLE, "error": str(item)})
    if isinstance(item, Ready):
        return _ready(item, job)
    row = _Row(
        {
            "conversation_id": item.id,
            "language": item.language,
            "model": item.model,
            **_user(item),
        },
        id=_stem(item, place, job.rules),
    )
    if dropped := _guarded(item, job):
        row.table["decision"] = dropped
        if dropped is Drop.OPTED_OUT:
            row.table["user"] = None  # the source's row is enough to show that it is left out
        return row
    found = examine(item, job.rules)
    row.table |= _sizes(found.messages)
    row.table["decision"] = found.dropped or KEPT
    if found.dropped is None:
        row.found = found
        row.texts = [message.content for message in found.messages]
        row.table |= {"without_history": found.without_history, "blank": found.blank}
    return row


def _user(item: Conversation | Ready) -> dict[str, Any]:
    return {"user": item.user, "user_key": key(item.user) if item.user else 0}


def _has_opted_out(item: Conversation | Ready, id: str, job: Job) -> bool:
    return not job.opted_out.isdisjoint((id, item.source, *item.names))


def _ready(item: Ready, job: Job) -> _Row:
    """A ready triple: its rules are its author's; the guardrails are ours."""
    triple = item.interaction
    row = _Row({"conversation_id": triple.id, "ready": True, **_user(item)}, id=triple.id)
    # as `prepare` made them, "c1_3" is of the conversation "c1"
    if _has_opted_out(item, triple.id, job) or triple.id.rpartition("_")[0] in job.opted_out:
        row.table |= {"decision": Drop.OPTED_OUT, "user": None}
        return row
    followup = Message("user", triple.followup)
    messages = [*triple.prompt, Message("assistant", triple.response), followup]
    n = len(triple.prompt)
    row.found = Extraction(None, messages, [Turn(tuple(range(n)), n)], 0, 0)
    row.texts = [message.content for message in messages]
    row.ready = triple
    row.table |= {"decision": KEPT, **_sizes(messages)}
    return row


def _sizes(messages: Sequence[Message]) -> dict[str, int]:
    return {"messages": len(messages), "characters": sum(len(m.content) for m in messages)}


def _stem(conversation: Conversation, place: int, rules: ExtractionRules) -> str:
    """What the conversation's rows are called after."""
    if rules.ids == "own" or (rules.ids == "conversation_id" and conversation.named):
        return conversation.id
    return str(place)


def _guarded(conversation: Conversation, job: Job) -> Drop | None:
    if _has_opted_out(conversation, conversation.id, job):
        return Drop.OPTED_OUT
    if job.guardrails.redacted and conversation.redacted:
        return Drop.REDACTED
    if job.guardrails.flagged and conversation.flagged:
        return Drop.FLAGGED
    return None


def key(text: str) -> int:
    """64 bits of a hash of a name, never 0."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def _sketch(rows: list[_Row], guardrails: GuardrailConfig) -> None:
    """Fingerprints, and sketches of conversations; ready triples of one conversation share most
    of their history, and would be taken for near-duplicates."""
    if guardrails.duplicates == "off" or not rows:
        return
    texts = ["\n\0\n".join(row.texts) for row in rows]  # where one message ends counts, too
    for row, (high, low) in zip(rows, duplicates.fingerprints(texts).tolist(), strict=True):
        row.table |= {"fingerprint_high": high, "fingerprint_low": low}
    if guardrails.duplicates == "near":
        for row, sketch in zip(rows, duplicates.sketches(texts), strict=True):
            if row.ready is None:
                row.table["sketch"] = sketch


def _redact(rows: list[_Row], redactor: pii.Redactor, all_suspect: bool) -> None:
    """Replaces personal data, reading closely only what a fast look finds suspect."""
    texts = [text for row in rows for text in row.texts]
    suspect = [True] * len(texts) if all_suspect else pii.suspects(pa.array(texts, pa.string()))
    ends = np.cumsum([len(row.texts) for row in rows]).tolist()
    flags = np.asarray(suspect)
    for row, start, end in zip(rows, [0, *ends], ends, strict=False):
        if flags[start:end].any():
            row.texts, counts = redactor.redact(row.texts)
            row.table["pii"] = sorted(counts.items())


def _render(row: _Row, job: Job, out) -> None:
    """Writes the row's interactions, except those whose follow-up is an injection."""
    assert row.found is not None
    ids, ends, caught, opted_out = [], [], 0, 0
    said = _Said(row)
    for turn in row.found.turns:
        id = row.id if row.ready else f"{row.id}_{turn.answer}"
        if id in job.opted_out:
            opted_out += 1
            continue
        if job.guardrails.injections and injection(row.texts[turn.answer + 1]):
            caught += 1
            continue
        out.write(said.ready() if row.ready else said.line(id, turn))
        ids.append(id)
        ends.append(out.tell())
    row.table |= {
        "injections": caught,
        "opted_out": opted_out,
        "interaction_ids": ids,
        "id_keys": [key(id) for id in ids],
        "ends": ends,
    }


class _Said:
    """The messages of a row as JSON, each rendered once for all interactions that hold it."""

    def __init__(self, row: _Row):
        self.row = row
        self.rendered: dict[int, bytes] = {}

    def _turn(self, i: int) -> bytes:
        if i not in self.rendered:
            assert self.row.found is not None
            name = _NAME_OF[self.row.found.messages[i].role]
            value = orjson.dumps(self.row.texts[i])
            self.rendered[i] = b'{"from":"' + name + b'","value":' + value + b"}"
        return self.rendered[i]

    def line(self, id: str, turn: Turn) -> bytes:
        """As `orjson.dumps(to_row(...))` would have it."""
        return b'{"id":%b,"turn_id":%d,"prompt":[%b],"completion":%b,"user_response":%b}\n' % (
            orjson.dumps(id),
            turn.answer,
            b",".join(map(self._turn, turn.history)),
            self._turn(turn.answer),
            self._turn(turn.answer + 1),
        )

    def ready(self) -> bytes:
        """The ready triple; tokens as sampled would tell what was replaced in its text."""
        item, texts = self.row.ready, self.row.texts
        assert item is not None
        *prompt, completion, followup = texts
        if completion != item.response:
            item = replace(item, response_token_ids=None, response_logprobs=None)
        roles = (message.role for message in item.prompt)
        item = replace(
            item,
            prompt=tuple(Message(r, t) for r, t in zip(roles, prompt, strict=True)),
            response=completion,
            followup=followup,
        )
        return orjson.dumps(to_row(item), option=orjson.OPT_APPEND_NEWLINE)


def total(counts: Iterable[Sequence[tuple[str, int]] | None]) -> dict[str, int]:
    """Sums of the table's `pii` column."""
    sums: Counter[str] = Counter()
    for row in counts:
        sums.update(dict(row or ()))
    return dict(sorted(sums.items()))
