"""Conversations, and the errors that say what is wrong with a log.

What a log holds is `sdpo.data.read.formats`' affair; which turns are worth training on,
`sdpo.data.prepare.rules`'s.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class DataError(ValueError):
    """Data that cannot be used: names the file, the row, the field, and what to do about it.

    JSONL rows are counted as editors count lines, from 1 ("line 12"); rows of parquet files and of
    JSON arrays from 0, as data frames do ("row 12 (counted from 0)").
    """


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is what the log says: "user", "assistant", "human", "gpt", "system", ..."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a log, as it was logged: nothing stripped, dropped or reordered.

    `source` is "path:row", the row counted as in `DataError`. `has_language` tells a log without
    a language column (nothing is known) from a row whose language is unknown (`language` None).
    `named` is False where `id` is not the log's own `conversation_id` or `id`, but its hash of the
    conversation, or made from the row's place. `user` is a hashed address or a user's id; `names`
    are all that the log calls the row and its user. `flagged` and `redacted` are what the log's
    moderation says of it or of any of its messages.
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


def fault(field: str, problem: str, remedy: str) -> DataError:
    """An error in one field of a row; `located` adds which row of which file."""
    return DataError(f"field `{field}`: {problem}. {remedy}.")


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts `where` (a file and a row) before the message of a DataError raised inside."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}, {error}") from None


def as_text(value: object, field: str) -> str:
    """`value` if it is text that UTF-8 can hold; else a DataError naming `field`."""
    if not isinstance(value, str):
        raise fault(field, f"found {kind(value)} where text is needed", "Write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"half of a surrogate pair at character {error.start}, which is not valid text"
        raise fault(field, problem, "Repair or remove that character") from None
    return value


def as_list(value: object, field: str) -> list[Any]:
    """`value` if it is a list; else a DataError naming `field`."""
    if not isinstance(value, list):
        raise fault(field, f"found {kind(value)} where a list is needed", "Write it as a list")
    return value


def as_object(value: object, field: str) -> dict[str, Any]:
    """`value` if it is a JSON object; else a DataError naming `field`."""
    if not isinstance(value, dict):
        remedy = "Write it as a JSON object"
        raise fault(field, f"found {kind(value)} where an object is needed", remedy)
    return value


def as_id(value: object, default: str, field: str = "id") -> str:
    """A row's id: text or an integer, or `default` if the row has none."""
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not as_text(value, field):
        raise fault(field, "the id is empty", "Give the row an id, or leave the field out")
    return str(value)


def kind(value: object) -> str:
    """What JSON calls a value, for messages."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object", type(None): "nothing (null or missing)"}
    return names.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """A value for messages: short, and of what may hold anything only its kind."""
    if isinstance(value, str) and len(value) > 40:
        value = value[:40] + "…"
    return repr(value) if isinstance(value, str | int | float) else kind(value)


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
