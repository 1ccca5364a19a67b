"""Numbers by condition, on readings whose numbers are known."""

import io
import json
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from sdpo.analysis.effects import Tally, figures, print_effects


def tally(ratio: float, rows: int = 40, names: tuple[str, str] = ("own", "irrelevant")) -> Tally:
    """Rows whose irrelevant follow-ups move them ``ratio`` times as much, give or take a tenth."""
    rng, made = np.random.default_rng(0), Tally()
    for n in range(rows):
        own = rng.normal(size=30)
        other = own * ratio * rng.uniform(0.9, 1.1)
        under = dict(zip(names, (own.tolist(), other.tolist()), strict=True))
        made.add(under, conversation=f"c{n}", kind=("praise", "complaint")[n % 2])
    return made


def test_the_figures_of_a_response():
    a = [-2.0] * 10 + [1.0] * 5 + [0.009, -0.0099, 0.0101, 0.0, 0.5]
    size, near_zero, first, mean = figures(a)
    assert size == pytest.approx((20 + 5 + 0.009 + 0.0099 + 0.0101 + 0.5) / 20)
    assert near_zero == 3 / 20 and first == pytest.approx(25 / 15)
    assert mean == pytest.approx(sum(a) / 20)


def test_interactions_count_alike_and_conversations_are_drawn_whole():
    made = Tally()
    for n in range(30):  # one long conversation of large values, one of small ones
        size = 3.0 if n < 15 else 1.0
        made.add({"own": [size] * (n + 1)}, conversation="ab"[n < 15])
    found = made.effects()
    own = found.conditions["own"]["mean_abs_advantage"]
    assert found.interactions == 30 and found.tokens == 465
    assert own.value == pytest.approx(2.0), "by tokens it were 1.52"
    assert (own.low, own.high) == pytest.approx((1.0, 3.0)), "by rows it were 1.6 to 2.4"


def test_intervals_cover_the_mean_and_narrow_with_rows():
    few, many = (tally(0.5, rows).effects().ratio for rows in (8, 800))
    assert few and many and few.low < 0.5 < few.high and many.low < 0.5 < many.high
    assert many.high - many.low < (few.high - few.low) / 5


@pytest.mark.parametrize(
    ("ratio", "says"), [(0.02, "near zero"), (0.5, "not near zero"), (0.1, "do not tell")]
)
def test_the_verdict_says_what_the_ratio_is(ratio, says):
    found = tally(ratio).effects()
    assert found.ratio is not None and found.ratio.value == pytest.approx(ratio, rel=0.05)
    start = f"irrelevant follow-ups move this model {found.ratio.value:.2f} times as much"
    assert found.verdict.startswith(start) and says in found.verdict.partition(": ")[2]
    assert (says == "near zero") == found.verdict.endswith("): near zero")


def test_which_conditions_are_compared():
    assert tally(0.5, names=("own", "swapped")).effects().compared == ("swapped", "own")
    assert tally(0.5, names=("relevant", "irrelevant")).effects().compared == (
        "irrelevant",
        "relevant",
    )
    alone = tally(0.5, names=("own", "none")).effects()
    assert alone.compared is None and alone.ratio is None and "no irrelevant" in alone.verdict


def test_a_model_that_nothing_moves_has_no_ratio():
    made = Tally()
    for n in range(20):
        made.add({"own": [0.0, 0.0], "irrelevant": [0.1, -0.1]}, conversation=f"c{n}")
    found = made.effects()
    assert found.ratio is None and "do not move this model at all" in found.verdict
    made.add({"own": [0.0, 0.2], "irrelevant": [0.1, -0.1]}, conversation="c20")
    json.dumps(asdict(made.effects()), allow_nan=False)  # draws without that one have no 0 / 0


def test_kinds_are_numbers_of_their_own():
    found = tally(0.5).effects()
    assert list(found.kinds) == ["complaint", "praise"]
    assert [part.interactions for part in found.kinds.values()] == [20, 20]
    means = [part.conditions["own"]["mean_abs_advantage"].value for part in found.kinds.values()]
    assert np.mean(means) == pytest.approx(found.conditions["own"]["mean_abs_advantage"].value)
    out = io.StringIO()
    print_effects(found, Console(file=out, width=80))
    assert f"{means[0]:.3f}" in out.getvalue() and "praise: 20" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80
