"""Malformed files by name, and what must become of each.

A file is put between two good ones. Its good rows must come out, and its bad ones must be told by
file and row, or skipped and counted. Where the house rules leave open whether a row can be read,
a case allows both: an outcome is "fine" (the row comes out), "nothing" (read, and without an
interaction) or "error".
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
    """A malformed file and what may become of it.

    good: names of the file's conversations that must come out. doubtful: names that come out if the
    outcome is "fine", and may come out of a file that breaks off. outcomes: those allowed, as
    "fine|error". bad_rows: how many rows are unreadable; None if the file is, or if the number of
    its lines is uncertain. says: what the error names, beside the file.
    """

    name: str
    file: str
    content: bytes | Callable[[], bytes]
    """A function where it is large."""
    outcomes: str
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


# Lines of JSONL


def _between(bad: bytes) -> bytes:
    return line("g1") + bad + b"\n" + line("g2")


def _text_row(text: str) -> bytes:
    """A row of messages whose answer is `text` as it would stand in JSON."""
    return line("m").rstrip(b"\n").replace(b"m: answer 0", text.encode())


BAD_LINES: dict[str, bytes] = {
    "cut short": line("m")[:40],
    "cut after a key": b'{"messages"',
    "no closing brace": line("m")[:-2],
    "a brace too many": line("m")[:-1] + b"}",
    "two objects": line("m")[:-1] + line("x")[:-1],
    "a comma after": line("m")[:-1] + b",",
    "a trailing comma": line("m")[:-2] + b",}",
    "a comment": line("m")[:-1] + b" // m",
    "Python's repr": repr(row("m")).encode(),
    "unquoted keys": b"{messages: []}",
    "words": b"hello there",
    "a lone quote": b'"',
    "null": b"null",
    "true": b"true",
    "a number": b"12",
    "NaN": b"NaN",
    "Infinity": b"-Infinity",
    "text": b'"messages"',
    "an empty list": b"[]",
    "a row in a list": b"[" + line("m")[:-1] + b"]",
    "an empty object": b"{}",
    "an object of nothing known": b'{"dialog": "hello"}',
    "keys in capitals": line("m")[:-1].replace(b"messages", b"Messages"),
    "a raw tab in text": _text_row("a\tb"),
    "a raw NUL in text": _text_row("a\x00b"),
    "NUL bytes": b"\x00" * 64,
    "NUL bytes before": b"\x00\x00" + line("m")[:-1],
    "NUL bytes after": line("m")[:-1] + b"\x00",
    "a bad escape": _text_row(r"a\xb"),
    "half an escape": _text_row(r"a\u12"),
    "a lone high surrogate": _text_row(r"a\ud83d b"),
    "a lone low surrogate": _text_row(r"\ude00"),
    "surrogates in the wrong order": _text_row(r"\ude00\ud83d"),
    "a lone byte of UTF-8": line("m")[:-1].replace(b"answer", b"answ\xe9r"),
    "a continuation byte": line("m")[:-1].replace(b"answer", b"\x80"),
    "an overlong slash": line("m")[:-1].replace(b"answer", b"\xc0\xaf"),
    "a surrogate in UTF-8": line("m")[:-1].replace(b"answer", b"\xed\xa0\x80"),
    "beyond Unicode": line("m")[:-1].replace(b"answer", b"\xf5\x80\x80\x80"),
    "byte FF": b"\xff" + line("m")[:-1],
    "one line of UTF-16": line("m")[:-1].decode().encode("utf-16-be"),
    "a number with a leading zero": line("m")[:-2] + b', "n": 01}',
    "a number without its digits": line("m")[:-2] + b', "n": 1.}',
    "a hexadecimal number": line("m")[:-2] + b', "n": 0x1F}',
    "lists without end": b'{"messages": ' + b"[" * 100_000,
    "objects without end": b'{"messages": {"a":' * 50_000,
    "deeply nested messages": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deeply nested content": _text_row("X").replace(b'"X"', b"[" * 5_000 + b"]" * 5_000),
    "HTML": b"<html><body>502 Bad Gateway</body></html>",
    "a row of WildChat": line("m", "wildchat")[:-1],
    "a row of ShareGPT": line("m", "sharegpt")[:-1],
    "a ready interaction": line("m", "triples")[:-1],
    "a message out of its list": b'{"role": "user", "content": "m"}',
    "an image part": _text_row("X").replace(b'"X"', b'[{"type": "image_url", "image_url": {}}]'),
    "a part without a type": _text_row("X").replace(b'"X"', b'[{"text": "m"}]'),
    "a part without text": _text_row("X").replace(b'"X"', b'[{"type": "text"}]'),
    "a part that is a number": _text_row("X").replace(b'"X"', b'[{"type": "text", "text": 1}]'),
}

# another format's row may be taken for what it is
OPEN_LINES = {"a row of WildChat", "a row of ShareGPT", "a ready interaction"}


def _bad_lines() -> Iterator[Case]:
    for name, bad in BAD_LINES.items():
        yield Case(
            f"line: {name}",
            "m.jsonl",
            _between(bad),
            f"{FINE}|{ERROR}" if name in OPEN_LINES else ERROR,
            doubtful=("m",),
            bad_rows=1,
            says=("line 2",),
        )
    yield Case(
        "line: 50 MB that breaks off",
        "m.jsonl",
        lambda: _between(line("m")[:60] + b"x" * HUGE_LINE),
        ERROR,
        bad_rows=1,
        says=("line 2",),
    )
    yield Case(
        "line: 50 MB of brackets",
        "m.jsonl",
        lambda: _between(b"[" * HUGE_LINE),
        ERROR,
        bad_rows=1,
        says=("line 2",),
    )
    yield Case(
        "line: the last one cut short",
        "m.jsonl",
        line("g1") + line("g2") + line("m")[:50],
        ERROR,
        bad_rows=1,
        says=("line 3",),
    )
    yield Case(
        "line: the first one is of no known format",
        "m.jsonl",
        b'{"a": 1}\n' + line("g1") + line("g2"),
        ERROR,
        bad_rows=1,
        says=("line 1",),
    )
    yield Case(
        "line: every second one is bad",
        "m.jsonl",
        b"{\n" + line("g1") + b"nonsense\n" + line("g2") + b"[\n",
        ERROR,
        bad_rows=3,
        says=("line 1",),
    )


FINE_LINES: dict[str, bytes] = {
    "an escaped NUL": _text_row(r"a\u0000b"),
    "a pair of surrogates": _text_row(r"\ud83d\ude00"),
    "a key twice": line("m")[:-2] + b', "id": "m2"}',
    "unknown keys": line("m")[:-2] + b', "tags": [{"a": [1, 2.5, null, true]}]}',
    "spaces around": b" \t" + line("m")[:-1] + b"  ",
    "a non-character": _text_row("\uffff\ufdd0"),
    "a byte order mark in text": _text_row("\ufeff"),
    "line separators in text": _text_row("a\u2028b\u2029c\x85d"),
    "every key escaped": line("m")[:-1].replace(b'"messages"', rb'"\u006dessages"'),
    "blank lines around": b"\n \n" + line("m") + b"\t\n",
    "a part of text": _text_row("X").replace(b'"X"', b'[{"type": "text", "text": "m"}]'),
    "an unknown role": line("m")[:-2].replace(
        b'[{"role"', b'[{"role": "critic", "content": "x"}, {"role"'
    )
    + b"}",
}
# readers differ on what the standard leaves out
OPEN_FINE_LINES: dict[str, bytes] = {
    "NaN in an unknown key": line("m")[:-2] + b', "score": NaN}',
    "Infinity in an unknown key": line("m")[:-2] + b', "score": -Infinity}',
    "a huge integer": line("m")[:-2] + b', "n": ' + b"9" * 400 + b"}",
    "an integer of 5,000 digits": line("m")[:-2] + b', "n": ' + b"9" * 5_000 + b"}",
    "a huge exponent": line("m")[:-2] + b', "n": 1e999}',
    "a lone surrogate in an unknown key": line("m")[:-2] + rb', "n": "\ud800"}',
    "deep nesting in an unknown key": line("m")[:-2]
    + b', "n": '
    + b"[" * 3_000
    + b"]" * 3_000
    + b"}",
    "a byte order mark on line 2": b"\xef\xbb\xbf" + line("m")[:-1],
    "a form feed before": b"\x0c" + line("m")[:-1],
}


def _fine_lines() -> Iterator[Case]:
    for outcomes, lines in ((FINE, FINE_LINES), (f"{FINE}|{ERROR}", OPEN_FINE_LINES)):
        for name, fine in lines.items():
            yield Case(
                f"line: {name}",
                "m.jsonl",
                _between(fine),
                outcomes,
                doubtful=("m",),
                bad_rows=1,
                says=("line 2",),
            )
    yield Case(
        "line: 50 MB in one message",
        "m.jsonl",
        lambda: _between(_text_row("x" * HUGE_LINE)),
        FINE,
        doubtful=("m",),
    )


def _whole_jsonl_files() -> Iterator[Case]:
    good = logs.json_lines(row(name) for name in GOOD)
    text = good.decode()
    fine = {
        "a byte order mark": b"\xef\xbb\xbf" + good,
        "CRLF": good.replace(b"\n", b"\r\n"),
        "CRLF and a byte order mark": b"\xef\xbb\xbf" + good.replace(b"\n", b"\r\n"),
        "no newline at the end": good[:-1],
        "blank lines before and after": b"\n\r\n  \n" + good + b"\n\n\n",
        "escaped throughout": "".join(
            json.dumps(row(name), ensure_ascii=True) + "\n" for name in GOOD
        ).encode(),
    }
    for name, data in fine.items():
        yield Case(f"jsonl: {name}", "m.jsonl", data, FINE)
    broken = {
        "UTF-16 with a mark": text.encode("utf-16"),
        "UTF-16-LE": text.encode("utf-16-le"),
        "UTF-16-BE": text.encode("utf-16-be"),
        "UTF-32": text.encode("utf-32"),
        "CR alone": good.replace(b"\n", b"\r"),
        "spread over lines": json.dumps(row("g1"), indent=2).encode(),
        "only NUL bytes": b"\x00" * 4096,
        "only broken lines": b"{\n[\n'\n",
        "only scalars": b"1\n2\n3\n",
        "only rows of no format": b'{"a": 1}\n{"b": 2}\n',
        "CSV": b"id,role,content\n1,user,hello\n",
        "empty": b"",
        "only blank lines": b"\n  \n\t\n\r\n",
        "only a byte order mark": b"\xef\xbb\xbf",
    }
    for name, data in broken.items():
        yield Case(f"jsonl: {name}", "m.jsonl", data, ERROR, good=())


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


_EITHER = f"{FINE}|{ERROR}"
_NO_ERROR = f"{NOTHING}|{ERROR}"
_ID = _outcomes(
    null=FINE,
    missing=FINE,
    a_number=_EITHER,
    text=FINE,
    empty_text=_EITHER,
)
# of published logs: what is null there is an empty message
_LOOSE_ROLE = _outcomes(null=NOTHING, missing=NOTHING, text=NOTHING, empty_text=NOTHING)
_LOOSE_TEXT = _LOOSE_ROLE | {"text": FINE}
_LOOSE_LIST = _outcomes(null=NOTHING, missing=_NO_ERROR, an_empty_list=NOTHING)
_LOOSE_ITEM = _outcomes(null=_NO_ERROR, missing=NOTHING, an_object=NOTHING)
_ROLE = _outcomes(text=NOTHING, empty_text=_NO_ERROR)
_CONTENT = _outcomes(text=FINE, empty_text=NOTHING, an_empty_list=_NO_ERROR)
_ANSWER = _outcomes(text=FINE)

FIELDS: dict[str, dict[tuple[str | int, ...], Mapping[str, str]]] = {
    "messages": {
        ("id",): _ID,
        ("messages",): _outcomes(an_empty_list=NOTHING),
        ("messages", 1): _outcomes(missing=NOTHING),
        ("messages", 1, "role"): _ROLE,
        ("messages", 1, "content"): _CONTENT,
    },
    "wildchat": {
        ("conversation_id",): _ID,
        ("language",): dict.fromkeys(VALUES, _EITHER) | _outcomes(_EITHER, text=FINE, null=FINE),
        ("conversation",): _LOOSE_LIST,
        ("conversation", 1): _LOOSE_ITEM,
        ("conversation", 1, "role"): _LOOSE_ROLE,
        ("conversation", 1, "content"): _LOOSE_TEXT,
    },
    "wildchat-1m": {("conversation_hash",): _ID},
    "sharegpt": {
        ("id",): _ID,
        ("conversations",): _LOOSE_LIST,
        ("conversations", 1): _LOOSE_ITEM,
        ("conversations", 1, "from"): _LOOSE_ROLE,
        ("conversations", 1, "value"): _LOOSE_TEXT,
    },
    "triples": {
        ("id",): _ID,
        ("turn_id",): _outcomes(null=FINE, missing=FINE, a_number=FINE),
        ("prompt",): _outcomes(),
        ("prompt", 0): _outcomes(),
        ("prompt", 0, "from"): _outcomes(),
        ("prompt", 0, "value"): _outcomes(text=FINE, empty_text=_EITHER),
        ("completion",): _ANSWER,
        ("completion", "from"): _outcomes(missing=_EITHER),
        ("completion", "value"): _ANSWER,
        ("user_response",): _ANSWER,
        ("user_response", "value"): _ANSWER,
    },
}


def _fields() -> Iterator[Case]:
    for shape, fields in FIELDS.items():
        for path, outcomes in fields.items():
            for value, outcome in outcomes.items():
                bad = json.dumps(_with(row("m", shape), path, VALUES[value]), default=str)
                data = line("g1", shape) + bad.encode() + b"\n" + line("g2", shape)
                # JSON that no reader takes is told by its column, not by its field
                says = ("line 2",) if value in UNREADABLE else ("line 2", str(path[0]))
                name = f"field: {shape} {'.'.join(map(str, path))} is {value}"
                more = {"doubtful": ("m",), "bad_rows": 1, "says": says}
                yield Case(name, "m.jsonl", data, outcome, **more)


UNREADABLE = ("a lone surrogate", "NaN")


def _with(row: logs.Row, path: tuple[str | int, ...], value: object) -> logs.Row:
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
    for name, data in fine.items():
        yield Case(f"json: {name}", "m.json", data, FINE)
    rows = {
        "a number": b"7",
        "null": b"null",
        "text": b'"m"',
        "a list": b"[" + m + b"]",
        "an empty object": b"{}",
        "messages that are a number": b'{"messages": 3}',
        "a role that is a number": m.replace(b'"assistant"', b"5"),
    }
    for name, bad in rows.items():
        yield Case(
            f"json: a row that is {name}",
            "m.json",
            b"[" + g1 + b", " + bad + b", " + g2 + b"]",
            ERROR,
            bad_rows=1,
        )
    broken = {
        "no closing bracket": whole.strip()[:-1],
        "cut in a row": whole[: len(whole) * 3 // 4],
        "no comma": b"[" + g1 + g2 + b"]",
        "a trailing comma": b"[" + g1 + b"," + g2 + b",]",
        "two arrays": whole + whole,
        "text after the array": whole + b"the end",
        "invalid UTF-8": whole.replace(b"g2: answer", b"g2: \xe9"),
        "a raw NUL": whole.replace(b"g2: answer", b"g2: \x00"),
        "NUL bytes after": whole + b"\x00" * 16,
    }
    for name, data in broken.items():
        yield Case(f"json: {name}", "m.json", data, ERROR, good=(), doubtful=GOOD)
    for name, data in {
        "one object": g1,
        "lines of objects": g1 + b"\n" + g2 + b"\n",
        "rows under a key": b'{"data": ' + whole + b"}",
        "rows by id": b'{"g1": ' + g1 + b', "g2": ' + g2 + b"}",
        "an empty array": b"[]",
        "deep nesting": b"[" * 100_000 + b"]" * 100_000,
        "a number": b"7",
        "null": b"null",
        "empty": b"",
        "blank": b" \n ",
        "UTF-16": whole.decode().encode("utf-16"),
    }.items():
        yield Case(
            f"json: {name}",
            "m.json",
            data,
            {
                "one object": _EITHER,
                "lines of objects": _EITHER,
                "an empty array": _NO_ERROR,
            }.get(name, ERROR),
            good=(),
            doubtful=("g1",) if name == "one object" else GOOD,
        )


# Compressed streams


def _streams() -> Iterator[Case]:
    names = [f"g{i}" for i in range(200)]
    text = logs.json_lines(row(name) for name in names)
    packers: dict[str, Callable[[bytes], bytes]] = {
        "gz": lambda data: gzip.compress(data, mtime=0),
        "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }
    for suffix, pack in packers.items():
        file = f"m.jsonl.{suffix}"
        packed = pack(text)
        for cut in (0, 1, 2, 4, 9, 12, 30, *range(100, len(packed), len(packed) // 6)):
            yield _cut_stream(f"{suffix}: cut at {cut}", file, packed[:cut], names)
        for cut in (1, 4, 8):
            yield _cut_stream(f"{suffix}: {cut} from the end", file, packed[:-cut], names)
        middle = len(packed) // 2
        flipped = packed[:middle] + bytes([packed[middle] ^ 0x55]) + packed[middle + 1 :]
        yield _cut_stream(f"{suffix}: one byte flipped", file, flipped, names)
        last = packed[:-2] + bytes([packed[-2] ^ 0xFF]) + packed[-1:]
        yield _cut_stream(f"{suffix}: a wrong checksum", file, last, names)
        two = pack(line("g1")) + pack(line("g2"))
        yield Case(f"{suffix}: two streams", file, two, FINE)
        bad = pack(line("g1") + b"{nonsense\n" + line("g2"))
        yield Case(f"{suffix}: a bad line inside", file, bad, ERROR, bad_rows=1, says=("line 2",))
        for name, data, outcomes in (
            ("trailing nonsense", packed + b"nonsense", _EITHER),
            ("packed twice", pack(pack(line("g1") + line("g2"))), ERROR),
            ("nothing packed", pack(b""), ERROR),
        ):
            yield Case(f"{suffix}: {name}", file, data, outcomes, good=(), doubtful=tuple(names))
        yield _misnamed(f"jsonl named {suffix}", file, line("g1") + line("g2"))
        plain = pack(line("g1") + line("g2"))
        yield _misnamed(f"{suffix} named jsonl", "m.jsonl", plain)
        other = "zst" if suffix == "gz" else "gz"
        yield _misnamed(f"{suffix} named {other}", f"m.jsonl.{other}", plain)


def _cut_stream(name: str, file: str, data: bytes, names: list[str]) -> Case:
    """Rows before the break may come out or not; none of what comes after it is made up."""
    return Case(name, file, data, ERROR, good=(), doubtful=tuple(names))


def _misnamed(name: str, file: str, data: bytes) -> Case:
    """Readable if it is known by its first bytes."""
    return Case(name, file, data, _EITHER, good=(), doubtful=GOOD)


# Files that are something else

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head>\n<body>Not found</body></html>\n"


def _foreign_files() -> Iterator[Case]:
    noise = random.Random(0)
    contents = {
        "a Git LFS pointer": LFS_POINTER,
        "an HTML page": HTML,
        "nothing": b"",
        "noise": noise.randbytes(4096),
        "a PNG": b"\x89PNG\r\n\x1a\n" + noise.randbytes(200),
        "a ZIP": b"PK\x03\x04" + noise.randbytes(200),
        "an encrypted parquet": b"PARE" + noise.randbytes(200) + b"PARE",
        "an Arrow file": _feather(),
        "an XML page": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "a JSON error": b'{"error": {"message": "Invalid token", "code": 401}}\n',
    }
    for suffix in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "json"):
        for name, data in contents.items():
            yield Case(f"{name} as {suffix}", f"m.{suffix}", data, ERROR, good=())
    good = [row(name, "wildchat") for name in GOOD]
    yield _misnamed("parquet named jsonl", "m.jsonl", logs.parquet("wildchat", good))
    yield _misnamed("parquet named json", "m.json", logs.parquet("wildchat", good))
    yield _misnamed("jsonl named parquet", "m.parquet", logs.json_lines(good))
    yield _misnamed("json named parquet", "m.parquet", logs.packed("wildchat", good, "json"))
    yield _misnamed("json named jsonl", "m.jsonl", logs.packed("wildchat", good, "json"))


def _feather() -> bytes:
    file = io.BytesIO()
    feather.write_feather(pa.table({"messages": [1]}), file)
    return file.getvalue()


# Parquet


def _cut_parquet() -> Iterator[Case]:
    names = [f"g{i}" for i in range(8)]
    whole = logs.parquet("wildchat", [row(name, "wildchat") for name in names])
    cuts = [1, 3, 4, 5, 8, 12, 100, *range(1_000, len(whole), len(whole) // 16)]
    for cut in [*cuts, *(len(whole) - n for n in (1, 2, 4, 5, 8, 9, 100))]:
        yield Case(
            f"parquet: cut at {cut} of {len(whole)}", "m.parquet", whole[:cut], ERROR, good=()
        )
    changed = {
        "the footer's length is huge": whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:],
        "the footer's length is 0": whole[:-8] + b"\x00" * 4 + whole[-4:],
        "the footer is NUL bytes": _overwritten(whole, len(whole) - 200, 192),
        "the head is gone": whole[1_000:],
        "the middle is gone": whole[:2_000] + whole[4_000:],
        "text before": b"hello" + whole,
        "text after": whole + b"hello",
    }
    for name, data in changed.items():
        yield Case(f"parquet: {name}", "m.parquet", data, ERROR, good=(), doubtful=tuple(names))
    for start in (4, 40, 400, 4_000):
        yield Case(
            f"parquet: 16 bytes changed at {start}",
            "m.parquet",
            _overwritten(whole, start, 16),
            _EITHER,
            good=(),
            doubtful=tuple(names),
        )


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
    text = pa.string()
    talk = [row(name)["messages"] for name in GOOD]
    chat = _typed(_chat(text, text), talk)
    ids = _typed(text, list(GOOD))
    large = pa.large_string()
    listed = _chat(text, text).value_type
    for name, columns, outcomes in (
        ("large strings", {"conversation": _typed(_chat(large, large), talk)}, FINE),
        ("large lists", {"conversation": _typed(pa.large_list(listed), talk)}, FINE),
        ("lists of 3", {"conversation": _typed(pa.list_(listed, 3), talk)}, _EITHER),
        ("a dictionary of ids", {"conversation_id": ids.dictionary_encode()}, FINE),
        ("large ids", {"conversation_id": ids.cast(large)}, FINE),
        ("ids of numbers", {"conversation_id": _typed(pa.int64(), [1, 2])}, _EITHER),
        ("ids of nulls", {"conversation_id": pa.nulls(2)}, FINE),
        ("ids of bytes", {"conversation_id": ids.cast(pa.binary())}, _EITHER),
        ("ids of structs",
         {"conversation_id": _typed(pa.struct([("a", text)]), 2 * [{}])}, _EITHER),
        ("languages of nulls", {"language": pa.nulls(2)}, FINE),
        ("languages of numbers", {"language": _typed(pa.int8(), [1, 2])}, _EITHER),
        ("odd columns", {"blob": _typed(pa.binary(), [b"\xff", None]), "": pa.nulls(2)}, FINE),
        ("a column of dots", {"a.b.conversation.list.element.role": ids}, FINE),
        ("a nested conversation", {"extra": _typed(pa.struct([("conversation", text)]), 2 * [{}])},
         FINE),
        ("conversations of text", {"conversation": ids}, ERROR),
        ("conversations of nulls", {"conversation": pa.nulls(2)}, _NO_ERROR),
        ("lists of text", {"conversation": _typed(pa.list_(text), 2 * [["x"]])}, ERROR),
        ("lists of lists", {"conversation": _typed(pa.list_(_chat(text, text)), 2 * [[]])}, ERROR),
        ("a struct", {"conversation": _typed(listed, 2 * [{}])}, ERROR),
        ("a map", {"conversation": _typed(pa.map_(text, text), 2 * [[]])}, ERROR),
        ("roles of numbers",
         {"conversation": _typed(_chat(pa.int64(), text), 2 * [[{"role": 1}]])}, ERROR),
        ("contents of numbers",
         {"conversation": _typed(_chat(text, pa.float64()), 2 * [[{"content": 1.0}]])}, ERROR),
        ("contents of lists",
         {"conversation": _typed(_chat(text, pa.list_(text)), 2 * [[{"content": []}]])}, ERROR),
        ("contents of bytes",
         {"conversation": _typed(_chat(text, pa.binary()), 2 * [[{"content": b"x"}]])},
         f"{NOTHING}|{ERROR}"),
        ("no role", {"conversation": _typed(pa.list_(pa.struct([("content", text)])), 2 * [[{}]])},
         ERROR),
        ("no content", {"conversation": _typed(pa.list_(pa.struct([("role", text)])), 2 * [[{}]])},
         ERROR),
    ):  # fmt: skip
        data = _table({"conversation_id": ids, "conversation": chat} | columns)
        yield Case(
            f"columns: {name}",
            "m.parquet",
            data,
            outcomes,
            good=GOOD if outcomes == FINE else (),
            doubtful=() if outcomes == FINE else GOOD,
        )
    wrong = {
        "no conversation": {"conversation_id": ids},
        "capitals": {"Conversation_ID": ids, "Conversation": chat},
        "none": {},
        "numbers": {"a": [1, 2]},
        "text": {"text": ["hello"]},
    }
    for name, columns in wrong.items():
        yield Case(f"columns: {name}", "m.parquet", _table(columns), ERROR, good=())
    yield Case("columns: no rows", "m.parquet", logs.parquet("wildchat", []), _EITHER, good=())


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
    for name, between in rows.items():
        data = logs.parquet("wildchat", [g1, *between, g2])
        yield Case(f"parquet: {name}", "m.parquet", data, NOTHING, doubtful=("m",))
    for field in ("content", "role"):
        yield Case(
            f"parquet: a {field} not in UTF-8",
            "m.parquet",
            _not_utf8(field),
            ERROR,
            doubtful=("m",),
            bad_rows=1,
            says=("row 1", "conversation"),
        )


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
