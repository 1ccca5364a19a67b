"""Every format in every container: recognised, read, and carried through a round trip."""

import pytest

from helpers import logs
from helpers.logs import Row, all_turns, exchange, interaction, rows_of
from sdpo.data.prepare.prepare import prepare
from sdpo.errors import DataError
from sdpo.interactions import read_interactions, write_interactions

EVERY = pytest.mark.parametrize(
    "shape, container", [(shape, container) for shape in logs.ROWS for container in logs.CONTAINERS]
)
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
