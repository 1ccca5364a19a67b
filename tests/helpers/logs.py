"""Small real logs: every published shape in every container, with the columns that nobody reads.

A conversation is written down once, as (role, text) turns, and `row` gives it the shape of a
format; `write` puts rows into the container that a path's suffixes name.
"""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from sdpo.data.filters.guardrails import OFF
from sdpo.data.prepare.prepare import PrepareConfig

Row = dict[str, Any]
Turn = tuple[str | None, str | None] | None
Turns = Sequence[Turn] | None

CONTAINERS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "json")
WRITTEN = datetime(2023, 5, 1, 12, 30, tzinfo=UTC)
CATEGORIES = ("harassment", "harassment/threatening", "self-harm", "sexual/minors")


# Rows


def wildchat(id: str | None, turns: Turns, language: str | None = "English") -> Row:
    """A row of allenai/WildChat."""
    return {
        "conversation_id": id,
        "model": "gpt-3.5-turbo",
        "timestamp": WRITTEN,
        "conversation": _each(turns, _wildchat_message),
        "turn": len(turns or ()) // 2,
        "language": language,
        "openai_moderation": _each(turns, lambda role, content: _openai_flags()),
        "detoxify_moderation": _each(turns, lambda role, content: {"toxicity": 0.01}),
        "toxic": False,
        "redacted": False,
    }


def wildchat_1m(id: str | None, turns: Turns, language: str | None = "English") -> Row:
    """A row of allenai/WildChat-1M: `conversation_hash`, and where the user sits."""
    shared = wildchat(id, turns, language)
    row = {"conversation_hash": shared.pop("conversation_id"), **shared}
    row["conversation"] = _each(turns, _wildchat_1m_message)
    return row | {
        "state": "Normandy",
        "country": "France",
        "hashed_ip": "9c8a51ac",
        "header": {"accept-language": "fr", "user-agent": "Mozilla"},
    }


def lmsys(id: str | None, turns: Turns, language: str | None = "English") -> Row:
    """A row of lmsys/lmsys-chat-1m."""
    columns = ("conversation_id", "turn", "language", "openai_moderation", "redacted")
    row = {name: value for name, value in wildchat(id, turns, language).items() if name in columns}
    return row | {"model": "vicuna-13b", "conversation": messages(id, turns)["messages"]}


def wildfeedback(id: str | None, turns: Turns, language: str | None = None) -> Row:
    """A row as WildFeedback is published: [{from, value}] and no id."""
    return {"conversation": _each(turns, _from_value)}


def sharegpt(id: str | None, turns: Turns, language: str | None = None) -> Row:
    return {"id": id, "conversations": _each(turns, _from_value)}


def messages(id: str | None, turns: Turns, language: str | None = None) -> Row:
    """A row in the shape of OpenAI's API."""
    return {
        "id": id,
        "messages": _each(turns, lambda role, content: {"role": role, "content": content}),
    }


def triples(id: str | None, turns: Turns, language: str | None = None) -> Row:
    """A ready interaction: the last two turns are the answer and the follow-up."""
    *prompt, answer, follow_up = _each(turns, _from_value) or [None, None]
    return {
        "id": id,
        "turn_id": len(prompt),
        "prompt": prompt,
        "completion": answer,
        "user_response": follow_up,
    }


def _each(turns: Turns, make: Callable[[str | None, str | None], Row]) -> list[Row | None] | None:
    return None if turns is None else [t and make(*t) for t in turns]


def _wildchat_message(role: str | None, content: str | None) -> Row:
    flags = {"redacted": False, "toxic": False}
    return {"content": content, "language": "English", "role": role} | flags


def _wildchat_1m_message(role: str | None, content: str | None) -> Row:
    place = {"country": "France", "hashed_ip": "9c8a51ac", "state": "Normandy"}
    seen = {"header": {"accept-language": "fr", "user-agent": "Mozilla"}, "timestamp": WRITTEN}
    return _wildchat_message(role, content) | place | seen | {"turn_identifier": 1234567}


def _openai_flags() -> Row:
    return {
        "categories": dict.fromkeys(CATEGORIES, False),
        "category_scores": dict.fromkeys(CATEGORIES, 1e-5),
        "flagged": False,
    }


def _from_value(role: str | None, content: str | None) -> Row:
    name = {"user": "human", "assistant": "gpt"}.get(role or "", role)
    return {"from": name, "value": content}


ROWS: dict[str, Callable[..., Row]] = {
    "wildchat": wildchat,
    "wildchat-1m": wildchat_1m,
    "lmsys": lmsys,
    "wildfeedback": wildfeedback,
    "sharegpt": sharegpt,
    "messages": messages,
    "triples": triples,
}
# what `format=` and the report call them
FORMAT = {shape: shape for shape in ROWS} | {"wildchat-1m": "wildchat"}


# Containers


def _schema(shape: str) -> pa.Schema:
    """As a row without nulls has it: a file of nothing but nulls has its columns' types too."""
    whole = ROWS[shape]("id", [("user", "q"), ("assistant", "a"), ("user", "f")], "English")
    return pa.Table.from_pylist([whole]).schema


SCHEMAS = {shape: _schema(shape) for shape in ROWS}


def row(shape: str, id: str | None, turns: Turns, language: str | None = "English") -> Row:
    return ROWS[shape](id, turns, language)


def json_line(row: object) -> bytes:
    """A row as a line; bytes as they are."""
    if isinstance(row, bytes):
        return row + b"\n"
    return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


def json_lines(rows: Iterable[object]) -> bytes:
    return b"".join(map(json_line, rows))


def parquet(shape: str, rows: Iterable[Row], *, rows_per_group: int = 2) -> bytes:
    file = io.BytesIO()
    table = pa.Table.from_pylist(list(rows), schema=SCHEMAS[shape])
    pq.write_table(table, file, row_group_size=rows_per_group, write_page_checksum=True)
    return file.getvalue()


def packed(shape: str, rows: Sequence[Row], container: str) -> bytes:
    """The bytes of a file that holds `rows`; `container` is one of CONTAINERS."""
    if container == "parquet":
        return parquet(shape, rows)
    if container == "json":
        return json.dumps(rows, ensure_ascii=False, default=str, indent=1).encode()
    pack = {
        "jsonl": bytes,
        "jsonl.gz": lambda lines: gzip.compress(lines, mtime=0),
        "jsonl.zst": zstandard.compress,
    }
    return pack[container](json_lines(rows))


def write_lines(path: Path, *rows: object) -> Path:
    """Writes rows as JSON lines."""
    path.write_bytes(json_lines(rows))
    return path


def write(path: Path, shape: str, rows: Sequence[Row]) -> Path:
    """Writes rows into the container that the name of `path` ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(shape, rows, path.name.split(".", maxsplit=1)[1]))
    return path


# One log that every format can hold


def exchange(name: str, answers: int = 1) -> list[tuple[str, str]]:
    """Question and answer in turn, and a last word of the user's."""
    turns = []
    for i in range(answers):
        turns += [("user", f"{name}: question {i}"), ("assistant", f"{name}: answer {i}")]
    return [*turns, ("user", f"{name}: thanks")]


def interaction(id: str, turns: Sequence[tuple[str, str]]) -> Row:
    """What `prepare` writes for an answer: the turns are the history, it, and the follow-up."""
    row = triples(id, turns)
    row["turn_id"] = int(id.rsplit("_", 1)[1])
    return row


# Through `prepare`, with nothing filtered


def all_turns(*inputs: Path | str, out: Path, **settings: Any) -> PrepareConfig:
    """Every answer with a follow-up, and no guardrails."""
    return PrepareConfig(
        inputs=tuple(map(str, inputs)), out=str(out), preset="all-turns", guardrails=OFF, **settings
    )


def rows_of(out: Path) -> list[Row]:
    return [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
