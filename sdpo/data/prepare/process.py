"""What a worker makes of a unit: the rendered interactions, and a table of what became of each row.

Both are files of the work folder, `0-00012.jsonl` and `0-00012.arrow` (0: the first of the places
that were processed). The table is renamed into place last: where it stands, the unit is done.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa

from ...conversations import Conversation, Message, ToolMessage
from ...errors import DataError
from ...interactions import NAME_OF, Interaction, conversation_of, to_row, to_turn
from ...io.rows import Batch, read_chunk
from ..filters import duplicates, pii
from ..filters.guardrails import GuardrailConfig
from ..filters.injections import injection
from ..read.formats import Item, Ready, items_of
from .plan import Unit
from .rules import Drop, Extraction, ExtractionRules, Turn, Unused, examine
from .texts import texts_of, with_texts

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
        "unused": pa.map_(pa.string(), pa.int32()),
        "left_out": pa.map_(pa.string(), pa.int32()),
        "has_tools": pa.bool_(),
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
"""`unused`, `left_out`: as in `Extraction`. `has_tools`: some message calls tools or is a result.
`ends`: where each of a row's interactions ends in the unit's lines. `*_key`: 64 bits of a hash (0:
none)."""

_SKIP = "To leave such rows out and count them, add --bad-rows skip"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all units of a preparation have in common."""

    folder: Path
    rules: ExtractionRules
    guardrails: GuardrailConfig
    opted_out: frozenset[str]
    lenient: bool
    order: Path | None
    """.npy of every row's place in the order; None: as they come."""
    places: tuple[int, int]
    """Only rows of these places are read, [from, to)."""

    def load_order(self) -> np.ndarray | None:
        """Every row's place, memory-mapped."""
        return None if self.order is None else np.load(self.order, mmap_mode="r")

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
        """Opens what `process` has made."""
        mapped = pa.memory_map(str(job.table_of(unit.index)))
        table = pa.ipc.open_file(mapped).read_all()
        return cls(unit=unit.index, table=table, lines=job.lines_of(unit.index))


def whole_table(shards: list[Shard]) -> pa.Table:
    """All shards' tables, end to end."""
    return pa.concat_tables([SCHEMA.empty_table(), *(shard.table for shard in shards)])


@dataclass(slots=True)
class _Row:
    """One row on its way: what is known of it, and its row of the table."""

    table: dict[str, Any]
    id: str = ""
    found: Extraction | None = None
    texts: list[str] = field(default_factory=list)
    ready: Interaction | None = None


def process(unit: Unit, job: Job) -> int:
    """Processes a unit unless that is done; returns the number of its rows.

    Raises DataError for an unreadable row, unless the job is lenient.
    """
    table = job.table_of(unit.index)
    if table.exists():
        return unit.chunk.rows
    order, end = job.load_order(), unit.offset + unit.chunk.rows
    places = np.arange(unit.offset, end) if order is None else np.array(order[unit.offset : end])
    wanted = (places >= job.places[0]) & (places < job.places[1])
    find = pii.presidio_finder() if job.guardrails.pii == "presidio" else pii.find_pii
    redactor = None if job.guardrails.pii == "off" else pii.Redactor(find)
    lines = job.lines_of(unit.index)
    # this process's own: one that outlives its parent must not write into another's file
    own = f"{os.getpid()}.partial"
    partials = {path: path.with_name(f"{path.name}.{own}") for path in (lines, table)}
    with (
        _no_collections(),
        partials[lines].open("wb") as out,
        pa.OSFile(str(partials[table]), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for batch in read_chunk(
            unit.log.file, unit.chunk, wanted=wanted, columns=unit.log.columns, lenient=job.lenient
        ):
            done = _process_batch(batch, unit, places[batch.indices].tolist(), job, redactor, out)
            columns = {name: [row.table.get(name) for row in done] for name in SCHEMA.names}
            writer.write_batch(pa.record_batch(columns, SCHEMA))
    for path, partial in partials.items():
        os.replace(partial, path)
    return unit.chunk.rows


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without garbage collection: a unit makes millions of objects and no cycles, and looking for
    cycles takes a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _process_batch(
    batch: Batch,
    unit: Unit,
    places: list[int],
    job: Job,
    redactor: pii.Redactor | None,
    out: BinaryIO,
) -> list[_Row]:
    rows, indices = [], (batch.indices + unit.offset).tolist()
    items = items_of(batch, unit.log, job.rules.languages)
    for number, index, place, item in zip(batch.numbers, indices, places, items, strict=True):
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


def _examined(item: Item, place: int, job: Job) -> _Row:
    if isinstance(item, DataError):
        if not job.lenient:
            raise item.hinting(_SKIP)
        return _Row({"decision": Drop.UNREADABLE, "error": str(item)})
    if isinstance(item, Ready):
        return _ready(item, job)
    row = _Row(
        {"conversation_id": item.id, "language": item.language, "model": item.model, **_user(item)},
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
    if found.left_out:
        row.table["left_out"] = sorted(found.left_out.items())
    if found.dropped is None:
        _keep(row, found)
        row.table["unused"] = sorted(found.unused.items())
    return row


def _keep(row: _Row, found: Extraction) -> None:
    row.found = found
    if found.has_tools:
        row.texts = texts_of(found.messages)
        row.table["has_tools"] = True
    else:
        row.texts = [message.content for message in found.messages]


def _user(item: Conversation | Ready) -> dict[str, Any]:
    return {"user": item.user, "user_key": key(item.user) if item.user else 0}


def _has_opted_out(item: Conversation | Ready, id: str, job: Job) -> bool:
    return not job.opted_out.isdisjoint((id, item.source, *item.names))


def _ready(item: Ready, job: Job) -> _Row:
    """A ready interaction: the guardrails apply to it, the rules do not."""
    ready = item.interaction
    row = _Row({"conversation_id": ready.id, "ready": True, **_user(item)}, id=ready.id)
    if _has_opted_out(item, ready.id, job) or conversation_of(ready) in job.opted_out:
        row.table |= {"decision": Drop.OPTED_OUT, "user": None}
        return row
    followup = Message("user", ready.followup)
    messages = [*ready.prompt, Message("assistant", ready.response), followup]
    n, after = len(ready.prompt), ready.next_response if job.rules.next_response else None
    turns = [Turn(tuple(range(n)), n, n + 1, n)]
    unused: dict[str, int] = {}
    if after is not None:
        messages.append(Message("assistant", after))
    elif job.rules.next_response:
        turns, unused = [], {str(Unused.NO_NEXT): 1}
    tools = any(isinstance(message, ToolMessage) for message in messages)
    _keep(row, Extraction(None, messages, turns, unused, {}, has_tools=tools))
    if unused:
        row.table["unused"] = sorted(unused.items())
    row.ready = replace(ready, next_response=after)
    row.table |= {"decision": KEPT, **_sizes(messages)}
    return row


def _sizes(messages: Sequence[Message]) -> dict[str, int]:
    return {"messages": len(messages), "characters": sum(len(m.content) for m in messages)}


def _stem(conversation: Conversation, place: int, rules: ExtractionRules) -> str:
    """What the ids of the conversation's interactions begin with."""
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
    """Adds fingerprints, and sketches of conversations: ready interactions of one conversation
    share most of their history, and would be taken for near-duplicates."""
    if guardrails.duplicates == "off" or not rows:
        return
    texts = ["\n\0\n".join(row.texts) for row in rows]  # where one message ends counts, too
    for row, (high, low) in zip(rows, duplicates.fingerprints(texts).tolist(), strict=True):
        row.table |= {"fingerprint_high": high, "fingerprint_low": low}
    if guardrails.duplicates == "near":
        texts = [_without_system(row, text) for row, text in zip(rows, texts, strict=True)]
        for row, sketch in zip(rows, duplicates.sketches(texts), strict=True):
            if row.ready is None:
                row.table["sketch"] = sketch


def _without_system(row: _Row, whole: str) -> str:
    """What makes conversations similar; a long system prompt is the same in all of a service's."""
    assert row.found is not None
    if not (system := row.found.system):
        return whole
    return "\n\0\n".join(text for i, text in enumerate(row.texts) if i not in system)


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


def _render(row: _Row, job: Job, out: BinaryIO) -> None:
    """Writes the row's interactions, except those whose follow-up is an injection."""
    assert row.found is not None
    ids, ends, caught, opted_out = [], [], 0, 0
    turns = _turns(row) if row.found.turns and not row.ready else []
    for turn in row.found.turns:
        id = row.id if row.ready else f"{row.id}_{turn.turn_id}"
        if id in job.opted_out:
            opted_out += 1
            continue
        if job.guardrails.injections and injection(row.texts[turn.followup]):
            caught += 1
            continue
        ready = row.ready and to_row(_redacted(row.ready, row.texts))
        line = ready or _row_of(turns, id, turn, row.found.runs)
        out.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        ids.append(id)
        ends.append(out.tell())
    row.table |= {
        "injections": caught,
        "opted_out": opted_out,
        "interaction_ids": ids,
        "id_keys": [key(id) for id in ids],
        "ends": ends,
    }


def _turns(row: _Row) -> list[dict[str, str]]:
    """A file's turns of a row's messages, with its texts."""
    assert row.found is not None
    messages = row.found.messages
    if row.table.get("has_tools"):
        return [to_turn(message) for message in with_texts(messages, row.texts)]
    pairs = zip(messages, row.texts, strict=True)
    return [{"from": NAME_OF.get(m.role, m.role), "value": text} for m, text in pairs]


def _row_of(turns: list[dict[str, str]], id: str, turn: Turn, runs: bool) -> dict[str, Any]:
    """What `to_row` would give, without making an `Interaction` of every turn."""
    prompt = [turns[i] for i in turn.history]
    after = {} if turn.next_answer is None else {"next_completion": turns[turn.next_answer]}
    return {
        "id": id,
        "turn_id": turn.turn_id,
        "prompt": _joined(prompt) if runs else prompt,
        "completion": turns[turn.answer],
        "user_response": turns[turn.followup],
        **after,
    }


def _joined(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Neighbours of one role as one turn, parted by a blank line; what has to do with tools stays
    as it is."""
    prompt: list[dict[str, str]] = []
    for turn in turns:
        last = prompt[-1] if prompt else {}
        if last.get("from") == turn["from"] != "tool" and len(last) == len(turn) == 2:
            prompt[-1] = turn | {"value": f"{last['value']}\n\n{turn['value']}"}
        else:
            prompt.append(turn)
    return prompt


def _redacted(ready: Interaction, texts: list[str]) -> Interaction:
    """A ready interaction with its redacted texts.

    If the response was redacted, the sampled tokens go: they would tell what was replaced.
    """
    n = len(ready.prompt)
    response, followup, *rest = texts[n:]
    after = None if ready.next_response is None else rest.pop(0)
    if response != ready.response:
        ready = replace(ready, response_token_ids=None, response_logprobs=None)
    prompt = tuple(with_texts(ready.prompt, [*texts[:n], *rest]))
    answers = dict(response=response, next_response=after)
    return replace(ready, prompt=prompt, followup=followup, **answers)
