"""Malformed files: a clear error or a counted skip; no traceback, no hang, no good row lost."""

import json
import os
import re
import resource
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import logs, malformed
from helpers.logs import all_turns, rows_of
from helpers.malformed import ERROR, FINE, NOTHING, Case
from sdpo.data.manifest import manifest_path, report_path
from sdpo.data.prepare.prepare import prepare
from sdpo.errors import DataError

MEMORY = 4 * 2**30
CASES = malformed.cases()
EVERY = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """No file takes longer than a minute, nor more than 4 GiB: the machine outlives the test."""

    def stop(*_: Any) -> None:
        raise TimeoutError("a hang")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, memory[1]))
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, memory)


def log_with(case: Case, folder: Path) -> list[Path]:
    """The file between two good ones."""
    before = logs.write(folder / "a.jsonl", "messages", [malformed.row("before")])
    after = logs.write(folder / "z.jsonl", "messages", [malformed.row("after")])
    path = folder / case.file
    path.write_bytes(case.make())
    return [before, path, after]


def names_in(out: Path) -> list[str]:
    """Which conversations a file's interactions are from, each of which has one."""
    found = []
    for row in rows_of(out):
        spoken = re.search(r"(\w+): (question|answer|thanks)", json.dumps(row))
        assert spoken, row
        found.append(spoken[1])
    return found


@contextmanager
def data_error() -> Iterator[list[str]]:
    """The message of a DataError raised inside, as the only member of a list; else it is empty."""
    message: list[str] = []
    try:
        yield message
    except DataError as error:
        shown = "".join(traceback.format_exception(error))
        assert shown.count("Traceback") == 1, "the reader sees another library's traceback too"
        message.append(str(error))


def outcome_of(case: Case, names: list[str], failed: bool) -> str:
    """What became of the doubtful ones; asserts that the good ones came out, in order and once."""
    assert names.count("before") == names.count("after") == 1
    inner = [name for name in names if name not in ("before", "after")]
    assert len(set(inner)) == len(inner)
    assert [name for name in inner if name in case.good] == list(case.good)
    assert set(inner) <= {*case.good, *case.doubtful}
    if failed:
        return ERROR
    came = set(inner) & set(case.doubtful)
    assert came in (set(), set(case.doubtful))
    return FINE if came == set(case.doubtful) else NOTHING


@EVERY
def test_stop_says_where_and_leaves_nothing(case, tmp_path):
    log, out = log_with(case, tmp_path / "logs"), tmp_path / "out" / "x.jsonl"
    out.parent.mkdir()
    with data_error() as message:
        prepare(all_turns(*log, out=out))
    if message:
        assert case.outcome == ERROR, message
        for part in (str(log[1]), *case.says):
            assert part in message[0]
        assert len(message[0]) < 2_000, "nobody reads this"
        assert re.search(r"\. [A-Z].*\.$", message[0]), f"it does not say what to do: {message}"
        assert list(out.parent.iterdir()) == []
    else:
        assert outcome_of(case, names_in(out), failed=False) == case.outcome
        assert sorted(out.parent.iterdir()) == sorted([out, manifest_path(out), report_path(out)])


@EVERY
def test_skip_keeps_every_good_row_and_counts_the_others(case, tmp_path):
    log, out = log_with(case, tmp_path / "logs"), tmp_path / "out" / "x.jsonl"
    report = prepare(all_turns(*log, out=out, bad_rows="skip"))
    rows = report.drops.get("unreadable row", 0)
    files = report.drops.get("unreadable file", 0)
    outcome = outcome_of(case, names_in(out), failed=bool(rows or files))
    assert outcome == case.outcome
    assert report.counts["rows"] == report.counts["conversations_kept"] + sum(
        report.drops.values(), -files
    )
    assert report.counts["interactions"] == len(names_in(out))
    if outcome == ERROR:
        assert any(case.file in message for message in report.bad_rows)
        if case.bad_rows is not None:
            assert (rows, files) == (case.bad_rows, 0)
    assert sorted(out.parent.iterdir()) == sorted([out, manifest_path(out), report_path(out)])


def test_many_bad_rows_are_counted_and_twenty_are_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(malformed.line("g1") + b"{\n" * 500 + malformed.line("g2"))
    report = prepare(all_turns(path, out=tmp_path / "x.jsonl", bad_rows="skip"))
    assert (report.drops["unreadable row"], len(report.bad_rows)) == (500, 20)
    assert "line 2" in report.bad_rows[0] and "line 21" in report.bad_rows[-1]
    assert report.counts["rows"] == 502


@pytest.mark.parametrize("name", ["m.json", "m.jsonl.gz"])
def test_a_file_that_breaks_off_says_how_much_skipping_keeps(name, tmp_path):
    rows = [logs.row("messages", f"g{i}", logs.exchange(f"g{i}")) for i in range(2000)]
    data = logs.packed("messages", rows, name.partition(".")[2])
    path, out = tmp_path / name, tmp_path / "x.jsonl"
    path.write_bytes(data[: len(data) * 4 // 5])
    with data_error() as message:
        prepare(all_turns(path, out=out))
    said = re.search(r"\. --bad-rows skip keeps the ([\d,]+) rows before the break\.$", message[0])
    assert said, message
    kept = prepare(all_turns(path, out=out, bad_rows="skip")).counts["conversations_kept"]
    assert f"{kept:,}" == said[1] and kept > 500


def test_a_bad_row_says_how_to_go_on_without_it(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(malformed.line("g1") + b"{\n" + malformed.line("g2"))
    with data_error() as message:
        prepare(all_turns(path, out=tmp_path / "x.jsonl"))
    assert message[0].endswith("To leave such rows out and count them, add --bad-rows skip.")


# What is not a file of data at all


def test_a_folder_with_a_files_name(tmp_path):
    (tmp_path / "m.jsonl").mkdir()
    with pytest.raises(DataError, match=r"m\.jsonl"):
        prepare(all_turns(tmp_path / "m.jsonl", out=tmp_path / "x.jsonl"))
    logs.write(tmp_path / "m.jsonl" / "n.parquet" / "a.jsonl", "messages", [malformed.row("g1")])
    prepare(all_turns(tmp_path / "m.jsonl", out=tmp_path / "x.jsonl"))
    assert names_in(tmp_path / "x.jsonl") == ["g1"]


@pytest.mark.parametrize("make", ["dangling", "loop", "pipe"])
def test_a_path_that_cannot_be_read(make, tmp_path):
    path = tmp_path / "m.jsonl"
    match make:
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
        case "loop":
            path.symlink_to(path)
        case "pipe":  # opening it would wait for a writer
            os.mkfifo(path)
            signal.alarm(5)
    with pytest.raises(DataError, match=r"m\.jsonl"):
        prepare(all_turns(path, out=tmp_path / "x.jsonl"))
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
def test_a_file_without_permission(bad_rows, tmp_path):
    folder = tmp_path / "logs"
    logs.write(folder / "a.jsonl", "messages", [malformed.row("g1")])
    logs.write(folder / "m.jsonl", "messages", [malformed.row("m")]).chmod(0)
    settings = all_turns(folder, out=tmp_path / "x.jsonl", bad_rows=bad_rows)
    if bad_rows == "stop":
        with pytest.raises(DataError, match=r"m\.jsonl"):
            prepare(settings)
    else:
        assert prepare(settings).drops["unreadable file"] == 1
        assert names_in(tmp_path / "x.jsonl") == ["g1"]
