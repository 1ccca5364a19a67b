"""Make `sdpo/evaluate/gamed.csv.gz`: AlpacaEval's gamed baselines, recovered from published fits.

    git clone https://github.com/tatsu-lab/alpaca_eval      # Apache-2.0; commit cd543a1
    python -m benchmarks.gamed_baselines alpaca_eval

The length-controlled win rate is fitted with data that only the hub has, df_gamed.csv: 805
difficulties, and a judge's verdicts on two gamed baselines. The repository publishes what was
fitted with it, and that is enough:

- Difficulties. Some annotations have `glm_preference`, where logit(glm_preference) = b + d x
  difficulty with the model's published weights b and d. The two files that have it must agree.
- Verdicts. The two baselines enter a fit through s = sum_j y_j x_j only. At the weights w of a fit
  with penalty C, the gradient is 0: X'(y - p) + 0.1 (s - G'q) = sign(w) / C, where X are the
  model's features and G the baselines', p and q what w predicts for them, and 0.1 the baselines'
  weight. The intercept is 0 for the baselines, so its gradient alone tells C, and then the others
  tell s: the median over all models. As verdicts the table has the probabilities of the logistic
  model with that s.

It ends with the length-controlled win rates under the table, beside the published ones.
"""

import csv
import gzip
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sdpo.evaluate.alpaca import GAMED, _length_controlled

JUDGE = "weighted_alpaca_eval_gpt4_turbo"
REFERENCE = "gpt4_1106_preview"
BASELINES = (f"{REFERENCE}_verbose", f"{REFERENCE}_concise")
KNOW_DIFFICULTY = ("vicuna-13b-v1.5", "vicuna-7b-v1.5")
"""Models whose annotations are there with `glm_preference`, in a folder in the folder."""
WEIGHT = 0.1
"""Of a gamed baseline's row in a fit."""
PENALTIES = np.logspace(-4, 4, 10)
"""The C that cross-validation chooses from."""
LARGEST = 4 << 20
"""Bytes of an annotations file beyond which it is not read; the 50 smaller ones are enough."""


@dataclass(frozen=True)
class Fit:
    """A model's verdicts, and the weights that were fitted to them."""

    model: str
    verdicts: list[dict]
    weights: NDArray
    """(3,): of the difference in length, of the difficulty and of the model."""


def sigmoid(x: NDArray) -> NDArray:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def read_weights(clone: Path) -> dict[str, NDArray]:
    """(3,) by model: the weights of all published fits."""
    folder = clone / "src/alpaca_eval/metrics/weights" / JUDGE / "length_controlled_v1"
    rows = list(csv.reader((folder / f"baseline_{REFERENCE}.csv").open(encoding="utf-8")))[1:]
    return {name: np.array([float(x) for x in weights]) for name, *weights in rows}


def read_outputs(clone: Path, model: str) -> list[dict]:
    """A model's outputs."""
    return json.loads((clone / "results" / model / "model_outputs.json").read_text("utf-8"))


def read_difficulties(clone: Path, weights: dict[str, NDArray], order: list[str]) -> NDArray:
    """(805,), which both files that know them agree on."""
    found = []
    for model in KNOW_DIFFICULTY:
        path = clone / "results" / model / JUDGE / JUDGE / "annotations.json"
        rows = {row["instruction"]: row for row in json.loads(path.read_text("utf-8"))}
        p = np.array([rows[instruction]["glm_preference"] for instruction in order])
        found.append((np.log(p / (1 - p)) - weights[model][2]) / weights[model][1])
    difference = float(np.abs(found[0] - found[1]).max())
    if difference > 1e-7:
        raise ValueError(f"the difficulties of {KNOW_DIFFICULTY} differ by {difference}")
    return found[0]


def read_fits(clone: Path, weights: dict[str, NDArray], order: list[str]) -> list[Fit]:
    """The published fits whose verdicts are there for every instruction."""
    fits = []
    for model, w in sorted(weights.items()):
        path = clone / "results" / model / JUDGE / "annotations.json"
        if not w.any() or not path.is_file() or path.stat().st_size > LARGEST:
            continue
        rows = json.loads(path.read_text("utf-8"))
        whole = [row["instruction"] for row in rows] == order
        if whole and all(row["preference"] is not None for row in rows):
            fits.append(Fit(model, rows, w))
    return fits


def standardized(lengths: list[int]) -> NDArray:
    """Differences in length over their standard deviation, as alpaca_eval has them."""
    differences = np.array(lengths, dtype=float)
    return differences / differences.std(ddof=1)


def statistics(fit: Fit, difficulties: NDArray, features_GK: NDArray) -> NDArray:
    """(2,): s as this fit tells it."""
    lengths = [len(row["output_1"]) - len(row["output_2"]) for row in fit.verdicts]
    ones = np.ones(len(lengths))
    features = np.stack([np.tanh(standardized(lengths)), difficulties, ones], axis=1)
    y = np.array([row["preference"] or 1.5 for row in fit.verdicts], dtype=float) - 1
    gradient = features.T @ (y - sigmoid(features @ fit.weights))
    penalty = min(1 / PENALTIES, key=lambda p: abs(p - abs(gradient[2])))
    own = gradient[:2] - np.sign(fit.weights[:2]) * penalty
    return features_GK.T @ sigmoid(features_GK @ fit.weights[:2]) - own / WEIGHT


def probabilities(features_GK: NDArray, sums_K: NDArray) -> NDArray:
    """(G,) of the logistic model under which the features' sums are as given."""
    w = np.zeros(len(sums_K))
    for _ in range(50):  # Newton's
        p = sigmoid(features_GK @ w)
        w += np.linalg.solve(
            (features_GK.T * (p * (1 - p))) @ features_GK, sums_K - features_GK.T @ p
        )
    return sigmoid(features_GK @ w)


def write_table(out: Path, lengths: NDArray, difficulties: NDArray, p: NDArray) -> None:
    """Write the table in the format of df_gamed.csv; the same bytes for the same numbers."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    names = "instruction_difficulty", "std_delta_len", "preference"
    rows.writerow(("model", "index", *names, "not_gamed_baseline"))
    n = len(difficulties)
    for i in range(len(p)):
        numbers = difficulties[i % n], lengths[i], p[i]
        rows.writerow((BASELINES[i // n], i % n, *(f"{x:.8f}" for x in numbers), False))
    partial = out.with_name(f".{out.name}.partial")
    partial.write_bytes(gzip.compress(text.getvalue().encode(), 9, mtime=0))
    os.replace(partial, out)


def main(clone: Annotated[Path, tyro.conf.Positional], /, *, out: Path = GAMED) -> None:
    """Write the table from a clone of alpaca_eval's repository.

    Args:
        clone: the clone's folder.
        out: file to write.
    """
    weights, base = read_weights(clone), read_outputs(clone, REFERENCE)
    order = [row["instruction"] for row in base]
    difficulties = read_difficulties(clone, weights, order)
    lengths = []
    for model in BASELINES:
        pairs = zip(base, read_outputs(clone, model), strict=True)
        lengths.append(standardized([len(a["output"]) - len(b["output"]) for a, b in pairs]))
    lengths = np.concatenate(lengths)
    features_GK = np.stack([np.tanh(lengths), np.tile(difficulties, len(BASELINES))], axis=1)
    fits = read_fits(clone, weights, order)
    sums = np.array([statistics(fit, difficulties, features_GK) for fit in fits])
    print(f"s from {len(fits)} fits: {np.median(sums, axis=0)} ± {sums.std(axis=0)}")
    p = probabilities(features_GK, np.median(sums, axis=0))
    write_table(out, lengths, difficulties, p)
    compare(fits, difficulties)


def compare(fits: list[Fit], difficulties: NDArray) -> None:
    """Print the length-controlled win rates with the shipped table, and the published ones."""
    table, errors = Table("model", "published", "with the table"), []
    for fit in fits:
        published = 100 * float(sigmoid(fit.weights[2] + fit.weights[1] * difficulties).mean())
        found = float(_length_controlled(fit.verdicts)["length_controlled_winrate"])
        errors.append(abs(found - published))
        table.add_row(fit.model, f"{published:.3f}", f"{found:.3f}")
    Console().print(table)
    close = sum(error < 0.02 for error in errors)
    print(f"{close} of {len(fits)} within 0.02, the furthest {max(errors):.2f} off")


if __name__ == "__main__":
    tyro.cli(main)
