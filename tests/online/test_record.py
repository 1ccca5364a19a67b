"""What is written down of an update is read as it was, or not at all."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from sdpo.conversations import Message, ToolMessage
from sdpo.errors import DataError
from sdpo.interactions import read_interactions
from sdpo.online.record import Record, read_update, rollouts_file, write_update

CALLS = '[{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]'
RECORD = Record(
    id="000001.0000",
    update=1,
    phase=1,
    persona="concise",
    prompt_id="7",
    prompt=(Message("system", ""), Message("user", "Why?\n")),
    answer="Because.",
    followup=" Shorter. ",
    token_ids=(4, 5, 2),
    logprobs=(-1.25, -0.1, 0.0),
    finished=True,
    versions=(0, 0, 1),
    reply_source="rule",
    dropped=None,
    satisfied=False,
    score=0.25,
)
WITH_TOOLS = replace(
    RECORD,
    id="000001.0001",
    prompt=(
        Message("user", "Why?"),
        ToolMessage("assistant", "", tool_calls=CALLS),
        ToolMessage("tool", "3", tool_call_id="c", name="f"),
    ),
)
RECORDS = [
    RECORD,
    WITH_TOOLS,
    replace(RECORD, id="000001.0002", followup=None, dropped="silence", satisfied=None, score=None),
    replace(RECORD, id="000001.0003", followup="", dropped="silence"),
    replace(RECORD, id="000001.0004", answer="", followup="?", dropped="blank answer"),
    replace(RECORD, id="000001.0005", finished=False, dropped="injection: fake turn"),
]


def test_an_update_is_read_as_it_was_written(tmp_path):
    write_update(tmp_path, 1, RECORDS)
    assert read_update(tmp_path, 1) == RECORDS
    assert read_update(tmp_path, 2) is None
    assert not list(tmp_path.rglob("*.partial"))


def test_interactions_are_those_that_are_trained_on(tmp_path):
    write_update(tmp_path, 1, RECORDS)
    found = read_interactions(tmp_path / "interactions" / "update-000001.parquet")
    assert found == [RECORD.interaction(), WITH_TOOLS.interaction()]
    write_update(tmp_path, 2, RECORDS[2:])
    assert read_update(tmp_path, 2) == RECORDS[2:], "an update without any"
    assert pq.read_table(tmp_path / "interactions" / "update-000002.parquet").num_rows == 0


@pytest.mark.parametrize("left", ["rollouts", "interactions"])
def test_an_update_of_which_one_file_is_missing_is_not_there(left, tmp_path):
    write_update(tmp_path, 1, RECORDS)
    other = {"rollouts": "interactions", "interactions": "rollouts"}[left]
    (tmp_path / other / "update-000001.parquet").unlink()
    assert read_update(tmp_path, 1) is None


def test_an_update_that_is_written_again_is_not_whole_before_its_end(tmp_path, monkeypatch):
    """The old second file must not vouch for the new first one."""
    write_update(tmp_path, 1, RECORDS)
    written = []

    def replaced(partial, path):
        written.append(path.parent.name)
        if path.parent.name == "interactions":
            raise KeyboardInterrupt
        partial.rename(path)

    monkeypatch.setattr("sdpo.online.record.os.replace", replaced)
    with pytest.raises(KeyboardInterrupt):
        write_update(tmp_path, 1, RECORDS[:1])
    assert written == ["rollouts", "interactions"]
    assert read_update(tmp_path, 1) is None


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"", lambda b: b"x" * len(b)])
def test_a_spoiled_file_is_named(damage, tmp_path):
    write_update(tmp_path, 1, RECORDS)
    path = rollouts_file(tmp_path, 1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="not a file of rollouts") as error:
        read_update(tmp_path, 1)
    assert str(path) in str(error.value) and "Remove it to sample again" in str(error.value)
