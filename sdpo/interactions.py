"""Interactions (x, y, o): a prompt history, the model's answer, the user's next message.

`sdpo data prepare` makes them from conversation logs. A file of them is JSONL in the row shape of
the paper's own data (arXiv:2603.12273), or parquet with the same fields as columns:

    {"id": "c1_3", "turn_id": 3, "prompt": [{"from": "human", "value": ...}, ...],
     "completion": {"from": "gpt", "value": ...}, "user_response": {"from": "human", "value": ...}}

with `weight`, `completion_token_ids`, `completion_logprobs` and `next_completion`, a turn like
`completion`, only where they are set. In a prompt, `"from": "tool"` is the result of a tool call,
with `tool_call_id` and `name` where they are known, and a turn from gpt may have `tool_calls`, the
JSON text of OpenAI's list.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from .conversations import Message, ToolMessage, tool_calls_text, tool_message
from .errors import DataError
from .io.fields import as_id, as_list, as_object, as_text, bad, is_integer, kind, shown
from .io.files import written_whole
from .io.rows import read_rows

_ROLE_OF = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
NAME_OF = {role: name for name, role in _ROLE_OF.items()}
"""What files call a role."""
_USE_KNOWN_ROLES = "Use user, assistant, system or tool (human, gpt, system or tool after `from`)"
_OF_TOOLS = ("tool_calls", "tool_call_id", "name")


class RepeatedId(DataError):
    """An id that an earlier row of the file has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interaction:
    """One training example. Raises DataError, naming the field, if it could not be trained on.

    prompt: x, ends with a user message or a tool's result; an assistant's is let pass, as published
    rows of WildFeedback have some. response: y, not blank. followup: o, not blank.
    turn_id: the answer's index in its cleaned conversation. weight: of its loss, finite, >= 0.
    next_response: y', the answer that the log has behind o, not blank.
    response_token_ids, response_logprobs: y as it was sampled and log π_old(y_t) in nats,
    for online data; as long as each other.
    """

    id: str
    prompt: tuple[Message, ...]
    response: str
    followup: str
    turn_id: int | None = None
    weight: float = 1.0
    response_token_ids: tuple[int, ...] | None = None
    response_logprobs: tuple[float, ...] | None = None
    next_response: str | None = None

    def __post_init__(self) -> None:
        _check_turns(self)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            problem = f"the weight is {shown(self.weight)}, not a finite number >= 0"
            raise bad("weight", problem, "Use 0 to switch a row off, or leave the field out for 1")
        if self.response_token_ids is not None:
            _check_token_ids(self.response_token_ids)
        if self.response_logprobs is not None:
            _check_logprobs(self.response_logprobs, self.response_token_ids)


def _check_turns(interaction: Interaction) -> None:
    prompt = interaction.prompt
    if not interaction.id:
        raise bad("id", "the id is empty", "Give every interaction its own id")
    if not prompt:
        raise bad("prompt", "the prompt has no messages", "Give the history, or drop the row")
    for i, message in enumerate(prompt):
        if message.role not in NAME_OF:
            raise bad(f"prompt[{i}]", f"unknown role {shown(message.role)}", _USE_KNOWN_ROLES)
    if not any(message.role == "user" for message in prompt):
        raise bad("prompt", "the prompt has no user message", "Give what was answered")
    if (last := prompt[-1].role) == "system":
        problem = f"the prompt ends with a message of role {last!r}, not a user message"
        raise bad("prompt", problem, "Cut it after the user message that was answered")
    if not interaction.response.strip():
        problem = "an interaction whose response is empty teaches nothing"
        raise bad("completion", problem, "Drop the row")
    if not interaction.followup.strip():
        problem = "an interaction whose user response is empty has no feedback to learn from"
        raise bad("user_response", problem, "Drop the row")
    if interaction.next_response is not None and not interaction.next_response.strip():
        problem = "the response behind the follow-up is empty"
        raise bad("next_completion", problem, "Leave the field out where there is none")


def _check_token_ids(ids: tuple[int, ...]) -> None:
    name = "completion_token_ids"
    if not ids:
        problem = "no token ids, though the completion has text"
        raise bad(name, problem, "Leave the field out where they are unknown")
    for i, token in enumerate(ids):
        if not is_integer(token) or not 0 <= token < 2**31:
            problem = f"{shown(token)} is not a token id, an integer from 0 to 2**31 - 1"
            raise bad(f"{name}[{i}]", problem, "Log the ids as they were sampled")


def _check_logprobs(logprobs: tuple[float, ...], ids: tuple[int, ...] | None) -> None:
    name = "completion_logprobs"
    if ids is None:
        problem = "log-probabilities without the tokens that they belong to"
        raise bad(name, problem, "Add completion_token_ids, or leave both out")
    if len(logprobs) != len(ids):
        problem = f"{len(logprobs)} log-probabilities for {len(ids)} token ids"
        raise bad(name, problem, "Log one per sampled token")
    for i, value in enumerate(logprobs):
        if not (math.isfinite(value) and value <= 0):
            problem = f"{shown(value)} is not a log-probability, finite and <= 0"
            raise bad(f"{name}[{i}]", problem, "Log natural logarithms of probabilities")


def conversation_of(interaction: Interaction) -> str:
    """The conversation's id, which `prepare` begins an interaction's id with: "c1" of "c1_3~2".

    "~2" marks a repeated id and goes; of "_3", only the turn's own number goes, or without a
    `turn_id` any number.
    """
    id = re.sub(r"~\d+$", "", interaction.id)
    turn = r"\d+" if interaction.turn_id is None else interaction.turn_id
    return re.sub(rf"_{turn}$", "", id)


# The file format


def read_interactions(path: str | Path) -> list[Interaction]:
    """All interactions of a file; see `iter_interactions`."""
    return list(iter_interactions(path))


def iter_interactions(path: str | Path) -> Iterator[Interaction]:
    """Streams the interactions of a JSONL file (compressed or not) or parquet file, in its order.

    Messages may be {"from": "human"|"gpt"|"system", "value"} or {"role": "user"|"assistant"|
    "system", "content"}; completion and user_response may also be plain strings. A row without an
    id gets its row number; other optional fields may be left out or null. Unknown fields are
    ignored.

    Raises DataError, naming file, line and field, for a row that is not an interaction and for an
    id that an earlier row has.
    """
    for _, row in iter_rows(path):
        if isinstance(row, DataError):
            raise row
        yield row


def iter_rows(path: str | Path) -> Iterator[tuple[str, Interaction | DataError]]:
    """Streams (row as in `DataError.row`, interaction or what is wrong with it).

    An id that an earlier row has is wrong, too.

    Raises DataError where the file cannot be read on.
    """
    place_of: dict[str, str] = {}
    for number, place, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            found = from_row(as_object(row, "row"), default_id=str(number))
            if found.id in place_of:
                problem = f"{shown(found.id)} is the id of {place_of[found.id]} too"
                raise RepeatedId(problem, field="id", hint="Give every row its own id, or none")
            place_of[found.id] = place
        except DataError as error:
            found = error.at(file=str(path), row=place)
        yield place, found


def write_interactions(path: str | Path, interactions: Iterable[Interaction]) -> int:
    """Writes interactions as JSONL, whole or not at all (`written_whole`), and returns how many.

    Raises DataError if two interactions have the same id.
    """
    ids: set[str] = set()
    with written_whole(path) as file:
        for interaction in interactions:
            if interaction.id in ids:
                problem = f"{shown(interaction.id)} is the id of two interactions"
                raise bad("id", problem, "Give each its own id")
            ids.add(interaction.id)
            line = orjson.dumps(to_row(interaction), option=orjson.OPT_APPEND_NEWLINE)
            file.write(line.decode())
    return len(ids)


def to_row(interaction: Interaction) -> dict[str, Any]:
    """The row of a file."""
    row: dict[str, Any] = {"id": interaction.id}
    if interaction.turn_id is not None:
        row["turn_id"] = interaction.turn_id
    row["prompt"] = [to_turn(message) for message in interaction.prompt]
    row["completion"] = to_turn(Message("assistant", interaction.response))
    row["user_response"] = to_turn(Message("user", interaction.followup))
    if interaction.weight != 1.0:
        row["weight"] = interaction.weight
    if interaction.response_token_ids is not None:
        row["completion_token_ids"] = interaction.response_token_ids
    if interaction.response_logprobs is not None:
        row["completion_logprobs"] = interaction.response_logprobs
    if interaction.next_response is not None:
        row["next_completion"] = to_turn(Message("assistant", interaction.next_response))
    return row


def to_turn(message: Message) -> dict[str, str]:
    """A message of a row's prompt; the role must be one of `NAME_OF`."""
    turn = {"from": NAME_OF[message.role], "value": message.content}
    if isinstance(message, ToolMessage):
        more = {name: getattr(message, name) for name in _OF_TOOLS}
        turn |= {name: text for name, text in more.items() if text is not None}
    return turn


def from_row(row: dict[str, Any], default_id: str) -> Interaction:
    """The interaction of a row. Raises DataError, naming the field."""
    weight, ids = row.get("weight"), row.get("completion_token_ids")
    after = row.get("next_completion")
    return Interaction(
        id=as_id(row.get("id"), default_id),
        prompt=prompt_of(row.get("prompt")),
        response=_spoken_by("assistant", row.get("completion"), "completion"),
        followup=_spoken_by("user", row.get("user_response"), "user_response"),
        turn_id=_turn_id(row.get("turn_id")),
        weight=1.0 if weight is None else _number(weight, "weight"),
        response_token_ids=None if ids is None else tuple(as_list(ids, "completion_token_ids")),
        response_logprobs=_logprobs(row.get("completion_logprobs")),
        next_response=None if after is None else _spoken_by("assistant", after, "next_completion"),
    )


def prompt_of(turns: object) -> tuple[Message, ...]:
    """The messages of a row's ``prompt``. Raises DataError, naming the field."""
    messages = as_list(turns, "prompt")
    if not messages:
        raise bad("prompt", "the prompt has no messages", "Give the history, or drop the row")
    return tuple(_from_turn(turn, f"prompt[{i}]") for i, turn in enumerate(messages))


def _from_turn(turn: object, name: str) -> Message:
    turn = as_object(turn, name)
    if "from" not in turn:
        role = as_text(turn.get("role"), f"{name}.role")
        content = turn.get("content")
        if content is None and turn.get("tool_calls"):  # as OpenAI's API answers
            content = ""
        return _with_tools(role, as_text(content, f"{name}.content"), turn, name)
    sender = as_text(turn["from"], f"{name}.from")
    if sender not in _ROLE_OF:
        raise bad(f"{name}.from", f"unknown sender {shown(sender)}", _USE_KNOWN_ROLES)
    text = as_text(turn.get("value"), f"{name}.value")
    return _with_tools(_ROLE_OF[sender], text, turn, name)


def _with_tools(role: str, text: str, turn: dict[str, Any], name: str) -> Message:
    """The message, with what files say of tools: calls of the assistant's, ids of results'."""
    if role == "assistant" and turn.get("tool_calls"):
        calls = _tool_calls(turn["tool_calls"], f"{name}.tool_calls")
        return tool_message(role, text, tool_calls=calls)
    if role == "tool":
        known = {key: turn[key] for key in _OF_TOOLS[1:] if turn.get(key) is not None}
        return tool_message(role, text, **{k: as_text(v, f"{name}.{k}") for k, v in known.items()})
    return Message(role, text)


def _tool_calls(calls: object, field: str) -> str:
    try:
        if isinstance(calls, str):
            calls = json.loads(as_text(calls, field))
        return tool_calls_text(as_list(calls, field))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        hint = 'Write [{"id": …, "type": "function", "function": {"name": …, "arguments": …}}]'
        raise bad(field, f"not a list of tool calls ({error})", hint) from None


def _spoken_by(role: str, turn: object, name: str) -> str:
    if not isinstance(turn, dict):
        return as_text(turn, name)
    message = _from_turn(turn, name)
    if message.role != role:
        raise bad(name, f"a message of role {message.role!r}", f"It must be of role {role!r}")
    return message.content


def _turn_id(value: object) -> int | None:
    if value is None or (is_integer(value) and value.bit_length() < 64):
        return value
    raise bad("turn_id", f"found {kind(value)}, not an integer", "Leave it out if unknown")


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad(name, f"found {kind(value)} where a number is needed", "Write it as a number")
    try:
        return float(value)
    except OverflowError:
        raise bad(name, "the number is too large for a float", "Write a smaller one") from None


def _logprobs(value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    name = "completion_logprobs"
    return tuple(_number(v, f"{name}[{i}]") for i, v in enumerate(as_list(value, name)))
