"""The rows of a file: how it is packed, and every row with its place, parsed.

A row that cannot be read comes as the DataError that says why. What a row means is decided
elsewhere: in `sdpo.interactions`, and for logs in `sdpo.data.read.formats`.

The container is recognised by a file's first bytes, not by its name: parquet; JSON lines, or one
JSON array of rows, each plain or compressed by gzip or zstd. Reading streams.

    read_rows    every row of a whole file
    split        a file as chunks, which are read independently of each other
    read_chunk   a chunk's rows, many at a time; those of parquet as Arrow batches
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from .fields import as_text, kind
from .json_array import array_items
from .paths import SUFFIXES

Container = Literal["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst"]

CHUNK_ROWS = 32_768
CHUNK_BYTES = 1 << 26
BATCH_ROWS = 1024
"""Rows that are in memory at a time."""
_BATCH_BYTES = 1 << 24
_BUFFER = 1 << 20
_PACKED = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_ENDINGS = {"gzip": ".gz", "zstd": ".zst", None: ""}


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file and how it is packed."""

    path: Path
    container: Container

    def place(self, number: int) -> str:
        """The row of an error: lines are counted from 1, as editors do, all else from 0."""
        if self.container.startswith("jsonl"):
            return f"line {number}"
        what = "row" if self.container == "parquet" else "item"
        return f"{what} {number} (counted from 0)"


class Chunk(NamedTuple):
    """Part of a file: row groups or bytes [start, stop), to the end if `stop` is None."""

    start: int
    stop: int | None
    first: int
    """Number of its first row or line, as errors count them."""
    rows: int


class Batch(NamedTuple):
    """Some rows of a chunk."""

    numbers: list[int]
    """Each row's number, as errors count them."""
    indices: np.ndarray
    """Each row's index within the chunk."""
    rows: "list[Any] | pa.RecordBatch"
    """Parsed JSON, with a DataError in place of each bad row; or Arrow's columns."""


# Containers


def recognise(path: str | Path) -> RowFile:
    """Finds out how a file is packed. Raises DataError if it is empty or cannot be read."""
    path = Path(path)
    magic = _magic(path)
    if not magic:
        raise empty(path)
    if magic == b"PAR1" or (path.suffix == ".parquet" and magic[:3] not in _PACKED):
        return RowFile(path, "parquet")
    layout = "json" if _is_array(path) else "jsonl"
    container = f"{layout}{_ENDINGS[_compression(magic)]}"
    return RowFile(path, container)  # pyright: ignore[reportArgumentType]


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise DataError(problem, file=str(path), hint="Check the path") from None


def _compression(magic: bytes) -> str | None:
    return _PACKED.get(magic) or _PACKED.get(magic[:3])


def _is_array(path: Path) -> bool:
    """Whether it is an array of rows; in a file named as one of lines, "[" begins a bad row."""
    if path.name.endswith(SUFFIXES):
        return False
    with _decompressed(path) as file:
        while (head := file.read(_BUFFER)) and not head.strip():
            pass
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


@contextmanager
def _decompressed(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes. Raises DataError where the file is cut off or corrupt."""
    compression = _compression(_magic(path))
    try:
        if compression is None:
            file = path.open("rb", buffering=_BUFFER)
        else:  # of a broken stream, what the buffer holds last is lost: hence a small one
            stream: Any = pa.input_stream(str(path), compression=compression)
            file = io.BufferedReader(stream, 1 << 16)
        with file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise _broken(path, compression or "file", error) from None


def open_parquet(path: Path) -> pq.ParquetFile:
    """Raises DataError for a file that is not a whole parquet file."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        _ = file.schema_arrow  # names that are not UTF-8 show only here
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken(path, "parquet", error) from None
    return file


def empty(path: Path) -> DataError:
    """The error of a file without rows."""
    return DataError("the file is empty", file=str(path), hint="Write it again, or leave it out")


def _broken(path: Path, what: str, error: Exception, row: str = "") -> DataError:
    """The error of a file that another library could not read to its end."""
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    hint = "Fetch or write the file again; a few hundred bytes may be a Git LFS pointer"
    problem = f"truncated or corrupt {what} ({reason})"
    return DataError(problem, file=str(path), row=row, hint=hint)


# Whole files


def read_rows(path: str | Path) -> Iterator[tuple[int, str, Any]]:
    """Streams (number, place as in `DataError.row`, row or what is wrong with it) of a file.

    Raises DataError if there is no row, and where the rest of the file cannot be read.
    """
    file = recognise(path)
    number = None
    for number, row in _parquet_rows(file) if file.container == "parquet" else _json_rows(file):
        yield number, file.place(number), row
    if number is None:
        raise empty(file.path)


def _parquet_rows(file: RowFile) -> Iterator[tuple[int, Any]]:
    for chunk in split(file):
        for batch in read_chunk(file, chunk):
            yield from zip(batch.numbers, plain_rows(batch, file), strict=True)


def _json_rows(file: RowFile) -> Iterator[tuple[int, Any]]:
    return ((number, _parsed(raw, file, number)) for number, _, raw in _raw_rows(file))


def plain_rows(batch: Batch, file: RowFile) -> list[Any]:
    """A batch's rows as JSON has them, with a DataError in place of each bad row."""
    if isinstance(batch.rows, list):
        return batch.rows
    try:
        return batch.rows.to_pylist()
    except UnicodeDecodeError:
        singly = (batch.rows.slice(i, 1) for i in range(len(batch.numbers)))
        return [_decoded(row, file, n) for n, row in zip(batch.numbers, singly, strict=True)]


def _decoded(row: pa.RecordBatch, file: RowFile, number: int) -> Any:
    name = "row"
    try:
        for name in row.schema.names:
            row.column(name).to_pylist()
    except UnicodeDecodeError as error:
        place = {"field": name, "row": file.place(number), "file": str(file.path)}
        hint = "Write it again as UTF-8"
        return DataError(f"not valid UTF-8 ({error.reason})", hint=hint, **place)
    return row.to_pylist()[0]


# Chunks


def split(file: RowFile) -> Iterator[Chunk]:
    """Looks through a file once, and streams its chunks.

    Runs of row groups of a parquet file, runs of lines of a plain JSONL file, or the whole of a
    file that cannot be read from the middle. Raises DataError where the rest of the file cannot be
    read, after the chunk of what precedes the break.
    """
    return _runs_of_row_groups(file) if file.container == "parquet" else _runs_of_rows(file)


def _runs_of_row_groups(file: RowFile) -> Iterator[Chunk]:
    with open_parquet(file.path) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    start, first, rows, size = 0, 0, 0, 0
    for i, group in enumerate(groups):
        rows, size = rows + group.num_rows, size + group.total_byte_size
        if rows >= CHUNK_ROWS or size >= 2 * CHUNK_BYTES or i + 1 == len(groups):
            yield Chunk(start, i + 1, first, rows)
            start, first, rows, size = i + 1, first + rows, 0, 0


def _runs_of_rows(file: RowFile) -> Iterator[Chunk]:
    start, first, rows = 0, _first_number(file), 0
    broken = None
    try:
        for number, offset, _ in _raw_rows(file):
            if file.container == "jsonl" and offset - start >= CHUNK_BYTES:
                yield Chunk(start, offset, first, rows)
                start, first, rows = offset, number, 0
            rows += 1
    except DataError as error:
        broken = error
    if rows:
        yield Chunk(start, None, first, rows)
    if broken:
        raise broken


def read_chunk(
    file: RowFile,
    chunk: Chunk,
    *,
    wanted: np.ndarray | None = None,
    columns: list[str] | None = None,
    lenient: bool = False,
) -> Iterator[Batch]:
    """Streams a chunk's rows, `BATCH_ROWS` at most at a time.

    Args:
        wanted: bool (rows of the chunk,), which rows to read at all.
        columns: of a parquet file, paths of the leaf columns to read.
        lenient: rows of a parquet file that are lost with a corrupt page come as the error that
            otherwise is raised.

    Raises:
        DataError: the file cannot be read on.
    """
    if wanted is None:
        wanted = np.ones(chunk.rows, bool)
    if file.container == "parquet":
        return _read_row_groups(file, chunk, wanted, columns, lenient)
    return _read_json(file, chunk, wanted)


def _read_json(file: RowFile, chunk: Chunk, wanted: np.ndarray) -> Iterator[Batch]:
    numbers, indices, rows, size = [], [], [], 0
    for index, (number, _, raw) in enumerate(islice(_raw_rows(file, chunk), chunk.rows)):
        if not wanted[index]:
            continue
        numbers.append(number)
        indices.append(index)
        rows.append(_parsed(raw, file, number))
        size += len(raw) if isinstance(raw, bytes) else 0
        if len(rows) >= BATCH_ROWS or size >= _BATCH_BYTES:
            yield Batch(numbers, np.array(indices), rows)
            numbers, indices, rows, size = [], [], [], 0
    if rows:
        yield Batch(numbers, np.array(indices), rows)


def _read_row_groups(
    file: RowFile, chunk: Chunk, wanted: np.ndarray, columns: list[str] | None, lenient: bool
) -> Iterator[Batch]:
    """One row group at a time, so that a corrupt one does not take the next with it."""
    assert chunk.stop is not None
    index = 0
    with open_parquet(file.path) as parquet:
        for group in range(chunk.start, chunk.stop):
            end = index + parquet.metadata.row_group(group).num_rows
            batches = parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
            while index < end:
                try:
                    rows = next(batches).slice(0, end - index)
                except (pa.ArrowException, OSError, UnicodeDecodeError, StopIteration) as error:
                    place = f"at or after {file.place(chunk.first + index)}"
                    broken = _broken(file.path, "parquet", error, place)
                    if not lenient:
                        raise broken from None
                    rows = [broken] * (end - index)
                indices = np.arange(index, index + len(rows))
                index += len(rows)
                keep = wanted[indices]
                indices = indices[keep]
                if len(indices):
                    if isinstance(rows, pa.RecordBatch):
                        rows = rows.filter(pa.array(keep))
                    else:
                        rows = rows[: len(indices)]
                    yield Batch((chunk.first + indices).tolist(), indices, rows)


# JSON


def _first_number(file: RowFile) -> int:
    return 1 if file.container.startswith("jsonl") else 0


def _raw_rows(file: RowFile, chunk: Chunk | None = None) -> Iterator[tuple[int, int, Any]]:
    """Streams (number, offset, line or array item) of the rows that begin in a chunk, or of all.

    Blank lines are not rows. Offsets count decompressed bytes; those of array items are all 0.
    """
    if not file.container.startswith("jsonl"):
        yield from ((number, 0, item) for number, item in _array_items(file))
        return
    start, stop, first, _ = chunk or Chunk(0, None, _first_number(file), 0)
    with _decompressed(file.path) as lines:
        if start:
            lines.seek(start)
        offset = start
        for number, line in enumerate(lines, start=first):
            if stop is not None and offset >= stop:
                return
            if not line.isspace():
                yield number, offset, line
            offset += len(line)


def _array_items(file: RowFile) -> Iterator[tuple[int, Any]]:
    number = 0
    with _decompressed(file.path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        try:
            for item, source in array_items(text):
                yield number, _checked(item, source, file, number)
                number += 1
        except (ValueError, RecursionError) as error:
            place = f"at or after {file.place(number)}"
            raise _broken(file.path, "JSON array", error, place) from None
        finally:
            text.detach()


def _checked(item: Any, source: str, file: RowFile, number: int) -> Any:
    try:
        if "\\u" in source:
            _refuse_half_characters(item)
    except DataError as error:
        return error.at(file=str(file.path), row=file.place(number))
    return item


def _parsed(raw: Any, file: RowFile, number: int) -> Any:
    """The JSON object of a line, or what is wrong with the line; an array's item as it is."""
    if not isinstance(raw, bytes):
        return raw
    try:
        return _parse_line(raw)
    except DataError as error:
        return error.at(file=str(file.path), row=file.place(number))


def _parse_line(raw: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError:
        row = _parse_tolerantly(raw)  # a byte-order mark, NaN, huge numbers; and better messages
    if not isinstance(row, dict):
        problem = f"found {kind(row)} where an object is needed"
        raise DataError(problem, hint="Write one JSON object per line")
    return row


def _parse_tolerantly(raw: bytes) -> Any:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
        _refuse_half_characters(row)
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 at byte {error.start + 1}"
        raise DataError(problem, hint="Save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        problem = f"broken JSON at column {error.colno} ({error.msg})"
        hint = (
            "Write one whole JSON object per line; if the last line is cut short, the file was "
            "not written to its end"
        )
        raise DataError(problem, hint=hint) from None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        problem = f"unreadable JSON ({error})"
        raise DataError(problem, hint="Repair or remove the line") from None
    return row


def _refuse_half_characters(value: Any, field: str = "") -> None:
    if isinstance(value, str):
        as_text(value, field)
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_half_characters(as_text(key, field), field)
            _refuse_half_characters(item, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_half_characters(item, f"{field}[{i}]")
