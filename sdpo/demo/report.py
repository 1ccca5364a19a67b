"""The demo's report: what was measured next to its targets, as a table, JSON and an HTML page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..analysis.signal import Signal
from ..io.files import write_text
from ..io.html import render, svg

GREEN, RED = "30,150,60", "200,40,40"
TEMPLATE = Path(__file__).with_name("report.html.j2")


class Target(NamedTuple):
    """A claim in miniature, met if ``low <= value <= high``."""

    claim: str
    low: float
    high: float


TARGETS = {
    "preference_rate.before": Target("preference before training", 0.3, 0.7),
    "preference_rate.after": Target("preference after training on logs", 0.9, 1.0),
    "preference_rate.after_change_of_mind": Target(
        "old preference after a change of mind", 0.0, 0.2
    ),
    "signal.irrelevant_over_relevant": Target(
        "signal, irrelevant over relevant follow-ups", 0.0, 0.05
    ),
    "retention.hindsight_following_drop": Target("hindsight still followed: drop", -1.0, 0.05),
    "retention.other_tasks_drop": Target("other tasks kept: drop", -1.0, 0.05),
}

COLLAPSE = 0.25
"""Drop of hindsight following beyond which the method has nothing left to learn from."""


def value_of(report: Mapping, name: str) -> float:
    """The value named ``section.key``."""
    section, key = name.split(".")
    return report[section][key]


def is_met(report: Mapping, name: str) -> bool:
    """Whether the report's value lies within its target."""
    return TARGETS[name].low <= value_of(report, name) <= TARGETS[name].high


def all_met(report: Mapping) -> bool:
    """Whether every target is met."""
    return all(is_met(report, name) for name in TARGETS)


def _bounds(target: Target) -> str:
    if target.low <= 0:
        return f"≤ {target.high:g}"
    return f"≥ {target.low:g}" if target.high >= 1 else f"{target.low:g} … {target.high:g}"


def print_table(report: Mapping, console: Console) -> None:
    """Print the targets, and where the time went."""
    table = Table(title=f"sdpo demo, seed {report['seed']}, {report['objective']}")
    for column in ("claim", "measured", "target", ""):
        table.add_column(column, justify="left" if column == "claim" else "right")
    for name, target in TARGETS.items():
        met = "[green]met[/]" if is_met(report, name) else "[bold red]missed[/]"
        table.add_row(target.claim, f"{value_of(report, name):.3f}", _bounds(target), met)
    console.print(table)
    if report["collapsed"]:
        console.print("[bold red]collapsed: the model no longer follows what hindsight says[/]")
    spent = ", ".join(f"{name} {s:.0f}" for name, s in report["seconds"].items())
    console.print(f"seconds: {spent}", highlight=False)


def write(
    folder: Path,
    report: Mapping,
    trajectories: Mapping[str, Sequence[Mapping]],
    signals: Mapping[str, Sequence[tuple[str, Signal]]],
) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``.

    Args:
        trajectories: name of a run -> rows of its metrics.jsonl.
        signals: kind of follow-up -> (follow-up, its signal) to show.
    """
    write_text(folder / "report.json", json.dumps(report, indent=2))
    rows = [
        (t.claim, f"{value_of(report, n):.3f}", _bounds(t), is_met(report, n))
        for n, t in TARGETS.items()
    ]
    coloured = {k: [(o, _coloured(row)) for o, row in shown] for k, shown in signals.items()}
    curves = _curves(trajectories)
    page = render(TEMPLATE, report=report, rows=rows, curves=curves, signals=coloured)
    write_text(folder / "report.html", page)


def _curves(trajectories: Mapping[str, Sequence[Mapping]]) -> Markup:
    """Loss, |advantage| and entropy over the steps of each run, as inline SVG."""
    shown = {
        "loss": "loss",
        "advantage/mean_abs": "mean |advantage|, nats",
        "entropy/policy": "policy entropy, nats",
    }
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots(1, len(shown))
    for ax, (name, label) in zip(axes, shown.items(), strict=True):
        for run, rows in trajectories.items():
            ax.plot([r["step"] for r in rows], [r[name] for r in rows], label=run)
        ax.set_xlabel("step")
        ax.set_title(label, fontsize=10)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    return svg(figure)


def _coloured(row: Signal) -> list[tuple[str, float, str]]:
    """(token, advantage, CSS): green where hindsight makes it likelier, red where less likely."""
    return [
        (token, a, f"background:rgba({GREEN if a > 0 else RED},{min(abs(a) / 2, 1.0):.2f})")
        for token, a in zip(row["tokens"], row["advantage"], strict=True)
    ]
