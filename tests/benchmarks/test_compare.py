"""What counts as moved between two runs."""

import pytest

from benchmarks.compare import compare, main
from benchmarks.report import Output, read


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


def test_the_command_fails_for_our_regressions_only(tmp_path, capsys):
    names = "old", "ours", "theirs", "broken", "absent"
    old, ours, theirs, broken, absent = (tmp_path / f"{name}.jsonl" for name in names)
    Output(out=old).keep([row(), row("torch")])
    Output(out=ours).keep([row(median=2.0), row("torch")])
    Output(out=theirs).keep([row(), row("torch", 2.0)])
    broken.write_text('{"a": 1}\nnot json\n')
    for new, status, told in (
        (old, False, "2 results in both; 0 moved"),
        (ours, True, "+100.0%"),
        (theirs, False, "+100.0%"),
        (broken, "error: {}, line 2: not a JSON object", ""),
        (absent, "error: {}: no results there", ""),
    ):
        with pytest.raises(SystemExit) as stop:
            main(old, new)
        assert stop.value.code == (status.format(new) if isinstance(status, str) else status)
        assert told in capsys.readouterr().out


def test_reading_a_folder(tmp_path):
    with pytest.raises(ValueError, match="no results there"):
        read(tmp_path)
    for name in ("a", "b"):
        Output(out=tmp_path / f"{name}.jsonl").keep([row(name)])
    assert [r["contender"] for r in read(tmp_path)] == ["a", "b"]
