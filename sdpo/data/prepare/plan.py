"""Units of work: pieces of the log that are read on their own, whatever the number of workers.

A unit is a run of row groups of a parquet file, a run of lines of a plain JSONL file, or a whole
file that cannot be read from the middle. Which rows it holds is known before any is read for
good, so that every row has its place in the extraction's order from the start.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ...errors import DataError
from ...io.containers import array_items, lines, open_parquet, parse_or_error
from ..read.formats import (
    ROWS_AT_ONCE,
    Format,
    Item,
    LogFile,
    describe,
    item_of,
    read_row_groups,
)

UNIT_ROWS = 32_768
UNIT_BYTES = 1 << 26
_BATCH_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Part of one file: row groups or bytes [start, stop); None: to the end."""

    start: int
    stop: int | None
    first: int
    """Number of its first row or line, as errors count them."""
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePlan:
    """A file and its pieces; `error`: why it, or the rest of it, cannot be read."""

    path: Path
    log: LogFile | None
    pieces: tuple[Piece, ...]
    size: int
    mtime_ns: int
    error: str | None = None

    @property
    def rows(self) -> int:
        """Of all pieces."""
        return sum(piece.rows for piece in self.pieces)

    @property
    def is_ready(self) -> bool:
        """It holds interactions, not conversations."""
        return self.log is not None and self.log.format == "triples"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A piece with its number, and how many rows come before it in all files."""

    index: int
    log: LogFile
    piece: Piece
    offset: int


def plan_file(path: Path, forced: Format | Literal["auto"], lenient: bool) -> FilePlan:
    """Looks through a file once. Raises DataError if it cannot be read, unless `lenient`."""
    log, pieces, error = None, [], None
    try:
        log = describe(path, forced, lenient=lenient)
        for piece in _pieces(log):
            pieces.append(piece)
    except DataError as broken:
        if not lenient:
            raise
        error = str(broken)
    stat = path.stat()
    return FilePlan(
        path=path,
        log=log,
        pieces=tuple(pieces),
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        error=error,
    )


def units_of(plans: list[FilePlan]) -> list[Unit]:
    """All units, in the order of the files."""
    units, offset = [], 0
    for plan in plans:
        for piece in plan.pieces:
            assert plan.log is not None
            units.append(Unit(index=len(units), log=plan.log, piece=piece, offset=offset))
            offset += piece.rows
    return units


def _pieces(log: LogFile) -> Iterator[Piece]:
    match log.container:
        case "parquet":
            return _runs_of_row_groups(log.path)
        case "jsonl":
            return _runs_of_lines(log.path, UNIT_BYTES)
        case "jsonl.gz" | "jsonl.zst":
            return _runs_of_lines(log.path, None)
        case _:
            return _whole_array(log.path)


def _runs_of_row_groups(path: Path) -> Iterator[Piece]:
    with open_parquet(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    start, first, rows, size = 0, 0, 0, 0
    for i, group in enumerate(groups):
        rows, size = rows + group.num_rows, size + group.total_byte_size
        if rows >= UNIT_ROWS or size >= 2 * UNIT_BYTES or i + 1 == len(groups):
            yield Piece(start=start, stop=i + 1, first=first, rows=rows)
            start, first, rows, size = i + 1, first + rows, 0, 0


def _runs_of_lines(path: Path, size: int | None) -> Iterator[Piece]:
    """Pieces of about `size` bytes, or one; a stream that breaks gives what came before."""
    start, first, rows, end = 0, 1, 0, 0
    broken = None
    try:
        for number, (offset, raw) in enumerate(lines(path), start=1):
            if size is not None and offset - start >= size:
                yield Piece(start=start, stop=offset, first=first, rows=rows)
                start, first, rows = offset, number, 0
            rows += not raw.isspace()
            end = offset + len(raw)
    except DataError as error:
        broken = error
    if rows:
        yield Piece(start=start, stop=end if size is not None else None, first=first, rows=rows)
    if broken:
        raise broken


def _whole_array(path: Path) -> Iterator[Piece]:
    rows = 0
    broken = None
    try:
        for _ in array_items(path):
            rows += 1
    except DataError as error:
        broken = error
    if rows:
        yield Piece(start=0, stop=None, first=0, rows=rows)
    if broken:
        raise broken


class Rows(NamedTuple):
    """Some rows of a unit: their numbers as errors count them, their indices in all files."""

    numbers: list[int]
    indices: np.ndarray
    items: list[Item]


def read_unit(
    unit: Unit, wanted: np.ndarray, lenient: bool, languages: tuple[str, ...] | None
) -> Iterator[Rows]:
    """Streams a unit's rows for which `wanted` (rows of the unit,) is true.

    Conversations in languages other than `languages` may come without their messages. Raises
    DataError where it cannot be read on; if `lenient`, the unreadable rows hold it instead.
    """
    if unit.log.container == "parquet":
        yield from _read_groups(unit, wanted, lenient, languages)
        return
    batch, size = [], 0
    for index, (number, row) in enumerate(islice(_rows(unit), unit.piece.rows)):
        if not wanted[index]:
            continue
        if isinstance(row, bytes):
            size += len(row)
            place = f"line {number}"
            row = parse_or_error(row, unit.log.path, place)
        else:
            place = f"item {number} (counted from 0)"
        batch.append((number, unit.offset + index, item_of(row, unit.log, number, place)))
        if len(batch) >= ROWS_AT_ONCE or size >= _BATCH_BYTES:
            yield _as_rows(batch)
            batch, size = [], 0
    if batch:
        yield _as_rows(batch)


def _as_rows(batch: list[tuple[int, int, Item]]) -> Rows:
    numbers, indices, items = zip(*batch, strict=True)
    return Rows(list(numbers), np.array(indices, dtype=np.int64), list(items))


def _rows(unit: Unit) -> Iterator[tuple[int, Any]]:
    """(number, line or item of an array) of every row."""
    path, piece = unit.log.path, unit.piece
    if not unit.log.container.startswith("jsonl"):
        yield from array_items(path)
        return
    for number, (_, raw) in enumerate(lines(path, piece.start, piece.stop), start=piece.first):
        if not raw.isspace():
            yield number, raw


def _read_groups(
    unit: Unit, wanted: np.ndarray, lenient: bool, languages: tuple[str, ...] | None
) -> Iterator[Rows]:
    """One row group at a time, so that a corrupt one does not take the next with it."""
    assert unit.piece.stop is not None
    shift, first = unit.offset - unit.piece.first, unit.piece.first
    with open_parquet(unit.log.path) as parquet:
        for group in range(unit.piece.start, unit.piece.stop):
            count = parquet.metadata.row_group(group).num_rows
            of_group, wanted = wanted[:count], wanted[count:]
            last = first - 1
            try:
                for numbers, items in read_row_groups(
                    unit.log,
                    parquet,
                    row_groups=[group],
                    first=first,
                    wanted=of_group,
                    languages=languages,
                ):
                    if numbers:
                        last = numbers[-1]
                        yield Rows(numbers, np.array(numbers) + shift, items)
            except DataError as error:
                if not lenient:
                    raise
                lost = [n for n in range(last + 1, first + count) if of_group[n - first]]
                yield Rows(lost, np.array(lost, dtype=np.int64) + shift, [error] * len(lost))
            first += count
