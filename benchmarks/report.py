"""Tables for people, JSON lines for machines, and plots.

A result is one line: a dict with ``benchmark``, ``contender``, its shape, ``verdict``, ``machine``
and, where it was right, ``seconds`` by pass; see ``microbenchmark``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a benchmark's results go besides the terminal."""

    out: Path | None = None
    """JSON lines are appended to this file."""

    def keep(self, rows: Iterable[Row]) -> None:
        """Append rows to the file, if there is one."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, or of every ``.jsonl`` file in a folder.

    Raises:
        ValueError: there is none, or a line is not a JSON object.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise ValueError(f"{path}: no results there")
    rows = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: not a JSON object")
            rows.append(row)
    return rows


def grid(title: str, *columns: str, left: int = 1) -> Table:
    """An empty table. The first ``left`` columns hold words, the others numbers."""
    found = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        justify = "left" if i < left else "right"
        found.add_column(name, justify=justify, no_wrap=i >= left, overflow="fold")
    return found


def milliseconds(spread: Mapping[str, float] | None) -> str:
    """Median, and half the distance between the quartiles in percent."""
    if spread is None:
        return ""
    ms = 1e3 * spread["median"]
    half = 50 * (spread["high"] - spread["low"]) / spread["median"]
    return f"{ms:.{max(0, 2 - len(str(int(ms))) + 1)}f} ±{half:.0f}%"


def table(rows: Sequence[Row]) -> Table:
    """One problem: contenders by time, then the wrong ones, which have none."""
    first = rows[0]
    found = grid(
        f"{first['kind']}: N={first['tokens']:,}, V={first['vocabulary']:,}, "
        f"D={first['hidden']:,} ({first['head']}), {first['dtype']}, "
        f"{first['problem']} ({first['entropy']:.1f} nats)",
        *("", "forward, ms", "backward, ms", "both, ms", "x floor", "memory, MiB"),
        *("error loss", "error dH", "error dW"),
    )
    timed = (r for r in rows if "seconds" in r)
    for row in sorted(timed, key=lambda r: r["seconds"]["both"]["median"]):
        passes = (row["seconds"].get(p) for p in ("forward", "backward", "both"))
        cells = [row["contender"], *map(milliseconds, passes), f"{row.get('over_floor', 1):.2f}"]
        if row["verdict"] == "floor":
            found.add_row(*cells, style="dim")
        else:
            found.add_row(*cells, *_memory_and_errors(row))
    for row in rows:
        if row["verdict"] == "wrong":
            cells = row["contender"], "[red]wrong[/red]", "", "", ""
            found.add_row(*cells, *_memory_and_errors(row))
    return found


def _memory_and_errors(row: Row) -> list[str]:
    memory = f"{row['extra_bytes'] / MIB:,.0f}" if "extra_bytes" in row else "?"
    return [memory, *(f"{row['error'][name]:.1e}" for name in ("loss", "hidden", "weight"))]


def excuses(rows: Sequence[Row]) -> list[str]:
    """Contenders that could not be measured, and why."""
    return [f"  {r['contender']} {r['note']}" for r in rows if "note" in r]


def first_line(error: Exception) -> str:
    """The first line of an error, for a row's note."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Time, memory and distance from the floor over N, and errors over the distance between the
    distributions: one PNG per kind, dtype and problem. The files written."""
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def which(row: Row) -> tuple[str, ...]:
        problem = row.get("problem", "gaussian")
        names = row["benchmark"], row["kind"], row["dtype"]
        return names if problem == "gaussian" else (*names, problem)

    for names, group in groupby(sorted(rows, key=which), which):
        path = folder / f"{'-'.join(names)}.png"
        _plot_one(list(group), ", ".join(names[1:]), path)
        written.append(path)
    return written


OVER_N = (
    ("forward and backward, ms", "log", lambda r: 1e3 * r["seconds"]["both"]["median"]),
    ("of the floor, %", "linear", lambda r: 100 / r["over_floor"] if "over_floor" in r else None),
    (
        "memory beyond inputs and gradients, MiB",
        "log",
        lambda r: r["extra_bytes"] / MIB if "extra_bytes" in r else None,
    ),
)
"""Panels of each head: what, its scale, and the value of a row that has one."""
OVER_DISTANCE = {"loss": "loss", "hidden": "dH", "weight": "dW"}
"""Panels of errors, and how they are called."""


def _plot_one(rows: list[Row], title: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    over_n = [r for r in rows if "sweep" not in r and "seconds" in r]
    heads = sorted({r["head"] for r in over_n})
    sweep = [r for r in rows if r.get("sweep") == "distance" and "error" in r]
    height = len(heads) + bool(sweep)
    figure, axes = plt.subplots(height, 3, figsize=(14, 3.6 * height), squeeze=False)
    names = sorted({r["contender"] for r in over_n + sweep})

    def lines(axis, points: Iterable[tuple[str, float, float | None]]) -> None:
        """(contender, x, y); a contender has its colour in all panels."""
        points = list(points)
        for i, name in enumerate(names):
            mine = sorted((x, y) for c, x, y in points if c == name and y is not None)
            if mine:
                style = "-" if name.startswith("sdpo") else "--"
                style += "os^v"[i // 10 % 4]  # more names than colours
                axis.plot(*zip(*mine, strict=True), style, color=f"C{i % 10}", ms=3, label=name)

    for head, panels in zip(heads, axes, strict=False):
        for axis, (label, scale, of) in zip(panels, OVER_N, strict=True):
            lines(axis, ((r["contender"], r["tokens"], of(r)) for r in over_n if r["head"] == head))
            axis.set(title=f"{head}: {label}", xlabel="N, tokens", xscale="log", yscale=scale)
            axis.set_xticks(sorted({r["tokens"] for r in over_n}))
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.xaxis.minorticks_off()
    if sweep:
        for axis, (part, label) in zip(axes[-1], OVER_DISTANCE.items(), strict=True):
            errors = ((r["contender"], r["distance"], r["error"][part]) for r in sweep)
            lines(axis, ((name, x, max(error, 1e-12)) for name, x, error in errors))
            axis.set(title=f"relative error of {label}", xscale="log", yscale="log")
            axis.set_xlabel("distance between student's and teacher's logits")
    for first in axes[:, 0]:
        first.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
