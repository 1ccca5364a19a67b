"""Conversation logs of any supported format, as a stream of `Conversation`s.

A log is recognised by what its first row holds, not by its name:

- "wildchat": parquet with a `conversation` column, list<struct<role, content, ...>>, an id column
  (`conversation_id`, or WildChat-1M's `conversation_hash`) and, optionally, `language`. LMSYS's
  logs have the same shape.
- "messages": JSONL in OpenAI's chat shape, `{"messages": [{"role", "content"}], "id"?}`, where
  content is text or a list of text parts.
- "triples": JSONL of ready interactions; `sdpo.interactions` reads those.

Reading is streaming and takes only the columns it needs, so memory does not grow with the log.
This module says what a log holds; which turns are worth training on is `sdpo.interactions`' affair.
"""

import glob
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

Format = Literal["wildchat", "messages", "triples"]
Paths = str | Path | Iterable[str | Path]

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
_ID_COLUMNS = ("conversation_id", "conversation_hash")
_TRIPLE_KEYS = ("prompt", "completion", "user_response")
# What an assistant message may hold instead of content in OpenAI's format.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal")
_ROWS_PER_BATCH = 512


class DataError(ValueError):
    """Data that cannot be used: names the file, the row, the field, and what to do about it.

    JSONL rows are counted as editors count lines, from 1 ("line 12"); parquet rows from 0, as
    data frames do ("row 12 (counted from 0)").
    """


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is what the log says: "user", "assistant", "system", "tool", ..."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a log, as it was logged: nothing stripped, dropped or reordered.

    `source` is "path:row", the row counted as in `DataError`. `has_language` tells a log without
    a language column (nothing is known) from a row whose language is unknown (`language` None).
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    language: str | None = None
    has_language: bool = False


def read_conversations(paths: Paths) -> Iterator[Conversation]:
    """Streams the conversations of files, folders and globs, in the order of `resolve_paths`.

    Raises DataError for anything that cannot be read, ready triples included.
    """
    for path in resolve_paths(paths):
        yield from read_file(path)


def read_file(path: Path) -> Iterator[Conversation]:
    """Streams the conversations of one file, in the file's order."""
    match sniff_format(path):
        case "wildchat":
            yield from _read_wildchat(path)
        case "messages":
            yield from _read_messages(path)
        case "triples":
            raise DataError(
                f"{path}: holds ready interactions (prompt, completion, user_response), not "
                "conversations. Read it with sdpo.interactions.read_interactions."
            )


def count_rows(path: Path) -> int:
    """Rows of one file: from a parquet file's footer, or by counting the lines that hold a row."""
    if _is_parquet(path):
        with _open_parquet(path) as file:
            return file.metadata.num_rows
    with _open(path) as file:
        return sum(not line.isspace() for line in file)


def sniff_format(path: str | Path) -> Format:
    """The format of a file, from its parquet schema or its first JSON row.

    Raises DataError if the file is empty, broken, or of none of the known formats.
    """
    path = Path(path)
    if _is_parquet(path):
        with _open_parquet(path) as file:
            _check_schema(path, file.schema_arrow)
        return "wildchat"
    line, row = next(json_rows(path))
    if "messages" in row:
        return "messages"
    if all(key in row for key in _TRIPLE_KEYS):
        return "triples"
    raise DataError(
        f"{path}, line {line}: of no known format; its fields are {_listed(row)}. Rows need "
        f"`messages`, or all of {_listed(_TRIPLE_KEYS)}; convert the file, or leave it out."
    )


def resolve_paths(paths: Paths) -> list[Path]:
    """Every file that `paths` name, each once: in the order given, sorted within a folder or glob.

    A folder stands for all `.parquet`, `.jsonl` and `.ndjson` files under it that are not hidden.
    Raises DataError for a path, glob or folder that gives no file.
    """
    named = [paths] if isinstance(paths, str | Path) else paths
    files: dict[Path, Path] = {}
    for path in named:
        for file in _expand(Path(path).expanduser()):
            files.setdefault(file.resolve(), file)
    if not files:
        raise DataError("no data: the list of paths is empty. Name at least one file or folder.")
    return list(files.values())


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        if files := _files_under(path):
            return files
        raise DataError(f"{path}: the folder holds no {'/'.join(SUFFIXES)} file. Check the path.")
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise DataError(f"{path}: no such file or folder. Check the path.")
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    files = [file for m in matches for file in (_files_under(m) if m.is_dir() else [m])]
    if not files:
        raise DataError(f"{path}: the glob matches no file. Check the pattern and the folder.")
    return files


def _files_under(folder: Path) -> list[Path]:
    def is_data(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        return file.suffix in SUFFIXES and not hidden and file.is_file()

    return sorted(filter(is_data, folder.rglob("*")))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from None


# Errors: what a row says about itself, then where the row is.


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


def as_id(value: object, default: str) -> str:
    """A row's id: text or an integer, or `default` if the row has none."""
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not as_text(value, "id"):
        raise fault("id", "the id is empty", "Give the row an id, or leave the field out")
    return str(value)


def kind(value: object) -> str:
    """What JSON calls a value, for messages."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object", type(None): "nothing (null or missing)"}
    return names.get(type(value), type(value).__name__)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


# JSONL


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams (line number from 1, object) of a JSONL file; blank lines are skipped.

    Raises DataError for a file without rows, and for a line that is not a JSON object in UTF-8.
    """
    empty = True
    with _open(path) as file:
        for line, raw in enumerate(file, start=1):
            if not raw.isspace():
                empty = False
                with located(f"{path}, line {line}"):
                    row = _parse_line(raw)
                yield line, row
    if empty:
        raise DataError(f"{path}: the file is empty. Write it again, or leave it out.")


def _parse_line(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1}: not valid UTF-8. Save the file as UTF-8, uncompressed."
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"column {error.colno}: broken JSON ({error.msg}). Write one whole JSON object per "
            "line; a last line cut short means that the file was not written to its end."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"unreadable JSON ({error}). Repair or remove the line.") from None
    if not isinstance(row, dict):
        raise DataError(
            f"found {kind(row)} where an object is needed. Write one JSON object per line."
        )
    return row


def _read_messages(path: Path) -> Iterator[Conversation]:
    for line, row in json_rows(path):
        with located(f"{path}, line {line}"):
            messages = as_list(row.get("messages"), "messages")
            conversation = Conversation(
                id=as_id(row.get("id"), f"{path.stem}-{line}"),
                messages=tuple(
                    _openai_message(m, f"messages[{i}]") for i, m in enumerate(messages)
                ),
                source=f"{path}:{line}",
            )
        yield conversation


def _openai_message(message: object, field: str) -> Message:
    message = as_object(message, field)
    role = as_text(message.get("role"), f"{field}.role")
    content = message.get("content")
    if content is None and any(message.get(key) for key in _INSTEAD_OF_CONTENT):
        return Message(role, "")
    if isinstance(content, list):
        parts = (_text_part(p, f"{field}.content[{i}]") for i, p in enumerate(content))
        return Message(role, "".join(parts))
    return Message(role, as_text(content, f"{field}.content"))


def _text_part(part: object, field: str) -> str:
    part = as_object(part, field)
    if part.get("type") != "text":
        problem = f"a content part of type {part.get('type')!r}; only text can be trained on"
        raise fault(field, problem, "Remove the part or the conversation")
    return as_text(part.get("text"), f"{field}.text")


# Parquet


def _is_parquet(path: Path) -> bool:
    with _open(path) as file:
        magic = file.read(4)
    if not magic:
        raise DataError(f"{path}: the file is empty. Write it again, or leave it out.")
    return magic == b"PAR1" or path.suffix == ".parquet"


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _broken_parquet(path, error) from None


def _broken_parquet(where: Path | str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0].rstrip(".")
    return DataError(
        f"{where}: truncated or corrupt parquet ({reason}). Fetch or write the file again; "
        "a file of a few hundred bytes may be a Git LFS pointer."
    )


def _check_schema(path: Path, schema: pa.Schema) -> None:
    ids = [name for name in _ID_COLUMNS if name in schema.names]
    if "conversation" not in schema.names or not ids:
        raise DataError(
            f"{path}: the columns are {_listed(schema.names)}; needed are `conversation` and one "
            f"of {_listed(_ID_COLUMNS)}. Rename or add columns, or convert to JSONL of messages."
        )
    with located(f"{path}, every row"):
        _check_conversation_type(schema.field("conversation").type)
        for name in [*ids, *({"language"} & set(schema.names))]:
            _check_text_type(name, schema.field(name).type)


def _check_conversation_type(column: pa.DataType) -> None:
    is_list = pa.types.is_list(column) or pa.types.is_large_list(column)
    if not is_list or not pa.types.is_struct(column.value_type):
        problem = f"the column is of type {column}, not a list of {{role, content}}"
        raise fault("conversation", problem, "Convert the file to WildChat's schema")
    element = column.value_type
    fields = {element.field(i).name: element.field(i).type for i in range(element.num_fields)}
    for name in ("role", "content"):
        if name not in fields:
            problem = f"its messages have {_listed(fields)}, but no `{name}`"
            raise fault("conversation", problem, "Convert the file to WildChat's schema")
        _check_text_type(f"conversation.{name}", fields[name])


def _check_text_type(field: str, column: pa.DataType) -> None:
    value = column.value_type if pa.types.is_dictionary(column) else column
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    if not any(test(value) for test in tests):
        raise fault(field, f"the column is of type {column}, not text", "Cast it to string")


def _read_wildchat(path: Path) -> Iterator[Conversation]:
    for number, row in _parquet_rows(path):
        ids = (row.get(name) for name in _ID_COLUMNS)
        yield Conversation(
            id=next((id for id in ids if id), f"{path.stem}-{number}"),
            messages=tuple(_wildchat_message(m) for m in row["conversation"] or ()),
            source=f"{path}:{number}",
            language=row.get("language"),
            has_language="language" in row,
        )


def _wildchat_message(message: dict[str, str | None] | None) -> Message:
    message = message or {}
    return Message(message.get("role") or "", message.get("content") or "")


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams (row number from 0, the needed columns of the row)."""
    number = 0
    with _open_parquet(path) as file:
        batches = file.iter_batches(_ROWS_PER_BATCH, columns=_needed_leaves(file))
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                where = f"{path}, at or after row {number} (counted from 0)"
                raise _broken_parquet(where, error) from None
            if batch is None:
                return
            for scalars in zip(*batch.columns, strict=True):
                with located(f"{path}, row {number} (counted from 0)"):
                    row = _as_row(batch.schema.names, scalars)
                yield number, row
                number += 1


def _needed_leaves(file: pq.ParquetFile) -> list[str]:
    """Paths of the needed leaf columns; what lies between list and field depends on the writer."""
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    flat = [path for path in paths if path in (*_ID_COLUMNS, "language")]
    nested = [path for path in paths if path.startswith("conversation.")]
    return flat + [path for path in nested if path.endswith((".role", ".content"))]


def _as_row(names: list[str], scalars: tuple[pa.Scalar, ...]) -> dict[str, Any]:
    row = {}
    for name, scalar in zip(names, scalars, strict=True):
        try:
            row[name] = scalar.as_py()
        except UnicodeDecodeError as error:
            problem = f"not valid UTF-8 ({error.reason})"
            raise fault(name, problem, "Write the file again as UTF-8") from None
    return row
