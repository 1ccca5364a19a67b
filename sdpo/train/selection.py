"""Selection by signal: what a run trains on, and how much each interaction counts, by the scores
that `sdpo data score` wrote."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..errors import DataError, SdpoError
from ..interactions import Interaction
from ..io.fields import as_object, kind
from ..io.files import sha256
from ..io.rows import read_rows

CAP = 4.0
"""Largest factor of a weight. Mean |A| has a heavy tail: without a cap, the few interactions that
a model finds most surprising, quirks of the text among them, would outweigh the rest of a step."""


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Selection by signal; by default every interaction is trained on with its own weight."""

    scores: str | None = None
    """File that ``sdpo data score`` wrote for this run's data."""
    min_signal: float = 0.0
    """Interactions whose mean |advantage|, in nats, is smaller are left out."""
    min_relevance: float | None = None
    """Interactions are left out whose mean |advantage| exceeds the one with another conversation's
    follow-up by less than this, in nats."""
    drop_outliers: bool = False
    """Leave out interactions marked as outliers, of either tail."""
    weight: Literal["none", "signal"] = "none"
    """``signal``: weights are multiplied by mean |advantage| over its average, at most 4 times."""

    def __post_init__(self):
        if not (math.isfinite(self.min_signal) and self.min_signal >= 0):
            raise SdpoError(f"select.min_signal must be 0 or more nats, got {self.min_signal}")
        if self.min_relevance is not None and not math.isfinite(self.min_relevance):
            raise SdpoError(f"select.min_relevance must be finite, got {self.min_relevance}")
        if self.selects and self.scores is None:
            raise SdpoError(
                "select.* needs select.scores: the file that `sdpo data score` writes for the data"
            )
        if self.scores is not None and not self.selects:
            raise SdpoError(
                "select.scores alone selects nothing: set select.min-signal, select.min-relevance, "
                "select.drop-outliers or select.weight signal, or leave it out"
            )

    @property
    def selects(self) -> bool:
        """Whether anything is selected or weighted."""
        asked = self.min_signal, self.min_relevance is not None, self.drop_outliers
        return any(asked) or self.weight != "none"


def selection_sha256(config: SelectConfig) -> str:
    """SHA-256, in hex, of the settings and the content of the file of scores: together they decide
    which interactions are kept and how much they count.

    Raises:
        DataError: that file cannot be read.
    """
    assert config.scores is not None
    try:
        settings = {**asdict(config), "scores": sha256(config.scores)}
    except OSError as error:
        raise DataError(f"{config.scores}: cannot be read ({error.strerror})") from None
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Selection:
    """The interactions to train on, and how many were left out, by reason."""

    interactions: list[Interaction]
    dropped: Counter[str]

    def __str__(self) -> str:
        kept = len(self.interactions)
        told = f"kept {kept:,} of {kept + self.dropped.total():,}"
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.most_common())
        return f"{told}: {reasons}" if reasons else told


class Judge:
    """Maps an interaction's id to its mean |advantage|, or to the reason why it is left out.

    Raises:
        DataError: the scores cannot be read, or there is none for an id.
    """

    def __init__(self, config: SelectConfig):
        assert config.scores is not None
        self.path, self._verdicts = config.scores, dict[str, float | str]()
        for _, place, row in read_rows(config.scores):
            if isinstance(row, DataError):
                raise row
            try:
                row = as_object(row, "row")
                id, signal = row.get("id"), _number(row, "mean_abs_advantage")
                if not isinstance(id, str):
                    raise DataError(f"found {kind(id)}, not text", field="id", hint=_AGAIN)
                self._verdicts[id] = _reason(row, config) or signal
            except DataError as error:
                raise error.at(file=str(config.scores), row=place) from None

    def __call__(self, id: str) -> float | str:
        if (verdict := self._verdicts.get(id)) is None:
            raise DataError(
                f"{self.path}: no score of interaction {id}; score the same file again with "
                "`sdpo data score`"
            )
        return verdict


_AGAIN = "Score the same file again with `sdpo data score`"


def _number(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"found {kind(value)}, not a finite number", field=name, hint=_AGAIN)
    return float(value)


def _reason(row: dict[str, Any], config: SelectConfig) -> str | None:
    """Why an interaction is left out, if it is."""
    if _number(row, "mean_abs_advantage") < config.min_signal:
        return "below min_signal"
    if config.min_relevance is not None and _number(row, "relevance") < config.min_relevance:
        return "below min_relevance"
    if config.drop_outliers and row.get("outlier") is not None:
        return "outliers"
    return None


def choose(interactions: Iterable[Interaction], config: SelectConfig) -> Selection:
    """The interactions to train on, in their order; those left out are not held in memory.

    Raises:
        DataError: an interaction has no score, nothing is left, or nothing has any signal.
    """
    if not config.selects:
        return Selection(list(interactions), Counter())
    judge, kept, signals, dropped = Judge(config), [], [], Counter[str]()
    for i in interactions:
        verdict = judge(i.id)
        if isinstance(verdict, str):
            dropped[verdict] += 1
        else:
            kept.append(i)
            signals.append(verdict)
    selection = Selection(kept, dropped)
    if dropped and not kept:
        raise DataError(f"{config.scores}: nothing is left to train on ({selection}); select less")
    if config.weight == "none" or not kept:
        return selection
    if not (mean := sum(signals) / len(signals)):
        problem = "every mean_abs_advantage is 0; this model learns nothing here"
        raise DataError(f"{config.scores}: {problem}")
    factors = (min(signal / mean, CAP) for signal in signals)
    kept = [replace(i, weight=i.weight * f) for i, f in zip(kept, factors, strict=True)]
    return Selection(kept, dropped)
