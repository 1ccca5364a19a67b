"""Malformed files by name, and what must become of each.

A file is put between two good ones. Its good rows must come out, and its bad ones must be
reported with file and row, or skipped and counted. The outcome is "fine" (the rows in question come
out), "nothing" (they are read, and give no interaction) or "error".
"""

import copy
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import zstandard

from helpers import logs

FINE, NOTHING, ERROR = "fine", "nothing", "error"
HUGE_LINE = 50 * 2**20
GOOD = ("g1", "g2")
_MISSING = object()


@dataclass(frozen=True)
class Case:
    """A malformed file and what must become of it.

    good: names of the file's conversations that must come out. doubtful: names that come out if the
    outcome is "fine", and may come out of a file that breaks off. bad_rows: how many rows are
    unreadable; None if the file is, or if the number of its lines is uncertain. says: what the
    error names, beside the file.
    """

    name: str
    file: str
    content: bytes | Callable[[], bytes]
    """A function where it is large."""
    outcome: str
    _: KW_ONLY
    good: tuple[str, ...] = GOOD
    doubtful: tuple[str, ...] = ()
    bad_rows: int | None = None
    says: tuple[str, ...] = ()

    def make(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content()


def row(name: str, shape: str = "messages") -> logs.Row:
    return logs.row(shape, name, logs.exchange(name))


def line(name: str, shape: str = "messages") -> bytes:
    return logs.json_line(row(name, shape))


def cases() -> list[Case]:
    found = [
        *_bad_lines(),
        *_fine_lines(),
        *_whole_jsonl_files(),
        *_fields(),
        *_json_files(),
        *_streams(),
        *_foreign_files(),
        *_cut_parquet(),
        *_parquet_schemas(),
        *_parquet_rows(),
    ]
    assert len({case.name for case in found}) == len(found)
    return found


def _each(
    what: str, file: str, outcome: str, contents: Mapping[str, bytes], **more: Any
) -> Iterator[Case]:
    """A case for each of several contents of one file."""
    for name, data in contents.items():
        yield Case(f"{what}: {name}", file, data, outcome, **more)


# Lines of JSONL


def _between(bad: bytes) -> bytes:
    return line("g1") + bad + b"\n" + line("g2")


def _text_row(text: str) -> bytes:
    """A row of messages whose answer is `text` as it would stand in JSON."""
    return line("m").rstrip(b"\n").replace(b"m: answer 0", text.encode())


BAD_LINES: dict[str, bytes] = {
    "cut short": line("m")[:40],
    "no closing brace": line("m")[:-2],
    "two objects": line("m")[:-1] + line("x")[:-1],
    "a trailing comma": line("m")[:-2] + b",}",
    "a comment": line("m")[:-1] + b" // m",
    "Python's repr": repr(row("m")).encode(),
    "unquoted keys": b"{messages: []}",
    "null": b"null",
    "a number": b"12",
    "NaN": b"NaN",
    "text": b'"messages"',
    "a row in a list": b"[" + line("m")[:-1] + b"]",
    "an empty object": b"{}",
    "an object of nothing known": b'{"dialog": "hello"}',
    "keys in capitals": line("m")[:-1].replace(b"messages", b"Messages"),
    "a raw NUL in text": _text_row("a\x00b"),
    "NUL bytes": b"\x00" * 64,
    "a bad escape": _text_row(r"a\xb"),
    "a lone high surrogate": _text_row(r"a\ud83d b"),
    "a lone low surrogate": _text_row(r"\ude00"),
    "a lone byte of UTF-8": line("m")[:-1].replace(b"answer", b"answ\xe9r"),
    "an overlong slash": line("m")[:-1].replace(b"answer", b"\xc0\xaf"),
    "a surrogate in UTF-8": line("m")[:-1].replace(b"answer", b"\xed\xa0\x80"),
    "one line of UTF-16": line("m")[:-1].decode().encode("utf-16-be"),
    "a hexadecimal number": line("m")[:-2] + b', "n": 0x1F}',
    "lists without end": b'{"messages": ' + b"[" * 100_000,
    "deeply nested messages": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deeply nested content": _text_row("X").replace(b'"X"', b"[" * 5_000 + b"]" * 5_000),
    "HTML": b"<html><body>502 Bad Gateway</body></html>",
    "a row of WildChat": line("m", "wildchat")[:-1],
    "a ready interaction": line("m", "triples")[:-1],
    "a message out of its list": b'{"role": "user", "content": "m"}',
    "an integer of 5,000 digits": line("m")[:-2] + b', "n": %b}' % (b"9" * 5_000),
    "a lone surrogate in an unknown key": line("m")[:-2] + rb', "n": "\ud800"}',
    "deep nesting in an unknown key": line("m")[:-2] + b', "n": %b}' % (b"[" * 3000 + b"]" * 3000),
    "a form feed before": b"\x0c" + line("m")[:-1],
}


def _bad_lines() -> Iterator[Case]:
    good = line("g1") + line("g2")
    contents: dict[str, tuple[bytes | Callable[[], bytes], int]] = {
        name: (_between(bad), 2) for name, bad in BAD_LINES.items()
    } | {
        "50 MB that breaks off": (lambda: _between(line("m")[:60] + b"x" * HUGE_LINE), 2),
        "50 MB of brackets": (lambda: _between(b"[" * HUGE_LINE), 2),
        "the last one cut short": (good + line("m")[:50], 3),
        "the first one is of no known format": (b'{"a": 1}\n' + good, 1),
    }
    for name, (content, number) in contents.items():
        says = (f"line {number}",)
        yield Case(f"line: {name}", "m.jsonl", content, ERROR, bad_rows=1, says=says)
    three = b"{\n" + line("g1") + b"nonsense\n" + line("g2") + b"[\n"
    name = "line: every second one is bad"
    yield Case(name, "m.jsonl", three, ERROR, bad_rows=3, says=("line 1",))


FINE_LINES: dict[str, bytes] = {
    "an escaped NUL": _text_row(r"a\u0000b"),
    "a pair of surrogates": _text_row(r"\ud83d\ude00"),
    "a key twice": line("m")[:-2] + b', "id": "m2"}',
    "unknown keys": line("m")[:-2] + b', "tags": [{"a": [1, 2.5, null, true]}]}',
    "spaces around": b" \t" + line("m")[:-1] + b"  ",
    "a byte order mark in text": _text_row("\ufeff"),
    "line separators in text": _text_row("a\u2028b\u2029c\x85d"),
    "every key escaped": line("m")[:-1].replace(b'"messages"', rb'"\u006dessages"'),
    "blank lines around": b"\n \n" + line("m") + b"\t\n",
    "a part of text": _text_row("X").replace(b'"X"', b'[{"type": "text", "text": "m"}]'),
    # what the standard leaves out, and Python's reader takes
    "NaN in an unknown key": line("m")[:-2] + b', "score": NaN}',
    "a huge integer": line("m")[:-2] + b', "n": %b}' % (b"9" * 400),
    "a byte order mark on line 2": b"\xef\xbb\xbf" + line("m")[:-1],
}


PARTS: dict[str, bytes] = {
    "an image part": b'[{"type": "image_url", "image_url": {}}]',
    "a part without a type": b'[{"text": "m"}]',
    "a part without text": b'[{"type": "text"}]',
    "a part that is a number": b'[{"type": "text", "text": 1}]',
}


def _fine_lines() -> Iterator[Case]:
    odd = {name: _between(_text_row("X").replace(b'"X"', part)) for name, part in PARTS.items()}
    critic = b'[{"role": "critic", "content": "x"}, {"role"'
    odd["an unknown role"] = _between(line("m")[:-1].replace(b'[{"role"', critic))
    yield from _each("line", "m.jsonl", NOTHING, odd, doubtful=("m",))
    fine = {name: _between(line) for name, line in FINE_LINES.items()}
    yield from _each("line", "m.jsonl", FINE, fine, doubtful=("m",))
    huge = "x" * HUGE_LINE
    name = "line: 50 MB in one message"
    yield Case(name, "m.jsonl", lambda: _between(_text_row(huge)), FINE, doubtful=("m",))


def _whole_jsonl_files() -> Iterator[Case]:
    good = logs.json_lines(row(name) for name in GOOD)
    text = good.decode()
    fine = {
        "a byte order mark": b"\xef\xbb\xbf" + good,
        "CRLF": good.replace(b"\n", b"\r\n"),
        "CRLF and a byte order mark": b"\xef\xbb\xbf" + good.replace(b"\n", b"\r\n"),
        "no newline at the end": good[:-1],
        "blank lines before and after": b"\n\r\n  \n" + good + b"\n\n\n",
        "escaped throughout": b"".join(json.dumps(row(name)).encode() + b"\n" for name in GOOD),
    }
    yield from _each("jsonl", "m.jsonl", FINE, fine)
    broken = {
        **{code: text.encode(code) for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")},
        "CR alone": good.replace(b"\n", b"\r"),
        "spread over lines": json.dumps(row("g1"), indent=2).encode(),
        "only NUL bytes": b"\x00" * 4096,
        "only broken lines": b"{\n[\n'\n",
        "only rows of no format": b'{"a": 1}\n{"b": 2}\n',
        "empty": b"",
        "only blank lines": b"\n  \n\t\n\r\n",
        "only a byte order mark": b"\xef\xbb\xbf",
    }
    yield from _each("jsonl", "m.jsonl", ERROR, broken, good=())


# Wrong types, field by field

VALUES: dict[str, Any] = {
    "null": None,
    "missing": _MISSING,
    "true": True,
    "a number": 7,
    "text": "x",
    "empty text": "",
    "an empty list": [],
    "a nested list": [[]],
    "an object": {"a": {"b": None}},
    "a lone surrogate": "\ud800",
    "NaN": float("nan"),
}


def _outcomes(default: str = ERROR, **other: str) -> dict[str, str]:
    assert {name.replace("_", " ") for name in other} <= VALUES.keys()
    return {name: other.get(name.replace(" ", "_"), default) for name in VALUES}


_ID = _outcomes(null=FINE, missing=FINE, a_number=FINE, text=FINE, empty_text=FINE)
_LIST = _outcomes(an_empty_list=NOTHING, a_nested_list=NOTHING)
_LOOSE_LIST = _LIST | {"null": NOTHING}
# what is no message, or has no text, costs its turn alone
_ITEM = _outcomes(NOTHING, a_lone_surrogate=ERROR)
_CONTENT = _ITEM | {"text": FINE}
_ANSWER = _outcomes(text=FINE)

FIELDS: dict[str, dict[tuple[str | int, ...], Mapping[str, str]]] = {
    "messages": {
        ("id",): _ID,
        ("messages",): _LIST,
        ("messages", 1): _ITEM,
        ("messages", 1, "role"): _ITEM,
        ("messages", 1, "content"): _CONTENT,
    },
    "wildchat": {
        ("conversation_id",): _ID,
        ("language",): _outcomes(null=FINE, missing=FINE, text=FINE, empty_text=FINE),
        ("conversation",): _LOOSE_LIST,
        ("conversation", 1): _ITEM,
        ("conversation", 1, "role"): _ITEM,
        ("conversation", 1, "content"): _CONTENT,
    },
    "wildchat-1m": {("conversation_hash",): _ID},
    "triples": {
        ("id",): {**_ID, "empty text": ERROR},
        ("turn_id",): _outcomes(null=FINE, missing=FINE, a_number=FINE),
        ("prompt",): _outcomes(),
        ("prompt", 0): _outcomes(),
        ("prompt", 0, "from"): _outcomes(),
        ("prompt", 0, "value"): _outcomes(text=FINE, empty_text=FINE),
        ("completion",): _ANSWER,
        ("completion", "from"): _outcomes(),
        ("completion", "value"): _ANSWER,
        ("user_response",): _ANSWER,
        ("user_response", "value"): _ANSWER,
    },
}


_NAMES = {"conversation_id": "id", "conversation": "conversations"}
_NAMES |= {"role": "from", "content": "value"}
FIELDS["sharegpt"] = {
    tuple(_NAMES.get(str(part), part) for part in path): outcomes
    for path, outcomes in FIELDS["wildchat"].items()
    if path != ("language",)
}


def _fields() -> Iterator[Case]:
    for shape, fields in FIELDS.items():
        for path, outcomes in fields.items():
            for value, outcome in outcomes.items():
                bad = json.dumps(changed(row("m", shape), path, VALUES[value]), default=str)
                data = line("g1", shape) + bad.encode() + b"\n" + line("g2", shape)
                # of JSON that no reader takes, the error names the column, not the field
                says = ("line 2",) if value in UNREADABLE else ("line 2", _field(path, value))
                name = f"field: {shape} {'.'.join(map(str, path))} is {value}"
                more = {"doubtful": ("m",), "bad_rows": 1, "says": says}
                yield Case(name, "m.jsonl", data, outcome, **more)


def _field(path: tuple[str | int, ...], value: str) -> str:
    """What the error calls the field; of one that is missing or empty, at least what it is in."""
    inside = path[:-1] if value in ("missing", "empty text") and path[1:] else path
    names = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in inside)
    return "".join(names).removeprefix(".")


UNREADABLE = ("a lone surrogate", "NaN")


def changed(row: logs.Row, path: tuple[str | int, ...], value: object) -> logs.Row:
    row = copy.deepcopy(row)
    holder: Any = row
    for key in path[:-1]:
        holder = holder[key]
    if value is _MISSING:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return row


# JSON arrays


def _json_files() -> Iterator[Case]:
    g1, m, g2 = (line(name).strip() for name in ("g1", "m", "g2"))
    whole = b"[" + g1 + b",\n" + g2 + b"]\n"
    fine = {
        "one line": whole.replace(b"\n", b""),
        "a byte order mark": b"\xef\xbb\xbf" + whole,
        "CRLF": whole.replace(b"\n", b"\r\n"),
        "spaces before": b"\n\n   " + whole,
        "spread over lines": json.dumps([row(name) for name in GOOD], indent=4).encode(),
    }
    yield from _each("json", "m.json", FINE, fine)
    rows = {
        "a number": b"7",
        "a list": b"[" + m + b"]",
        "an empty object": b"{}",
        "messages that are a number": b'{"messages": 3}',
    }
    arrays = {name: b"[%b, %b, %b]" % (g1, bad, g2) for name, bad in rows.items()}
    yield from _each("json: a row that is", "m.json", ERROR, arrays, bad_rows=1)
    broken = {
        "no closing bracket": whole.strip()[:-1],
        "cut in a row": whole[: len(whole) * 3 // 4],
        "no comma": b"[" + g1 + g2 + b"]",
        "a trailing comma": b"[" + g1 + b"," + g2 + b",]",
        "text after the array": whole + b"the end",
        "invalid UTF-8": whole.replace(b"g2: answer", b"g2: \xe9"),
        "a raw NUL": whole.replace(b"g2: answer", b"g2: \x00"),
    }
    yield from _each("json", "m.json", ERROR, broken, good=(), doubtful=GOOD)
    yield Case("json: one object", "m.json", g1, FINE, good=(), doubtful=("g1",))
    yield Case("json: lines of objects", "m.json", g1 + b"\n" + g2 + b"\n", FINE)
    other = {
        "rows under a key": b'{"data": ' + whole + b"}",
        "an empty array": b"[]",
        "deep nesting": b"[" * 100_000 + b"]" * 100_000,
        "a number": b"7",
        "empty": b"",
        "blank": b" \n ",
        "UTF-16": whole.decode().encode("utf-16"),
    }
    yield from _each("json", "m.json", ERROR, other, good=(), doubtful=GOOD)


# Compressed streams


def _streams() -> Iterator[Case]:
    names = tuple(f"g{i}" for i in range(200))
    text = logs.json_lines(row(name) for name in names)
    packers: dict[str, Callable[[bytes], bytes]] = {
        "gz": lambda data: gzip.compress(data, mtime=0),
        "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }
    for suffix, pack in packers.items():
        file, packed, good = f"m.jsonl.{suffix}", pack(text), line("g1") + line("g2")
        cuts = (0, 1, 2, 4, 9, 12, 30, *range(100, len(packed), len(packed) // 6), -8, -4, -1)
        broken = {f"cut at {cut}": packed[:cut] for cut in cuts}
        middle = len(packed) // 2
        broken |= {
            "one byte flipped": _flipped(packed, middle),
            "a wrong checksum": _flipped(packed, len(packed) - 2),
            "trailing nonsense": packed + b"nonsense",
            "packed twice": pack(pack(good)),
            "nothing packed": pack(b""),
        }
        # rows before the break may come out or not; none of what comes after it is made up
        yield from _each(suffix, file, ERROR, broken, good=(), doubtful=names)
        yield Case(f"{suffix}: two streams", file, pack(line("g1")) + pack(line("g2")), FINE)
        bad = pack(line("g1") + b"{nonsense\n" + line("g2"))
        yield Case(f"{suffix}: a bad line inside", file, bad, ERROR, bad_rows=1, says=("line 2",))
        yield Case(f"jsonl named {suffix}", file, good, FINE)
        yield Case(f"{suffix} named jsonl", "m.jsonl", pack(good), FINE)
        other = "zst" if suffix == "gz" else "gz"
        yield Case(f"{suffix} named {other}", f"m.jsonl.{other}", pack(good), FINE)


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


# Files that are something else


def _foreign_files() -> Iterator[Case]:
    noise = random.Random(0)
    contents = {
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "an HTML page": b"<!DOCTYPE html>\n<html>\n<body>Not found</body></html>\n",
        "nothing": b"",
        "noise": noise.randbytes(4096),
        "a ZIP": b"PK\x03\x04" + noise.randbytes(200),
        "an encrypted parquet": b"PARE" + noise.randbytes(200) + b"PARE",
        "an Arrow file": _feather(),
        "a JSON error": b'{"error": {"message": "Invalid token", "code": 401}}\n',
    }
    for suffix in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "json"):
        yield from _each(f"{suffix}, but", f"m.{suffix}", ERROR, contents, good=())
    good = [row(name, "wildchat") for name in GOOD]
    table = logs.parquet("wildchat", good)
    yield Case("parquet named jsonl", "m.jsonl", table, FINE)
    yield Case("parquet named json", "m.json", table, FINE)
    array = logs.packed("wildchat", good, "json")
    for name, file, data in (
        ("jsonl named parquet", "m.parquet", logs.json_lines(good)),
        ("json named parquet", "m.parquet", array),
        ("json named jsonl", "m.jsonl", array),
    ):
        yield Case(name, file, data, ERROR, good=(), doubtful=GOOD)


def _feather() -> bytes:
    file = io.BytesIO()
    feather.write_feather(pa.table({"messages": [1]}), file)
    return file.getvalue()


# Parquet


def _cut_parquet() -> Iterator[Case]:
    names = [f"g{i}" for i in range(8)]
    whole = logs.parquet("wildchat", [row(name, "wildchat") for name in names])
    cuts = [1, 3, 4, 5, 8, 12, 100, *range(1_000, len(whole), len(whole) // 16)]
    cuts += [-100, -9, -8, -5, -4, -2, -1]
    truncated = {f"cut at {cut}": whole[:cut] for cut in cuts}
    yield from _each("parquet", "m.parquet", ERROR, truncated, good=())
    changed = {
        "the footer's length is huge": whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:],
        "the footer's length is 0": whole[:-8] + b"\x00" * 4 + whole[-4:],
        "the footer is NUL bytes": _overwritten(whole, len(whole) - 200, 192),
        "the head is gone": whole[1_000:],
        "the middle is gone": whole[:2_000] + whole[4_000:],
        "text before": b"hello" + whole,
        "text after": whole + b"hello",
    }
    group = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(1)
    unread = {}
    for column in map(group.column, range(group.num_columns)):
        name = column.path_in_schema
        is_read = name == "conversation_id" or name.endswith((".content", ".role", ".flagged"))
        if is_read or name in ("turn", "timestamp"):
            data = _overwritten(whole, column.data_page_offset, 16)
            (changed if is_read else unread)[f"a page of {name} changed"] = data
    yield from _each("parquet", "m.parquet", ERROR, changed, good=(), doubtful=tuple(names))
    yield from _each("parquet", "m.parquet", FINE, unread, good=tuple(names))


def _overwritten(data: bytes, start: int, length: int) -> bytes:
    return data[:start] + b"\x00" * length + data[start + length :]


def _table(columns: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), file)
    return file.getvalue()


def _typed(type: pa.DataType, values: list[Any]) -> pa.Array:
    return pa.array(values, type=type)


def _chat(role: pa.DataType, content: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct([pa.field("role", role), pa.field("content", content)]))


def _parquet_schemas() -> Iterator[Case]:
    text, large = pa.string(), pa.large_string()
    talk = [row(name)["messages"] for name in GOOD]
    chat, ids = _typed(_chat(text, text), talk), _typed(text, list(GOOD))
    listed = _chat(text, text).value_type
    fine = {
        "large strings": {"conversation": _typed(_chat(large, large), talk)},
        "large lists": {"conversation": _typed(pa.large_list(listed), talk)},
        "lists of 3": {"conversation": _typed(pa.list_(listed, 3), talk)},
        "a dictionary of ids": {"conversation_id": ids.dictionary_encode()},
        "large ids": {"conversation_id": ids.cast(large)},
        "ids of numbers": {"conversation_id": _typed(pa.int64(), [1, 2])},
        "ids of nulls": {"conversation_id": pa.nulls(2)},
        "a dictionary of languages": {"language": ids.dictionary_encode()},
        "languages of nulls": {"language": pa.nulls(2)},
        "odd columns": {"blob": _typed(pa.binary(), [b"\xff", None]), "": pa.nulls(2)},
        "a column of dots": {"a.b.conversation.list.element.role": ids},
        "a nested one": {"extra": _typed(pa.struct([("conversation", text)]), 2 * [{}])},
    }
    only_role, only_content = (pa.struct([(name, text)]) for name in ("role", "content"))
    wrong_chats = {
        "text": ids,
        "lists of text": _typed(pa.list_(text), 2 * [["x"]]),
        "lists of lists": _typed(pa.list_(_chat(text, text)), 2 * [[]]),
        "a struct": _typed(listed, 2 * [{}]),
        "a map": _typed(pa.map_(text, text), 2 * [[]]),
        "roles of numbers": _typed(_chat(pa.int64(), text), 2 * [[{"role": 1}]]),
        "contents of numbers": _typed(_chat(text, pa.float64()), 2 * [[{"content": 1.0}]]),
        "contents of lists": _typed(_chat(text, pa.list_(text)), 2 * [[{"content": []}]]),
        "contents of bytes": _typed(_chat(text, pa.binary()), 2 * [[{"content": b"x"}]]),
        "no role": _typed(pa.list_(only_content), 2 * [[{}]]),
        "no content": _typed(pa.list_(only_role), 2 * [[{}]]),
    }
    wrong = {
        "ids of bytes": {"conversation_id": ids.cast(pa.binary())},
        "ids of structs": {"conversation_id": _typed(pa.struct([("a", text)]), 2 * [{}])},
        "languages of numbers": {"language": _typed(pa.int8(), [1, 2])},
        "marks of text": {"toxic": ids},
    } | {name: {"conversation": column} for name, column in wrong_chats.items()}
    says = {
        "text": "field `conversation`: the column is of type string, not a list",
        "lists of text": "not a list of {role, content}",
        "no content": "field `conversation`: its messages have `role`, but no `content`",
        "contents of numbers": "`conversation.content`: the column is of type double, not text",
        "languages of numbers": "field `language`: the column is of type int8, not text",
        "marks of text": "field `toxic`: the column is of type string, not boolean",
    }
    whole = {"conversation_id": ids, "conversation": chat}
    unknown = {
        "no conversation": {"conversation_id": ids},
        "capitals": {"Conversation_ID": ids, "Conversation": chat},
        "none": {},
        "numbers": {"a": [1, 2]},
    }
    files = {name: _table(whole | columns) for name, columns in fine.items()}
    yield from _each("columns", "m.parquet", FINE, files)
    for name, columns in wrong.items():
        data, more = _table(whole | columns), ("every row", says.get(name, ""))
        yield Case(f"columns: {name}", "m.parquet", data, ERROR, good=(), says=more)
    files = {name: _table(columns) for name, columns in unknown.items()}
    yield from _each("columns", "m.parquet", ERROR, files, good=())
    nulls = _table(whole | {"conversation": pa.nulls(2)})
    yield Case("columns: only nulls", "m.parquet", nulls, NOTHING, good=(), doubtful=GOOD)
    yield Case("columns: no rows", "m.parquet", logs.parquet("wildchat", []), FINE, good=())


def _parquet_rows() -> Iterator[Case]:
    g1, g2 = (row(name, "wildchat") for name in GOOD)
    nulls = dict.fromkeys(g1)
    rows: dict[str, list[logs.Row]] = {
        "a row of nulls": [nulls],
        "a conversation null": [g1 | {"conversation_id": "m", "conversation": None}],
        "an empty conversation": [g1 | {"conversation_id": "m", "conversation": []}],
        "messages null": [g1 | {"conversation_id": "m", "conversation": [None, None, None]}],
        "roles null": [logs.wildchat("m", [(None, "a"), (None, "b"), (None, "c")])],
        "contents null": [logs.wildchat("m", 3 * [("user", None), ("assistant", None)])],
        "unknown roles": [logs.wildchat("m", 3 * [("critic", "a"), ("", "b")])],
    }
    files = {name: logs.parquet("wildchat", [g1, *bad, g2]) for name, bad in rows.items()}
    yield from _each("parquet", "m.parquet", NOTHING, files, doubtful=("m",))
    files = {f"a {field} not in UTF-8": _not_utf8(field) for field in ("content", "role")}
    more = {"doubtful": ("m",), "bad_rows": 1, "says": ("row 1", "conversation")}
    yield from _each("parquet", "m.parquet", ERROR, files, **more)


def _not_utf8(field: str) -> bytes:
    """Three WildChat rows, one row group each, where one text of the second is not UTF-8."""
    talks = []
    for name in ("g1", "m", "g2"):
        turns = row(name)["messages"]
        talks.append([{k: v.encode() for k, v in turn.items()} for turn in turns])
    talks[1][1][field] = b"caf\xe9"
    raw = _typed(_chat(pa.binary(), pa.binary()), talks)
    text = pa.ListArray.from_arrays(
        raw.offsets, raw.values.view(_chat(*2 * [pa.string()]).value_type)
    )
    file = io.BytesIO()
    table = pa.table({"conversation_id": ["g1", "m", "g2"], "conversation": text})
    pq.write_table(table, file, row_group_size=1)
    return file.getvalue()
