"""What moved between two runs, beyond the noise of both.

    python -m benchmarks.compare OLD NEW        # files of JSON lines, or folders of them

Where both runs timed the floor of a problem, times are compared as multiples of it, so that a
slower clock is not a slower kernel; elsewhere as they are, on the same device only. A time has
moved when the ranges between the quartiles do not meet, memory when it changed by a twentieth, a
verdict whenever it is another one. Exits 1 where anything of ours got worse.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console

from benchmarks.peers import FLOOR, OURS
from benchmarks.report import Row, grid, read

KEY = ("benchmark", "kind", "objective", "model", "head", "tokens", "vocabulary", "hidden")
KEY += ("problem", "dtype", "weights", "checkpointing", "distance", "sweep", "contender")
MEMORY_NOISE = 0.05


class Moved(NamedTuple):
    """One thing that changed. ``change``: new over old."""

    key: str
    what: str
    old: str
    new: str
    change: float | None
    worse: bool


def compare(old: Iterable[Row], new: Iterable[Row]) -> list[Moved]:
    """Everything that moved, the worst first; of repeated results the last counts."""
    before, after = _by_key(old), _by_key(new)
    moved = []
    for key in before.keys() & after.keys():
        name = ", ".join(str(part) for part in key if part is not None)
        a, b = before[key], after[key]
        if a["verdict"] != b["verdict"]:
            worse = a["verdict"] == "right"
            moved.append(Moved(name, "verdict", a["verdict"], b["verdict"], None, worse))
        moved += _times(name, a, b, [_floor(before, key), _floor(after, key)])
        sizes = a.get("extra_bytes"), b.get("extra_bytes")
        if all(sizes) and abs(sizes[1] / sizes[0] - 1) > MEMORY_NOISE:
            x, y = sizes
            mib = (f"{v / 2**20:,.1f} MiB" for v in sizes)
            moved.append(Moved(name, "memory", *mib, y / x, y > x))
    return sorted(moved, key=lambda m: (not m.worse, -(m.change or 0), m.key))


def _by_key(rows: Iterable[Row]) -> dict[tuple, Row]:
    # results from before there was another problem have the Gaussian one
    named = (row if "kind" not in row else {"problem": "gaussian"} | row for row in rows)
    return {tuple(row.get(name) for name in KEY): row for row in named if "contender" in row}


def _floor(rows: dict[tuple, Row], key: tuple) -> dict[str, float] | None:
    row = rows.get((*key[:-1], FLOOR))
    return row["seconds"]["both"] if row is not None and "seconds" in row else None


def _times(name: str, a: Row, b: Row, floors: list[dict[str, float] | None]) -> Iterable[Moved]:
    unit = "x floor"
    if not all(floors) or a["contender"].startswith(FLOOR):
        if a["machine"]["device"] != b["machine"]["device"]:
            return
        unit, floors = "s", [dict(median=1.0, low=1.0, high=1.0)] * 2
    for part in a.get("seconds", {}).keys() & b.get("seconds", {}).keys():
        x, y = (_over(row["seconds"][part], f) for row, f in zip((a, b), floors, strict=True))
        if x["high"] < y["low"] or y["high"] < x["low"]:
            texts = (f"{t['median']:.4g} {unit}" for t in (x, y))
            change = y["median"] / x["median"]
            yield Moved(name, part, *texts, change, change > 1)


def _over(seconds: dict[str, float], floor: dict[str, float]) -> dict[str, float]:
    return {
        "median": seconds["median"] / floor["median"],
        "low": seconds["low"] / floor["high"],
        "high": seconds["high"] / floor["low"],
    }


def main(
    old: Annotated[Path, tyro.conf.Positional], new: Annotated[Path, tyro.conf.Positional]
) -> None:
    """Print what moved.

    Args:
        old: a file of JSON lines, or a folder of them.
        new: likewise.
    """
    try:
        before, after = read(old), read(new)
    except ValueError as error:
        sys.exit(f"error: {error}")
    moved = compare(before, after)
    console = Console(width=150)
    both = len(_by_key(before).keys() & _by_key(after).keys())
    console.print(f"{both} results in both; {len(moved)} moved beyond noise")
    if moved:
        table = grid("", "", "what", "old", "new", "change", left=2)
        for m in moved:
            change = "" if m.change is None else f"{100 * (m.change - 1):+.1f}%"
            table.add_row(m.key, m.what, m.old, m.new, change, style="red" if m.worse else "green")
        console.print(table)
    sys.exit(any(m.worse and m.key.rpartition(", ")[2].startswith(OURS) for m in moved))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
