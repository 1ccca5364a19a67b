"""All texts of a row, as the guardrails read them: contents, and what tools are called with."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ...conversations import Message, ToolMessage


def texts_of(messages: Sequence[Message]) -> list[str]:
    """Every message's content, then the arguments of all tool calls.

    Each key is a text, and each value with its key before it, as in "password: hunter2": what
    an argument is called tells whether it is secret.
    """
    texts = [message.content for message in messages]
    for message in messages:
        if isinstance(message, ToolMessage) and message.tool_calls is not None:
            for call in json.loads(message.tool_calls):
                texts += _leaves(call["function"]["arguments"], "")
    return texts


def with_texts(messages: Sequence[Message], texts: Sequence[str]) -> list[Message]:
    """The messages with other texts in place of theirs, in the order of `texts_of`."""
    contents, more = texts[: len(messages)], iter(texts[len(messages) :])
    return [_with(message, text, more) for message, text in zip(messages, contents, strict=True)]


def _with(message: Message, content: str, more: Iterator[str]) -> Message:
    if not isinstance(message, ToolMessage) or message.tool_calls is None:
        return replace(message, content=content)
    calls = json.loads(message.tool_calls)
    for call in calls:
        function = call["function"]
        function["arguments"] = _replaced(function["arguments"], "", more)
    return replace(message, content=content, tool_calls=json.dumps(calls, ensure_ascii=False))


def _leaves(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _leaves(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, key)
    elif _is_text(value):
        yield f"{key}: {value}"


def _replaced(value: Any, key: str, more: Iterator[str]) -> Any:
    """The value with the next texts in it; a number that was replaced is a text."""
    if isinstance(value, dict):
        pairs = ((next(more), item) for item in value.values())
        return {name: _replaced(item, name, more) for name, item in pairs}
    if isinstance(value, list):
        return [_replaced(item, key, more) for item in value]
    if not _is_text(value):
        return value
    # a replaced key was replaced here, too
    text = next(more).removeprefix(f"{key}: ")
    return value if text == str(value) else text


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
