"""What a row's steps came to, read from the files that they left."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Read = Callable[[], float | None]
"""A number of ours; None: it is not there."""


class Target(NamedTuple):
    """A published number, None where only ours is told, and where ours is."""

    says: str
    published: float | None
    read: Read


def bench(folder: Path, task: str, metric: str, model: str) -> Read:
    """A model's score of `sdpo evaluate benchmarks`, in percent."""

    def read() -> float | None:
        for row in _json(folder / "benchmarks.json").get("rows", ()):
            if (row["task"], row["metric"], row["model"]) == (task, metric, model):
                return 100 * row["score"]["value"]
        return None

    return read


def won(folder: Path, persona: str) -> Read:
    """Wins of the first model, ties left out, in percent: by the last judge, or else the rule."""

    def read() -> float | None:
        found = None
        for row in _json(folder / "preference.json").get("compared", ()):
            told = "told" in row["first"].split()
            if row["persona"] == persona and not told and row["wins"]["rate"]:
                found = 100 * row["wins"]["rate"]["value"]
        return found

    return read


def signal_ratio(file: Path) -> Read:
    """How much irrelevant follow-ups move a model, of what relevant ones do."""

    def read() -> float | None:
        ratio = _json(file).get("ratio")
        return None if ratio is None else ratio["value"]

    return read


def curve(run: Path, persona: str, step: int) -> Read:
    """The rate of held-out answers that satisfy a persona after so many updates, in percent."""

    def read() -> float | None:
        rates = dict(_rates(run, persona))
        return None if step not in rates else 100 * rates[step]

    return read


def reached(run: Path, persona: str, rate: float, *, per_update: int, after: int = 0) -> Read:
    """Interactions behind an update until a persona's rate is at least so high."""
    return _first(run, persona, lambda value: value >= rate, per_update, after)


def rose_above(run: Path, persona: str, rate: float, *, per_update: int, after: int) -> Read:
    """Interactions behind an update until a persona's rate is above that."""
    return _first(run, persona, lambda value: value > rate, per_update, after)


def fell_below(run: Path, persona: str, rate: float, *, per_update: int, after: int) -> Read:
    """Interactions behind an update until a persona's rate is below that."""
    return _first(run, persona, lambda value: value < rate, per_update, after)


def _first(
    run: Path, persona: str, holds: Callable[[float], bool], per_update: int, after: int
) -> Read:
    def read() -> float | None:
        for step, rate in _rates(run, persona):
            if step > after and holds(rate):
                return float((step - after) * per_update)
        return None

    return read


def _rates(run: Path, persona: str) -> Iterator[tuple[int, float]]:
    file = run / "evaluations.jsonl"
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if persona in row["preference"]:
                yield row["step"], row["preference"][persona]


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
