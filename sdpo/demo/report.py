"""The demo's report: what was measured against its targets, as a table, JSON and one HTML file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..analysis.signal import Signal
from ..io.files import write_text
from ..io.html import render, svg


@dataclass(frozen=True, kw_only=True)
class Target:
    """A claim in miniature: ``low <= value <= high``."""

    claim: str
    low: float
    high: float


TARGETS = {
    "preference_rate.before": Target(claim="preference before training", low=0.3, high=0.7),
    "preference_rate.after": Target(claim="preference after training on logs", low=0.9, high=1.0),
    "preference_rate.after_change_of_mind": Target(
        claim="old preference after a change of mind", low=0.0, high=0.2
    ),
    "signal.irrelevant_over_relevant": Target(
        claim="signal, irrelevant over relevant follow-ups", low=0.0, high=0.05
    ),
    "retention.hindsight_following_drop": Target(
        claim="hindsight still followed: drop", low=-1.0, high=0.05
    ),
    "retention.other_tasks_drop": Target(claim="other tasks kept: drop", low=-1.0, high=0.05),
}

COLLAPSE = 0.25
"""A drop of hindsight following beyond which the method has nothing left to learn from."""


def value_of(report: Mapping, name: str) -> float:
    """``a.b`` of a nested report."""
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
    """The targets, and where the time went."""
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
    courses: Mapping[str, Sequence[Mapping]],
    signals: Mapping[str, Sequence[tuple[str, Signal]]],
) -> None:
    """``report.json`` and ``report.html`` in ``folder``.

    Args:
        courses: name of a run -> rows of its metrics.jsonl.
        signals: kind of follow-up -> (follow-up, its signal) to show.
    """
    write_text(folder / "report.json", json.dumps(report, indent=2))
    rows = [
        (t.claim, f"{value_of(report, n):.3f}", _bounds(t), is_met(report, n))
        for n, t in TARGETS.items()
    ]
    coloured = {k: [(o, _coloured(row)) for o, row in shown] for k, shown in signals.items()}
    page = render(PAGE, report=report, rows=rows, curves=_curves(courses), signals=coloured)
    write_text(folder / "report.html", page)


def _curves(courses: Mapping[str, Sequence[Mapping]]) -> Markup:
    """Loss, |advantage| and entropy over the steps of each run, as inline SVG."""
    shown = {
        "loss": "loss",
        "advantage/mean_abs": "mean |advantage|, nats",
        "entropy/policy": "policy entropy, nats",
    }
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots(1, len(shown))
    for ax, (name, label) in zip(axes, shown.items(), strict=True):
        for course, rows in courses.items():
            ax.plot([r["step"] for r in rows], [r[name] for r in rows], label=course)
        ax.set_xlabel("step")
        ax.set_title(label, fontsize=10)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    return svg(figure)


def _coloured(row: Signal, scale: float = 2.0) -> Markup:
    """Tokens as spans: green where hindsight would rather say them, red where it would not."""
    spans = []
    for token, advantage in zip(row["tokens"], row["advantage"], strict=True):
        hue = "30,150,60" if advantage > 0 else "200,40,40"
        alpha = min(abs(advantage) / scale, 1.0)
        style = f"background:rgba({hue},{alpha:.2f})"
        spans.append(f'<span style="{style}" title="{advantage:+.3f}">{escape(token)}</span>')
    return Markup("".join(spans))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>SDPO demo</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; text-align: left;
  border-bottom: 1px solid #ddd; vertical-align: top }
.number { text-align: right; font-variant-numeric: tabular-nums }
.met { color: #17803d } .missed { color: #b91c1c; font-weight: 600 }
.tokens { font-family: ui-monospace, monospace; white-space: pre-wrap } svg { max-width: 100% }
.note { color: #666 }
</style></head><body>
<h1>Learning from what users said next</h1>
<p>A tiny chat model talks to users who like <b>{{ report.preference }}</b> answers. Nobody labels
anything: the model reads each of its answers twice, with and without the user's next message in
the prompt, and moves towards what it would have said had it known. Then the users change their
mind. Seed {{ report.seed }}, objective {{ report.objective }}.</p>
{% if report.collapsed %}
<p class="missed">The model collapsed: it no longer follows what hindsight says.</p>
{% endif %}
<table>
<tr><th>claim</th><th class="number">measured</th><th class="number">target</th><th></th></tr>
{% for claim, value, bounds, met in rows %}
<tr><td>{{ claim }}</td><td class="number">{{ value }}</td><td class="number">{{ bounds }}</td>
<td class="{{ 'met' if met else 'missed' }}">{{ 'met' if met else 'missed' }}</td></tr>
{% endfor %}
</table>
<h2>Training</h2>
{{ curves }}
<h2>The same questions, before and after</h2>
<table><tr><th>question, never seen in a log</th><th>before</th><th>after</th>
<th>after the change of mind</th></tr>
{% for s in report.samples %}
<tr><td>{{ s.question }}</td><td>{{ s.before }}</td><td>{{ s.after }}</td>
<td>{{ s.after_change_of_mind }}</td></tr>
{% endfor %}
</table>
<h2>What a follow-up says about each token</h2>
<p class="note">Green: hindsight would rather have said it; red: it would not. Hover for nats.</p>
{% for kind, shown in signals.items() %}
<h3>{{ kind | capitalize }} follow-ups</h3>
<table>
{% for followup, tokens in shown %}
<tr><td class="tokens">{{ tokens }}</td><td>{{ followup }}</td></tr>
{% endfor %}
</table>
{% endfor %}
<h2>Where the time went</h2>
<p>{% for name, s in report.seconds.items() %}{{ name }} {{ '%.0f' | format(s) }} s{{ ', ' if not
loop.last }}{% endfor %}</p>
</body></html>
"""
