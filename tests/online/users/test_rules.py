"""Rules on answers of which anyone can say whether they are satisfied."""

import pytest

from sdpo.errors import SdpoError
from sdpo.online.users import rules
from sdpo.online.users.rules import (
    RULES,
    All,
    AtLeastMarks,
    AtLeastWords,
    AtMostMarks,
    AtMostWords,
    ClosingQuestion,
    NoClosingOffer,
    NoEmojis,
    NoExclamations,
    NoFirstPerson,
    NoPraiseOpening,
    NoPunctuation,
    NoWords,
    OpeningQuestion,
    ShortFirst,
    count_emojis,
    count_marks,
    count_words,
)

FAMILY = "👨‍👩‍👧‍👦"
SCOTLAND = "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
SETTINGS = {"at_most_words": {"words": 5}, "at_least_words": {"words": 5}}
SETTINGS |= {"no_words": {"words": ("maybe",)}}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Plain text, 1 2 3 # * © ® ™ → é – … „x“ ½ ² €", 0),
        ("Hello 😀 you", 1),
        (FAMILY, 1),
        ("👍🏽👍🏿", 2),
        ("🇩🇪🇫🇷", 2),
        (SCOTLAND, 1),
        ("1️⃣ and #️⃣", 2),
        ("❤️", 1),
        ("©️", 1),
        ("✅ done", 1),
        ("🫨🪿", 2),
        ("E♭ and F♯ are notes ♪", 0),
        ("日本語、한국어, العربية, हिन्दी, ไทย, ¿qué?", 0),
        ("a‍b", 0),
        ("", 0),
    ],
)
@pytest.mark.parametrize("icons", [True, False])
def test_emojis_are_counted_as_a_reader_sees_them(text, seen, icons):
    assert count_emojis(text, icons=icons) == seen


@pytest.mark.parametrize("icon", ["✔", "★", "☺", "✗", "➜", "☑︎", "❤"])
def test_icons_are_signs_without_colour(icon):
    text = f"{icon} done"
    assert count_emojis(text) == 1
    assert count_emojis(text, icons=False) == 0


def test_a_selector_for_text_makes_an_emoji_black_and_white():
    assert count_emojis("⌚︎", icons=False) == 0
    assert count_emojis("⌚", icons=False) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        (" \n\t", 0),
        ("One two  three\nfour.", 4),
        ("- one\n- two\n## three\n1. four", 5),
        ("well-known don't 3.5 and/or", 4),
        ("... -- 😀 ✔ *", 0),
        ("Привет, мир! ¡Hola!", 3),
        ("今日は雨です。", 6),
        ("GPUで計算 します", 7),
        ("naïve café", 2),
    ],
)
def test_words(text, words):
    assert count_words(text) == words


def test_marks_of_a_page():
    page = """# Title

Some **bold** and __bold__ text, 2 * 3 * 4, snake__case__name.

1. one
2) two
   - inside
\t* inside
* * *
---
| a | b |
|---|---|
| 1 | 2 |

• last
-not an item
1999. is no item
#hashtag
"""
    expected = {"header": 1, "bold": 2, "item": 5, "nested": 2, "table": 2}
    assert {mark: n for mark, n in count_marks(page).items() if n} == expected


@pytest.mark.parametrize(
    "code",
    [
        "```\n- x\n# y\n```",
        "~~~python\n# y\n- x\n~~~",
        "```py\n- x\n# never closed",
        "````\n```\n- x\n```\n````",
        "`- x`",
    ],
)
def test_code_is_not_formatting(code):
    assert not sum(count_marks(f"See:\n\n{code}").values())
    assert count_marks(f"- item\n\n{code}")["item"] == 1


def test_text_behind_a_block_of_code_counts_again():
    marks = count_marks("```\n- x\n```\n- y\n```\n- z\n```\n## h")
    assert (marks["item"], marks["header"]) == (1, 1)


PLEASES = [
    (NoEmojis(), "Paris is the capital.", "Paris 🎉 is the capital."),
    (AtMostMarks(), "A, b and **c**.", "- a"),
    (AtMostMarks(of=("item",), marks=3), "- a\n- b\n- c\n# t", "- a\n- b\n- c\n- d"),
    (AtLeastMarks(), "- a\n- b\n- c", "- a\n- b"),
    (AtLeastMarks(of=("header",), marks=1), "## A\ntext", "text"),
    (NoPunctuation(), "Paris is the well-known capital and don't pay 3.5 at 12:30", "Paris."),
    (NoPunctuation(), "see `f(x, y)` there", "see f(x, y) there"),
    (NoPunctuation(), "日本 の 首都", "日本の首都。"),
    (NoPunctuation(), "it costs 5 $ + 2 €", "it costs 5 $ (+ 2 €)"),
    (NoPunctuation(), "a\nb", "- a\n- b"),
    (NoExclamations(), "if a != b: stop. ![picture](x.png)", "Stop!"),
    (NoExclamations(), "Run `rm!` now.", "¡Hola! Stop！"),
    (NoFirstPerson(), "The answer depends on it.", "I think so."),
    (NoFirstPerson(), "World War I was long. See part I.", "As shown, I am sure."),
    (NoFirstPerson(), "The US and the U.S. are one.", "This helps us."),
    (NoFirstPerson(), 'Say "I am sorry" to them.', "I'm sorry."),
    (NoFirstPerson(), "Use `me.my()` here.", "We can see this."),
    (NoFirstPerson(), "The mineral is mined.", "Let's look at it."),
    (NoFirstPerson(), "Elizabeth I was queen.", "He and I agree."),
    (NoFirstPerson(), "Use Google My Business.", "It rains. My view is that it stops."),
    (NoFirstPerson(), "A letter to Us Weekly.", "**We** are here."),
    (NoWords(words=("perhaps", "it depends")), "Unperhapsed.", "It\ndepends."),
    (NoPraiseOpening(), "Good questions are rare.", "Good question! Paris."),
    (NoPraiseOpening(), "Absolutely nothing is known.", "Absolutely! Paris."),
    (NoPraiseOpening(), "Great Britain is an island.", "What a great question. Paris."),
    (NoPraiseOpening(), "Surely not.", "Sure, here it is."),
    (NoPraiseOpening(), "It is a good idea to wait.", "  **Great question!** Paris."),
    (NoPraiseOpening(), "Paris. Great question!", "That's a really thoughtful question."),
    (NoPraiseOpening(), "This is good for plants.", "That's great! Paris."),
    (NoPraiseOpening(), "A good cook waits.", "Such an interesting topic."),
    (NoPraiseOpening(), "I am tired of it.", "I'm so glad you asked."),
    (NoPraiseOpening(), "You are 30.", "You're very welcome. Paris."),
    (NoPraiseOpening(), "Thanks to rain it grows.", "Thank you for asking."),
    (NoClosingOffer(), "It is Paris.", "It is Paris. Let me know if you need more."),
    (NoClosingOffer(), "Why? Since it rains.", "It rains. Do you want to know why?"),
    (NoClosingOffer(), "- What is your name?\n- How old are you?", "Paris.\n\nAnything else? 😊"),
    (NoClosingOffer(), "Feel free to skip it.\n\nThen stir.", "Then stir.\n\n*Hope this helps!*"),
    (NoClosingOffer(), "Ask:\n```\nwhy?\n```", "```\nx\n```\nDoes that work for you?"),
    (NoClosingOffer(), "如果下雨。", "还有别的吗？"),
    (NoClosingOffer(), 'They met.\n\n"Are you well?" she asked.', 'Would "why" be better?'),
    (NoClosingOffer(), 'Xid: "Could you come?"', "If you have any more questions, I'm here."),
    (NoClosingOffer(), "They hope it rains.", "I hope these few questions help you!"),
    (NoClosingOffer(), "Ask your bank if you have any questions.", "If you need more, just ask!"),
    (ClosingQuestion(), "It is Paris. Have you been there?", "Have you been there? It is Paris."),
    (ClosingQuestion(), "Paris.\n\n**Shall we go on?** 😊", "Paris. Feel free to ask."),
    (OpeningQuestion(), "Which city do you mean? Paris has one.", "Paris. It has. One. Right?"),
    (ShortFirst(words=3), "It is Paris.\n\nThe reason is long.", "It is Paris."),
    (ShortFirst(words=3), "Paris.\n \n- a", "Paris is the capital.\n\nYes."),
    (AtMostWords(words=3), "It is Paris.", "It is not Paris."),
    (AtLeastWords(words=4), "It is not Paris.", "It is Paris."),
]


@pytest.mark.parametrize(("rule", "good", "bad"), PLEASES)
def test_what_satisfies_a_rule_and_what_does_not(rule, good, bad):
    assert rule.satisfied(good, True)
    assert rule.score(good, True) == 1.0
    assert not rule.satisfied(bad, True)
    assert 0.0 <= rule.score(bad, True) < 1.0


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
def test_a_blank_answer_satisfies_no_rule(kind, blank):
    rule = RULES[kind](**SETTINGS.get(kind, {}))
    assert rule.score(blank, True) == 0.0
    assert not rule.satisfied(blank, True)


def test_length_takes_an_end():
    """An answer that was cut has only so many words as the limit left it."""
    short, long = "It is Paris.", "It is " + "very " * 50 + "far."
    assert not AtMostWords(words=25).satisfied(short, False)
    assert AtLeastWords(words=25).satisfied(long, False), "it would have had even more"
    assert not ClosingQuestion().satisfied("And you?", False)


def test_scores_grow_on_the_way_to_a_rule():
    steps = ["! ! !", "! !", "!", "."]
    scores = [NoExclamations().score(step, True) for step in steps]
    assert scores == sorted(scores) == [1 / 4, 1 / 3, 1 / 2, 1.0]
    words = [AtMostWords(words=10).score("word " * n, True) for n in (40, 20, 10)]
    assert words == [0.25, 0.5, 1.0]


def test_all_is_satisfied_where_each_is():
    both = All(rules=(NoExclamations(), NoClosingOffer()))
    assert both.satisfied("Paris.", True)
    assert both.score("Paris.\n\nAnything else?", True) == 0.5
    assert both.score("Paris!", True) == 0.75
    assert both.score("", True) == 0.0


@pytest.mark.parametrize("kind", ["at_most_words", "at_least_words", "short_first"])
def test_no_words_at_all_are_refused(kind):
    with pytest.raises(SdpoError, match="words must be at least 1, got 0"):
        RULES[kind](words=0)
    with pytest.raises(SdpoError, match="at least one word"):
        NoWords(words=())
    with pytest.raises(SdpoError, match="marks must be at least 1"):
        AtLeastMarks(marks=0)


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_takes_long_and_odd_texts(kind):
    """No text takes a rule long: a user's answer may be anything."""
    rule = RULES[kind](**SETTINGS.get(kind, {}))
    odd = ["a" * 100_000, "`" * 20_000, "- " * 20_000, "*" * 20_000, "! " * 20_000]
    odd += ["_a" * 20_000, "\n" * 20_000 + "x", '"' * 20_000, "😀" * 5_000, "# " * 20_000]
    odd += ["I " * 20_000, "``` \n" * 5_000, "Great " * 20_000, "if you want " * 5_000]
    for text in odd:
        assert 0.0 <= rule.score(text, True) <= 1.0


def test_every_rule_is_named():
    kinds = {rule for rule in vars(rules).values() if isinstance(rule, type)}
    kinds = {rule for rule in kinds if issubclass(rule, rules.Rule)} - {rules.Rule, All}
    assert kinds == set(RULES.values())
