"""The demo's report: what was measured next to its targets, as a table, JSON and an HTML page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console

from ...analysis.signal import Signal
from ...io.files import write_text
from ...io.html import render, svg
from .. import targets
from ..targets import Target

TEMPLATE = Path(__file__).with_name("report.html.j2")


TARGETS = {
    "preference_rate.before": Target("preference before training", low=0.3, high=0.7),
    "preference_rate.after": Target("preference after training on logs", low=0.9),
    "preference_rate.after_change_of_mind": Target(
        "old preference after a change of mind", high=0.2
    ),
    "signal.irrelevant_over_relevant": Target(
        "signal, irrelevant over relevant follow-ups", high=0.05
    ),
    "retention.hindsight_following_drop": Target("hindsight still followed: drop", high=0.05),
    "retention.other_tasks_drop": Target("other tasks kept: drop", high=0.05),
}

COLLAPSE = 0.25
"""Drop of hindsight following beyond which the method has nothing left to learn from."""


def all_met(report: Mapping) -> bool:
    """Whether every target is met."""
    return targets.all_met(report, TARGETS)


def print_table(report: Mapping, console: Console) -> None:
    """Print the targets, and where the time went."""
    title = f"sdpo demo --world toy, seed {report['seed']}, {report['objective']}"
    console.print(targets.table(title, targets.check(report, TARGETS)))
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
    rows = targets.check(report, TARGETS)
    coloured = {k: [(o, targets.coloured(row)) for o, row in s] for k, s in signals.items()}
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
