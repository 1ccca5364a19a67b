"""What a run writes down of each update, and reads again where it goes on or is replayed.

    rollouts/update-000001.parquet       one row per answer: who said what, and what became of it
    interactions/update-000001.parquet   what was trained on, as `sdpo train --data` reads it

Both are there before the update is made; the second one is the sign that both are whole. The rows
of the first are conversations, as `sdpo data prepare` reads them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..conversations import Message
from ..errors import DataError
from ..interactions import Interaction, prompt_of, to_row, to_turn

_OF_TOOLS = [(name, pa.string()) for name in ("tool_calls", "tool_call_id", "name")]
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), *_OF_TOOLS])
ROLLOUTS = pa.schema(
    [
        ("id", pa.string()),
        ("update", pa.int64()),
        ("phase", pa.int64()),
        ("persona", pa.string()),
        ("prompt_id", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("completion_token_ids", pa.list_(pa.int64())),
        ("completion_logprobs", pa.list_(pa.float64())),
        ("finished", pa.bool_()),
        ("version", pa.int64()),
        ("versions", pa.list_(pa.int64())),
        ("reply_source", pa.string()),
        ("dropped", pa.string()),
        ("satisfied", pa.bool_()),
        ("score", pa.float64()),
    ]
)
"""Columns of a file of rollouts. ``messages``: prompt, answer and, unless the user was silent, the
follow-up. ``version``: updates behind the oldest weights that answered;
``versions``: behind those that made each token. ``dropped``: why it is not trained
on; null: it is. ``satisfied``, ``score``: by the persona's rule, where it has one."""
_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_PROMPT_TURN = pa.struct([("from", pa.string()), ("value", pa.string()), *_OF_TOOLS])
_INTERACTIONS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.list_(_PROMPT_TURN)),
        ("completion", _TURN),
        ("user_response", _TURN),
        ("completion_token_ids", pa.list_(pa.int64())),
        ("completion_logprobs", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer, what the user said to it, and what became of both. See `ROLLOUTS`."""

    id: str
    update: int
    phase: int
    persona: str
    prompt_id: str
    prompt: tuple[Message, ...]
    answer: str
    followup: str | None
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    versions: tuple[int, ...]
    reply_source: str
    dropped: str | None
    satisfied: bool | None
    score: float | None = None

    @property
    def version(self) -> int:
        """Of the oldest weights that it comes from."""
        return min(self.versions)

    def interaction(self) -> Interaction:
        """What is trained on, where nothing is in the way."""
        assert self.followup is not None and self.dropped is None
        return Interaction(
            id=self.id,
            prompt=self.prompt,
            response=self.answer,
            followup=self.followup,
            response_token_ids=self.token_ids,
            response_logprobs=self.logprobs,
        )


def write_update(folder: Path, update: int, records: Sequence[Record]) -> None:
    """Write both files of an update."""
    _interactions_file(folder, update).unlink(missing_ok=True)
    _write(rollouts_file(folder, update), ROLLOUTS, [_row(r) for r in records])
    trained_on = [to_row(r.interaction()) for r in records if r.dropped is None]
    _write(_interactions_file(folder, update), _INTERACTIONS, trained_on)


def read_update(folder: Path, update: int) -> list[Record] | None:
    """The records of an update; None: it has none, or was not written to its end.

    Raises:
        DataError: the file is not what `write_update` writes.
    """
    path = rollouts_file(folder, update)
    if not (path.is_file() and _interactions_file(folder, update).is_file()):
        return None
    try:
        rows = pq.read_table(path, schema=ROLLOUTS).to_pylist()
        return [_record(row) for row in rows]
    except (OSError, pa.ArrowInvalid, DataError) as error:
        problem = f"not a file of rollouts ({error})"
        raise DataError(problem, file=str(path), hint="Remove it to sample again") from error


def rollouts_file(folder: Path, update: int) -> Path:
    """The file of an update's rollouts in a run's folder."""
    return folder / "rollouts" / f"update-{update:06d}.parquet"


def _interactions_file(folder: Path, update: int) -> Path:
    return folder / "interactions" / f"update-{update:06d}.parquet"


def _row(r: Record) -> dict:
    said = [*r.prompt, Message("assistant", r.answer)]
    said += [Message("user", r.followup)] if r.followup is not None else []
    return {
        "id": r.id,
        "update": r.update,
        "phase": r.phase,
        "persona": r.persona,
        "prompt_id": r.prompt_id,
        "messages": [_message(m) for m in said],
        "completion_token_ids": r.token_ids,
        "completion_logprobs": r.logprobs,
        "finished": r.finished,
        "version": r.version,
        "versions": r.versions,
        "reply_source": r.reply_source,
        "dropped": r.dropped,
        "satisfied": r.satisfied,
        "score": r.score,
    }


def _message(message: Message) -> dict[str, str]:
    turn = to_turn(message)
    return {"role": message.role, "content": turn.pop("value")} | turn


def _record(row: dict) -> Record:
    said = prompt_of(row["messages"])
    silent = said[-1].role == "assistant"
    at = len(said) - (1 if silent else 2)
    kept = "id", "update", "phase", "persona", "prompt_id", "finished"
    return Record(
        **{name: row[name] for name in (*kept, "reply_source", "dropped", "satisfied", "score")},
        prompt=said[:at],
        answer=said[at].content,
        followup=None if silent else said[-1].content,
        token_ids=tuple(row["completion_token_ids"]),
        versions=tuple(row["versions"]),
        logprobs=tuple(row["completion_logprobs"]),
    )


def _write(path: Path, schema: pa.Schema, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.Table.from_pylist(rows, schema), partial)
    os.replace(partial, path)
