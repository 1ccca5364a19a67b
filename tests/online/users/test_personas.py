"""The personas that come with the package, and files of one's own."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from sdpo.errors import DataError, SdpoError
from sdpo.online.users.personas import Persona, load_persona, parse_persona, personas
from sdpo.online.users.rules import RULES, All, AtMostWords, NoEmojis

ROOT = Path(__file__).parents[3]
FOLDER, PAGE = ROOT / "sdpo" / "online" / "users" / "personas", ROOT / "docs" / "personas.md"

PUBLISHED = """
concise_casual_beginner concise_casual_expert concise_professional_beginner
concise_professional_expert detailed_casual_beginner detailed_casual_expert
detailed_professional_beginner detailed_professional_expert poetic no_punctuation no_emojis
less_filler_praise_sycophancy answer_direclty_reduce_formatting no_first_person
clarification_first single_answer writing_tics writing_tics_v2 formatting no_sycophantic
sycophantic_and_praise answer_first no_filler_followup high_initiative committing no_lists
more_lists less_formatting more_formatting opinionated exclamation
""".split()  # noqa: SIM905
JUDGED = {"poetic", "single_answer", "no_sycophantic", "opinionated"}
"""Personas that no rule tells anything of."""
LIKED = {
    "concise": "It is Paris.",
    "detailed": "word " * 40,
    "answer_first": "Paris.\n\nIt has been the capital for long.",
    "clarification_first": "Which Paris do you mean?",
    "high_initiative": "It is Paris. Have you been there?",
    "more_lists": "- a\n- b\n- c",
    "more_formatting": "# T\n- a\n- b\n- c",
    "no_punctuation": "It is Paris",
}
DISLIKED = {
    "concise": "word " * 26,
    "detailed": "word " * 39,
    "answer_directly_reduce_formatting": "Great question! " + "word " * 100 + "\n- a" * 4,
    "committing": "It might be Paris, perhaps.",
    "exclamation": "It is Paris!",
    "formatting": "- a\n  - b",
    "less_filler_praise_sycophancy": "Great question! Paris.",
    "less_formatting": "# T\n- a",
    "no_emojis": "Paris 🎉",
    "no_filler_followup": "It is Paris. Anything else?",
    "no_first_person": "I think it is Paris.",
    "no_lists": "- Paris",
    "sycophantic_and_praise": "Paris. Hope this helps!",
    "writing_tics": "Paris ✅",
    "writing_tics_v2": "Paris 🚀",
}
"""An answer that each persona with a rule complains of, where "It is Paris." is not one."""


def test_all_published_personas_are_there_and_two_more():
    assert len(PUBLISHED) == len(set(PUBLISHED)) == 31
    names = {load_persona(name).name for name in PUBLISHED}
    assert names | {"concise", "detailed"} == set(personas())


@pytest.mark.parametrize("name", personas())
def test_a_persona_is_whole(name):
    persona = load_persona(name)
    assert persona.name == name
    assert persona.wants.startswith("You") and "\n" not in persona.wants
    assert len(persona.complaints) >= 4 and len(persona.praise) >= 3
    said = (*persona.complaints, *persona.praise)
    assert len(set(said)) == len(said)
    assert all(len(sentence.split()) <= 20 for sentence in said)
    assert (persona.rule is None) == (name in JUDGED)


@pytest.mark.parametrize("name", personas())
def test_opposites_go_both_ways(name):
    persona = load_persona(name)
    if persona.opposite is not None:
        assert load_persona(persona.opposite).opposite == name != persona.opposite


@pytest.mark.parametrize("name", sorted({*personas()} - JUDGED))
def test_a_persona_tells_answers_apart(name):
    persona = load_persona(name)
    long = name.startswith("detailed")
    liked = "word " * 120 if long else LIKED.get(name, "It is Paris.")
    disliked = "word " * 61 if name.startswith("concise") else DISLIKED.get(name, "It is Paris.")
    assert persona.satisfied(liked, True) and persona.score(liked, True) == 1.0
    assert not persona.satisfied(disliked, True) and persona.score(disliked, True) < 1.0


@pytest.mark.parametrize("name", sorted({*personas()} - JUDGED))
def test_the_opposite_wants_something_else(name):
    persona = load_persona(name)
    if persona.opposite is not None:
        opposite = load_persona(persona.opposite)
        for answer in ("It is Paris.", "word " * 130, "- a\n- b\n- c", "# A\n- a\n- b\n- c"):
            answer += "And you?" if "word" in answer else ""
            assert not (persona.satisfied(answer, True) and opposite.satisfied(answer, True))


@pytest.mark.parametrize("name", sorted(JUDGED))
def test_what_takes_a_judge_says_so(name):
    persona = load_persona(name)
    for ask in (persona.satisfied, persona.score):
        with pytest.raises(SdpoError, match=f"persona {name} has no rule"):
            ask("It is Paris.", True)


OWN = """
wants = "You want it short, and no emojis."
complaints = ["Shorter, and no emojis."]

[[rules]]
kind = "at_most_words"
words = 25

[[rules]]
kind = "no_emojis"
icons = false
"""


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text(OWN, encoding="utf-8")
    persona = load_persona(tmp_path / "mine.toml")
    assert persona == load_persona(str(tmp_path / "mine.toml"))
    assert persona == Persona(
        name="mine",
        wants="You want it short, and no emojis.",
        complaints=("Shorter, and no emojis.",),
        rule=All(rules=(AtMostWords(words=25), NoEmojis(icons=False))),
    )
    assert len(persona.praise) == 3


@pytest.mark.parametrize(
    ("old", "new", "field", "problem"),
    [
        ("wants", "want", "want", "no such field of a persona"),
        ('wants = "You want it short, and no emojis."', "", "wants", "nothing (null or missing)"),
        ('"You want it short, and no emojis."', '" "', "wants", "the text is blank"),
        ('["Shorter, and no emojis."]', '"Shorter"', "complaints", "found text where a list"),
        ('["Shorter, and no emojis."]', "[]", "complaints", "the list is empty"),
        ('["Shorter, and no emojis."]', '["a", 3]', "complaints[1]", "found a number where text"),
        ('"no_emojis"', '"no_emoji"', "rules[1].kind", "no rule is called no_emoji"),
        ('kind = "no_emojis"', "", "rules[1].kind", "nothing (null or missing)"),
        ("icons", "icon", "rules[1].icon", "no such setting of no_emojis"),
        ("false", "0", "rules[1].icons", "found a number where bool is needed"),
        ("words = 25", "", "rules[0].words", "at_most_words needs this setting"),
        ("words = 25", "words = 2.5", "rules[0].words", "where int is needed"),
        ("words = 25", "words = 0", "rules[0]", "words must be at least 1, got 0"),
        ('[[rules]]\nkind = "at_most', '[rules]\nkind = "at_most', None, "not valid TOML"),
    ],
)
def test_a_broken_file_is_refused_by_field(old, new, field, problem):
    assert old in OWN
    with pytest.raises(DataError) as caught:
        parse_persona("mine", OWN.replace(old, new, 1), "mine.toml")
    assert caught.value.file == "mine.toml"
    assert caught.value.field == (field or "")
    assert problem in caught.value.problem and caught.value.hint


def test_marks_are_known_ones():
    text = OWN.replace(
        'kind = "no_emojis"\nicons = false', 'kind = "at_most_marks"\nof = ["items"]'
    )
    with pytest.raises(DataError, match="'items' is unknown") as caught:
        parse_persona("mine", text, "mine.toml")
    assert caught.value.field == "rules[1].of[0]"


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError, match="no persona is called consise.*concise, .*writing_tics"):
        load_persona("consise")
    with pytest.raises(DataError, match="cannot be read") as caught:
        load_persona(tmp_path / "absent.toml")
    assert caught.value.file == str(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b'wants = "\xe9"')
    with pytest.raises(DataError, match="not valid UTF-8 at byte 10"):
        load_persona(tmp_path / "latin.toml")


def row(name):
    """A persona's line in docs/personas.md."""
    persona = load_persona(name)
    told_by = "a judge"
    if persona.rule is not None:
        rules = persona.rule.rules if isinstance(persona.rule, All) else (persona.rule,)
        kinds = {rule: kind for kind, rule in RULES.items()}
        told_by = ", ".join(f"`{kind}`" for kind in dict.fromkeys(kinds[type(r)] for r in rules))
        text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
        told_by += ", in part" if text.startswith("# The rule sees") else ""
    opposite = f"`{persona.opposite}`" if persona.opposite else ""
    return f"| `{name}` | {told_by} | {opposite} |"


def rule_row(kind):
    """A rule's line in docs/personas.md."""
    settings = []
    for setting in fields(RULES[kind]):
        default = setting.default
        text = list(default) if isinstance(default, tuple) else str(default).lower()
        text = "" if default is MISSING else f" = {text}".replace("'", '"')
        settings.append(f"`{setting.name}{text}`")
    doc = RULES[kind].__doc__ or ""
    return f"| `{kind}` | {', '.join(settings)} | {doc.strip()} |"


def test_the_documentation_lists_all_personas_and_rules():
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for expected in ([row(name) for name in personas()], [rule_row(kind) for kind in RULES]):
        found = [line for line in rows if line.split("`")[1] in {e.split("`")[1] for e in expected}]
        assert [line for line in found if line in expected] == expected


def test_the_documentations_example_is_a_persona():
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    persona = parse_persona("bullets", example, "bullets.toml")
    assert persona.satisfied("- Paris\n- Rome\n- Oslo", True)
    assert not persona.satisfied("- Paris\n- Rome\n- Oslo 🎉", True)
    assert not persona.satisfied("Paris, Rome and Oslo", True)
    known = {*Persona.__dataclass_fields__} - {"name", "rule"}
    assert all(re.search(rf"^{name} = ", example, re.M) for name in known)
