"""Tables for people, JSON lines for machines, and plots.

A result is one line: a dict with ``benchmark``, ``contender``, its shape, ``verdict``, ``machine``
and, where it was right, ``seconds`` by pass; see ``microbenchmark``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]
MIB = 2**20


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
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
    grid = Table(
        title=f"{first['kind']}: N={first['tokens']:,}, V={first['vocabulary']:,}, "
        f"D={first['hidden']:,} ({first['head']}), {first['dtype']}",
        title_justify="left",
    )
    for name in ("", "forward, ms", "backward, ms", "both, ms", "x floor", "memory, MiB"):
        grid.add_column(name, justify="right" if name else "left")
    for name in ("loss", "dH", "dW"):
        grid.add_column(f"error {name}", justify="right")
    timed = sorted(
        (r for r in rows if "seconds" in r), key=lambda r: r["seconds"]["both"]["median"]
    )
    for row in timed:
        passes = (row["seconds"].get(p) for p in ("forward", "backward", "both"))
        cells = [row["contender"], *map(milliseconds, passes), f"{row.get('over_floor', 1):.2f}"]
        if row["verdict"] == "floor":
            grid.add_row(*cells, style="dim")
        else:
            grid.add_row(*cells, _mib(row), *_errors(row))
    for row in rows:
        if row["verdict"] == "wrong":
            verdict = ["[red]wrong[/red]", "", "", ""]
            grid.add_row(row["contender"], *verdict, _mib(row), *_errors(row))
    return grid


def excuses(rows: Sequence[Row]) -> list[str]:
    """Contenders that could not be measured, and why."""
    return [f"  {r['contender']} {r['note']}" for r in rows if "note" in r]


def first_line(error: Exception) -> str:
    """The first line of an error, for a row's note."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


def _mib(row: Row) -> str:
    return f"{row['extra_bytes'] / MIB:,.0f}" if "extra_bytes" in row else "?"


def _errors(row: Row) -> list[str]:
    return [f"{row['error'][name]:.1e}" for name in ("loss", "hidden", "weight")]


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Time, memory and distance from the floor over N, and errors over the distance between the
    distributions: one PNG per kind and dtype. The files written."""
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def which(row: Row) -> tuple[str, str, str]:
        return row["benchmark"], row["kind"], row["dtype"]

    for (benchmark, kind, dtype), group in groupby(sorted(rows, key=which), which):
        path = folder / f"{benchmark}-{kind}-{dtype}.png"
        _plot_one(list(group), f"{kind}, {dtype}", path)
        written.append(path)
    return written


def _plot_one(rows: list[Row], title: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    over_n = [r for r in rows if "sweep" not in r and "seconds" in r]
    heads = sorted({r["head"] for r in over_n})
    sweep = [r for r in rows if r.get("sweep") == "distance" and "error" in r]
    height = len(heads) + bool(sweep)
    figure, axes = plt.subplots(height, 3, figsize=(14, 3.6 * height), squeeze=False)
    names = sorted({r["contender"] for r in over_n + sweep})
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    styles = {name: "-" if name.startswith("sdpo") else "--" for name in names}
    for i, name in enumerate(names):
        styles[name] += "os^v"[i // 10 % 4]  # more names than colours

    def line(axis, points: list[tuple[float, float]], name: str) -> None:
        if points:
            axis.plot(*zip(*sorted(points), strict=True), styles[name], ms=3, label=name)
            axis.lines[-1].set_color(colours[name])

    for head, panels in zip(heads, axes, strict=False):
        time, share, memory = panels
        for name in names:
            mine = [r for r in over_n if r["head"] == head and r["contender"] == name]
            for axis, of in zip(panels, (_ms, _share, _memory), strict=True):
                line(axis, [(r["tokens"], y) for r in mine if (y := of(r)) is not None], name)
        for axis, label in (
            (time, "forward and backward, ms"),
            (share, "of the floor, %"),
            (memory, "memory beyond inputs and gradients, MiB"),
        ):
            axis.set(title=f"{head}: {label}", xlabel="N, tokens", xscale="log")
            axis.set_xticks(sorted({r["tokens"] for r in over_n}))
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.minorticks_off()
        for axis in (time, memory):
            axis.set_yscale("log")
        time.legend(fontsize=7)
    if sweep:
        for axis, part in zip(axes[-1], ("loss", "hidden", "weight"), strict=True):
            for name in names:
                mine = [r for r in sweep if r["contender"] == name]
                line(axis, [(r["distance"], max(r["error"][part], 1e-12)) for r in mine], name)
            label = {"loss": "loss", "hidden": "dH", "weight": "dW"}[part]
            axis.set(
                title=f"relative error of {label}",
                xlabel="distance between the passes' logits",
                xscale="log",
                yscale="log",
            )
        axes[-1][0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _ms(row: Row) -> float:
    return 1e3 * row["seconds"]["both"]["median"]


def _share(row: Row) -> float | None:
    return 100 / row["over_floor"] if "over_floor" in row else None


def _memory(row: Row) -> float | None:
    return row["extra_bytes"] / MIB if "extra_bytes" in row else None
