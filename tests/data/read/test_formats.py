"""Every format in every container: recognised, read, and carried through a round trip."""

from pathlib import Path
from typing import Any

import pytest

from helpers import logs
from helpers.logs import Row, all_turns, exchange, interaction, rows_of
from sdpo.data.manifest import manifest_path, report_path
from sdpo.data.prepare.prepare import prepare
from sdpo.errors import DataError
from sdpo.interactions import iter_interactions, read_interactions, write_interactions

EVERY = pytest.mark.parametrize(
    "shape, container", [(shape, container) for shape in logs.ROWS for container in logs.CONTAINERS]
)
SHAPES = pytest.mark.parametrize("shape", logs.ROWS)
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


@EVERY
def test_is_recognised_and_read(shape, container, tmp_path):
    path = logs.write(tmp_path / f"log.{container}", shape, log_of(shape))
    out = tmp_path / "out.jsonl"
    report = prepare(all_turns(path, out=out))
    (source,) = report.inputs
    assert (source["format"], source["container"]) == (logs.FORMAT[shape], container)
    assert (source["path"], source["bytes"]) == (str(path), path.stat().st_size)
    assert source["rows"] == report.counts["rows"] == len(log_of(shape))
    assert report.counts["interactions"] == 4
    assert_rows(shape, rows_of(out))


@EVERY
def test_reads_the_same_when_the_format_is_forced(shape, container, tmp_path):
    path = logs.write(tmp_path / f"log.{container}", shape, log_of(shape))
    out = tmp_path / "out.jsonl"
    report = prepare(all_turns(path, out=out, format=logs.FORMAT[shape]))
    assert report.inputs[0]["format"] == logs.FORMAT[shape]
    assert_rows(shape, rows_of(out))


# in another shape, and of no field in common
CLASHES = [
    ("wildchat", "messages"),
    ("wildchat", "triples"),
    ("lmsys", "sharegpt"),
    ("wildfeedback", "messages"),
    ("sharegpt", "messages"),
    ("sharegpt", "triples"),
    ("messages", "wildchat"),
    ("messages", "lmsys"),
    ("messages", "wildfeedback"),
    ("messages", "triples"),
    ("triples", "messages"),
    ("triples", "wildchat"),
]


@pytest.mark.parametrize("container", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize("shape, forced", CLASHES)
def test_a_wrong_format_is_an_error(shape, forced, container, tmp_path):
    path = logs.write(tmp_path / f"log.{container}", shape, log_of(shape))
    with pytest.raises(DataError) as caught:
        prepare(all_turns(path, out=tmp_path / "out.jsonl", format=forced))
    assert str(path) in str(caught.value) and forced in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_unknown_format_is_an_error(tmp_path):
    path = logs.write(tmp_path / "log.jsonl", "messages", log_of("messages"))
    with pytest.raises(ValueError, match="jsonlines"):
        prepare(all_turns(path, out=tmp_path / "out.jsonl", format="jsonlines"))


# Folders and globs


@pytest.fixture
def mixed_folder(tmp_path) -> Path:
    """One file per container, of as many shapes, in nested folders; ids are the file's own."""
    shapes = ["wildchat", "messages", "sharegpt", "lmsys", "wildchat-1m"]
    for i, (container, shape) in enumerate(zip(logs.CONTAINERS, shapes, strict=True)):
        name = f"{'deep/er/' * (i % 2)}{i}.{container}"
        path = tmp_path / "logs" / name
        logs.write(path, shape, [logs.row(shape, f"r{i}", exchange(f"r{i}"))])
    (tmp_path / "logs" / "README.md").write_text("# not data")
    (tmp_path / "logs" / ".hidden.jsonl").write_text("not data")
    return tmp_path / "logs"


def test_a_folder_is_all_its_data(mixed_folder, tmp_path):
    """But `.json` beside parquet and lines, which may well be a config; alone, it is the data."""
    out = tmp_path / "out.jsonl"
    report = prepare(all_turns(mixed_folder, out=out))
    assert [row["id"] for row in rows_of(out)] == ["r0_1", "r2_1", "r1_1", "r3_1"]
    assert [source["container"] for source in report.inputs] == [
        *("parquet", "jsonl.gz", "jsonl", "jsonl.zst")
    ]
    (alone,) = mixed_folder.glob("*.json")
    (tmp_path / "alone").mkdir()
    alone.rename(tmp_path / "alone" / alone.name)
    prepare(all_turns(tmp_path / "alone", out=out))
    assert [row["id"] for row in rows_of(out)] == ["r4_1"]


@pytest.mark.parametrize(
    "pattern, found",
    [("*.json*", ["r2", "r4"]), ("**/*.jsonl*", ["r2", "r1", "r3"]), ("deep", ["r1", "r3"])],
)
def test_a_glob_is_what_it_matches(pattern, found, mixed_folder, tmp_path):
    out = tmp_path / "out.jsonl"
    prepare(all_turns(mixed_folder / pattern, out=out))
    assert sorted(row["id"] for row in rows_of(out)) == sorted(f"{name}_1" for name in found)


def test_a_file_named_twice_is_read_once(mixed_folder, tmp_path):
    out = tmp_path / "out.jsonl"
    report = prepare(all_turns(mixed_folder / "0.parquet", mixed_folder, out=out))
    assert (len(report.inputs), len(rows_of(out))) == (4, 4)


@pytest.mark.parametrize("named", ["nowhere.jsonl", "no*.jsonl", "empty"])
def test_inputs_that_name_nothing_are_an_error(named, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        prepare(all_turns(tmp_path / named, out=tmp_path / "out.jsonl"))
    assert str(tmp_path / named) in str(caught.value)


# Round trips


@SHAPES
def test_what_is_prepared_can_be_prepared_again(shape, tmp_path):
    path = logs.write(tmp_path / "log.jsonl", shape, log_of(shape))
    once, again, twice = (tmp_path / name for name in ("once.jsonl", "again.jsonl", "twice.jsonl"))
    prepare(all_turns(path, out=once))
    assert write_interactions(again, read_interactions(once)) == 4
    assert again.read_bytes() == once.read_bytes()
    report = prepare(all_turns(again, out=twice))
    assert rows_of(twice) == rows_of(once)
    assert report.counts["ready_interactions"] == 4


@SHAPES
def test_parquet_holds_what_jsonl_holds(shape, tmp_path):
    path = logs.write(tmp_path / "log.jsonl", shape, log_of(shape))
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    prepare(all_turns(path, out=lines))
    prepare(all_turns(path, out=table))
    assert read_interactions(table) == read_interactions(lines) == list(iter_interactions(table))
    back = tmp_path / "back.jsonl"
    report = prepare(all_turns(table, out=back))
    assert report.inputs[0]["format"] == "triples"
    assert back.read_bytes() == lines.read_bytes()


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_what_training_needs_comes_through(name, tmp_path):
    """Weights, sampled tokens and their log-probabilities of ready interactions."""
    sampled = {"completion_token_ids": [5, 2], "completion_logprobs": [-0.25, -1e-3]}
    rows = [expected_of("triples")[0] | {"weight": 0.5}, expected_of("triples")[1] | sampled]
    path = logs.write(tmp_path / "log.jsonl", "triples", rows)
    prepare(all_turns(path, out=tmp_path / name))
    assert read_interactions(tmp_path / name) == read_interactions(path)


def test_three_files_are_written(tmp_path):
    path = logs.write(tmp_path / "in" / "log.jsonl", "messages", log_of("messages"))
    out = tmp_path / "out" / "new" / "x.jsonl"
    prepare(all_turns(path, out=out))
    assert sorted(out.parent.iterdir()) == sorted([out, manifest_path(out), report_path(out)])


# The rules of all-turns


def messages_in(tmp_path: Path, messages: list[Any]) -> list[Row]:
    path = logs.write(tmp_path / "log.jsonl", "messages", [{"id": "c", "messages": messages}])
    report = prepare(all_turns(path, out=tmp_path / "out.jsonl"))
    assert not {"unreadable row", "unreadable file"} & {k for k, v in report.drops.items() if v}
    return rows_of(tmp_path / "out.jsonl")


def said(role: str, content: Any = "text", **more: Any) -> Row:
    return {"role": role, "content": content} | more


def test_system_and_tool_messages_are_left_out_by_rule(tmp_path):
    call = {"id": "t1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    rows = messages_in(
        tmp_path,
        [
            said("system", "Be brief."),
            said("developer", "Be kind."),
            said("user", "What time is it?"),
            said("assistant", None, tool_calls=[call]),
            said("tool", "12:00", tool_call_id="t1"),
            said("function", "12:00", name="now"),
            said("assistant", "It is noon.", refusal=None),
            said("system", "The user is in a hurry."),
            said("user", "Thanks"),
        ],
    )
    turns = [("user", "What time is it?"), ("assistant", "It is noon."), ("user", "Thanks")]
    assert rows == [interaction("c_1", turns)]


def test_parts_of_text_are_one_text(tmp_path):
    parts = [{"type": "text", "text": " It is"}, {"type": "text", "text": " noon.\n"}]
    asked = [{"type": "text", "text": "When?"}]
    rows = messages_in(
        tmp_path, [said("user", asked), said("assistant", parts), said("user", "Thanks")]
    )
    turns = [("user", "When?"), ("assistant", "It is noon."), ("user", "Thanks")]
    assert rows == [interaction("c_1", turns)]


def test_blank_messages_and_cased_roles(tmp_path):
    rows = messages_in(
        tmp_path,
        [
            said("user", "\u2003"),
            said(" User ", " q "),
            said("assistant", ""),
            said("ASSISTANT", "a\n"),
            said("user", "\t\x1f\n"),
            said("user", "f"),
        ],
    )
    assert rows == [interaction("c_1", [("user", "q"), ("assistant", "a"), ("user", "f")])]


def test_a_history_is_five_messages_that_take_turns(tmp_path):
    talk = [said("user" if i % 2 == 0 else "assistant", str(i)) for i in range(10)]
    rows = messages_in(tmp_path, [*talk, said("user", "end")])
    texts = [[turn["value"] for turn in row["prompt"]] for row in rows]
    assert texts == [
        ["0"],
        ["0", "1", "2"],
        ["0", "1", "2", "3", "4"],
        ["2", "3", "4", "5", "6"],
        ["4", "5", "6", "7", "8"],
    ]
    assert [row["id"] for row in rows] == ["c_1", "c_3", "c_5", "c_7", "c_9"]


def test_of_a_run_the_first_stays(tmp_path):
    turns = [("user", "q0"), ("user", "q1"), ("assistant", "a2"), ("user", "f")]
    rows = messages_in(tmp_path, [said(*turn) for turn in turns])
    assert rows == [interaction("c_2", [turns[0], *turns[2:]])]


def test_a_history_that_ends_with_the_assistant_gives_nothing(tmp_path):
    turns = [("user", "q"), ("assistant", "a1"), ("assistant", "a2"), ("user", "f")]
    assert messages_in(tmp_path, [said(*turn) for turn in turns]) == []


def test_no_conversation_is_too_long(tmp_path):
    turns = [("user", "q" * 70_000), ("assistant", "a" * 70_000), ("user", "f" * 70_000)]
    assert messages_in(tmp_path, [said(*turn) for turn in turns]) == [interaction("c_1", turns)]
