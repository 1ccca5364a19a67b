"""Errors that the user can mend: the base class, and the one that names file, row and field."""

from sdpo_parallel.errors import SdpoError

__all__ = ["DataError", "SdpoError"]


class DataError(SdpoError):
    """Data that cannot be used.

    Args:
        problem: what is wrong.
        hint: what to do about it.
        field: the field of the row, as the file names it, e.g. ``prompt[0].value``.
        row: "line 12" in JSONL, counted from 1 as editors do; "row 12 (counted from 0)" in parquet
            files and JSON arrays, as data frames do.
        file: the file's path.
    """

    def __init__(
        self, problem: str, *, hint: str = "", field: str = "", row: str = "", file: str = ""
    ):
        super().__init__(problem)
        self.problem, self.hint = problem, hint
        self.field, self.row, self.file = field, row, file

    def at(self, *, file: str = "", row: str = "") -> "DataError":
        """The same error with the file and the row it did not know."""
        place = {"file": self.file or file, "row": self.row or row}
        return type(self)(self.problem, hint=self.hint, field=self.field, **place)

    def hinting(self, hint: str) -> "DataError":
        """The same error with one more thing to do about it."""
        place = {"file": self.file, "row": self.row, "field": self.field}
        return type(self)(self.problem, hint=". ".join(filter(None, (self.hint, hint))), **place)

    def __str__(self) -> str:
        known = self.file, self.row, self.field and f"field `{self.field}`"
        place = ", ".join(filter(None, known))
        message = f"{place}: {self.problem}" if place else self.problem
        return f"{message}. {self.hint}." if self.hint else message
