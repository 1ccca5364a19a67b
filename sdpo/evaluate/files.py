"""The files of a benchmark: one row per question, none missing, none twice, none of another."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DataError
from ..io.fields import as_object, as_text, bad, kind, shown
from ..io.rows import read_rows

Row = TypeVar("Row")


class SameName:
    """Reads a field that must say the same in every row, such as the model's name.

    Args:
        field: of the row.
        name: what it must say; "": what the first row says.
    """

    def __init__(self, field: str, name: str = ""):
        self._field, self.name = field, name

    def __call__(self, row: dict[str, Any]) -> str:
        """The name. Raises DataError for another one."""
        found = as_text(row.get(self._field), self._field)
        self.name = self.name or found
        if not found or found != self.name:
            problem = f"found {shown(found)} where {shown(self.name)} is needed"
            raise bad(self._field, problem, "Give a file with the rows of one model only")
        return found


def finished_of(row: dict[str, Any]) -> bool | None:
    """Whether a row's answer ended by itself; None where it does not say."""
    finished = row.get("finished")
    if finished is not None and not isinstance(finished, bool):
        raise bad("finished", f"found {kind(finished)}", "Write true, false or null")
    return finished


def read_by(
    field: str,
    path: str | Path,
    parse: Callable[[dict[str, Any]], Row],
    *,
    known: Collection[str] | None = None,
    wanted: Sequence[str] | None = None,
    source: str = "",
) -> dict[str, Row]:
    """The rows of a file by the text in a field, which no two rows share.

    Args:
        parse: what to make of a row; called for wanted rows only.
        known: all that the field may say; None: anything.
        wanted: the rows to return, in this order; None: all, in the file's.
        source: the file that `known` and `wanted` are from, for messages.

    Raises:
        DataError: a bad row, a repeated, unknown or missing one.
    """
    place_of: dict[str, str] = {}
    found: dict[str, Row] = {}
    chosen = None if wanted is None else set(wanted)
    for _, place, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            key = as_text(as_object(row, "row").get(field), field)
            if key in place_of:
                problem = f"{shown(key)} is the {field} of {place_of[key]} too"
                raise bad(field, problem, "Keep one of the rows")
            if known is not None and key not in known:
                problem = f"{shown(key)} is no {field} of {source}"
                raise bad(field, problem, "Give the files of the same benchmark, text unchanged")
            place_of[key] = place
            if chosen is None or key in chosen:
                found[key] = parse(row)
        except DataError as error:
            raise error.at(file=str(path), row=place) from None
    if wanted is None:
        return found
    if missing := [key for key in wanted if key not in found]:
        raise DataError(
            f"{len(missing)} of {len(wanted)} rows are missing, first that of {shown(missing[0])}",
            field=field,
            file=str(path),
            hint=f"Add a row for each {field} of {source}: fewer give another number",
        )
    return {key: found[key] for key in wanted}
