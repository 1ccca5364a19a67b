"""What the rows of a log mean: each is a `Conversation`, or a `Ready` interaction.

`describe` recognises a file's format from what its rows hold, whatever container
(`sdpo.io.rows`) they are in; `items_of` reads rows of that format.

| format | a row |
|---|---|
| wildchat | `conversation`: [{role, content}], `conversation_id` or `conversation_hash` (1M) |
| lmsys | the same, with `openai_moderation` and nothing of WildChat's own |
| wildfeedback | `conversation` or `conversations`: [{from, value}], with more columns |
| sharegpt | `conversations`: [{from, value}], `id` |
| messages | OpenAI's: `messages`: [{role, content: text or text parts}], `id` |
| triples | ready interactions: `prompt`, `completion`, `user_response` |

Where a row has them, `language`, `model`, a user (`hashed_ip`, `user_id`, `user`), `toxic`,
`redacted` (also of single messages) and `openai_moderation[].flagged` are read, too. Messages of
every role stay in the conversation, and so do those that hold more than text or are no messages at
all: `Conversation.lost` says which, and `prepare` has rules for them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...conversations import Conversation, Message, tool_calls_text, tool_message
from ...errors import DataError
from ...interactions import Interaction, from_row
from ...io.fields import as_id, as_list, as_object, as_text, bad, kind, listed
from ...io.paths import Paths, resolve_paths
from ...io.rows import (
    Batch,
    RowFile,
    open_parquet,
    plain_rows,
    read_chunk,
    read_rows,
    recognise,
    split,
)
from ..arrow import pc

Format = Literal["wildchat", "lmsys", "wildfeedback", "sharegpt", "messages", "triples"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class Ready:
    """A ready interaction, and what its row says of where it is from (as in `Conversation`)."""

    interaction: Interaction
    source: str
    names: tuple[str, ...]
    user: str | None


Item = Conversation | Ready | DataError

_INTERACTION = ("prompt", "completion", "user_response")
_LISTS: dict[str, tuple[str, ...]] = {
    "wildchat": ("conversation",),
    "lmsys": ("conversation",),
    "wildfeedback": ("conversations", "conversation"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
}
_KEYS = ("conversation", "conversations", "messages")
_NAMES = ("conversation_id", "id")
_HASH = "conversation_hash"
_USERS = ("hashed_ip", "user_id", "user")
_MARKS = ("toxic", "redacted")
_TEXTS = (*_NAMES, _HASH, *_USERS, "language", "model")
_OF_WILDCHAT = {_HASH, "toxic", "hashed_ip", "detoxify_moderation"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tool_calls", "function_call")
# what a message may hold beside a role and its content
_MORE = frozenset({*_CALLS, "tool_call_id", "name", "refusal", "audio", *_REASONING})
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_REASONING_PARTS = ("reasoning", "thinking", "redacted_thinking")
_RESULTS = ("tool", "function")
_LOOKED_AT = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class LogFile:
    """A file and what its rows mean."""

    file: RowFile
    format: Format
    knows: frozenset[str]
    """Columns of the guardrails that it has, of "language", "user", "flagged" and "redacted"."""
    columns: list[str] | None = None
    """Paths of the leaf columns to read of a parquet file; None: all."""


def sniff(path: str | Path) -> Format:
    """The format of a file; see `describe`."""
    return describe(path).format


def describe(
    path: str | Path, forced: Format | Literal["auto"] = "auto", *, lenient: bool = False
) -> LogFile:
    """Recognises a file by its parquet schema, or by its first JSON rows.

    Args:
        forced: the format that it must have.
        lenient: look at a hundred rows, and pass over those that are not JSON objects.

    Raises:
        DataError: the file is empty, broken, of none of the known formats or not of `forced`.
    """
    file = recognise(path)
    if file.container != "parquet":
        place, fields, inner = _first_row(file.path, forced, lenient)
        format = _format(fields, inner, forced, file, place)
        return LogFile(file=file, format=format, knows=_known(fields))
    with open_parquet(file.path) as parquet:
        schema, leaves = parquet.schema_arrow, parquet.schema
    fields = set(schema.names)
    format = _format(fields, _message_fields_of(schema), forced, file)
    columns = None
    if format != "triples":
        try:
            _check_schema(schema, format)
        except DataError as error:
            raise error.at(file=str(path), row="every row") from None
        columns = _needed_leaves(leaves, _key(schema, format))
    return LogFile(file=file, format=format, knows=_known(fields), columns=columns)


def _format(
    fields: set[str], message: set[str] | None, forced: str, file: RowFile, place: str = ""
) -> Format:
    if (found := _recognised(fields, message, forced)) is not None:
        return found
    needed = f"the format {forced!r} that was asked for" if forced != "auto" else "a known format"
    hint = (
        "Rows need one of `conversation`, `conversations`, `messages`, or all of "
        f"{listed(_INTERACTION)}; name the right format, rename fields, or leave the file out"
    )
    problem = f"not of {needed}; its fields are {listed(sorted(fields))}"
    raise DataError(problem, file=str(file.path), row=place, hint=hint)


def _first_row(path: Path, forced: str, lenient: bool) -> tuple[str, set[str], set[str] | None]:
    """Place and fields of a file's first row, and fields of its first message.

    If `lenient`, bad rows are passed over, and the first row of the most frequent format counts.
    """
    rows: list[tuple[str, set[str], set[str] | None]] = []
    for _, place, row in islice(read_rows(path), _LOOKED_AT):
        if isinstance(row, dict):
            inner = _message_fields(row)
            rows.append((place, set(row), inner))
            if not lenient and (inner or set(_INTERACTION) <= set(row)):
                return *rows[0][:2], inner
        elif not lenient and rows:
            break
        elif not lenient:
            if isinstance(row, DataError):
                raise row
            hint = "Write one object per row"
            raise DataError("not a JSON object", file=str(path), row=place, hint=hint)
    if not rows:
        problem = f"none of the first {_LOOKED_AT} rows is a JSON object"
        raise DataError(problem, file=str(path), hint="Write one object per row")
    formats = [_recognised(fields, inner, forced) for _, fields, inner in rows if lenient]
    most = Counter(filter(None, formats)).most_common(1)
    return rows[formats.index(most[0][0])] if most else rows[0]


def _recognised(fields: set[str], message: set[str] | None, forced: str) -> Format | None:
    """The format; formats of one shape may stand in for each other where one is forced."""
    if forced == "auto":
        return _recognise(fields, message)
    needed = set(_INTERACTION) <= fields if forced == "triples" else fields & {*_LISTS[forced]}
    return cast(Format, forced) if needed else None


def _message_fields(row: dict[str, Any]) -> set[str] | None:
    found = (row.get(key) for key in _KEYS)
    firsts = (messages[0] for messages in found if isinstance(messages, list) and messages)
    return next((set(message) for message in firsts if isinstance(message, dict)), None)


def _message_fields_of(schema: pa.Schema) -> set[str] | None:
    structs = (_struct(schema.field(key).type) for key in _KEYS if key in schema.names)
    return next(({field.name for field in struct} for struct in structs if struct), None)


def _recognise(fields: set[str], message: set[str] | None) -> Format | None:
    if set(_INTERACTION) <= fields:
        return "triples"
    if "messages" in fields:
        return "messages"
    if not fields & {"conversation", "conversations"}:
        return None
    if message is not None and "from" in message:
        plain = "conversations" in fields and _HASH not in fields
        return "sharegpt" if plain else "wildfeedback"
    if "conversation" not in fields:
        return "sharegpt"
    if "openai_moderation" in fields and not fields & _OF_WILDCHAT:
        return "lmsys"
    return "wildchat"


def _known(fields: set[str]) -> frozenset[str]:
    knows = {"language", "redacted"} & fields
    if fields & {"toxic", "openai_moderation"}:
        knows.add("flagged")
    if fields & set(_USERS):
        knows.add("user")
    return frozenset(knows)


def read_conversations(paths: Paths) -> Iterator[Conversation]:
    """Streams the conversations of files, folders and globs, in the order of `resolve_paths`.

    Raises DataError for the first thing that cannot be read, ready interactions included.
    """
    for path in resolve_paths(paths):
        log = describe(path)
        if log.format == "triples":
            raise DataError(
                "holds ready interactions (prompt, completion, user_response), not conversations",
                file=str(path),
                hint="Read it with sdpo.interactions.read_interactions",
            )
        for chunk in split(log.file):
            for batch in read_chunk(log.file, chunk, columns=log.columns):
                for item in items_of(batch, log):
                    if isinstance(item, DataError):
                        raise item
                    assert isinstance(item, Conversation)
                    yield item


def items_of(
    batch: Batch, log: LogFile, languages: tuple[str, ...] | None = None
) -> Iterable[Item]:
    """What each row of a batch holds, or what is wrong with it.

    Args:
        languages: conversations in other languages may come without their messages.
    """
    if not isinstance(batch.rows, list) and log.columns is not None:
        key = _key(batch.rows.schema, log.format)
        if _is_plain(batch.rows.column(key)):
            with suppress(UnicodeDecodeError):
                return list(_conversations(batch.rows, log, batch.numbers, key, languages))
    rows = plain_rows(batch, log.file)
    return [_item(row, log, number) for row, number in zip(rows, batch.numbers, strict=True)]


# Rows as JSON has them


def _item(row: Any, log: LogFile, number: int) -> Item:
    if isinstance(row, DataError):
        return row
    try:
        make = _ready if log.format == "triples" else _conversation
        return make(as_object(row, "row"), log, number)
    except DataError as error:
        return error.at(file=str(log.file.path), row=log.file.place(number))


def _ready(row: dict[str, Any], log: LogFile, number: int) -> Ready:
    interaction = from_row(row, default_id=f"{log.file.path.stem}-{number}")
    return Ready(interaction, f"{log.file.path}:{number}", _names(row), _name(row, _USERS))


def _conversation(row: dict[str, Any], log: LogFile, number: int) -> Conversation:
    keys = [key for key in _LISTS[log.format] if key in row]
    key = next((key for key in keys if row[key] is not None), (keys or _LISTS[log.format])[0])
    is_empty = bool(keys) and row[key] is None and log.format != "messages"
    raw = [] if is_empty else as_list(row.get(key), key)
    return Conversation(
        **_named(row, log, number),
        **_messages(raw),
        flagged=_marked(row, raw, "toxic") or _moderated(row.get("openai_moderation")),
        redacted=_marked(row, raw, "redacted"),
    )


def _named(row: dict[str, Any], log: LogFile, number: int) -> dict[str, Any]:
    """What a conversation is called, and who had it: all but its messages and their marks."""
    id, named = _id(row, f"{log.file.path.stem}-{number}")
    language = row.get("language")
    return {
        "id": id,
        "source": f"{log.file.path}:{number}",
        "language": None if language is None else as_text(language, "language"),
        "has_language": "language" in row or "language" in log.knows,
        "named": named,
        "user": _name(row, _USERS),
        "names": _names(row),
        "model": _name(row, ("model",)),
    }


def _id(row: dict[str, Any], default: str) -> tuple[str, bool]:
    """The id, and whether it is the log's own; an empty one is none."""
    for key in (*_NAMES, _HASH):
        if row.get(key) not in (None, ""):
            return as_id(row[key], default, key), key != _HASH
    return default, False


def _name(row: dict[str, Any], keys: Iterable[str]) -> str | None:
    for key in keys:
        value = row.get(key)
        if isinstance(value, str | int) and value != "":
            return str(value)
    return None


def _names(row: dict[str, Any]) -> tuple[str, ...]:
    """All that a row calls its conversation and its user."""
    values = (row.get(key) for key in (*_NAMES, _HASH, *_USERS))
    return tuple(str(v) for v in values if isinstance(v, str | int) and v != "")


def _marked(row: dict[str, Any], messages: list[Any], mark: str) -> bool:
    marked = [m[mark] for m in messages if isinstance(m, dict) and mark in m]
    return any([_truth(value, mark) for value in (row.get(mark), *marked)])


def _moderated(verdicts: object) -> bool:
    verdicts = verdicts if isinstance(verdicts, list) else [verdicts]
    said = [v["flagged"] for v in verdicts if isinstance(v, dict) and "flagged" in v]
    return any([_truth(value, "openai_moderation.flagged") for value in said])


def _truth(value: object, field: str) -> bool:
    """A mark must not be passed over because of how it is written."""
    if value is None or value in (True, False):  # and so 0 and 1
        return bool(value)
    raise bad(field, f"found {kind(value)} where true or false is needed", "Write a boolean")


# Messages


class _Read(NamedTuple):
    """A message, what it holds beside text (None: nothing), and whether it came with reasoning."""

    message: Message
    lost: str | None = None
    reasoning: bool = False


def _messages(raw: list[Any]) -> dict[str, Any]:
    """A conversation's `messages`, `lost` and `reasoning`."""
    messages, lost, reasoning = [], [], 0
    for i, logged in enumerate(raw):
        if (message := _of_two_texts(logged)) is None:
            message, what, reasons = _odd(logged)
            reasoning += reasons
            if what is not None:
                lost.append((i, what))
        messages.append(message)
    return {"messages": tuple(messages), "lost": tuple(lost), "reasoning": reasoning}


def _of_two_texts(message: object) -> Message | None:
    """What nearly all messages are; None if this one is not."""
    if type(message) is not dict or not (len(message) == 2 or _MORE.isdisjoint(message)):
        return None
    role, content = message.get("role"), message.get("content")
    if type(role) is str and type(content) is str:
        return Message(role, content)
    sender, value = message.get("from"), message.get("value")
    return Message(sender, value) if type(sender) is str and type(value) is str else None


def _odd(message: object) -> _Read:
    """A message as public logs and APIs have them: null, without a role, of parts, with tools.

    A role or content that is missing or null is "".
    """
    if message is None:
        return _Read(Message("", ""))
    if not isinstance(message, dict):
        return _Read(Message("", ""), f"message that is {kind(message)}")
    item = message.get("type")
    if "role" not in message and isinstance(item, str) and item in _ITEMS:
        message = _ITEMS[item](message)
    role = next((r for key in ("role", "from") if isinstance(r := message.get(key), str)), "")
    content = message.get("content")
    text, lost, reasoning = _text(message.get("value") if content is None else content)
    reasoning = reasoning or any(message.get(key) for key in _REASONING)
    if not text:
        refusal = message.get("refusal")
        text = refusal if isinstance(refusal, str) else ""
        lost = lost or ("part audio" if message.get("audio") else None)
    try:
        return _Read(_with_tools(role, text, message), lost, reasoning)
    except ValueError:
        return _Read(Message(role, text), "tool call without a name", reasoning)


# what the items of OpenAI's Responses API are that have no role, as messages
_ITEMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "function_call": lambda item: {
        "role": "assistant",
        "tool_calls": [{"id": item.get("call_id"), "function": item}],
    },
    "function_call_output": lambda item: {
        "role": "tool",
        "content": item.get("output"),
        "tool_call_id": item.get("call_id"),
    },
    "reasoning": lambda item: {"role": "reasoning"},
}


def _text(content: object) -> tuple[str, str | None, bool]:
    """The text of a content, what it holds beside text, and whether that is reasoning, too."""
    if content is None or isinstance(content, str):
        return content or "", None, False
    if not isinstance(content, list):
        return "", f"content that is {kind(content)}", False
    texts, lost, reasoning = [], None, False
    for part in content:
        sort = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if "refusal" in part else "text") if sort in _TEXT_PARTS else part
        if isinstance(text, str):
            texts.append(text)
        elif sort in _REASONING_PARTS:
            reasoning = True
        else:
            lost = f"part {sort}" if isinstance(sort, str) else "part without a type"
    return "".join(texts), lost, reasoning


def _with_tools(role: str, text: str, message: dict[str, Any]) -> Message:
    """The message with its tool calls, or what call it is the result of.

    Raises ValueError for calls that have no name."""
    calls = message.get("tool_calls") or message.get("function_call")
    calls = [calls] if isinstance(calls, dict) else calls
    if calls and not isinstance(calls, list):
        raise ValueError
    of_call, name = message.get("tool_call_id"), message.get("name")
    is_result = of_call is not None or role in _RESULTS
    if not calls and not is_result:
        return Message(role, text)
    return tool_message(
        role,
        text,
        tool_calls=tool_calls_text(calls) if calls else None,
        tool_call_id=str(of_call) if isinstance(of_call, str | int) else None,
        name=name if is_result and isinstance(name, str) else None,
    )


# Parquet


def _struct(column: pa.DataType) -> pa.StructType | None:
    """The struct that a list column holds, if it is one."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(test(column) for test in tests) and pa.types.is_struct(column.value_type):
        return column.value_type
    return None


def _pair(names: set[str]) -> tuple[str, str]:
    """What a message's role and text are called."""
    return ("from", "value") if "from" in names and "role" not in names else ("role", "content")


def _key(schema: pa.Schema, format: Format) -> str:
    """The column of messages, by which the format was recognised."""
    return next(key for key in _LISTS[format] if key in schema.names)


def _check_schema(schema: pa.Schema, format: Format) -> None:
    key = _key(schema, format)
    column = schema.field(key).type
    struct = _struct(column)
    if struct is None:
        if pa.types.is_null(getattr(column, "value_type", column)):
            return
        problem = f"the column is of type {column}, not a list of {{role, content}}"
        raise bad(key, problem, "Convert the file to a list of messages")
    names = {field.name for field in struct}
    role, content = _pair(names)
    for name in (role, content):
        if name not in names:
            problem = f"its messages have {listed(sorted(names))}, but no `{name}`"
            raise bad(key, problem, "Rename or add the field")
    read = {f"{key}.{name}": struct.field(name).type for name in (role, content)}
    if format == "messages":
        del read[f"{key}.{content}"]  # text or parts
    for name in (*_NAMES, _HASH, "language", *_MARKS):
        if name in schema.names:
            read[name] = schema.field(name).type
    read |= {f"{key}.{name}": struct.field(name).type for name in _MARKS if name in names}
    if (verdict := _verdict_type(schema)) is not None:
        read["openai_moderation.flagged"] = verdict
    for field, column in read.items():
        is_number, problem = pa.types.is_integer(column), f"the column is of type {column}"
        if field.endswith((*_MARKS, "flagged")):
            if not (pa.types.is_boolean(column) or is_number or pa.types.is_null(column)):
                raise bad(field, f"{problem}, not boolean", "Cast it to boolean")
        elif not _is_text(column) and not (is_number and field in (*_NAMES, _HASH)):
            raise bad(field, f"{problem}, not text", "Cast it to string")


def _is_text(column: pa.DataType) -> bool:
    value = column.value_type if pa.types.is_dictionary(column) else column
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    return any(test(value) for test in (*tests, pa.types.is_string_view))


def _verdict_type(schema: pa.Schema) -> pa.DataType | None:
    """Type of `openai_moderation`'s `flagged`: of one verdict a message, or of one in all."""
    if "openai_moderation" not in schema.names:
        return None
    column = schema.field("openai_moderation").type
    struct = column if pa.types.is_struct(column) else _struct(column)
    if struct is None or struct.get_field_index("flagged") < 0:
        return None
    return struct.field("flagged").type


def _needed_leaves(schema: pq.ParquetSchema, key: str) -> list[str]:
    """Paths of the needed leaf columns; what lies between list and field depends on the writer."""
    inside = {"role", "content", "from", "value", *_MARKS}

    def is_needed(path: str) -> bool:
        top, *within = path.split(".")
        field = within[-1] if within else ""
        if top == key:
            # OpenAI's messages may hold parts; of others, texts, the marks and tool calls do
            plain = not within or (field in inside and len(within) <= 3)
            return key == "messages" or plain or not _MORE.isdisjoint(within[1:3])
        is_verdict = top == "openai_moderation" and field == "flagged"
        return is_verdict or path in (*_TEXTS, *_MARKS)

    return list(filter(is_needed, (schema.column(i).path for i in range(len(schema)))))


def _is_plain(column: pa.Array) -> bool:
    """Messages of two texts each, which are read column by column, much faster than row by row."""
    if (struct := _struct(column.type)) is None:
        return False
    names = {field.name for field in struct}
    if not _is_text(struct.field(_pair(names)[1]).type):
        return False
    if not (more := names & _MORE):
        return True
    flat = column.flatten()
    return all(pc.struct_field(flat, name).null_count == len(flat) for name in more)


def _conversations(
    batch: pa.RecordBatch,
    log: LogFile,
    numbers: list[int],
    key: str,
    languages: tuple[str, ...] | None,
) -> Iterator[Conversation]:
    flat, of_row = _flattened(batch.column(key))
    flagged = _marks(batch, flat, of_row, "toxic") | _moderation(batch)
    redacted = _marks(batch, flat, of_row, "redacted")
    texts = {n: batch.column(n).to_pylist() for n in _TEXTS if n in batch.schema.names}
    if "language" in texts and languages is not None:
        read = np.array([is_among(name, languages) for name in texts["language"]], dtype=bool)
        flat, of_row = flat.filter(pa.array(read[of_row])), of_row[read[of_row]]
    lengths = np.bincount(of_row, minlength=batch.num_rows).tolist()
    role, content = _pair({field.name for field in flat.type})
    pairs = zip(_texts(flat, role), _texts(flat, content), strict=True)
    for i, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
        yield Conversation(
            **_named({name: values[i] for name, values in texts.items()}, log, number),
            messages=tuple([Message(r, c) for r, c in islice(pairs, length)]),
            flagged=bool(flagged[i]),
            redacted=bool(redacted[i]),
        )


def _flattened(lists: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """What all lists hold, and the row that each item is from."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return lists.flatten(), np.repeat(np.arange(len(lists)), lengths)


def is_among(language: str | None, languages: tuple[str, ...]) -> bool:
    """Whether a log's name of a language is one of `languages`, which are in lower case."""
    return (language or "").strip().lower() in languages


def _texts(flat: pa.StructArray, name: str) -> list[str]:
    return [text or "" for text in pc.struct_field(flat, name).to_pylist()]


def _marks(batch: pa.RecordBatch, flat: pa.Array, of_row: np.ndarray, mark: str) -> np.ndarray:
    """(rows,) bool: the row's column of that name is true, or that of one of its messages."""
    marked = np.zeros(batch.num_rows, bool)
    if mark in batch.schema.names:
        marked |= _bools(batch.column(mark))
    if flat.type.get_field_index(mark) >= 0:
        marked[of_row[_bools(pc.struct_field(flat, mark))]] = True
    return marked


def _moderation(batch: pa.RecordBatch) -> np.ndarray:
    """(rows,) bool: OpenAI's moderation flagged one of the messages."""
    flagged = np.zeros(batch.num_rows, bool)
    if _verdict_type(batch.schema) is None:
        return flagged
    column = batch.column("openai_moderation")
    if pa.types.is_struct(column.type):
        return _bools(pc.struct_field(column, "flagged"))
    verdicts, of_row = _flattened(column)
    flagged[of_row[_bools(pc.struct_field(verdicts, "flagged"))]] = True
    return flagged


def _bools(column: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.cast(column, pa.bool_()), False).to_numpy(zero_copy_only=False)
