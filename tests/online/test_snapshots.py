"""The list of snapshots, and what is put aside where a run goes back."""

import json

import pytest
from filelock import FileLock

from sdpo.errors import SdpoError
from sdpo.online.snapshots import (
    Snapshot,
    attempts,
    command,
    find_snapshot,
    go_back,
    read_snapshots,
    write_snapshots,
)

FILES = (
    "rollouts/update-{n:06d}.parquet",
    "interactions/update-{n:06d}.parquet",
    "evaluations/step-{n}.jsonl",
    "checkpoints/step-{n}/manifest.json",
)


def snapshot(name, step, phase=1):
    return Snapshot(name=name, step=step, phase=phase, persona="concise")


SNAPSHOTS = [snapshot("phase-1", 0), snapshot("phase-2", 9, 2), snapshot("good", 12, 2)]


@pytest.fixture
def run(tmp_path):
    for n in (9, 10, 12):
        for name in FILES:
            path = tmp_path / name.format(n=n)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    rows = "".join(f'{{"step": {n}}}\n' for n in (9, 10, 12))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"st')
    (tmp_path / "evaluations.jsonl").write_text(rows)
    (tmp_path / "export").mkdir()
    write_snapshots(tmp_path, SNAPSHOTS[::-1])
    return tmp_path


def test_snapshots_are_read_in_the_order_of_their_steps_and_found_by_name(run, tmp_path):
    assert read_snapshots(run) == SNAPSHOTS
    assert find_snapshot(run, "phase-2") == SNAPSHOTS[1]
    assert read_snapshots(tmp_path / "none") == []
    with pytest.raises(SdpoError, match="no snapshot 'x'; there are: phase-1, phase-2, good"):
        find_snapshot(run, "x")
    with pytest.raises(SdpoError, match="there are: none"):
        find_snapshot(tmp_path / "none", "x")


def test_a_run_that_is_under_way_is_not_put_back(run, capsys):
    with FileLock(run / "lock"):
        with pytest.raises(SdpoError, match="a job is training there"):
            command("restore", str(run), "phase-2")
        assert attempts(run) == 0
    command("restore", str(run), "phase-2")
    assert attempts(run) == 1 and not (run / "lock").exists()


def test_going_back_puts_aside_what_came_later_and_nothing_else(run):
    undone = go_back(run, SNAPSHOTS[1])
    assert undone == run / "undone-1" and attempts(run) == 1
    for name in FILES:
        assert (run / name.format(n=9)).exists()
        for n in (10, 12):
            assert not (run / name.format(n=n)).exists()
            assert (undone / name.format(n=n)).exists()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert [json.loads(row)["step"] for row in (run / name).open()] == [9]
        assert [json.loads(row)["step"] for row in (undone / name).open()] == [10, 12]
    assert (undone / "export").is_dir() and not (run / "export").exists()
    assert read_snapshots(run) == SNAPSHOTS[:2]
    assert go_back(run, SNAPSHOTS[0]).name == "undone-2"
    assert attempts(run) == 2 and not list(run.glob("rollouts/*"))
