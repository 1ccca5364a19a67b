"""Single rules of the extraction, with values worked out by hand; parity is test_paper_parity's."""

from dataclasses import replace

import pytest

from sdpo.conversations import Conversation, Message
from sdpo.data.prepare.rules import PRESETS, Drop, ExtractionRules, examine

PAPER = PRESETS["paper-wildchat"]
ALL_TURNS = PRESETS["all-turns"]


def conversation(*messages: tuple[str, str], **known) -> Conversation:
    known = {"id": "c", "source": "log:0", "language": "English", "has_language": True} | known
    return Conversation(messages=tuple(Message(*m) for m in messages), **known)


def turns(logged: Conversation, rules: ExtractionRules) -> list[tuple[list[str], str, str, int]]:
    """(history, answer, follow-up, turn id) of every turn."""
    found = examine(logged, rules)
    said = [message.content for message in found.messages]
    return [
        ([said[i] for i in turn.history], said[turn.answer], said[turn.followup], turn.turn_id)
        for turn in found.turns
    ]


def test_answers_without_history_are_counted():
    twice = conversation(("user", "u"), ("assistant", "a"), ("assistant", "b"), ("user", "o"))
    found = examine(twice, PAPER)
    assert (found.dropped, found.turns) == (None, [])
    assert found.unused == {"no question before it": 1}


def test_indices_count_messages_with_text():
    logged = conversation(
        *[("system", "s"), ("developer", "d"), ("user", " \u2003"), ("User", " x ")],
        *[("ASSISTANT ", "\ty\n"), ("user", "o\u00a0"), ("assistant", ""), ("user", "\t\x1f\n")],
        *[("user", "p"), ("assistant", "z"), ("user", "q")],
    )
    history = ["s", "d", "x"]
    assert turns(logged, ALL_TURNS) == [
        (history, "y", "o", 1),
        ([*history, "y", "o", "p"], "z", "q", 4),
    ]
    assert turns(logged, PAPER) == [(["x"], "y", "o", 1), (["x", "y", "o"], "z", "q", 4)]


def test_roles_of_every_format_are_turns_unless_a_paper_counts_only_its_own():
    logged = conversation(("human", "x"), ("GPT", "y"), ("human", "o"))
    assert turns(logged, ALL_TURNS) == [(["x"], "y", "o", 1)]
    assert examine(logged, PAPER).dropped is Drop.TOO_FEW_MESSAGES
    assert turns(logged, PRESETS["paper-wildfeedback"]) == [], "GPT is not gpt there"


def test_each_drop_has_its_reason_and_its_limit_is_inclusive():
    rules = replace(PAPER, max_conversation_chars=20, max_assistant_chars=8, max_user_chars=6)

    def dropped(*lengths: int, **known) -> Drop | None:
        said = [(r, "x" * n) for r, n in zip(["user", "assistant"] * 4, lengths, strict=False)]
        return examine(conversation(*said, **known), rules).dropped

    assert dropped(6, 8, 6) is None
    assert dropped(6, 8) is Drop.TOO_FEW_MESSAGES
    assert dropped(6, 9, 5) is Drop.ASSISTANT_TOO_LONG
    assert dropped(7, 8, 5) is Drop.USER_TOO_LONG
    assert dropped(6, 8, 6, 1) is Drop.TOO_LONG
    assert dropped(6, 8, 6, language=None) is Drop.LANGUAGE
    assert dropped(6, 8, 6, language="French") is Drop.LANGUAGE
    assert dropped(6, 8, 6, language=" EN ") is None
    assert dropped(6, 8, 6, language=None, has_language=False) is None


def test_all_turns_drops_nothing():
    long = conversation(("user", "x" * 9999), ("assistant", "y" * 99_999), ("user", "o"))
    assert len(turns(replace(long, language="French"), ALL_TURNS)) == 1
    assert examine(conversation(), ALL_TURNS).dropped is None


@pytest.mark.parametrize(
    "rule",
    [
        {"history_messages": 0},
        {"max_conversations": 0},
        {"languages": ("English",)},
        {"roles": (("x", "robot"),)},
    ],
)
def test_rules_that_make_no_sense(rule):
    with pytest.raises(ValueError, match=next(iter(rule)).rstrip("s")):
        ExtractionRules(**rule)
