"""Files of rows: which there are, how they are packed, and their rows one by one.

A container is told by a file's first bytes, not by its name: parquet; JSONL, plain or compressed
by gzip or zstd; one JSON array of rows, plain or compressed. Reading is streaming.
"""

import glob
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from .fields import as_text, kind

Paths = str | Path | Iterable[str | Path]
Container = Literal["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst"]

_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".parquet", *(name + packed for name in _LINES for packed in ("", ".gz", ".zst")))
_OURS = (".manifest.parquet", ".report.json")
_PACKED = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_ENDINGS = {"gzip": ".gz", "zstd": ".zst", None: ""}
_HUB = "hf://datasets/"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_HUB_PARTS = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.+))?")
_BUFFER = 1 << 20


# Paths


def resolve_paths(paths: Paths) -> list[Path]:
    """Every file that `paths` name, each once: in the order given, sorted within a folder or glob.

    A folder stands for all parquet and JSONL files under it, or where there are none for its
    `.json` files; hidden ones, and the manifests that `prepare` writes, are not data. What is no
    path but looks like `owner/name` or starts with `hf://datasets/` is fetched from the Hugging
    Face hub: "hf://datasets/allenai/WildChat@main/data/*.parquet", or whole, "allenai/WildChat".

    Raises DataError for a path, glob, folder or hub name that gives no file.
    """
    named = [paths] if isinstance(paths, str | Path) else paths
    files: dict[Path, Path] = {}
    for path in named:
        for file in _expand(path):
            files.setdefault(file.resolve(), file)
    if not files:
        raise DataError(
            "no data: the list of paths is empty", hint="Name at least one file or folder"
        )
    return list(files.values())


def _expand(name: str | Path) -> list[Path]:
    if str(name).startswith(_HUB):
        return _from_hub(str(name).removeprefix(_HUB))
    path = Path(name).expanduser()
    if path.is_dir():
        if files := _files_under(path):
            return files
        problem = "the folder holds no .parquet, .jsonl, .ndjson or .json file"
        raise DataError(problem, file=str(path), hint="Check the path")
    if path.is_file():
        return [path]
    if path.exists():
        hint = "Write it to a file first"
        raise DataError("neither a file nor a folder", file=str(path), hint=hint)
    if glob.has_magic(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [file for m in matches for file in (_files_under(m) if m.is_dir() else [m])]
        if not files:
            hint = "Check the pattern and the folder"
            raise DataError("the glob matches no file", file=str(path), hint=hint)
        return files
    if _HUB_NAME.fullmatch(str(name)) and not path.parent.is_dir():
        return _from_hub(str(name))
    raise DataError("no such file or folder", file=str(path), hint="Check the path")


def _files_under(folder: Path) -> list[Path]:
    def is_shown(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        return not hidden and not file.name.endswith(_OURS) and file.is_file()

    shown = sorted(filter(is_shown, folder.rglob("*")))
    data = [file for file in shown if file.name.endswith(SUFFIXES)]
    return data or [file for file in shown if file.suffix == ".json"]


def _from_hub(name: str) -> list[Path]:
    """Files of `owner/name[@revision][/pattern]` on the hub, in the cache of huggingface_hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = _HUB_PARTS.fullmatch(name)
    if parts is None:
        hint = "Write owner/name, or owner/name@revision/path"
        raise DataError("not the name of a data set", file=name, hint=hint)
    dataset, revision, pattern = parts.groups()
    wanted = [pattern] if pattern else [f"*{suffix}" for suffix in (*SUFFIXES, ".json")]
    try:
        folder = snapshot_download(
            dataset,
            repo_type="dataset",
            revision=revision,
            allow_patterns=wanted,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"no such file or folder, and no data set of the Hugging Face hub ({reason})",
            file=name,
            hint="Check the name, the network and, for gated data, `hf auth login`",
        ) from None
    files = _files_under(Path(folder))  # of a cache that may hold more than was asked for
    names = {file: str(file.relative_to(folder)) for file in files}
    if found := [f for f in files if any(fnmatch(names[f], pattern) for pattern in wanted)]:
        return found
    hint = "Name a file of it after its name"
    raise DataError("the data set on the hub has no such file", file=name, hint=hint)


# Containers


def container_of(path: Path) -> Container:
    """How a file is packed. Raises DataError if it is empty or cannot be read."""
    with _opened(path) as file:
        magic = file.read(4)
    if not magic:
        raise empty(path)
    if magic == b"PAR1" or (path.suffix == ".parquet" and magic[:3] not in _PACKED):
        return "parquet"
    ending = _ENDINGS[_compression(path)]
    layout = "json" if _is_array(path) else "jsonl"
    return f"{layout}{ending}"  # pyright: ignore[reportReturnType]


def _is_array(path: Path) -> bool:
    """Whether it is an array of rows; in a file that says it has lines, "[" begins a bad row."""
    if path.name.endswith(SUFFIXES):
        return False
    with read_stream(path) as file:
        while (head := file.read(_BUFFER)) and not head.strip():
            pass
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _compression(path: Path) -> str | None:
    with _opened(path) as file:
        magic = file.read(4)
    return _PACKED.get(magic) or _PACKED.get(magic[:3])


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb", buffering=_BUFFER)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise DataError(problem, file=str(path), hint="Check the path") from None
    with file:
        yield file


@contextmanager
def read_stream(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed. Raises DataError where it is truncated or cannot be read."""
    compression = _compression(path)
    try:
        if compression is None:
            with _opened(path) as file:
                yield file
        else:
            with io.BufferedReader(_Decompressed(path, compression), _BUFFER) as file:
                yield file
    except (OSError, pa.ArrowException) as error:
        raise broken(path, compression or "file", error) from None


class _Decompressed(io.RawIOBase):
    """Every byte before the place where a stream breaks, and only then the error.

    Arrow drops what it had decompressed in the read that fails; that part is read again, singly.
    """

    def __init__(self, path: Path, compression: str):
        self._path, self._compression = str(path), compression
        self._stream = pa.input_stream(self._path, compression=compression)
        self._at, self._singly = 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(1 if self._singly else len(buffer))
        except (OSError, pa.ArrowException):
            if self._singly:
                raise
            self._singly = True
            self._stream = pa.input_stream(self._path, compression=self._compression)
            for start in range(0, self._at, _BUFFER):
                self._stream.read(min(_BUFFER, self._at - start))
            return self.readinto(buffer)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def empty(path: Path) -> DataError:
    """The error of a file without rows."""
    return DataError("the file is empty", file=str(path), hint="Write it again, or leave it out")


def broken(path: Path, what: str, error: Exception, row: str = "") -> DataError:
    """The error of a file that another library could not read to its end."""
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return DataError(
        f"truncated or corrupt {what} ({reason})",
        file=str(path),
        row=row,
        hint="Fetch or write the file again; if it has a few hundred bytes, it may be a Git LFS "
        "pointer",
    )


# Rows


def lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Streams (offset, line) of the lines that begin in [start, stop) of the decompressed bytes."""
    with read_stream(path) as file:
        if start:
            file.seek(start)
        offset = start
        for raw in file:
            if stop is not None and offset >= stop:
                return
            yield offset, raw
            offset += len(raw)


def json_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Streams (number, place, row or what is wrong with it) of a JSONL file or a JSON array.

    Lines are counted from 1, "line 12"; items from 0, "item 12 (counted from 0)"; blank lines are
    not rows. Raises DataError if the file is empty, and where the rest of it cannot be read.
    """
    number = None
    if container_of(path).startswith("jsonl"):
        for number, (_, raw) in enumerate(lines(path), start=1):
            if not raw.isspace():
                place = f"line {number}"
                yield number, place, parse_or_error(raw, path, place)
    else:
        for number, item in array_items(path):
            yield number, f"item {number} (counted from 0)", item
    if number is None:
        raise empty(path)


def array_items(path: Path) -> Iterator[tuple[int, Any]]:
    """Streams (number from 0, item or what is wrong with it) of a JSON array.

    Item by item, with the standard library: ijson names every value by its path, which takes
    memory by the square of the depth, and so gigabytes for a hundred kilobytes of "[".
    """
    number = 0
    with read_stream(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        try:
            for item in _items(text):
                if isinstance(item, DataError):
                    item = item.at(file=str(path), row=f"item {number} (counted from 0)")
                yield number, item
                number += 1
        except (ValueError, RecursionError) as error:
            place = f"at or after item {number} (counted from 0)"
            raise broken(path, "JSON array", error, place) from None
        finally:
            text.detach()


def _items(text: io.TextIOWrapper) -> Iterator[Any]:
    """The items of one array. Raises JSONDecodeError, UnicodeDecodeError or RecursionError."""
    array = _Array(text)
    array.expect("[")
    if array.peek() != "]":
        yield array.item()
    while array.peek() != "]":
        array.expect(",")
        yield array.item()
    array.expect("]")
    array.expect("")


class _Array:
    """The text of an array, of which a little more than one item is held at a time."""

    _decoder = json.JSONDecoder()
    _blanks = re.compile(r"[ \t\n\r]*")
    _longest_word = len("-Infinity")

    def __init__(self, text: io.TextIOWrapper):
        self._text, self._buffer, self._at, self._more = text, "", 0, True

    def _fill(self) -> None:
        grown = self._text.read(max(_BUFFER, len(self._buffer) - self._at))
        self._buffer, self._at, self._more = self._buffer[self._at :] + grown, 0, bool(grown)

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            blanks = self._blanks.match(self._buffer, self._at)
            self._at = blanks.end() if blanks else self._at
            if self._at < len(self._buffer) or not self._more:
                return self._buffer[self._at : self._at + 1]
            self._fill()

    def expect(self, mark: str) -> None:
        """Goes past `mark`; "" is the end."""
        if self.peek() != mark:
            what = repr(mark) if mark else "nothing more"
            raise json.JSONDecodeError(f"Expecting {what}", self._buffer, self._at)
        self._at += len(mark)

    def item(self) -> Any:
        """The next item, or what is wrong with its text."""
        while True:
            self.peek()
            try:
                item, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self._buffer) - self._longest_word
                if not self._more or not (near_end or error.msg.startswith("Unterminated")):
                    raise
            else:
                if end < len(self._buffer) or not self._more:  # a number may go on
                    source, self._at = self._buffer[self._at : end], end
                    return _checked(item, source)
            self._fill()


def _checked(item: Any, source: str) -> Any:
    if "\\u" not in source:
        return item
    try:
        _refuse_half_characters(item)
    except DataError as error:
        return error
    return item


def parse_or_error(raw: bytes, path: Path, place: str) -> dict[str, Any] | DataError:
    """The JSON object of a line, or what is wrong with the line."""
    try:
        return parse_line(raw)
    except DataError as error:
        return error.at(file=str(path), row=place)


def parse_line(raw: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises DataError, naming the column or byte."""
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
        raise DataError(
            f"broken JSON at column {error.colno} ({error.msg})",
            hint="Write one whole JSON object per line; if the last line is cut short, the file "
            "was not written to its end",
        ) from None
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


def open_parquet(path: Path) -> pq.ParquetFile:
    """Raises DataError for a file that is no whole parquet file."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        _ = file.schema_arrow  # names that are not UTF-8 show only here
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise broken(path, "parquet", error) from None
    return file


def parquet_batches(
    file: pq.ParquetFile,
    path: Path,
    *,
    row_groups: list[int] | None = None,
    columns: list[str] | None = None,
    first: int = 0,
    size: int = 1024,
) -> Iterator[pa.RecordBatch]:
    """Streams the batches of some row groups; `first` is the number of their first row.

    Raises DataError where a page is corrupt.
    """
    number = first
    batches = file.iter_batches(size, row_groups=row_groups, columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            place = f"at or after row {number} (counted from 0)"
            raise broken(path, "parquet", error, place) from None
        if batch is None:
            return
        yield batch
        number += batch.num_rows
