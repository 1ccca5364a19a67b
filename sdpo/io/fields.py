"""Fields of a row as the type they must have, or a DataError that names the field."""

from collections.abc import Iterable
from typing import Any, TypeGuard

from ..errors import DataError


def bad(field: str, problem: str, hint: str) -> DataError:
    """The error of one field, whose file and row the caller knows."""
    return DataError(problem, field=field, hint=hint)


def as_text(value: object, field: str) -> str:
    """`value` if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise bad(field, f"found {kind(value)} where text is needed", "Write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"half of a surrogate pair at character {error.start}, which is not valid text"
        raise bad(field, problem, "Repair or remove that character") from None
    return value


def as_list(value: object, field: str) -> list[Any]:
    """`value` if it is a list."""
    if not isinstance(value, list):
        raise bad(field, f"found {kind(value)} where a list is needed", "Write it as a list")
    return value


def as_object(value: object, field: str) -> dict[str, Any]:
    """`value` if it is a JSON object."""
    if not isinstance(value, dict):
        problem = f"found {kind(value)} where an object is needed"
        raise bad(field, problem, "Write it as a JSON object")
    return value


def as_id(value: object, default: str, field: str = "id") -> str:
    """A row's id: text or an integer, or `default` if the row has none."""
    if value is None:
        return default
    if is_integer(value):
        return str(value)
    if not as_text(value, field):
        raise bad(field, "the id is empty", "Give the row an id, or leave the field out")
    return str(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is a number without a fraction, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def kind(value: object) -> str:
    """What JSON calls a value, for messages."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object", type(None): "nothing (null or missing)"}
    return names.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """A value for messages: short texts and numbers themselves, of anything else its kind."""
    if isinstance(value, str) and len(value) > 40:
        value = value[:40] + "…"
    return repr(value) if isinstance(value, str | int | float) else kind(value)


def listed(names: Iterable[str]) -> str:
    """Names in backticks, for messages."""
    return ", ".join(f"`{name}`" for name in names) or "none"
