"""What a killed command leaves, and how the next one goes on; with a real kill."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import runs, tiny
from sdpo.analysis.journal import Journal
from sdpo.cli import main
from sdpo.errors import SdpoError

HEADER = {"interactions": "a" * 64, "seed": 0, "date": "2026-01-01"}
ROWS = [["c0", 1.5], ["ü", 1e-200]]


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "folder" / "out.jsonl")


def _full(_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def written(out: str, rows=ROWS, header=HEADER, **options) -> list:
    """Open, add rows, close; all rows that are then there."""
    with Journal(out) as journal:
        journal.open(header, **options)
        journal.append(rows)
        return list(journal.rows())


def test_rows_go_on_where_they_end(out):
    assert written(out) == ROWS
    assert written(out, [["c2", 0.1]]) == [*ROWS, ["c2", 0.1]]


def test_half_a_line_is_cut(out):
    written(out)
    path = Journal(out).path
    assert path is not None
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        left = max(0, whole[:cut].count(b"\n") - 1)
        assert written(out, [["new", 1]]) == [*ROWS[:left], ["new", 1]]


def test_another_header_is_refused_by_name(out):
    written(out)
    path = Journal(out).path
    assert path is not None
    before = path.read_bytes()
    with pytest.raises(SdpoError) as refused:
        written(out, header={**HEADER, "seed": 7, "interactions": "b" * 64, "dtype": "bfloat16"})
    told = str(refused.value)  # and the file is free again, while the error lives
    assert written(out, []) == ROWS
    assert f"interactions ({'a' * 39}… then, {'b' * 39}… now), seed (0 then, 7 now)" in told
    assert "dtype (null then, bfloat16 now)" in told and "date" not in told
    assert "delete the file to begin again, or use another output" in told
    assert path.read_bytes() == before


def test_a_run_goes_on_with_the_day_on_which_it_began(out):
    written(out)
    tomorrow = {**HEADER, "date": "2026-01-02"}
    with pytest.raises(SdpoError, match="in date .2026-01-01 then, 2026-01-02 now."):
        written(out, header=tomorrow)
    with Journal(out) as journal:
        assert journal.open(tomorrow, keeps=("date",))["date"] == "2026-01-01"


def test_a_header_without_rows_binds_nobody(out):
    assert written(out, []) == []
    assert not os.path.exists(f"{out}.partial"), "it ended before it began"
    with Journal(out) as journal:
        journal.open(HEADER)
        os.link(f"{out}.partial", f"{out}.kept")
    os.rename(f"{out}.kept", f"{out}.partial")  # as a kill leaves it
    assert written(out, header={**HEADER, "seed": 7}) == ROWS


@pytest.mark.parametrize("content", ["[1]\n[2]\n", "no JSON\n", '{"id": "c0"}\n{"id": "c1"}\n'])
def test_files_of_others_are_not_touched(out, tmp_path, content):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "out.jsonl.partial"
    path.write_text(content)
    with pytest.raises(SdpoError, match="holds no results of a killed run"):
        written(out)
    assert path.read_text() == content


def test_two_processes_do_not_write_the_same(out):
    with Journal(out) as journal:
        journal.open(HEADER)
        journal.append(ROWS)
        with pytest.raises(SdpoError, match="another process is writing it"):
            written(out)
        assert list(journal.rows()) == ROWS
    assert written(out, []) == ROWS


def test_a_full_disk_is_told(out, monkeypatch):
    with Journal(out) as journal:
        journal.open(HEADER)
        monkeypatch.setattr(os, "fsync", _full)
        with pytest.raises(SdpoError, match="No space left on device.*goes on where it was"):
            journal.append(ROWS)


def test_without_an_output_nothing_is_left():
    with Journal(None) as journal:
        journal.open(HEADER)
        journal.append(ROWS)
        assert list(journal.rows()) == ROWS and journal.count == 2


@pytest.mark.parametrize("command", ["signal", "data score", "check-hindsight"])
def test_an_interrupted_command_ends_as_if_it_had_not_been(
    command, models, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sdpo.analysis.advantages.CHUNK", 7)
    data = tiny.make_interactions(tmp_path / "i.jsonl", 20)
    option = "--json" if command == "check-hindsight" else "--out"
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    words = [*command.split(), "--model", models("qwen3"), "--interactions", data, option]

    def run(file) -> str:
        capsys.readouterr()
        try:
            main([*words, str(file)])
        except SystemExit as verdict:
            assert verdict.code == 1 and command == "check-hindsight"
        return capsys.readouterr().err

    assert "already" not in run(undisturbed)
    append = Journal.append

    def interrupted(self: Journal, rows) -> None:
        if self.count == 14:
            raise KeyboardInterrupt
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert not out.exists()
    told = run(out)
    assert f"sdpo: {out}.partial: 14 of 20 interactions have been read already" in told
    assert out.read_bytes() == undisturbed.read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_when_all_is_read_only_the_output_is_made(models, tmp_path, monkeypatch, capsys):
    data, out = tiny.make_interactions(tmp_path / "i.jsonl", 9), tmp_path / "out"
    words = ["signal", "--model", models("qwen3"), "--interactions", data, "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("sdpo.analysis.signal.written_whole", _full)
        with pytest.raises(OSError, match="No space left"):
            main(words)
    assert not out.exists()
    monkeypatch.setattr("sdpo.analysis.advantages.encode", None)  # nothing is
    main(words)
    assert "9 of 9 interactions have been read already" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 9 and not list(tmp_path.glob("*.partial"))


def test_a_killed_command_ends_as_if_it_had_not_been(models, tmp_path, capsys):
    """SIGKILL between two rows of the journal, then the same command again."""
    data = tiny.make_interactions(tmp_path / "i.jsonl", 200)
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    words = ["data", "score", "--model", models("qwen3"), "--interactions", data, "--out"]
    main([*words, str(undisturbed)])
    process = subprocess.Popen([sys.executable, "-m", "sdpo", *words, str(out)], env=runs.ENV)
    partial = tmp_path / "out.partial"
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 64):
        assert process.poll() is None, "it was faster"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = partial.read_bytes().count(b"\n") - 1
    assert 64 <= left < 200 and not out.exists()
    told = runs.refused(capsys, *words, str(out), "--seed", "1")
    assert f"{partial} holds results of a run that was stopped" in told
    assert "seed (0 then, 1 now)" in told
    main([*words, str(out)])
    assert f"{left} of 200 interactions have been read already" in capsys.readouterr().err
    assert out.read_bytes() == undisturbed.read_bytes()
    assert not partial.exists()


def test_the_header_tells_everything_that_decides(models, tmp_path, monkeypatch):
    """Layout and batch size change no more than the last digits, and are not in it."""
    data = tiny.make_interactions(tmp_path / "i.jsonl", 20)
    seen = {}
    opened = Journal.open

    def noted(self: Journal, header, **options):
        seen.update(header)
        return opened(self, header, **options)

    monkeypatch.setattr(Journal, "open", noted)
    words = ["--model", models("qwen3"), "--interactions", data, "--out", str(tmp_path / "out")]
    main(["signal", *words, "--template", "{followup}", "--date", "2026-02-03"])
    assert seen["template"] == "{followup}" and seen["date"] == "2026-02-03"
    assert seen["dtype"] == "float32 and float32" and seen["command"] == "signal"
    assert len(seen["interactions"]) == len(seen["model.safetensors of model"]) == 64
    assert {"tokenizer.json of model", "config.json of model", "max_prompt_tokens"} <= seen.keys()
    assert json.dumps(seen) and not {"engine", "parallel", "batch_tokens"} & seen.keys()
