"""Conversations as they were logged.

`sdpo.data.read.formats` makes them from a log's rows; `sdpo.data.prepare.rules` decides which of
their turns are worth training on.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is what the log says: "user", "assistant", "human", "gpt", "system", ..."""

    role: str
    content: str

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class ToolMessage(Message):
    """An assistant's message that calls tools, or a tool's result.

    Args:
        tool_calls: JSON text of the list of calls, as `tool_calls_text` writes it; None: no calls.
        tool_call_id: the call that the result is of.
        name: the tool that the result is of.
    """

    tool_calls: str | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it; arguments are objects where they are known."""
        chat: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls is not None:
            chat["tool_calls"] = json.loads(self.tool_calls)
        others = {"tool_call_id": self.tool_call_id, "name": self.name}
        return chat | {key: value for key, value in others.items() if value is not None}


def tool_message(
    role: str,
    content: str,
    *,
    tool_calls: str | None = None,
    tool_call_id: str | None = None,
    name: str | None = None,
) -> Message:
    """A `ToolMessage`, or a plain message if it has nothing of one."""
    if tool_calls is None and tool_call_id is None and name is None:
        return Message(role, content)
    return ToolMessage(role, content, tool_calls, tool_call_id, name)


def tool_calls_text(calls: Iterable[Mapping[str, Any]]) -> str:
    """JSON text of an assistant's tool calls: [{"id", "type", "function": {"name", "arguments"}}].

    Arguments that are logged as the JSON text of an object become that object, as the templates of
    transformers expect; of a call, nothing that is null is kept.

    Raises:
        ValueError: a call is no object with a function and its name.
    """
    return json.dumps([_tool_call(call) for call in calls], ensure_ascii=False)


def _tool_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ValueError("a tool call that is no object")
    function = call.get("function") or call  # or, as some logs have it, the function alone
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call without a function's name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _object_in(arguments)
    arguments = _without_nulls(arguments)
    id = {} if call.get("id") is None else {"id": str(call["id"])}
    return id | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _object_in(text: str) -> Any:
    """The object that a JSON text holds, or the text."""
    try:
        value = json.loads(text or "{}")
        json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _without_nulls(value: Any) -> Any:
    """Parquet gives every call the arguments of all, null where it has none."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a log, as it was logged: nothing stripped, dropped or reordered.

    Args:
        source: "path:row", the row counted as in `DataError`.
        has_language: the log has a column of languages. Without one nothing is known; with one,
            `language` None means that this row's language is unknown.
        named: `id` is the log's own `conversation_id` or `id`, not its hash of the conversation
            or made from the row's place.
        user: a hashed address or a user's id.
        names: everything that the log calls the row and its user.
        flagged: the log's moderation flagged the conversation or one of its messages.
        redacted: the log's publisher redacted the conversation or one of its messages.
        lost: messages that hold something beside text, by index, and what: (2, "part image_url").
            Their `content` is what text they have.
        reasoning: how many messages came with reasoning that was not said to the user; it is not
            in their `content`.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    language: str | None = None
    has_language: bool = False
    named: bool = True
    user: str | None = None
    names: tuple[str, ...] = ()
    model: str | None = None
    flagged: bool = False
    redacted: bool = False
    lost: tuple[tuple[int, str], ...] = ()
    reasoning: int = 0
