"""What a demo claims, what it measured, and whether the claim holds."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rich.table import Table

from ..analysis.signal import Signal

GREEN, RED = "30,150,60", "200,40,40"


class Target(NamedTuple):
    """A claim, met if ``low <= value <= high``."""

    claim: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def bounds(self) -> str:
        """The target as a table shows it."""
        if math.isinf(self.low):
            return f"≤ {self.high:g}"
        return f"≥ {self.low:g}" if math.isinf(self.high) else f"{self.low:g} … {self.high:g}"


class Checked(NamedTuple):
    """A target and what was measured."""

    claim: str
    value: float
    bounds: str
    met: bool


def value_of(report: Mapping, name: str) -> float:
    """The report's value named ``section.key…``."""
    for key in name.split("."):
        report = report[key]
    return report  # pyright: ignore[reportReturnType]


def check(report: Mapping, targets: Mapping[str, Target]) -> list[Checked]:
    """Every target, by the name of its value in the report, in order."""
    values = {name: value_of(report, name) for name in targets}
    return [
        Checked(t.claim, values[name], t.bounds, t.low <= values[name] <= t.high)
        for name, t in targets.items()
    ]


def all_met(report: Mapping, targets: Mapping[str, Target]) -> bool:
    """Whether every target is met."""
    return all(row.met for row in check(report, targets))


def table(title: str, rows: Iterable[Checked]) -> Table:
    """The targets as a terminal shows them."""
    out = Table(title=title)
    for column in ("claim", "measured", "target", ""):
        out.add_column(column, justify="left" if column == "claim" else "right")
    for row in rows:
        met = "[green]met[/]" if row.met else "[bold red]missed[/]"
        out.add_row(row.claim, f"{row.value:.3f}", row.bounds, met)
    return out


def coloured(row: Signal) -> list[tuple[str, float, str]]:
    """(token, advantage, CSS): green where hindsight makes it likelier, red where less likely."""
    return [
        (token, a, f"background:rgba({GREEN if a > 0 else RED},{min(abs(a) / 2, 1.0):.2f})")
        for token, a in zip(row["tokens"], row["advantage"], strict=True)
    ]
