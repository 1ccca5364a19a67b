"""Intervals and agreement against counting by hand."""

import numpy as np
import pytest

from sdpo.evaluate.intervals import agreement, mean, ratio, wins


def test_wins_are_counted_with_and_without_ties():
    found = wins(["win"] * 6 + ["loss"] * 2 + ["tie"] * 4)
    assert (found.wins, found.losses, found.ties) == (6, 2, 4)
    assert found.rate is not None and found.rate.value == 0.75
    assert found.half.value == 8 / 12 and found.coverage == 8 / 12
    assert found.rate.low < 0.75 < found.rate.high and found.half.low < 8 / 12 < found.half.high


def test_all_ties_have_no_rate():
    found = wins(["tie"] * 5)
    assert found.rate is None and found.half.value == 0.5 and found.coverage == 0
    with pytest.raises(ValueError, match="no pairs"):
        wins([])


def test_a_mean_has_the_bootstraps_interval():
    """The multinomial draw is the resampling that it stands for."""
    rng = np.random.default_rng(1)
    values = rng.choice([-1.0, 0.0, 1.0], size=150, p=[0.2, 0.3, 0.5])
    found = mean(values)
    resampled = values[rng.integers(150, size=(20_000, 150))].mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert found.value == values.mean()
    assert found.low == pytest.approx(low, abs=0.01) and found.high == pytest.approx(high, abs=0.01)


def test_a_ratio_draws_prompts_and_not_chances():
    """Prompts whose chances all go one way are as few as they are, and not as their chances."""
    hits, of = [10.0] * 10 + [0.0] * 10, [10.0] * 20
    found, alone = ratio(hits, of), mean([1.0] * 100 + [0.0] * 100)
    assert found.value == alone.value == 0.5
    assert found.high - found.low > 2.5 * (alone.high - alone.low)
    assert ratio([1, 0], [1, 3]).value == 0.25


def test_agreement_is_that_beyond_chance():
    one = ["win"] * 5 + ["loss"] * 5
    assert agreement(one, one).kappa == 1
    other = ["win", "loss"] * 5
    found = agreement(one, other)
    assert found.share == 0.6 and found.kappa == pytest.approx(0.2)  # chance alone gives 0.5
    assert agreement(["tie"], ["tie"]).kappa is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Over 400 seeded samples of 100 pairs; 95 % of 400 is 380, and 3.5 deviations are 15."""
    rng, held = np.random.default_rng(0), {"rate": 0, "half": 0}
    for repetition in range(400):
        drawn = rng.choice(["win", "loss", "tie"], size=100, p=[0.45, 0.3, 0.25])
        found = wins(list(drawn), seed=repetition)
        assert found.rate is not None
        held["rate"] += found.rate.low <= 0.6 <= found.rate.high
        held["half"] += found.half.low <= 0.575 <= found.half.high
    assert all(365 <= n <= 395 for n in held.values()), held
