"""Cost as a sum of few terms, fitted to what was measured.

N response tokens, V vocabulary, D hidden size.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Spread, interleaved
from benchmarks.peers import ours
from benchmarks.problems import Problem, problem

TERMS = ("N V D", "N V", "V D", "1")


@dataclass(frozen=True)
class Fit:
    """seconds = sum of coefficients x terms."""

    coefficients: tuple[float, ...]
    errors: tuple[float, ...]
    """Relative error at each measured point."""
    source: str = ""

    def at(self, terms: Sequence[float]) -> float:
        return float(np.dot(self.coefficients, terms))

    @property
    def worst(self) -> float:
        return max(map(abs, self.errors))

    @property
    def typical(self) -> float:
        return median(map(abs, self.errors))


def objective_terms(n: float, v: float, d: float) -> tuple[float, ...]:
    """``TERMS`` of a shape."""
    return n * v * d, n * v, v * d, 1.0


def fit(points: Sequence[tuple[Sequence[float], float]], source: str = "") -> Fit:
    """Non-negative least squares of the relative residuals: the most negative coefficient is
    dropped until there is none."""
    terms = np.array([t for t, _ in points], dtype=float)
    seconds = np.array([s for _, s in points], dtype=float)
    design = terms / seconds[:, None]
    scale = np.linalg.norm(design, axis=0)
    found, kept = np.zeros(design.shape[1]), list(range(design.shape[1]))
    while kept:
        x = np.linalg.lstsq(design[:, kept] / scale[kept], np.ones(len(points)), rcond=None)[0]
        if x.min() >= 0:
            found[kept] = x / scale[kept]
            break
        kept.pop(int(x.argmin()))
    errors = terms @ found / seconds - 1
    return Fit(tuple(map(float, found)), tuple(map(float, errors)), source)


def fit_objective(points: Sequence[tuple[Sequence[int], float]], source: str) -> Fit:
    """The objective's ((N, V, D), seconds) over ``TERMS``."""
    return fit([(objective_terms(*shape), seconds) for shape, seconds in points], source)


def measured_points(rows: Sequence[Mapping[str, Any]], gpu: bool) -> dict[str, list]:
    """Device and dtype -> ((N, V, D), seconds) of the reverse KL in rows of ``divergence``."""
    found = defaultdict(list)
    for r in rows:
        mine = r.get("benchmark") == "divergence" and r.get("contender") == "sdpo"
        if mine and r.get("kind") == "reverse_kl" and r.get("verdict") == "right":
            about = r["machine"]
            if "both" in r.get("seconds", {}) and (about["cuda"] is not None) == gpu:
                shape = r["tokens"], r["vocabulary"], r["hidden"]
                key = f"{about['device']}, {r['dtype']}"
                found[key].append((shape, r["seconds"]["both"]["median"]))
    return {k: v for k, v in found.items() if len(v) > len(TERMS)}


SHAPES = (
    *((n, 4096, 128) for n in (64, 256, 512)),
    *((128, v, 128) for v in (1024, 8192, 16_384)),
    *((128, 4096, d) for d in (256, 512)),
    (512, 1024, 64),
    (16, 16_384, 256),
)
"""N, V, D that are measured where there are no results."""


def measure_objective(seconds: float) -> list[tuple[tuple[int, int, int], float]]:
    """((N, V, D), seconds) of forward and backward on this CPU in float32."""
    device = torch.device("cpu")

    def both(x: Problem, _: Any) -> None:
        x.forget()
        loss(x).backward()

    loss = ours("reverse_kl")
    problems = {str(shape): problem(*shape, 0.1, torch.float32, device) for shape in SHAPES}
    tasks = {name: partial(both, x) for name, x in problems.items()}
    times = interleaved(tasks, device, seconds / len(tasks), least=5)
    medians = [Spread.of(map(sum, rounds)).median for rounds in times.values()]
    return list(zip(SHAPES, medians, strict=True))
