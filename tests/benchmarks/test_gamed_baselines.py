"""The table of AlpacaEval's gamed baselines: what is recovered from a fit made it."""

import csv
import gzip
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from benchmarks.gamed_baselines import (
    BASELINES,
    Fit,
    probabilities,
    statistics,
    write_table,
)
from sdpo.evaluate.alpaca import GAMED

PUBLISHED = Path(__file__).parents[1] / "evaluate/published/alpaca_annotations.json.gz"


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    """(1610, 3): difficulties, differences in length, verdicts."""
    rows = list(csv.DictReader(gzip.decompress(GAMED.read_bytes()).decode().splitlines()))
    assert [row["model"] for row in rows] == [name for name in BASELINES for _ in range(805)]
    names = "instruction_difficulty", "std_delta_len", "preference"
    return np.array([[float(row[name]) for name in names] for row in rows])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_fit_tells_the_sums_that_it_was_made_with(table, tmp_path):
    """alpaca_eval fits gemma-7b-it with the table; its weights alone give the table's sums back."""
    from alpaca_eval.metrics import glm_winrate

    verdicts = json.loads(gzip.decompress(PUBLISHED.read_bytes()))
    with patch.object(glm_winrate, "hf_hub_download", lambda **_: str(GAMED)):
        glm_winrate.get_length_controlled_winrate(verdicts, save_weights_dir=tmp_path)
    (saved,) = tmp_path.rglob("*.csv")
    weights = np.array(saved.read_text().splitlines()[1].split(",")[1:], dtype=float)
    features_GK = np.stack([np.tanh(table[:, 1]), table[:, 0]], axis=1)
    found = statistics(Fit("gemma-7b-it", verdicts, weights), table[:805, 0], features_GK)
    assert found == pytest.approx(features_GK.T @ table[:, 2], abs=0.5)


def test_probabilities_have_the_sums_asked_for(table):
    features_GK = np.stack([np.tanh(table[:, 1]), table[:, 0]], axis=1)
    sums = np.array([-180.0, 400.0])
    p = probabilities(features_GK, sums)
    assert features_GK.T @ p == pytest.approx(sums)
    assert p.min() > 0 and p.max() < 1


def test_the_same_numbers_are_the_same_bytes(table, tmp_path):
    write_table(tmp_path / "t.csv.gz", table[:, 1], table[:805, 0], table[:, 2])
    written, shipped = (gzip.decompress(p.read_bytes()) for p in (tmp_path / "t.csv.gz", GAMED))
    assert written == shipped
