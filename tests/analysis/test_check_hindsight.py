"""The pre-flight check on models of random weights, and its rules on made-up figures."""

import json
from dataclasses import replace

import numpy as np
import pytest

from helpers import tiny
from sdpo.analysis.advantages import Reader
from sdpo.analysis.check_hindsight import CONTEXTS, _findings, check, sample
from sdpo.analysis.options import ReaderOptions
from sdpo.cli import main
from sdpo.errors import DataError
from sdpo.interactions import read_interactions, write_interactions

N = 40


@pytest.fixture
def data(tmp_path):
    """Twenty conversations of two interactions."""
    path = tmp_path / "i.jsonl"
    tiny.make_interactions(path, N)
    rows = read_interactions(path)
    write_interactions(path, [replace(i, id=f"c{n // 2}_{n % 2}") for n, i in enumerate(rows)])
    return str(path)


@pytest.mark.parametrize("kind", ["qwen3", "llama-tied"])
def test_random_weights_make_no_use_of_hindsight(kind, data, models, tmp_path, capsys):
    out = tmp_path / "check.json"
    asked = ["--model", models(kind), "--interactions", data, "--json", str(out)]
    with pytest.raises(SystemExit, match="1"):
        main(["check-hindsight", *asked])
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert not found["uses_hindsight"] and "does not make use of hindsight" in shown
    assert found["interactions"] == N // 2 and set(found["size"]) == set(CONTEXTS)
    for name in CONTEXTS:
        assert f"{found['size'][name]:.4f}" in shown and f"{found['advantage'][name]:+.4f}" in shown


def test_figures_are_those_of_each_context_read_alone(data, models):
    reader, drawn = Reader.load(models("qwen3"), ReaderOptions()), sample(data, N, 0)
    found = check(reader, drawn)
    followups = {
        "own": [i.followup for i in drawn],
        "neutral": ["Okay."] * len(drawn),
        "revealed": [f"You should have answered: {i.response}" for i in drawn],
    }
    for context, texts in followups.items():
        told = [replace(i, followup=o) for i, o in zip(drawn, texts, strict=True)]
        readings = list(reader.read((i, ()) for i in told))
        a = [r.advantages[0] for r in readings]
        size, mean = (np.mean([x.mean() for x in values]) for values in ([x.abs() for x in a], a))
        assert found.size[context] == pytest.approx(size, abs=1e-4)
        assert found.advantage[context] == pytest.approx(mean, abs=1e-4)
        surprisal = -np.mean([r.policy.mean() for r in readings])
        assert found.surprisal == pytest.approx(surprisal, abs=1e-4)
    assert found.own_over_neutral.mean == pytest.approx(found.size["own"] - found.size["neutral"])


def findings(surprisal=2.0, **size):
    """Findings from 64 interactions with means by context as given, and noise that all share."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.5, (64, 1)) + rng.normal(0, 0.02, (64, len(CONTEXTS)))
    values = np.array([size.get(context, 0.3) for context in CONTEXTS]) + noise
    partner = np.arange(64) ^ 1
    return _findings(values, values, surprisal, partner, 0)


@pytest.mark.parametrize(
    ("size", "uses", "reason"),
    [
        (dict(own=0.5, shuffled=0.4), True, "do move them more than other"),
        (dict(own=0.5, shuffled=0.5, revealed=1.0, misled=0.2), True, "may say much the same"),
        (dict(own=0.5, shuffled=0.5), False, "no more than the length"),
        (dict(own=0.5, shuffled=0.49), False, "no more than the length"),
        (dict(own=0.5, shuffled=0.5, revealed=0.4, misled=0.35), False, "no more than the length"),
        (dict(own=0.3, shuffled=0.1, revealed=1.0), False, "do not move responses more"),
    ],
)
def test_the_verdict_and_its_reason(size, uses, reason):
    """0.01 between own and shuffled is certain, but too little to prove that the model reads."""
    found = findings(**size)
    assert found.uses_hindsight is uses
    assert reason in " ".join(found.reasons())


def test_swaps_are_drawn_together():
    """A follow-up that moves any response alike does not widen the interval."""
    rng = np.random.default_rng(0)
    partner = np.arange(64) ^ 1
    loud = rng.normal(0, 1, 64)
    values = np.zeros((64, len(CONTEXTS)))
    values[:, CONTEXTS.index("own")] = 0.1 + loud
    values[:, CONTEXTS.index("shuffled")] = loud[partner]
    found = _findings(values, values, 1.0, partner, 0).own_over_shuffled
    assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_a_sample_has_one_interaction_of_a_conversation(data):
    drawn = sample(data, N, 0)
    assert len(drawn) == N // 2 and len({i.id.partition("_")[0] for i in drawn}) == N // 2
    assert len(sample(data, 17, 0)) == 16
    assert [i.id for i in sample(data, N, 0)] == [i.id for i in drawn]
    assert [i.id for i in sample(data, N, 1)] != [i.id for i in drawn]


def test_too_few_conversations(tmp_path):
    with pytest.raises(DataError, match="15 conversations are too few"):
        sample(tiny.make_interactions(tmp_path / "few.jsonl", 15), 256, 0)
