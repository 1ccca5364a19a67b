"""What held-out answers amount to, and which of it stops a run."""

import pytest

from sdpo.online.config import BrakeConfig
from sdpo.online.evaluate import Answer, Evaluation, Evaluations, evaluation, tripped
from sdpo.online.users.personas import load_persona


def answer(text, finished=True):
    return Answer(prompt_id="1", prompt="?", answer=text, finished=finished)


ANSWERS = [answer("One two three."), answer("word " * 30, False), answer("I'm sorry for that.")]
WHERE = {"step": 4, "phase": 1, "persona": "concise", "decoding": "greedy"}
ROW = {"entropy/policy": 2.0, "drift/kl": 0.5}


def seen(*rates, words=10.0, leaks=0.0, phases=None):
    """Evaluations with these rates of the preference."""
    return [
        Evaluation(
            step=4 * i, phase=phase, persona="concise", decoding="greedy", prompts=4,
            preference={"concise": rate}, words=words, finished=1.0, leaks=leaks,
        )
        for i, (rate, phase) in enumerate(zip(rates, phases or [1] * len(rates), strict=True))
    ]  # fmt: skip


def test_an_evaluation_counts_what_was_answered():
    personas = [load_persona(name) for name in ("concise", "detailed", "poetic")]
    now = evaluation(ANSWERS, personas, **WHERE)
    rated = {p.name: p.rule for p in personas if p.rule is not None}
    assert now.preference.keys() == rated.keys() and "poetic" not in rated
    assert now.preference["concise"] == pytest.approx(2 / 3)
    assert now.words == pytest.approx((3 + 30 + 4) / 3)
    assert now.finished == pytest.approx(2 / 3) and now.leaks == pytest.approx(1 / 3)
    metrics = now.metrics()
    assert metrics["evaluate/preference/concise"] == now.preference["concise"]
    names = {"words", "finished", "leaks", *(f"preference/{name}" for name in rated)}
    assert metrics.keys() == {f"evaluate/{name}" for name in names}


@pytest.mark.parametrize(
    ("limit", "found", "row", "says"),
    [
        ({"preference_drop": 0.3}, seen(0.2, 0.9, 0.5), ROW, "of concise fell by 0.40"),
        ({"max_words": 9}, seen(0.5), ROW, "answers have 10 words"),
        ({"min_words": 11}, seen(0.5), ROW, "answers have 10 words"),
        ({"entropy_change": 0.4}, seen(0.5), ROW | {"entropy/policy": 3.0}, "changed by 50%"),
        ({"entropy_change": 0.4}, seen(0.5), ROW | {"entropy/policy": 1.0}, "changed by 50%"),
        ({"max_drift": 0.4}, seen(0.5), ROW, "drifted by 0.500 nats"),
        ({"max_leaks": 0.1}, seen(0.5, leaks=0.25), ROW, "25% of answers speak of feedback"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) and len(x) == 1 else "",
)  # fmt: skip
def test_each_brake_trips_beyond_its_limit_and_no_sooner(limit, found, row, says):
    told = tripped(BrakeConfig(**limit), found, row, 2.0)
    assert told is not None and says in told and f"brakes.{next(iter(limit))}" in told
    assert tripped(BrakeConfig(), found, row, 2.0) is None
    (name,) = limit
    wide = {name: 1.0 if name == "min_words" else 100.0}
    assert tripped(BrakeConfig(**wide), found, row, 2.0) is None


def test_the_preference_is_compared_within_its_phase():
    limits = BrakeConfig(preference_drop=0.3)
    assert tripped(limits, seen(0.9, 0.1, phases=(1, 2)), ROW, 2.0) is None
    assert tripped(limits, seen(0.9, 0.8, 0.1, phases=(1, 2, 2)), ROW, 2.0) is not None


def test_an_update_that_trained_on_nothing_has_no_entropy_to_brake_on():
    limits = BrakeConfig(entropy_change=0.5)
    assert tripped(limits, seen(0.5), ROW | {"entropy/policy": 0.0}, 2.0) is None
    assert tripped(limits, seen(0.5), ROW, 0.0) is None, "nothing was trained on at first"


def test_evaluations_are_read_up_to_a_step(tmp_path):
    kept = Evaluations(tmp_path)
    assert kept.read(9) == []
    found = seen(0.1, 0.2, 0.3)
    for n in (1, 2, 3):
        kept.write(found[:n], ANSWERS[:n])
    assert kept.read(4) == found[:2] and kept.read(8) == found
    assert kept.answers_at(4) == ANSWERS[:2]
