"""How sure a comparison is: intervals by a paired bootstrap, and how far two judges agree.

A pair of answers to one prompt is drawn as a whole. Of outcomes that are counted, drawing n pairs
with replacement is one draw of a multinomial distribution, so that no resample is ever made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ..analysis.effects import Estimate

DRAWS = 10_000
LEVEL = 0.95

Outcome = Literal["win", "loss", "tie"]


def mean(values: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean of values or, of pairs, of their differences, over prompts.

    Raises:
        ValueError: there are none.
    """
    values_N = np.asarray(values, dtype=np.float64)
    if not values_N.size:
        raise ValueError("a mean of nothing")
    kinds, counts = np.unique(values_N, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(values_N.size, counts / values_N.size, DRAWS)
    return _estimate(float(values_N.mean()), drawn @ kinds / values_N.size)


def ratio(hits: ArrayLike, of: ArrayLike, *, seed: int = 0) -> Estimate:
    """Hits among all chances, where prompts have several each and are drawn as a whole.

    Args:
        hits: of each prompt; negative for what another model hit.
        of: each prompt's chances.

    Raises:
        ValueError: there are no chances.
    """
    hits_N, of_N = np.asarray(hits, dtype=np.float64), np.asarray(of, dtype=np.float64)
    if not of_N.sum():
        raise ValueError("a ratio of nothing")
    kinds, counts = np.unique(np.stack([hits_N, of_N]), axis=1, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(hits_N.size, counts / hits_N.size, DRAWS)
    hit, chances = drawn @ kinds[0], drawn @ kinds[1]
    some = chances > 0
    return _estimate(float(hits_N.sum() / of_N.sum()), hit[some] / chances[some])


@dataclass(frozen=True, kw_only=True)
class Wins:
    """How often the first of two models won.

    Attributes:
        rate: wins among decided pairs, ties left out; None where all tie.
        half: wins, and half of the ties, among all pairs.
        coverage: share of pairs that are decided.
    """

    wins: int
    losses: int
    ties: int
    rate: Estimate | None
    half: Estimate
    coverage: float


def wins(outcomes: Sequence[Outcome], *, seed: int = 0) -> Wins:
    """Count outcomes.

    Raises:
        ValueError: there are none.
    """
    names: tuple[Outcome, ...] = ("win", "loss", "tie")
    won, lost, tied = (sum(outcome == name for outcome in outcomes) for name in names)
    total = len(outcomes)
    if not total:
        raise ValueError("no pairs to count")
    shares = np.array([won, lost, tied]) / total
    drawn = np.random.default_rng(seed).multinomial(total, shares, DRAWS)
    decided = drawn[:, 0] + drawn[:, 1]
    some = decided > 0
    rate = None
    if won + lost:
        rate = _estimate(won / (won + lost), drawn[some, 0] / decided[some])
    half = _estimate((won + tied / 2) / total, (drawn[:, 0] + drawn[:, 2] / 2) / total)
    coverage = (won + lost) / total
    return Wins(wins=won, losses=lost, ties=tied, rate=rate, half=half, coverage=coverage)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two judges say the same.

    Attributes:
        share: of pairs with the same outcome.
        kappa: Cohen's: what of the agreement is not chance (1960); None where chance alone would
            give all of it.
    """

    pairs: int
    share: float
    kappa: float | None


def agreement(one: Sequence[Outcome], other: Sequence[Outcome]) -> Agreement:
    """Of outcomes of the same pairs, in the same order."""
    same = float(np.mean([a == b for a, b in zip(one, other, strict=True)]))
    chance = sum(
        float(np.mean([a == name for a in one])) * float(np.mean([b == name for b in other]))
        for name in ("win", "loss", "tie")
    )
    kappa = None if chance >= 1 else (same - chance) / (1 - chance)
    return Agreement(pairs=len(one), share=same, kappa=kappa)


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=value, low=float(low), high=float(high))
