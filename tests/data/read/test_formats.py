"""Every format in every container: recognised, read, and carried through a round trip."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import logs
from helpers.logs import Row, all_turns, exchange, interaction, rows_of, write_lines
from sdpo.conversations import Conversation, Message
from sdpo.data.prepare.prepare import prepare
from sdpo.data.read.formats import read_conversations, sniff
from sdpo.errors import DataError
from sdpo.interactions import read_interactions, write_interactions

ACCENTED = [("user", " wîe? \U0001f600\n"), ("assistant", "\u3000só\t"), ("user", "ok\u2028")]


def log_of(shape: str) -> list[Row]:
    """Three interactions: c0_1, c1_1 and c1_3 by an id, and one with text to strip, in French."""
    if shape == "triples":
        return expected_of(shape)
    talks = {
        "c0": exchange("c0"),
        "c1": exchange("c1", answers=2),
        "one-sided": [("user", "hello"), ("user", "anyone?")],
        "unanswered": [("user", "hello"), ("assistant", "hi")],
    }
    rows = [logs.row(shape, id, turns) for id, turns in talks.items()]
    return [*rows, logs.row(shape, "c2", ACCENTED, "French")]


def expected_of(shape: str) -> list[Row]:
    asked = [("user", "c1: question 0"), ("assistant", "c1: answer 0")]
    again = [("user", "c1: question 1"), ("assistant", "c1: answer 1"), ("user", "c1: thanks")]
    return [
        interaction("c0_1", exchange("c0")),
        interaction("c1_1", [*asked, again[0]]),
        interaction("c1_3", [*asked, *again]),
        interaction("c2_1", [(role, text.strip()) for role, text in ACCENTED]),
    ]


def assert_rows(shape: str, rows: list[Row]) -> None:
    """WildFeedback's rows have no ids, so theirs need only differ."""
    expected = expected_of(shape)
    if shape == "wildfeedback":
        assert len({row["id"] for row in rows}) == len(rows)
        rows = [row | {"id": None} for row in rows]
        expected = [row | {"id": None} for row in expected]
    assert rows == expected


# Recognised and read


@pytest.mark.parametrize("container", logs.CONTAINERS)
@pytest.mark.parametrize("shape", logs.ROWS)
def test_is_read_the_same_recognised_or_forced(shape, container, tmp_path):
    path = logs.write(tmp_path / f"log.{container}", shape, log_of(shape))
    out = tmp_path / "out.jsonl"
    for format in ("auto", logs.FORMAT[shape]):
        report = prepare(all_turns(path, out=out, format=format))
        (source,) = report.inputs
        assert (source["format"], source["container"]) == (logs.FORMAT[shape], container)
        assert (source["path"], source["bytes"]) == (str(path), path.stat().st_size)
        assert source["rows"] == report.counts["rows"] == len(log_of(shape))
        assert report.counts["interactions"] == 4
        assert_rows(shape, rows_of(out))


# in another shape, and of no field in common
CLASHES = {
    "wildchat": ("messages", "triples"),
    "lmsys": ("sharegpt",),
    "wildfeedback": ("messages",),
    "sharegpt": ("messages", "triples"),
    "messages": ("wildchat", "lmsys", "wildfeedback", "triples"),
    "triples": ("messages", "wildchat"),
}


@pytest.mark.parametrize("container", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize("shape, forced", [(a, b) for a in CLASHES for b in CLASHES[a]])
def test_a_wrong_format_is_an_error(shape, forced, container, tmp_path):
    path = logs.write(tmp_path / f"log.{container}", shape, log_of(shape))
    with pytest.raises(DataError) as caught:
        prepare(all_turns(path, out=tmp_path / "out.jsonl", format=forced))
    assert str(path) in str(caught.value) and forced in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# Round trips


@pytest.mark.parametrize("shape", logs.ROWS)
def test_what_is_prepared_can_be_prepared_again(shape, tmp_path):
    path = logs.write(tmp_path / "log.jsonl", shape, log_of(shape))
    lines, table, again = (tmp_path / name for name in ("a.jsonl", "b.parquet", "again.jsonl"))
    prepare(all_turns(path, out=lines))
    prepare(all_turns(path, out=table))
    assert read_interactions(table) == read_interactions(lines)
    for written in (lines, table):
        report = prepare(all_turns(written, out=again))
        assert report.inputs[0]["format"] == "triples"
        assert report.counts["ready_interactions"] == 4
        assert again.read_bytes() == lines.read_bytes()
    assert write_interactions(again, read_interactions(lines)) == 4
    assert again.read_bytes() == lines.read_bytes()


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_what_training_needs_comes_through(name, tmp_path):
    """Weights, sampled tokens and their log-probabilities of ready interactions."""
    sampled = {"completion_token_ids": [5, 2], "completion_logprobs": [-0.25, -1e-3]}
    rows = [expected_of("triples")[0] | {"weight": 0.5}, expected_of("triples")[1] | sampled]
    path = logs.write(tmp_path / "log.jsonl", "triples", rows)
    prepare(all_turns(path, out=tmp_path / name))
    assert read_interactions(tmp_path / name) == read_interactions(path)


# Single conversations

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def write_parquet(path: Path, columns: dict) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def ids(path: Path) -> list[str]:
    return [conversation.id for conversation in read_conversations(path)]


def test_wildchat_rows_come_as_logged(tmp_path):
    inner = {"role": "not this one", "content": "nor this"}
    said = [
        {"content": " Hello\n", "role": "user", "language": "English", "header": inner},
        {"content": None, "role": "assistant", "language": None, "header": None},
    ]
    columns = {"conversation_id": ["a", None], "model": ["m", "m"], "conversation": [said, None]}
    columns["language"] = ["English", None]
    path = write_parquet(tmp_path / "chat.parquet", columns)
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
            id="chat-1", messages=(), source=f"{path}:1", has_language=True, named=False, model="m"
        ),
    ]


def test_ids_hashes_and_places_name_conversations(tmp_path):
    both = {"conversation_id": ["a", None], "conversation_hash": ["x", "y"]}
    both["conversation"] = [HELLO, HELLO]
    assert ids(write_parquet(tmp_path / "both.parquet", both)) == ["a", "y"]
    assert ids(write_parquet(tmp_path / "q.parquet", {"conversation": [HELLO]})) == ["q-0"]
    numbered = {"conversation_id": [5], "conversation": [HELLO]}
    assert ids(write_parquet(tmp_path / "n.parquet", numbered)) == ["5"]
    only_hash = {"conversation_hash": ["x"], "conversation": [HELLO]}
    path = write_parquet(tmp_path / "hash.parquet", only_hash)
    (conversation,) = read_conversations(path)
    assert (conversation.id, conversation.has_language) == ("x", False)


def test_openai_messages(tmp_path):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    rows = [
        {"id": "mine", "messages": [{"role": "user", "content": parts}]},
        {"id": 7, "messages": HELLO},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "t"}]}]},
    ]
    first = b"\xef\xbb\xbf" + json.dumps(rows[0]).encode()
    path = write_lines(tmp_path / "m.jsonl", first, b"", rows[1], b"  ", rows[2])
    assert sniff(path) == "messages"
    read = list(read_conversations(path))
    assert [c.id for c in read] == ["mine", "7", "m-5"]
    assert [c.source for c in read] == [f"{path}:{line}" for line in (1, 3, 5)]
    assert read[0].messages == (Message("user", "one two"),)
    assert read[2].messages == (Message("assistant", ""),)
    assert not any(c.has_language for c in read)


def test_what_a_message_holds_beside_text(tmp_path):
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {}}]
    thought = {"role": "assistant", "content": "so", "reasoning_content": "hm"}
    row = {"messages": [{"role": "user", "content": parts}, thought, 7]}
    (read,) = read_conversations(write_lines(tmp_path / "m.jsonl", row))
    assert read.messages == (Message("user", "see"), Message("assistant", "so"), Message("", ""))
    assert read.lost == ((0, "part image_url"), (2, "message that is a number"))
    assert read.reasoning == 1


def test_bad_messages(tmp_path):
    """test_malformed has every field with values of every type."""
    said = [*HELLO, {"role": "user", "content": "ab\ud83d"}]
    field, problem = "content", "half of a surrogate pair at character 2"
    row = json.dumps({"messages": said}).encode()
    path = write_lines(tmp_path / "m.jsonl", {"messages": HELLO}, row)
    conversations = read_conversations(path)
    assert next(conversations).id == "m-1"
    with pytest.raises(DataError, match=problem) as caught:
        next(conversations)
    assert str(caught.value).startswith(f"{path}, line 2, field `messages[2].{field}`: ")


def test_triples_are_not_conversations(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", dict(prompt=[], completion="", user_response=""))
    with pytest.raises(DataError, match=r"t\.jsonl: holds ready.*read_interactions"):
        next(read_conversations(path))
