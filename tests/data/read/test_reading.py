"""Logs of every format, good and bad, through real files."""

import json
import re
import traceback
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdpo.conversations import Conversation, Message
from sdpo.data.read.formats import read_conversations, sniff
from sdpo.errors import DataError
from sdpo.io.paths import resolve_paths

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_messages(path: Path, *rows: object) -> Path:
    return write_lines(path, *map(json.dumps, rows))


def write_parquet(path: Path, columns: dict, **options) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def ids(paths) -> list[str]:
    return [conversation.id for conversation in read_conversations(paths)]


def error_of(paths) -> str:
    with pytest.raises(DataError) as caught:
        list(read_conversations(paths))
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback") == 1, "the reader sees another library's traceback too"
    return str(caught.value)


def assert_says(message: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in message
    assert re.search(r"\. [A-Z].*\.$", message), f"says nothing of what to do: {message}"


# Good logs


def test_wildchat_rows_come_as_logged(tmp_path):
    path = write_parquet(
        tmp_path / "chat.parquet",
        {
            "conversation_id": ["a", None],
            "model": ["m", "m"],
            "conversation": [
                [
                    {
                        "content": " Hello\n",
                        "role": "user",
                        "language": "English",
                        "header": {"role": "not this one", "content": "nor this"},
                    },
                    {"content": None, "role": "assistant", "language": None, "header": None},
                ],
                None,
            ],
            "language": ["English", None],
        },
    )
    assert sniff(path) == "wildchat"
    assert list(read_conversations(path)) == [
        Conversation(
            id="a",
            messages=(Message("user", " Hello\n"), Message("assistant", "")),
            source=f"{path}:0",
            language="English",
            has_language=True,
            names=("a",),
            model="m",
        ),
        Conversation(
            id="chat-1",
            messages=(),
            source=f"{path}:1",
            has_language=True,
            named=False,
            model="m",
        ),
    ]


def test_the_hash_names_a_conversation_without_an_id(tmp_path):
    both = {"conversation_id": ["a", None], "conversation_hash": ["x", "y"]}
    both["conversation"] = [HELLO, HELLO]
    assert ids(write_parquet(tmp_path / "both.parquet", both)) == ["a", "y"]
    only_hash = {"conversation_hash": ["x"], "conversation": [HELLO]}
    path = write_parquet(tmp_path / "hash.parquet", only_hash)
    (conversation,) = read_conversations(path)
    assert (conversation.id, conversation.has_language) == ("x", False)


def test_an_id_column_of_nulls_and_unusual_text_types_are_read(tmp_path):
    message = pa.struct({"content": pa.large_string(), "role": pa.string()})
    path = write_parquet(
        tmp_path / "c.parquet",
        {
            "conversation_id": pa.nulls(2),
            "conversation": pa.array([HELLO, [None]], pa.large_list(message)),
            "language": pa.array(["English", "French"]).dictionary_encode(),
        },
    )
    first, second = read_conversations(path)
    assert (first.id, first.language, first.messages[1].content) == ("c-0", "English", "Hi")
    assert (second.id, second.messages) == ("c-1", (Message("", ""),))


def test_rows_are_numbered_through_batches_and_row_groups(tmp_path):
    n = 1300
    columns = {"conversation_id": [f"c{i}" for i in range(n)], "conversation": [HELLO] * n}
    path = write_parquet(tmp_path / "c.parquet", columns, row_group_size=700)
    read = list(read_conversations(path))
    assert [c.id for c in read] == columns["conversation_id"]
    assert [c.source for c in read] == [f"{path}:{i}" for i in range(n)]


def test_reading_streams(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", json.dumps({"messages": HELLO}), "broken")
    stream = read_conversations(path)
    assert next(stream).id == "m-1"
    with pytest.raises(DataError):
        next(stream)


def test_openai_messages(tmp_path):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    rows = [
        {"id": "mine", "messages": [{"role": "user", "content": parts}]},
        {"id": 7, "messages": HELLO},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "t"}]}]},
    ]
    lines = [json.dumps(row) for row in rows]
    path = write_lines(tmp_path / "m.jsonl", "\ufeff" + lines[0], "", lines[1], "  ", lines[2])
    assert sniff(path) == "messages"
    read = list(read_conversations(path))
    assert [(c.id, c.source) for c in read] == [
        ("mine", f"{path}:1"),
        ("7", f"{path}:3"),
        ("m-5", f"{path}:5"),
    ]
    assert read[0].messages == (Message("user", "one two"),)
    assert read[2].messages == (Message("assistant", ""),)
    assert not any(c.has_language for c in read)


def test_a_line_separator_inside_text_does_not_end_the_row(tmp_path):
    said = "a\u2028b\u0085c\rd"
    row = {"messages": [{"role": "user", "content": said}]}
    path = write_lines(tmp_path / "m.jsonl", json.dumps(row, ensure_ascii=False))
    (conversation,) = read_conversations(path)
    assert conversation.messages[0].content == said


def test_the_format_is_told_by_content_not_by_name(tmp_path):
    columns = {"conversation_id": ["a"], "conversation": [HELLO]}
    assert sniff(write_parquet(tmp_path / "log.bin", columns)) == "wildchat"
    triple = {"prompt": [], "completion": "y", "user_response": "o"}
    assert sniff(write_messages(tmp_path / "log.txt", triple)) == "triples"


# Paths


def test_folders_and_globs_are_sorted_and_each_file_is_read_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".cache/d.jsonl", ".e.jsonl"):
        write_messages(tmp_path / name, {"id": name, "messages": HELLO})
    (tmp_path / "README.md").write_text("not data")
    everything = ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert ids(tmp_path) == everything
    assert ids(str(tmp_path / "*.jsonl")) == everything[:2]
    assert ids(str(tmp_path / "**/*.jsonl")) == everything
    assert ids(str(tmp_path / "s*")) == everything[2:]
    again = tmp_path / "sub" / ".." / "b.jsonl"
    assert ids([tmp_path / "b.jsonl", again, tmp_path]) == ["b.jsonl", "a.jsonl", "sub/c.jsonl"]


def test_a_file_may_have_a_name_that_looks_like_a_glob(tmp_path):
    path = write_messages(tmp_path / "log[1].jsonl", {"messages": HELLO})
    assert resolve_paths(path) == [path]


def test_paths_that_give_nothing(tmp_path):
    assert_says(error_of(tmp_path / "no.jsonl"), tmp_path / "no.jsonl", "no such file")
    assert_says(error_of(tmp_path / "*.jsonl"), tmp_path / "*.jsonl", "matches no file")
    assert_says(error_of(tmp_path), tmp_path, "holds no .parquet, .jsonl, .ndjson or .json file")
    assert_says(error_of([]), "the list of paths is empty")
    with pytest.raises(DataError, match="cannot be read"):
        sniff(tmp_path)


# Bad JSONL


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_empty_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    if name.endswith("parquet") and content:
        assert_says(error_of(path), path, "truncated or corrupt parquet")
    else:
        assert_says(error_of(path), path, "the file is empty")


def test_broken_json_far_into_the_file(tmp_path):
    good = json.dumps({"messages": HELLO})
    path = write_lines(tmp_path / "m.jsonl", *[good] * 1233, '{"messages": [}', good)
    assert_says(error_of(path), f"{path}, line 1234: broken JSON at column 15", "one whole JSON")


BAD_LINES = {
    "not an object": ("[1]", "found a list where an object is needed"),
    "bare text": ('"hello"', "found text where an object is needed"),
    "too deep": ("[" * 200_000, "unreadable JSON"),
    "number too long": ('{"messages": ' + "9" * 5000 + "}", "unreadable JSON"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_lines_that_are_no_rows(tmp_path, bad):
    line, problem = BAD_LINES[bad]
    path = write_lines(tmp_path / "m.jsonl", json.dumps({"messages": HELLO}), line)
    assert_says(error_of(path), f"{path}, line 2: ", problem)


def test_invalid_utf8_in_jsonl(tmp_path):
    path = write_messages(tmp_path / "m.jsonl", {"messages": HELLO})
    with path.open("ab") as file:
        file.write(b'{"messages": "\xff"}\n')
    assert_says(error_of(path), f"{path}, line 2: not valid UTF-8 at byte 15")


def test_a_first_row_of_no_known_format(tmp_path):
    path = write_messages(tmp_path / "m.jsonl", {"prompt": "x", "answer": "y"})
    known = "`messages`, or all of `prompt`, `completion`, `user_response`"
    assert_says(error_of(path), f"{path}, line 1", "`answer`, `prompt`", known)


def test_triples_are_not_conversations(tmp_path):
    path = write_messages(tmp_path / "t.jsonl", dict(prompt=[], completion="", user_response=""))
    assert_says(error_of(path), path, "read_interactions")


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
BAD_ROWS = {
    "no messages": ({"text": "x"}, "messages", "found nothing (null or missing)"),
    "messages not a list": ({"messages": "x"}, "messages", "found text where a list"),
    "message not an object": ({"messages": [1]}, "messages[0]", "found a number where an object"),
    "role missing": ({"messages": [{"content": "x"}]}, "messages[0].role", "found nothing"),
    "role a number": (
        {"messages": [*HELLO, {"role": 1, "content": "x"}]},
        "messages[2].role",
        "found a number where text",
    ),
    "content a number": (
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0].content",
        "found a number where text",
    ),
    "content null": (
        {"messages": [{"role": "user", "content": None}]},
        "messages[0].content",
        "found nothing (null or missing)",
    ),
    "image part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
        "messages[0].content[1]",
        "type 'image_url'; only text",
    ),
    "text part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "found nothing",
    ),
    "half a surrogate pair": (
        {"messages": [{"role": "user", "content": "ab\ud83d"}]},
        "messages[0].content",
        "surrogate pair at character 2",
    ),
    "id a list": ({"id": [], "messages": HELLO}, "id", "found a list"),
    "id a boolean": ({"id": True, "messages": HELLO}, "id", "found a boolean"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_rows_of_wrong_types(tmp_path, bad):
    row, field, problem = BAD_ROWS[bad]
    path = write_messages(tmp_path / "m.jsonl", {"messages": HELLO}, row)
    assert_says(error_of(path), f"{path}, line 2, field `{field}`: ", problem)


# Bad parquet


def test_parquet_without_the_needed_columns(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", {"text": ["x"], "language": ["en"]})
    assert_says(error_of(path), path, "its fields are `language`, `text`.", "need one of")


def test_parquet_without_ids_or_with_numbers_for_ids(tmp_path):
    assert ids(write_parquet(tmp_path / "q.parquet", {"conversation": [HELLO]})) == ["q-0"]
    numbered = {"conversation_id": [5], "conversation": [HELLO]}
    assert ids(write_parquet(tmp_path / "n.parquet", numbered)) == ["5"]


BAD_COLUMNS = {
    "not a list": ({"conversation": ["x"]}, "conversation", "type string, not a list"),
    "list of text": ({"conversation": [["x"]]}, "conversation", "not a list of {role, content}"),
    "no content": (
        {"conversation": [[{"from": "human", "role": "user"}]]},
        "conversation",
        "its messages have `from`, `role`, but no `content`",
    ),
    "content a number": (
        {"conversation": [[{"role": "user", "content": 5}]]},
        "conversation.content",
        "type int64, not text",
    ),
    "language a number": ({"language": [5]}, "language", "type int64, not text"),
}


@pytest.mark.parametrize("bad", BAD_COLUMNS)
def test_parquet_columns_of_wrong_types(tmp_path, bad):
    columns, field, problem = BAD_COLUMNS[bad]
    columns = {"conversation_id": ["a"], "conversation": [HELLO]} | columns
    path = write_parquet(tmp_path / "p.parquet", columns)
    assert_says(error_of(path), f"{path}, every row, field `{field}`: ", problem)


@pytest.mark.parametrize("cut", [5, 200, -1])
def test_truncated_parquet(tmp_path, cut):
    columns = {"conversation_id": ["a"] * 50, "conversation": [HELLO] * 50}
    path = write_parquet(tmp_path / "p.parquet", columns)
    path.write_bytes(path.read_bytes()[:cut])
    assert_says(error_of(path), path, "truncated or corrupt parquet", "again")


def test_corrupt_page_behind_a_good_footer(tmp_path):
    rows = 2000
    columns = {"conversation_id": [f"c{i}" for i in range(rows)], "conversation": [HELLO] * rows}
    options = dict(row_group_size=1000, compression="none", use_dictionary=False)
    path = write_parquet(tmp_path / "p.parquet", columns, write_page_checksum=True, **options)
    data = bytearray(path.read_bytes())
    page = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data[page.data_page_offset + page.total_compressed_size - 1] ^= 1  # "c1999" reads as "c1998"
    path.write_bytes(data)
    message = error_of(path)
    assert_says(message, path, "at or after row ", "truncated or corrupt parquet")
    assert int(re.search(r"after row (\d+)", message)[1]) <= 1000


def test_a_git_lfs_pointer_is_explained(tmp_path):
    path = tmp_path / "p.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert_says(error_of(path), path, "Git LFS pointer")


def test_invalid_utf8_in_parquet(tmp_path):
    bad = pa.array([b"ok", b"\xff", b"ok"], pa.binary()).view(pa.string())
    columns = {"conversation_id": bad, "conversation": [HELLO] * 3}
    path = write_parquet(tmp_path / "p.parquet", columns)
    where = f"{path}, row 1 (counted from 0), field `conversation_id`: "
    assert_says(error_of(path), where, "not valid UTF-8")
