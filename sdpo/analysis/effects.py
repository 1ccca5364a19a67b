"""How much follow-ups of each condition move responses: numbers over many rows.

A is log q(y_t) - log p(y_t) in nats. An interaction counts with figures over its response tokens,
in float64; of these come means over interactions, with 95% intervals by bootstrap over whole
conversations. The ratio is mean |A| under irrelevant follow-ups over mean |A| under relevant ones:
of a file that names none, those swapped between conversations over the responses' own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .conditions import OWN, SWAPPED
from .score import interval

NEAR_ZERO = 0.01
"""|A| below which a token counts as not moved, in nats."""
FIRST = 15
"""Tokens at the beginning of a response that are looked at apart, as the paper's figure does."""
TENTH = 0.1
"""Largest ratio that is called near zero."""
MEASURES = {
    "mean_abs_advantage": "mean |A|",
    "share_near_zero": f"|A| < {NEAR_ZERO}",
    "mean_abs_advantage_first": f"|A|, first {FIRST}",
    "mean_advantage": "mean A",
}
"""Figure of an interaction -> what a table calls it."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, or a ratio of two, and the interval in which it lies at level 0.95."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}\n{self.low:.2f} to {self.high:.2f}"


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What follow-ups of each condition do to a model's responses."""

    interactions: int
    tokens: int
    conditions: dict[str, dict[str, Estimate]]
    """Condition -> figure, as in `MEASURES`, -> its mean."""
    compared: tuple[str, str] | None
    """The conditions whose follow-ups are irrelevant and relevant, if the first are there."""
    ratio: Estimate | None
    """Mean |A| of these, the first over the second; None: there is none, or the second is 0."""
    kinds: "dict[str, Effects]" = field(default_factory=dict)
    """The same by kind of follow-up."""

    @property
    def verdict(self) -> str:
        """A sentence on the ratio."""
        if self.compared is None:
            return "no irrelevant follow-ups to compare with"
        if self.ratio is None:
            return "relevant follow-ups do not move this model at all"
        irrelevant, relevant = self.compared
        r = self.ratio
        near = "near zero" if r.high <= TENTH else "not near zero"
        if r.low <= TENTH < r.high:
            near = "these rows do not tell whether that is near zero"
        return (
            f"irrelevant follow-ups move this model {r.value:.2f} times as much as relevant ones "
            f"({irrelevant} / {relevant}, 95%: {r.low:.2f} to {r.high:.2f}): {near}"
        )


@dataclass(frozen=True)
class _Row:
    conversation: str
    kind: str
    tokens: int
    figures: NDArray[np.float64]
    """(conditions, measures)"""


class Tally:
    """The figures of interactions, gathered one by one; their tokens are not kept."""

    def __init__(self):
        self.names: list[str] = []
        self._rows: list[_Row] = []

    def add(
        self, advantages: Mapping[str, Sequence[float]], *, conversation: str, kind: str = ""
    ) -> None:
        """Add an interaction.

        Args:
            advantages: condition -> A of every response token; the conditions of all interactions
                are the same.
        """
        self.names = self.names or list(advantages)
        rows = [figures(advantages[name]) for name in self.names]
        tokens = len(next(iter(advantages.values())))
        self._rows.append(_Row(conversation, kind, tokens, np.array(rows)))

    def effects(self, seed: int = 0) -> Effects:
        """Means and intervals over all interactions, and over those of each kind.

        Args:
            seed: of the bootstrap.
        """
        kinds = sorted({row.kind for row in self._rows} - {""})
        groups = {kind: [row for row in self._rows if row.kind == kind] for kind in kinds}
        return self._effects(
            self._rows, seed, {kind: self._effects(rows, seed) for kind, rows in groups.items()}
        )

    def _effects(
        self, rows: Sequence[_Row], seed: int, kinds: dict[str, Effects] | None = None
    ) -> Effects:
        values = np.stack([row.figures for row in rows])
        groups = [row.conversation for row in rows]

        def mean(of: NDArray) -> Estimate:
            low, high = interval([of], groups, lambda means: means[0], seed)
            return Estimate(value=float(of.mean()), low=low, high=high)

        conditions = {
            name: {m: mean(values[:, c, k]) for k, m in enumerate(MEASURES)}
            for c, name in enumerate(self.names)
        }
        compared, ratio = _compared(self.names), None
        sizes = {name: values[:, c, 0] for c, name in enumerate(self.names)}
        if compared is not None and sizes[compared[1]].any():
            columns = [sizes[name] for name in compared]
            low, high = interval(columns, groups, _ratio, seed)
            value = _ratio(np.array([column.mean() for column in columns]))
            ratio = Estimate(value=value, low=low, high=high)
        return Effects(
            interactions=len(rows),
            tokens=sum(row.tokens for row in rows),
            conditions=conditions,
            compared=compared,
            ratio=ratio,
            kinds=kinds or {},
        )


def figures(advantage: Sequence[float]) -> tuple[float, ...]:
    """The `MEASURES` of an interaction under one condition."""
    a = np.asarray(advantage, np.float64)
    size = np.abs(a)
    return size.mean(), (size < NEAR_ZERO).mean(), size[:FIRST].mean(), a.mean()


def _ratio(means: NDArray) -> float:
    return float(means[0] / max(means[1], 1e-12))  # rows drawn may all be unmoved


def _compared(names: Sequence[str]) -> tuple[str, str] | None:
    """The conditions that stand for irrelevant and relevant follow-ups."""
    irrelevant = [name for name in ("irrelevant", SWAPPED) if name in names]
    return (irrelevant[0], "relevant" if "relevant" in names else OWN) if irrelevant else None


def print_effects(found: Effects, console: Console) -> None:
    """Print a table of all interactions and of each kind, and the verdict."""
    table = Table(title="nats per token, with 95% intervals", title_justify="left", box=SIMPLE)
    for name in ("follow-up", *MEASURES.values()):
        table.add_column(name, overflow="fold")
    for name, part in {"all": found, **found.kinds}.items():
        table.add_row(Text(f"{name}: {part.interactions:,}", style="bold"))
        for condition, values in part.conditions.items():
            table.add_row(Text(condition), *(str(values[m]) for m in MEASURES))
        table.add_section()
    console.print(table)
    for name, part in found.kinds.items():
        console.print(f"{name}: {part.verdict}", markup=False, highlight=False)
    console.print(found.verdict, markup=False, highlight=False)
