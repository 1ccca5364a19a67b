"""Which follow-ups a response is read under."""

import json

import pytest

from helpers import tiny
from sdpo.analysis.conditions import Case, iter_cases, plain_cases, write_cases
from sdpo.errors import DataError
from sdpo.interactions import conversation_of, read_interactions


def cases(path, *, swap=True, by="kind"):
    return list(iter_cases(str(path), swap=swap, by=by, seed=3))


@pytest.fixture
def named(tmp_path):
    """A file whose rows name an irrelevant follow-up, and kinds; every third has none."""
    rows = read_interactions(tiny.make_conversations(tmp_path / "i.jsonl", 9))
    path = tmp_path / "named.jsonl"
    said = (
        Case(interaction=i, followups={"irrelevant": f"the fox {n}"}, kind="ab "[n % 3].strip())
        for n, i in enumerate(rows)
    )
    write_cases(path, said)
    return path


def test_own_swapped_none_and_those_that_the_file_names(named):
    found = cases(named)
    own = read_interactions(str(named))
    for n, (case, i) in enumerate(zip(found, own, strict=True)):
        assert case.interaction == i and case.kind == "ab "[n % 3].strip()
        assert list(case.texts) == ["own", "swapped", "none", "irrelevant"]
        assert case.texts["own"] == i.followup and case.texts["none"] == ""
        assert case.texts["irrelevant"] == f"the fox {n}"
    swapped = [case.texts["swapped"] for case in found]
    assert sorted(swapped) == sorted(i.followup for i in own), "each is used once"
    from_others = {}
    for i in own:
        from_others.setdefault(i.followup, set()).add(conversation_of(i))
    for case in found:
        others = from_others[case.texts["swapped"]] - {conversation_of(case.interaction)}
        assert others, "it is never of the same conversation"
    assert cases(named) == found


def test_files_without_names_and_without_swapping(tmp_path):
    path = tiny.make_interactions(tmp_path / "i.jsonl", 4)
    assert all(list(case.texts) == ["own", "swapped", "none"] for case in cases(path))
    assert all(list(case.texts) == ["own", "none"] for case in cases(path, swap=False))
    assert all(list(case.texts) == ["own"] for case in plain_cases(path))


def test_kinds_are_of_the_field_that_is_named(named):
    rows = [json.loads(line) | {"mood": "good"} for line in named.read_text().splitlines()]
    named.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {case.kind for case in cases(named, by="mood")} == {"good"}
    assert {case.kind for case in cases(named, by="weather")} == {""}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"followups": {"irrelevant": "a", "more": "b"}}, "field `followups`: follow-ups"),
        ({"followups": {}}, "Give all rows the same"),
        ({"followups": {"irrelevant": " "}}, "field `followups.irrelevant`: the follow-up is em"),
        ({"followups": {"own": "a"}}, "field `followups.own`: 'own' is a condition of its own"),
        ({"followups": ["a"]}, "field `followups`: found a list"),
        ({"followups": {"irrelevant": 7}}, "field `followups.irrelevant`: found a number"),
        ({"kind": 7}, "field `kind`: found a number"),
    ],
)
def test_what_is_wrong_with_a_row_is_told_with_its_place(change, told, named):
    lines = named.read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | change)
    named.write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        cases(named)
    assert str(error.value).startswith(f"{named}, line 5, ") and told in str(error.value)


def test_one_conversation_alone_can_be_compared_without_swapping(tmp_path):
    path = tiny.make_interactions(tmp_path / "i.jsonl", 1)
    with pytest.raises(DataError, match="--no-swap"):
        cases(path)
    assert len(cases(path, swap=False)) == 1
