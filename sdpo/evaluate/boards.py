"""What `sdpo evaluate alpaca` and `sdpo evaluate arena` reported, as tables of a page: one for each
benchmark, with all models in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import alpaca, arena

Report = Mapping[str, Any]
"""What a command wrote, and in ``source`` the file that has it."""
NUMBERS = (
    "win rate, %",
    "length-controlled win rate, %",
    "characters",
    "verdicts",
    "judged pairs",
)
"""Columns that hold numbers; the others hold text."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """A benchmark's table.

    Attributes:
        key: id of its heading.
        rows: column -> text, all with the same columns.
        notes: what the numbers are, what is missing, and where they are from.
        styles: names of sets of answers, and their style markers.
    """

    key: str
    title: str
    rows: Sequence[Mapping[str, str]]
    notes: Sequence[str]
    styles: Sequence[tuple[str, Report]]


def boards(reports: Sequence[Report]) -> list[Board]:
    """The tables of all benchmarks of which there are reports.

    Raises:
        KeyError: a report lacks a field.
    """
    makers = {alpaca.BENCHMARK: alpaca_board, arena.BENCHMARK: arena_board}
    own = {name: [one for one in reports if one["benchmark"] == name] for name in makers}
    return [make(own[name]) for name, make in makers.items() if own[name]]


def alpaca_board(reports: Sequence[Report]) -> Board:
    """AlpacaEval 2: a row for each report."""
    rows, styles = list[Mapping[str, str]](), list[tuple[str, Report]]()
    for one in reports:
        model, reference = one["style"]["model"], one["style"]["reference"]
        styles += [(one["model"], model), (one["reference"], reference)]
        rows.append(
            {
                "model": one["model"],
                "win rate, %": _rate(one["win_rate"], one["standard_error"]),
                "length-controlled win rate, %": _rate(
                    one["length_controlled_winrate"], one["lc_standard_error"]
                ),
                "characters": f"{one['avg_length']:,}",
                "verdicts": f"{one['n_total']:,} of {model['answers']:,}",
                "compared with": one["reference"],
                "judged by": _judges(one),
            }
        )
    notes = [
        "Mean verdict for the model, from 0 to 100 % with a draw as one half, ± its standard "
        "error, as the package alpaca_eval (github.com/tatsu-lab/alpaca_eval) computes it. "
        "Length-controlled: what its fit predicts for answers as long as the reference's. Rates "
        "compare only under one judge and one reference. Characters are the mean of the model's "
        "answers."
    ]
    if none := [one["model"] for one in reports if one["length_controlled_winrate"] is None]:
        notes.append(
            f"No length-controlled win rate of {_and(none)}: the fit knows only AlpacaEval's 805 "
            "instructions, in their order."
        )
    return Board(
        key="alpaca",
        title=alpaca.BENCHMARK,
        rows=rows,
        notes=[*notes, *_unnamed(reports), _sources(reports)],
        styles=_once(styles),
    )


def arena_board(reports: Sequence[Report]) -> Board:
    """Arena-Hard v2: a row for each category of each report, those of a category together."""
    scores = [(one, score) for one in reports for score in one["scores"]]
    categories = list(dict.fromkeys([*arena.BASELINES, *(s["category"] for _, s in scores)]))
    scores.sort(key=lambda pair: categories.index(pair[1]["category"]))
    rows, styles = list[Mapping[str, str]](), list[tuple[str, Report]]()
    for one, score in scores:
        category = _words(score["category"])
        names = f"{one['model']}, {category}", f"{score['baseline']}, {category}"
        styles += zip(names, (score["model"], score["reference"]), strict=True)
        rows.append(
            {
                "model": one["model"],
                "category": category,
                "win rate, %": f"{score['win_rate']:.1f} [{score['low']:.1f}, {score['high']:.1f}]",
                "characters": f"{score['model']['characters']:,.0f}",
                "judged pairs": f"{score['pairs']:,} of {score['pairs'] + score['unjudged']:,}",
                "compared with": score["baseline"],
                "judged by": _judges(score),
            }
        )
    notes = [
        "Mean verdict for the model over both orders of the answers, with a tie as one half and "
        "“much better” counted three times, without style control: judgments in the format of "
        "github.com/lmarena/arena-hard-auto. In brackets, intervals of 95 % by a bootstrap over "
        "questions. Each judge has a pair of games for each question; a pair of which a game has "
        "no verdict is left out. Characters are the mean of the model's answers."
    ]
    for category in categories:
        with_it = {one["source"] for one, score in scores if score["category"] == category}
        if none := [one["model"] for one in reports if one["source"] not in with_it]:
            notes.append(
                f"No {_words(category)} of {_and(none)}: the baseline's answers were not given."
            )
    return Board(
        key="arena",
        title=arena.BENCHMARK,
        rows=rows,
        notes=[*notes, _sources(reports)],
        styles=_once(styles),
    )


def _rate(percent: float | None, error: float | None) -> str:
    if percent is None:
        return "–"
    return f"{percent:.2f}" if error is None else f"{percent:.2f} ± {error:.2f}"


def _judges(report: Report) -> str:
    return ", ".join(report.get("judges", ())) or "–"


def _unnamed(reports: Sequence[Report]) -> list[str]:
    none = [one["model"] for one in reports if not one.get("judges")]
    return [f"The verdicts on {_and(none)} do not say whose they are."] if none else []


def _sources(reports: Sequence[Report]) -> str:
    return f"From {_and([one['source'] for one in reports])}."


def _once(styles: Sequence[tuple[str, Report]]) -> list[tuple[str, Report]]:
    """Without what is there already: models have references in common."""
    return [style for i, style in enumerate(styles) if style not in styles[:i]]


def _words(category: str) -> str:
    return category.replace("_", " ")


def _and(names: Sequence[str]) -> str:
    *most, last = dict.fromkeys(names)
    return f"{', '.join(most)} and {last}" if most else last
