"""Slots as counted by hand, steps that agree, and what the command writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import prefixes
from benchmarks.prefixes import Settings, draw, first_conversations
from benchmarks.report import read
from benchmarks.slots import Slots, count
from helpers import tiny
from sdpo.hindsight import Encoded, Truncated
from sdpo.interactions import conversation_of, read_interactions
from sdpo_parallel.config import parse_teacher


def encoded(id: str, policy: str, hindsight: str, response: str, conversation: str) -> Encoded:
    """Letters for tokens."""
    p, h, r = (tuple(map(ord, text)) for text in (policy, hindsight, response))
    return Encoded(
        id=id,
        policy=p,
        hindsight=h,
        response=r,
        old_logprobs=None,
        ends=True,
        truncated=Truncated(),
        conversation=conversation,
    )


TURNS = [
    (encoded("c_1", "xx", "xxn", "yyy", "c"), 0.5),
    (encoded("c_2", "xxyyyo", "xxyyyonn", "zz", "c"), 0.5),
]
"""Two turns, of 2 + 3 and 6 + 2 tokens; hindsight has notes of 1 and 2."""


def test_slots_are_those_counted_by_hand():
    assert count(TURNS, 100) == [
        Slots("none", "interaction", 5 + 8, 6 + 10),
        Slots("keys", "interaction", 5 + 8, 4 + 4),  # of hindsight note and response
        Slots("tries", "conversation", 8, 6 + 10 - 2),  # the first prompt, once
        Slots("keys", "conversation", 8, 4 + 4),
    ]
    assert count(TURNS, 100)[3].cost == 3 * 8 + 8
    assert count(TURNS, 100)[3].shares_of(count(TURNS, 100)[0]) == (8 / 13, 0.5)
    # where both turns do not fit, they do not share
    assert count(TURNS, 7)[3] == Slots("keys", "conversation", 13, 8)


@pytest.fixture
def data(tmp_path):
    """Six conversations of one to three turns."""
    rows = []
    first = Path(tiny.make_interactions(tmp_path / "one.jsonl", 6))
    for n, row in enumerate(map(json.loads, first.read_text(encoding="utf-8").splitlines())):
        history = row["prompt"]
        for turn in range(1 + n % 3):
            new = dict(row, id=f"{row['id']}_{turn}", turn_id=turn, prompt=history)
            rows.append(new)
            history = [*history, row["completion"], row["user_response"]]
    path = tmp_path / "interactions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_steps_of_conversations_hold_all_turns_and_no_interaction_twice(data):
    items = read_interactions(data)
    assert len(items) == 12
    at = Settings(model="", data=data, unit="conversation", steps=2, per_step=3)
    steps = draw(items, at)
    assert all(len(step) >= 3 for step in steps)
    drawn = [i.id for step in steps for i in step]
    assert len(set(drawn)) == len(drawn)
    names = [{conversation_of(i) for i in step} for step in steps]
    assert not names[0] & names[1]
    whole = [i.id for i in items if conversation_of(i) in names[0] | names[1]]
    assert sorted(drawn) == sorted(whole)
    assert draw(items, replace(at, seed=1)) != steps == draw(items, at)
    assert [len(s) for s in draw(items, replace(at, unit="interaction"))] == [3, 3]
    with pytest.raises(ValueError, match="12 interactions are too few for 9 steps"):
        draw(items, replace(at, steps=9))


def test_counts_are_of_the_first_conversations(data, models, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    at = Settings(model=models("qwen3"), data=data, count_only=True, conversations=3, out=out)
    rows = prefixes.run(at)
    assert read(out) == rows
    assert [(r["sharing"], r["unit"]) for r in rows] == [
        ("none", "interaction"),
        ("keys", "interaction"),
        ("tries", "conversation"),
        ("keys", "conversation"),
    ]
    items = first_conversations(read_interactions(data), 3)
    assert {(r["conversations"], r["interactions"]) for r in rows} == {(3, len(items))}
    none, interaction, tries, keys = rows
    assert none["read"] == dict(policy=1.0, hindsight=1.0)
    assert interaction["policy"] == none["policy"] > tries["policy"] == keys["policy"]
    assert keys["hindsight"] <= interaction["hindsight"] < tries["hindsight"] < none["hindsight"]
    assert "cost 3P + H" in capsys.readouterr().out
    assert len(first_conversations(read_interactions(data), 0)) == 12


@pytest.mark.parametrize("teacher, sharing", [("live", "keys"), ("ema:0.9", "tries")])
def test_steps_agree_and_are_timed_by_turns(teacher, sharing, data, models, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    few = dict(unit="conversation", steps=2, per_step=3, micro_batch_tokens=512, rounds=2)
    at = Settings(model=models("qwen3"), data=data, teacher=parse_teacher(teacher), out=out, **few)
    (row,) = prefixes.run(at)
    assert read(out) == [row] and (row["sharing"], row["unit"]) == (sharing, "conversation")
    assert len(row["steps"]) == row["ratio"]["rounds"] == 2
    for step in row["steps"]:
        assert step["whole"]["loss"] == pytest.approx(step["shared"]["loss"], rel=1e-4)
        whole, shared = step["slots"]
        assert shared["policy"] < whole["policy"] and shared["hindsight"] < whole["hindsight"]
        assert step["ratio"] == step["whole"]["seconds"] / step["shared"]["seconds"]
    rates, seconds = (
        row["response_tokens_per_second"],
        [s["whole"]["seconds"] for s in row["steps"]],
    )
    responses = sum(s["responses"] for s in row["steps"])
    assert rates["whole"] == pytest.approx(responses / sum(seconds))
    assert rates["shared"] / rates["whole"] == pytest.approx(row["over_all"])
    assert row["by_cost"] > (1.3 if sharing == "keys" else 1.05)
    assert "shared over whole" in capsys.readouterr().out


def test_the_weights_of_all_steps_are_the_same(data, models, tmp_path):
    """Else the second way to take a step would not be given what the first was."""
    at = Settings(model=models("qwen3"), data=data, steps=1, per_step=3, micro_batch_tokens=512)
    (step,) = draw(read_interactions(data), at)
    tokenizer = prefixes.load_tokenizer(at.model)
    engine = prefixes.engine_of(at, 1024, str(tmp_path))
    before = {name: w.clone() for name, w in engine.module.state_dict().items()}
    list(prefixes.compare(engine, [prefixes.examples_of(step, tokenizer)], at))
    assert all(w.equal(before[name]) for name, w in engine.module.state_dict().items())
    assert len(engine.optimizer.state) == len(list(engine.module.parameters())), "AdamW ran"


def test_steps_that_differ_are_refused():
    whole = prefixes.Taken(1.0, 2.0, 3.0)
    slots = Slots("none", "interaction", 1, 1), Slots("keys", "interaction", 1, 1)
    both = prefixes.Both(1, 1, slots, whole, whole)
    both.check()
    with pytest.raises(ValueError, match="the two steps differ: norm 3.0"):
        replace(both, shared=replace(whole, norm=3.001)).check()


def test_a_model_that_cannot_share_is_refused(data, models, monkeypatch):
    import sdpo_parallel.transformers.engine as engine

    monkeypatch.setattr(engine, "install", lambda model: False)
    at = Settings(model=models("qwen3"), data=data, steps=1, per_step=3)
    with pytest.raises(ValueError, match="prefixes cannot be shared"):
        prefixes.run(at)
