"""`sdpo users …`: many users of one base model, each with adapters of their own, in one folder.

sdpo users add STORE alice concise:12
sdpo users train STORE online --model MODEL --prompts prompts.txt --lora.rank 4
sdpo users list STORE
sdpo users rollback STORE alice phase-2       # then train goes on from there
sdpo users export STORE alice --out adapter
sdpo users forget STORE alice

STORE/users.json        name -> phases
STORE/users/alice/      all that there is of alice: what was said, adapters, optimizer, metrics
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from ..errors import SdpoError
from ..train.export import export as export_run
from ..train.run_folder import read_metrics
from . import snapshots
from .command import main as online
from .config import parse_user
from .snapshots import find_snapshot, read_snapshots
from .tasks import MakeTasks
from .together import read_users, write_users

FORGETTING = ".forgetting-"


def folder_of(store: str | Path, name: str) -> Path:
    """A user's folder.

    Raises:
        SdpoError: there is no such user; those that there are are named.
    """
    users = read_users(store)
    if name not in users:
        raise SdpoError(f"{store}: no user {name!r}; there are: {', '.join(users) or 'none'}")
    return Path(store) / "users" / name


def add(
    store: tyro.conf.Positional[str],
    name: tyro.conf.Positional[str],
    phases: tyro.conf.Positional[tuple[str, ...]],
    /,
) -> None:
    """Add a user, or phases to one that is there; the next ``sdpo users train`` goes through them.

    Args:
        store: the folder of all users; made if it is not there.
        name: letters, digits and ``_ . @ -``.
        phases: PERSONA:UPDATES, one after the other.
    """
    parse_user(f"{name}={','.join(phases)}")
    users = read_users(store)
    write_users(store, users | {name: (*users.get(name, ()), *phases)})


def train(args: Sequence[str], tasks: MakeTasks | None = None) -> None:
    """``STORE RECIPE …``: `sdpo online` for all users of a store, each from where it is.

    Args:
        tasks: as `sdpo.online.run.online` takes it.

    Raises:
        SdpoError: as `sdpo.online.together.together` does.
    """
    if not args or args[0].startswith("-"):
        print("usage: sdpo users train STORE RECIPE …   (flags of `sdpo online RECIPE`)")
        raise SystemExit(0 if args and args[0] in ("-h", "--help") else 2)
    store, *rest = args
    if not (users := read_users(store)):
        raise SdpoError(f"{store}: no users; add one with `sdpo users add {store} NAME PHASE…`")
    named = [f"{name}={','.join(phases)}" for name, phases in users.items()]
    online([*rest, "--out", store, "--resume", "--users", *named], tasks)


def show(store: tyro.conf.Positional[str], /) -> None:
    """List users: how far they are, how satisfied, and what they take on disk.

    Args:
        store: the folder of all users.
    """
    table = Table("user", "phases", "updates", "satisfied", "snapshots", "MiB")
    for name, phases in read_users(store).items():
        folder = folder_of(store, name)
        rows = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
        satisfied = rows[-1].get("user/satisfied") if rows else None
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        table.add_row(
            name,
            " ".join(phases),
            str(rows[-1]["step"] if rows else 0),
            "" if satisfied is None else f"{satisfied:.2f}",
            " ".join(s.name for s in read_snapshots(folder)),
            f"{size / 2**20:.1f}",
        )
    Console().print(table)


def rollback(
    store: tyro.conf.Positional[str],
    name: tyro.conf.Positional[str],
    snapshot: tyro.conf.Positional[str],
    /,
) -> None:
    """Put a user back to a snapshot; the next ``sdpo users train`` goes on from there.

    Args:
        store: the folder of all users.
        name: the user's.
        snapshot: its name, as ``sdpo users list`` shows it.
    """
    snapshots.command("restore", str(folder_of(store, name)), snapshot)


def export(
    store: tyro.conf.Positional[str],
    name: tyro.conf.Positional[str],
    /,
    *,
    out: str,
    snapshot: str = "",
    merged: bool = False,
) -> None:
    """Write a user's adapters as a PEFT folder.

    Args:
        store: the folder of all users.
        name: the user's.
        out: folder to export to.
        snapshot: its name; "": the newest weights.
        merged: write a whole model with the adapters in it instead.
    """
    folder = folder_of(store, name)
    step = find_snapshot(folder, snapshot).step if snapshot else None
    export_run(str(folder), out=out, step=step, adapters=not merged)


def forget(store: tyro.conf.Positional[str], name: tyro.conf.Positional[str], /) -> None:
    """Remove all that a store has of a user, for good. What others were told or taught is not
    touched, and neither is what was exported elsewhere.

    Args:
        store: the folder of all users.
        name: the user's.
    """
    folder, users = folder_of(store, name), read_users(store)
    gone = folder.with_name(FORGETTING + name)
    lock = FileLock(folder / "lock", blocking=False)  # a run's own, while it trains
    if folder.is_dir():
        try:
            with lock:
                os.rename(folder, gone)
        except Timeout:
            raise SdpoError(f"{folder}: a job is training there; stop it first") from None
    write_users(store, {n: p for n, p in users.items() if n != name})
    for left in (Path(store) / "users").glob(f"{FORGETTING}*"):  # also of a command that was killed
        shutil.rmtree(left)
    print(f"{store}: nothing is left of {name}", file=sys.stderr)
