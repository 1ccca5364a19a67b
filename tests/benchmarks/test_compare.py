"""What counts as moved between two runs."""

import json
import subprocess
import sys

import pytest

from benchmarks.compare import compare
from benchmarks.report import read
from helpers.runs import ENV


def row(contender="sdpo", median=1.0, noise=0.02, **other):
    seconds = dict(median=median, low=median * (1 - noise), high=median * (1 + noise), rounds=9)
    common = dict(benchmark="divergence", kind="jsd", head="qwen3-8b", tokens=1024, dtype="bf16")
    common |= dict(verdict="right", extra_bytes=100 * 2**20, machine={"device": "X"})
    return common | dict(contender=contender, seconds={"both": seconds}) | other


def test_only_what_leaves_the_noise_of_both_runs_moves():
    assert compare([row()], [row(median=1.03)]) == []
    (slower,) = compare([row()], [row(median=1.1)])
    assert slower.what == "both" and slower.worse and slower.change == pytest.approx(1.1)
    assert compare([row()], [row(median=1.1, noise=0.2)]) == []
    (faster,) = compare([row()], [row(median=0.9)])
    assert not faster.worse


def test_times_are_multiples_of_the_floor_where_there_is_one():
    old = [row(), row("floor", 0.5)]
    slower_machine = [row(median=2.0), row("floor", 1.0, machine={"device": "Y"})]
    assert compare(old, slower_machine) == []
    slower_kernel = [row(median=3.0), row("floor", 1.0)]
    moved = {m.key.rpartition(", ")[2]: m for m in compare(old, slower_kernel)}
    assert moved["sdpo"].change == pytest.approx(1.5) and "x floor" in moved["sdpo"].old
    assert compare([row()], [row(median=2.0, machine={"device": "Y"})]) == []


def test_verdicts_and_memory_move_too():
    wrong = row(verdict="wrong")
    del wrong["seconds"]
    (verdict,) = compare([row()], [wrong])
    assert (verdict.old, verdict.new, verdict.worse) == ("right", "wrong", True)
    assert not compare([wrong], [row()])[0].worse
    assert compare([row()], [row(extra_bytes=103 * 2**20)]) == []
    (memory,) = compare([row()], [row(extra_bytes=120 * 2**20)])
    assert memory.what == "memory" and memory.worse


def test_the_command_fails_for_our_regressions_only(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path / name)

    old = write("old.jsonl", [row(), row("torch")])
    ours = write("ours.jsonl", [row(median=2.0), row("torch")])
    theirs = write("theirs.jsonl", [row(), row("torch", 2.0)])
    broken = write("broken.jsonl", [])
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\nnot json\n')
    for new, code in ((old, 0), (ours, 1), (theirs, 0), (broken, 1), (f"{old}x", 1)):
        command = [sys.executable, "-m", "benchmarks.compare", old, new]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        if new == broken:
            assert "broken.jsonl, line 2: not a JSON object" in done.stderr
        if new == ours:
            assert "+100.0%" in done.stdout


def test_reading_a_folder(tmp_path):
    with pytest.raises(ValueError, match="no results there"):
        read(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row(name)) + "\n")
    assert [r["contender"] for r in read(tmp_path)] == ["a", "b"]
