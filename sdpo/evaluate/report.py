"""`sdpo evaluate report`: one page and one JSON file of all that was evaluated.

    sdpo evaluate report eval/preference eval/benchmarks runs/online signal.jsonl --out report

What each argument is, its content says: a folder or file that another `sdpo evaluate` command
wrote, a run's folder, or rows of `sdpo signal`. One that cannot be read is named on the page, and
the rest is made.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import tyro
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from .. import __version__
from ..errors import SdpoError
from ..io.files import write_text
from ..io.html import INK, render, svg
from . import alpaca, arena, preference
from .boards import NUMBERS, boards
from .preference import told

TEMPLATE = Path(__file__).with_name("report.html.j2")
JSON, PAGE = "report.json", "report.html"
COLOURS = ("#2563c9", "#d97706", "#17803d", "#b91c1c", "#7c3aed", "#0e7490")
"""Of lines, in turn; told apart on white and on black."""
FULL = 2.0
"""Nats at which a token's colour is as strong as it gets."""
STRONGEST = 0.6
"""Opacity of that colour, under which text stays readable on white and on black."""
ACROSS = 3
"""Panels of curves beside each other."""
CURVES = {
    "evaluate/words": "words of an answer",
    "entropy/policy": "entropy of the policy, nats",
    "drift/kl": "KL to the first model, nats",
    "evaluate/leaks": "answers that leak hindsight",
}
"""What is drawn over a run's updates, beside preferences."""
BENCHMARK = "evaluate/benchmark/"
"""What the names of tasks' scores begin with."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left of itself.

    Attributes:
        metrics: rows of metrics.jsonl.
        evaluations: rows of evaluations.jsonl; none, where nothing was held out.
        kept: see `forgetting`.
    """

    name: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    kept: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Some pairs of answers of a game.

    Attributes:
        first, second: who answered.
        played: pairs of answers of the whole game.
        pairs: rows of pairs.jsonl.
    """

    persona: str
    first: str
    second: str
    played: int
    pairs: list[dict[str, Any]]


@dataclass(kw_only=True)
class Found:
    """What the report is made of."""

    preference: list[dict[str, Any]] = field(default_factory=list)
    games: list[Samples] = field(default_factory=list)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    rates: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    signals: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def command(
    sources: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    out: str,
    title: str = "Evaluation",
    samples: int = 8,
) -> None:
    """Write one page and one JSON file of what was evaluated.

    Args:
        sources: folders or files of other evaluations, folders of runs, rows of sdpo signal.
        out: folder for report.html and report.json.
        title: of the page.
        samples: pairs of answers of each comparison, and coloured answers, that the page shows; the
            pairs are of all its games, at least one of each.
    """
    found = Found()
    for source in sources:
        try:
            add(found, Path(source), samples)
        except (SdpoError, OSError, ValueError, KeyError) as error:
            found.problems.append(f"{source}: {_short(error)}")
    if not (found.preference or found.benchmarks or found.rates or found.runs or found.signals):
        raise SdpoError("nothing to report: " + "; ".join(found.problems))
    folder = Path(out)
    values = {
        "sdpo": __version__,
        "title": title,
        "preference": found.preference,
        "benchmarks": found.benchmarks,
        "rates": found.rates,
        "runs": [vars(run) for run in found.runs],
        "problems": found.problems,
    }
    write_text(folder / JSON, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / PAGE, page(found, title))
    Console().print(f"{folder / PAGE} and {JSON} are written", soft_wrap=True)
    if found.problems:
        raise SdpoError("; ".join(found.problems) + f". The rest is in {folder / PAGE}")


def add(found: Found, source: Path, samples: int) -> None:
    """Add what a folder or file holds.

    Raises:
        SdpoError: it is nothing that a report is made of.
    """
    if source.is_dir() and (source / "metrics.jsonl").is_file():
        found.runs.append(read_run(source))
        return
    if source.suffix == ".jsonl":
        rows = list(islice(_lines(source), samples))
        if not rows or not {"tokens", "advantage"} <= rows[0].keys():
            raise SdpoError("no rows of sdpo signal")
        found.signals += rows
        return
    files = [source] if source.is_file() else sorted(source.glob("*.json"))
    if not files:
        raise SdpoError("neither an evaluation nor a run's folder")
    for file in files:
        _add_file(found, file, samples)


def _add_file(found: Found, file: Path, samples: int) -> None:
    report = json.loads(file.read_text(encoding="utf-8"))
    match report:
        case {"kind": "preference"}:
            found.preference.append(report)
            pairs = file.with_name(preference.PAIRS)
            if pairs.is_file():
                found.games += games_of(pairs, samples)
        case {"kind": "benchmarks"}:
            found.benchmarks.append(report)
        case {"benchmark": alpaca.BENCHMARK | arena.BENCHMARK}:
            report["source"] = str(file)
            boards([report])  # fails here, where the file is named
            found.rates.append(report)
        case _:
            raise SdpoError(f"{file.name} is no report of an evaluation")


def games_of(file: Path, samples: int) -> list[Samples]:
    """The first pairs of each game in a file of pairs, as many of each.

    Args:
        samples: pairs of all games together; with more games than that, one of each.
    """
    if not samples:
        return []
    found = list[Samples]()
    game = groupby(_lines(file), lambda row: (row["persona"], *row["answers"]))
    for (persona, first, second), rows in game:
        pairs = list(islice(rows, samples))
        played = len(pairs) + sum(1 for _ in rows)
        one = Samples(persona=persona, first=first, second=second, played=played, pairs=pairs)
        found.append(one)
    each = max(samples // max(len(found), 1), 1)
    return [replace(one, pairs=one.pairs[:each]) for one in found]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.endswith("\n"))


def read_run(folder: Path) -> Run:
    """The curves of a run of `sdpo train` or `sdpo online`, or of one user's."""
    evaluations = folder / "evaluations.jsonl"
    seen = list(_lines(evaluations)) if evaluations.is_file() else []
    rows = list(_lines(folder / "metrics.jsonl"))
    return Run(name=folder.name, metrics=rows, evaluations=seen, kept=forgetting(seen))


def forgetting(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each phase's persona, its rate where the phase begins, at the phase's end, and at the end
    of each later phase.

    ``forgotten`` is how far it fell from its own phase's end to the run's end: what Chaudhry et al.
    (2018) call forgetting, of a rate.
    """
    ends = dict[int, Mapping[str, Any]]()
    starts = dict[int, Mapping[str, Any]]()
    before = None
    for row in evaluations:
        starts.setdefault(row["phase"], before or row)
        ends[row["phase"]] = before = row
    kept = list[dict[str, Any]]()
    for phase, end in ends.items():
        persona = end["persona"]
        if persona not in end["preference"]:
            continue
        later = {number: row["preference"].get(persona) for number, row in ends.items()}
        rates = {number: rate for number, rate in later.items() if number >= phase}
        last = rates[max(rates)]
        kept.append(
            {
                "phase": phase,
                "persona": persona,
                "start": starts[phase]["preference"].get(persona),
                "ends": rates,
                "forgotten": None if last is None else rates[phase] - last,
            }
        )
    return kept


def page(found: Found, title: str) -> str:
    """The whole page."""
    return render(
        TEMPLATE,
        title=title,
        found=found,
        forest=forest(found) if found.preference else "",
        curves=[(run, curves(run)) for run in found.runs],
        changes=[changes(report) for report in found.benchmarks],
        boards=boards(found.rates),
        numbers=NUMBERS,
        told=told,
        spans=spans,
    )


def forest(found: Found) -> Markup:
    """Win rates with their intervals: ties as half, and without ties, about the line of 50 %.

    Points are elements ``half-N`` and ``rate-N`` of row N, intervals ``half-N-interval`` and
    ``rate-N-interval``, the line is ``even``, and ``plot`` is 0 to 100 wide.
    """
    rows = [row for report in found.preference for row in report["compared"]]
    figure = Figure(figsize=(9, 0.8 + 0.36 * len(rows)), layout="constrained")
    ax = figure.subplots()
    _plain(ax)
    ax.patch.set_gid("plot")
    ax.axvline(50, color=INK, linewidth=1, linestyle=":", gid="even")
    for name, shift, colour, label in (
        ("half", -0.12, COLOURS[0], "ties as half"),
        ("rate", 0.12, COLOURS[1], "without ties"),
    ):
        ax.plot([], [], "o", color=colour, label=label)
        for at, row in enumerate(rows):
            if (one := row["wins"][name]) is not None:
                _point(ax, one, at + shift, colour, f"{name}-{at}")
    names = [
        f"{row['persona']}: {row['first']} against {row['second']}, {row['by']}" for row in rows
    ]
    ax.set_yticks(range(len(rows)), names, color=INK)
    ax.set_xlim(0, 100)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("wins, %", color=INK)
    ax.legend(
        frameon=False, fontsize=8, labelcolor=INK, ncols=2, loc="lower right", bbox_to_anchor=(1, 1)
    )
    return svg(figure)


def changes(report: Mapping[str, Any]) -> Markup:
    """Changes of all benchmarks with their intervals, about the line of no change.

    Points are elements ``change-N`` of changed row N, and the line is ``even``.
    """
    rows = [row for row in report["rows"] if row["change"]]
    if not rows:
        return Markup("")
    figure = Figure(figsize=(9, 0.8 + 0.3 * len(rows)), layout="constrained")
    ax = figure.subplots()
    _plain(ax)
    ax.axvline(0, color=INK, linewidth=1, linestyle=":", gid="even")
    colours = {"improved": COLOURS[2], "regressed": COLOURS[3], "unchanged": COLOURS[0]}
    for at, row in enumerate(rows):
        _point(ax, row["change"], at, colours[row["verdict"]], f"change-{at}")
    names = [f"{row['task']} {row['metric']}, {row['model']}" for row in rows]
    ax.set_yticks(range(len(rows)), names, color=INK)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("change, points", color=INK)
    return svg(figure)


def _point(ax: Axes, estimate: Mapping[str, float], at: float, colour: str, gid: str) -> None:
    """An estimate in percent, with its interval; whole where it lies on the plot's edge."""
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    common = {"color": colour, "clip_on": False}
    ax.plot([low, high], [at] * 2, linewidth=2, gid=f"{gid}-interval", **common)
    ax.plot(value, at, "o", gid=gid, **common)


def curves(run: Run) -> Markup:
    """A run over its updates: preference rates, and what may be spoiled meanwhile."""
    names = {name: says for name, says in CURVES.items() if any(name in r for r in run.metrics)}
    personas = sorted({name for row in run.evaluations for name in row["preference"]})
    tasks = sorted({name for row in run.metrics for name in row if name.startswith(BENCHMARK)})
    panels = bool(personas) + bool(tasks) + len(names)
    if not panels:
        return Markup("")
    across, down = min(panels, ACROSS), -(-panels // ACROSS)
    figure = Figure(figsize=(3.6 * across, 3 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for ax in axes[panels:]:
        ax.remove()
    borders = _borders(run.evaluations)
    if personas:
        ax = axes.pop(0)
        for persona, colour in zip(personas, _cycle(len(personas)), strict=True):
            rows = [r for r in run.evaluations if persona in r["preference"]]
            rates = [row["preference"][persona] for row in rows]
            ax.plot([r["step"] for r in rows], rates, "o-", color=colour, label=persona, ms=3)
        ax.set_ylim(0, 1.02)
        ax.set_title("rate of each preference", fontsize=10, color=INK)
        ax.legend(frameon=False, fontsize=8, labelcolor=INK)
        _over_updates(ax, borders)
    if tasks:
        ax = axes.pop(0)
        for task, colour in zip(tasks, _cycle(len(tasks)), strict=True):
            rows = [row for row in run.metrics if task in row]
            label = task.removeprefix(BENCHMARK)
            values = [row[task] for row in rows]
            ax.plot([r["step"] for r in rows], values, "o-", color=colour, label=label, ms=3)
        ax.set_title("scores of tasks", fontsize=10, color=INK)
        ax.legend(frameon=False, fontsize=8, labelcolor=INK)
        _over_updates(ax, borders)
    for ax, (name, says) in zip(axes, names.items(), strict=False):  # some panels are left over
        # a step without a response to train on has no entropy
        rows = [row for row in run.metrics if name in row and row.get("response/tokens") != 0]
        ax.plot([row["step"] for row in rows], [row[name] for row in rows], color=INK)
        ax.set_title(says, fontsize=10, color=INK)
        ax.set_ylim(bottom=0)
        _over_updates(ax, borders)
    return svg(figure)


def _borders(evaluations: Sequence[Mapping[str, Any]]) -> list[int]:
    """Updates at which a phase ends and another begins."""
    pairs = zip(evaluations, evaluations[1:], strict=False)
    return [one["step"] for one, other in pairs if other["phase"] != one["phase"]]


def _over_updates(ax: Axes, borders: Sequence[int]) -> None:
    _plain(ax)
    ax.set_xlabel("updates", color=INK)
    for step in borders:
        ax.axvline(step, color=INK, linestyle=":", linewidth=1)


def _plain(ax: Axes) -> None:
    ax.tick_params(colors=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def spans(row: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """An answer's tokens, their advantages, and the colour that shows them."""
    found = []
    for token, advantage in zip(row["tokens"], row["advantage"], strict=True):
        strength = min(abs(advantage) / FULL, 1.0)
        colour = "34, 160, 70" if advantage > 0 else "210, 40, 40"
        found.append((token, advantage, f"background: rgba({colour}, {STRONGEST * strength:.2f})"))
    return found


def _short(error: Exception) -> str:
    said = f"no field {error}" if isinstance(error, KeyError) else str(error)
    return said.strip().splitlines()[0] if said.strip() else type(error).__name__
