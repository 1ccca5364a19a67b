"""Snapshots: checkpoints that stay, by name. One is kept where each phase begins, one at the end,
and one at the newest evaluation that no brake objected to.

    sdpo snapshots list runs/online
    sdpo snapshots export runs/online phase-2 --out exported
    sdpo snapshots restore runs/online phase-2      # then go on with --resume
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from sdpo_parallel.engine import Engine

from ..errors import SdpoError
from ..io.files import write_text
from ..train.export import export

NAME = "snapshots.json"
GOOD = "good"
"""The snapshot of the newest evaluation that no brake objected to."""
END = "end"
"""The snapshot of the last update."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A checkpoint with a name.

    Attributes:
        step: updates behind it, and the checkpoint's number.
        phase: the phase that begins there, or that it is of; from 1.
    """

    name: str
    step: int
    phase: int
    persona: str


def read_snapshots(run: str | Path) -> list[Snapshot]:
    """The snapshots of a run's folder, in the order of their steps."""
    path = Path(run) / NAME
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    return sorted((Snapshot(**row) for row in rows), key=lambda s: (s.step, s.name))


def write_snapshots(run: str | Path, snapshots: list[Snapshot]) -> None:
    """Replace the list of snapshots."""
    write_text(Path(run) / NAME, json.dumps([asdict(s) for s in snapshots], indent=2) + "\n")


def find_snapshot(run: str | Path, name: str) -> Snapshot:
    """The snapshot of that name.

    Raises:
        SdpoError: the run has none; those that it has are named.
    """
    snapshots = {s.name: s for s in read_snapshots(run)}
    if name not in snapshots:
        there = ", ".join(snapshots) or "none"
        raise SdpoError(f"{run}: no snapshot {name!r}; there are: {there}")
    return snapshots[name]


def remember(run: str | Path, engine: Engine, named: Sequence[Snapshot]) -> None:
    """Add snapshots, in place of others of the same names, and keep the checkpoints of all. Every
    rank of the run calls it."""
    names = {s.name for s in named}
    kept = [s for s in read_snapshots(run) if s.name not in names] + list(named)
    engine.checkpoints.pinned = {s.step for s in kept}
    if engine.ranks.is_main:
        write_snapshots(run, kept)


def attempts(run: str | Path) -> int:
    """How often a run has gone back to a snapshot."""
    return len(list(Path(run).glob("undone-*")))


def go_back(run: str | Path, snapshot: Snapshot) -> Path:
    """Put aside all that a run wrote after a snapshot; returns where. Resuming goes on from the
    snapshot, with other random numbers."""
    folder = Path(run)
    undone = folder / f"undone-{attempts(run) + 1}"
    later: list[tuple[str, Callable[[str], str]]] = [
        ("checkpoints/step-*", lambda name: name.removeprefix("step-")),
        ("rollouts/update-*.parquet", lambda name: name[len("update-") : -len(".parquet")]),
        ("interactions/update-*.parquet", lambda name: name[len("update-") : -len(".parquet")]),
        ("evaluations/step-*.jsonl", lambda name: name[len("step-") : -len(".jsonl")]),
        ("evaluations/step-*.json", lambda name: name[len("step-") : -len(".json")]),
        ("export", lambda name: str(snapshot.step + 1)),
    ]
    moved = [
        path
        for pattern, number in later
        for path in folder.glob(pattern)
        if (n := number(path.name)).isdigit() and int(n) > snapshot.step
    ]
    undone.mkdir()
    for path in moved:
        to = undone / path.relative_to(folder)
        to.parent.mkdir(exist_ok=True)
        os.rename(path, to)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        if (path := folder / name).is_file():
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
            rows = [row for row in rows if row.endswith("\n")]  # a killed run leaves half of one
            cut = [row for row in rows if json.loads(row)["step"] > snapshot.step]
            write_text(undone / name, "".join(cut))
            write_text(path, "".join(rows[: len(rows) - len(cut)]))
    write_snapshots(run, [s for s in read_snapshots(run) if s.step <= snapshot.step])
    return undone


def command(
    what: tyro.conf.Positional[Literal["list", "export", "restore"]],
    run: tyro.conf.Positional[str],
    name: tyro.conf.Positional[str] = "",
    /,
    *,
    out: str = "",
) -> None:
    """Show the snapshots of a run of ``sdpo online``, export one, or go back to it.

    Args:
        what: list; export a snapshot as a Hugging Face folder; or restore: put aside what the run
            did after it, so that ``sdpo online … --resume`` goes on from there.
        run: the run's folder.
        name: of the snapshot, as ``list`` shows it.
        out: folder to export to.
    """
    if what == "list":
        table = Table("snapshot", "updates", "phase", "persona")
        for s in read_snapshots(run):
            table.add_row(s.name, str(s.step), str(s.phase), s.persona)
        Console().print(table)
        return
    snapshot = find_snapshot(run, name)
    if what == "export":
        if not out:
            raise SdpoError("snapshots export: say where with --out")
        export(run, out=out, step=snapshot.step)
        return
    if not (Path(run) / "checkpoints" / f"step-{snapshot.step}").is_dir():
        raise SdpoError(f"{run}: the checkpoint of snapshot {name!r} is gone; restore another one")
    lock = FileLock(Path(run) / "lock", blocking=False)  # a run's own, while it trains
    try:
        with lock:
            undone = go_back(run, snapshot)
            Path(lock.lock_file).unlink()
    except Timeout:
        raise SdpoError(f"{run}: a job is training there; stop it before going back") from None
    Console().print(
        f"{run} is back at {snapshot.name}, update {snapshot.step}; what came after is in "
        f"{undone}. Go on with --resume",
        soft_wrap=True,
    )
