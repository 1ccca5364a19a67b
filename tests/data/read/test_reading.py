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


def test_the_format_is_told_by_content_not_by_name(tmp_path):
    columns = {"conversation_id": ["a"], "conversation": [HELLO]}
    assert sniff(write_parquet(tmp_path / "log.bin", columns)) == "wildchat"
    triple = {"prompt": [], "completion": "y", "user_response": "o"}
    assert sniff(write_messages(tmp_path / "log.txt", triple)) == "triples"


# Bad rows


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
