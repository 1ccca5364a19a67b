"""Logs to interactions: `sdpo data prepare` next to a plain `datasets.map` script, same rules.

    python -m benchmarks.prepare [--conversations 1000000] [--workers 2] [--kill 5]
        [--log FOLDER] [--out benchmarks/results/cpu/prepare.jsonl]

The log is `benchmarks.logs`', made first if it is not there, or what lies in `--log`. Each side is
a process of its own that starts with nothing but the log, whose pages have been read before. What
they wrote is compared row by row before any number is printed: other interactions than the rival's
are an error. Memory is the peak of the proportional set size (PSS) of all processes of a side
together, looked at twice a second: pages that are shared count once.

`--kill N` starts ours again, kills it with SIGKILL at N moments drawn at random, lets it finish,
and compares the sha256 of its three files with the undisturbed run's.
"""

import hashlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

import orjson
import psutil
import pyarrow.parquet as pq
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.logs import LogConfig, write_log
from benchmarks.measure import ROOT, machine
from benchmarks.report import Output, grid
from sdpo.data.manifest import manifest_path, report_path

Level = Literal["rules", "with guardrails"]
FIELDS = ("id", "turn_id", "prompt", "completion", "user_response")
NO_GUARDRAILS = ("flagged=False", "redacted=False", "pii=off", "duplicates=off")
NO_GUARDRAILS += ("injections=False", "max-per-user=0")
SAMPLES_PER_SECOND = 2  # each walks all pages of all processes, which is not for nothing
LIBRARIES = ("pyarrow", "datasets", "numpy", "orjson")
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Settings(Output):
    """Log, sides and files of the measurement."""

    conversations: int = 1_000_000
    """Conversations of the generated log; an existing `log` is used as it is."""
    log: Path | None = None
    """Folder of parquet files shaped like WildChat-1M, instead of a generated log."""
    workers: int = 2
    levels: tuple[Level, ...] = get_args(Level)
    rounds: int = 1
    """Rounds in which the sides take turns; medians are printed."""
    alone: bool = False
    """Leave the rivals out, to see only what kills do."""
    kill: int = 0
    """Times to kill our run; it must end with the same bytes."""
    seed: int = 0
    """Seed of the log and of the moments to kill at."""
    scratch: Path = ROOT / "runs" / "prepare"
    """Folder for logs and outputs; 1,000,000 conversations take some 20 GB."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.rounds < 1 or self.kill < 0:
            raise ValueError("workers and rounds must be at least 1, and kill at least 0")
        if not self.levels:
            raise ValueError(f"levels is empty; name some of {', '.join(get_args(Level))}")


class Run(NamedTuple):
    """Time and memory of a process and its children."""

    seconds: float
    cpu_seconds: float
    """CPU seconds of all its processes, in user and kernel mode."""
    peak_bytes: int


# The sides


OURS = "sdpo"
SIDES = (OURS, "datasets.map", "datasets.map, batched")


def command_of(side: str, log: Sequence[Path], out: Path, level: Level, workers: int) -> list[str]:
    """`sdpo data prepare` as anyone would type it, or the script with `datasets.map` over rows or
    over batches, which is as fast as `map` allows."""
    files = [*map(str, log), "--out", str(out), "--workers", str(workers)]
    guarded = level == "with guardrails"
    if side == OURS:
        command = [sys.executable, "-m", "sdpo", "data", "prepare", *files, "--preset", "strict"]
        return command if guarded else command + [f"--guardrails.{x}" for x in NO_GUARDRAILS]
    options = ["--guardrails"] * guarded + ["--batched"] * ("batched" in side)
    return [sys.executable, "-m", "benchmarks.prepare_rival", *files, *options]


# One run


def measured(command: Sequence[str], notes: Path) -> Run:
    """Runs a command to its end; what it says goes to the file `notes`.

    Raises RuntimeError with the last of what it said if it fails.
    """
    peak, before = 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    process = _start(command, notes)
    while not _ended(process, 1 / SAMPLES_PER_SECOND):
        peak = max(peak, memory(process.pid))
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    if process.returncode:
        said = notes.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)}\nfailed with {process.returncode}:\n{said}")
    return Run(seconds, cpu, peak)


def _start(command: Sequence[str], notes: Path) -> subprocess.Popen:
    """Starts a command in a process group of its own, so that it can be killed as a whole."""
    with notes.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _ended(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def memory(pid: int) -> int:
    """PSS of a process and all its descendants in bytes, now; 0 once they are gone."""
    total, ended = 0, suppress(psutil.NoSuchProcess, psutil.AccessDenied)
    with ended:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with ended:
                total += process.memory_full_info().pss
    return total


def warm(paths: Iterable[Path]) -> None:
    """Reads the files and writes what others have left to write: each run finds the same."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            while file.read(2**24):
                pass


# Equality


def same_interactions(one: Path, other: Path) -> int:
    """How many interactions two files hold, the same ones in the same order.

    Raises ValueError where they first differ.
    """
    n = 0
    with one.open("rb") as a, other.open("rb") as b:
        for n, (left, right) in enumerate(zip_longest(a, b), start=1):
            if left is None or right is None:
                raise ValueError(f"{one if left is None else other} ends before line {n}")
            left, right = orjson.loads(left), orjson.loads(right)
            for field in FIELDS:
                if left[field] != right[field]:
                    raise ValueError(
                        f"line {n}, `{field}`: {one} has {left[field]!r:.200}, "
                        f"{other} has {right[field]!r:.200}"
                    )
    return n


def written(out: Path) -> tuple[Path, Path, Path]:
    """The three files of a preparation."""
    return out, manifest_path(out), report_path(out)


def digests(out: Path) -> dict[str, str]:
    """sha256 of the three files."""
    found = {}
    for path in written(out):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def killed(
    command: Sequence[str], out: Path, times: int, seconds: float, seed: int
) -> dict[str, Any]:
    """Kills `command`, which undisturbed took `seconds` and wrote `out`, so often on its way: after
    how many seconds, those of the run that was left alone, and the units that it found done.

    Raises ValueError unless it then ends with the files that are there now, byte for byte.
    """
    before = digests(out)
    clear(out)
    chance = random.Random(seed)
    notes = out.with_suffix(".killed.log")
    # Together less than one run: what the kills left behind may save the next start its time.
    moments = [0.9 * seconds / times * chance.uniform(0.3, 1) for _ in range(times)]
    moments = [_kill_after(command, moment, out, notes) for moment in moments]
    last = measured(command, notes)
    if (after := digests(out)) != before:
        differing = [name for name in before if after[name] != before[name]]
        raise ValueError(f"killed {times} times, it ended with another {', '.join(differing)}")
    found = re.search(r"goes on from (\d+) units", notes.read_text(encoding="utf-8"))
    return {
        "killed_after": moments,
        "last_seconds": last.seconds,
        "units_gone_on_from": int(found[1]) if found else 0,
    }


def _kill_after(command: Sequence[str], seconds: float, out: Path, notes: Path) -> float:
    """Kills a run after so many seconds, or if it is done by then, one from the start after half as
    many, and so on; returns the seconds."""
    while _ended(process := _start(command, notes), seconds):
        clear(out)
        seconds /= 2
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return seconds


def clear(out: Path) -> None:
    """Removes what an earlier run wrote."""
    for path in written(out):
        path.unlink(missing_ok=True)


# Everything


def compare(log: Sequence[Path], level: Level, settings: Settings) -> list[dict[str, Any]]:
    """A row of results for each side, which take turns. Raises ValueError for unequal outputs."""
    sides = SIDES[:1] if settings.alone else SIDES
    outs = {name: output(settings, level, name) for name in sides}
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for i in range(settings.rounds):
        for name in sides[:: -1 if i % 2 else 1]:
            clear(outs[name])
            warm(log)
            command = command_of(name, log, outs[name], level, settings.workers)
            runs[name].append(measured(command, outs[name].with_suffix(".log")))
    interactions = [same_interactions(outs[OURS], out) for out in outs.values()][-1]
    return [
        {
            "benchmark": "prepare",
            "contender": name,
            "level": level,
            "workers": settings.workers,
            "conversations": sum(pq.read_metadata(path).num_rows for path in log),
            "log_bytes": sum(path.stat().st_size for path in log),
            "interactions": interactions,
            "output_bytes": outs[name].stat().st_size,
            "seconds": median(run.seconds for run in runs[name]),
            "cpu_seconds": median(run.cpu_seconds for run in runs[name]),
            "rounds": settings.rounds,
            "peak_bytes": max(run.peak_bytes for run in runs[name]),
            "memory": "PSS",
            "verdict": "not compared" if settings.alone else "equal",
        }
        for name in sides
    ]


def output(settings: Settings, level: Level, contender: str) -> Path:
    """Where a side writes."""
    folder = settings.scratch / level.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{contender.replace(', ', '-')}.jsonl"


def log_of(settings: Settings) -> list[Path]:
    """The log's files, made first if need be. Raises ValueError if `settings.log` has none."""
    if settings.log is not None:
        if files := sorted(settings.log.glob("*.parquet")):
            return files
        raise ValueError(f"{settings.log}: no parquet files there; leave `log` out to make some")
    config = LogConfig(conversations=settings.conversations, seed=settings.seed)
    folder = settings.scratch / f"log-{config.conversations}-{config.seed}"
    files = sorted(folder.glob("*.parquet"))
    return files if len(files) == config.files else write_log(folder, config)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """All sides of one level, ours first."""
    first = rows[0]
    log = f"{first['conversations']:,} conversations in {first['log_bytes'] / MB:,.0f} MB"
    title = f"{first['level']}: {log}, {first['interactions']:,} interactions, {first['verdict']}"
    columns = "seconds", "CPU, s", "rows/s", "MB/s", "peak, MB", "slower by"
    found = grid(title, "", *columns)
    for row in rows:
        seconds = row["seconds"]
        numbers = (
            f"{seconds:,.1f}",
            f"{row['cpu_seconds']:,.1f}",
            f"{row['conversations'] / seconds:,.0f}",
            f"{row['log_bytes'] / MB / seconds:,.1f}",
            f"{row['peak_bytes'] / MB:,.0f}",
            "" if row is first else f"{seconds / first['seconds']:.2f}x",
        )
        found.add_row(row["contender"], *numbers)
    return found


def kill_row(log: Sequence[Path], row: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """A row of results of killing ours, whose undisturbed run is `row`."""
    out = output(settings, row["level"], OURS)
    command = command_of(OURS, log, out, row["level"], settings.workers)
    found = killed(command, out, settings.kill, row["seconds"], settings.seed)
    same = ("contender", "level", "workers", "conversations", "seconds")
    about = {"benchmark": "prepare, killed", "verdict": "same bytes"}
    return about | {name: row[name] for name in same} | found


def main(settings: Settings) -> None:
    """Run it."""
    console = Console()
    log = log_of(settings)
    rows: list[dict[str, Any]] = []
    for level in settings.levels:
        rows += (new := compare(log, level, settings))
        console.print(table(new))
    if settings.kill:
        last = next(row for row in reversed(rows) if row["contender"] == OURS)
        rows.append(kill_row(log, last, settings))
        moments = ", ".join(f"{seconds:.1f}" for seconds in rows[-1]["killed_after"])
        console.print(
            f"{last['level']}: killed {settings.kill} times, after {moments} s of a run; the one "
            f"after went on from {rows[-1]['units_gone_on_from']} units and took "
            f"{rows[-1]['last_seconds']:.1f} s, and all three files have the same bytes"
        )
    about = machine(torch.device("cpu"))
    about["versions"] = {name: version(name) for name in LIBRARIES}
    settings.keep(row | {"machine": about} for row in rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
