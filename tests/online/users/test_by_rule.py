"""Users who are a rule."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from sdpo.conversations import Message
from sdpo.errors import SdpoError
from sdpo.online.users.base import Exchange
from sdpo.online.users.by_rule import CUT, REMARKS
from sdpo.online.users.config import RuleUser, build_user
from sdpo.online.users.personas import load_persona

CONCISE = load_persona("concise")
SHORT, LONG = "It is Paris.", "It is " + "very " * 40 + "far."


def exchange(id, answer, *, finished=True):
    prompt = (Message("user", "Where?"),)
    return Exchange(id=str(id), prompt=prompt, answer=answer, finished=finished)


def user(tmp_path, persona=CONCISE, **settings):
    return build_user(RuleUser(**settings), persona, folder=tmp_path)


def test_complains_of_what_is_wrong_and_praises_the_rest(tmp_path):
    exchanges = [exchange(i, LONG if i % 2 else SHORT) for i in range(400)]
    replies = user(tmp_path).reply(exchanges, seed=0)
    assert {reply.source for reply in replies} == {"rule"}
    assert {reply.text for reply in replies[1::2]} == set(CONCISE.complaints)
    assert {reply.text for reply in replies[0::2]} == set(CONCISE.praise)


def test_replies_hang_on_the_exchange_and_the_seed_alone(tmp_path):
    exchanges = [exchange(i, LONG) for i in range(64)]
    mine = user(tmp_path, irrelevant=0.3)
    replies = mine.reply(exchanges, seed=1)
    order = list(range(64))
    random.Random(0).shuffle(order)
    shuffled = mine.reply([exchanges[i] for i in order], seed=1)
    assert shuffled == [replies[i] for i in order]
    assert [mine.reply([e], seed=1)[0] for e in exchanges] == replies
    assert mine.reply(exchanges, seed=2) != replies
    renamed = [replace(e, id=f"other{e.id}") for e in exchanges]
    assert mine.reply(renamed, seed=1) != replies


@pytest.mark.parametrize(("praise", "low", "high"), [(0.0, 0, 0), (0.25, 60, 140), (1.0, 400, 400)])
def test_praise_is_as_likely_as_configured(tmp_path, praise, low, high):
    replies = user(tmp_path, praise=praise).reply([exchange(i, SHORT) for i in range(400)], seed=0)
    said = sum(reply.text is not None for reply in replies)
    assert low <= said <= high


def test_some_talk_about_something_else(tmp_path):
    exchanges = [exchange(i, LONG if i % 2 else SHORT) for i in range(400)]
    replies = user(tmp_path, irrelevant=0.25).reply(exchanges, seed=0)
    sources = Counter(reply.source for reply in replies)
    assert 60 <= sources["rule:irrelevant"] <= 140
    for reply in replies:
        assert (reply.text in REMARKS) == (reply.source == "rule:irrelevant")
    undisturbed = user(tmp_path).reply(exchanges, seed=0)
    others = [(r, u) for r, u in zip(replies, undisturbed, strict=True) if r.source == "rule"]
    assert all(reply == same for reply, same in others)


def test_what_only_was_cut_is_not_called_too_long(tmp_path):
    concise = user(tmp_path, load_persona("concise"))
    cut, long = exchange("a", SHORT, finished=False), exchange("b", LONG, finished=False)
    about_cut, about_long = concise.reply([cut, long], seed=0)
    assert about_cut.source == "rule:cut" and about_cut.text in CUT
    assert about_long.source == "rule" and about_long.text in concise.persona.complaints


def test_nothing_is_said_to_nothing(tmp_path):
    (reply,) = user(tmp_path, irrelevant=1.0).reply([exchange("a", " \n")], seed=0)
    assert (reply.text, reply.source) == (None, "rule:blank")


def test_a_persona_without_a_rule_is_refused(tmp_path):
    with pytest.raises(SdpoError, match="persona poetic has no rule"):
        user(tmp_path, load_persona("poetic"))


@pytest.mark.parametrize("name", ["praise", "irrelevant"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_probabilities_are_probabilities(name, value):
    with pytest.raises(SdpoError, match=f"{name} is a probability, got {value}"):
        RuleUser(**{name: value})
