"""A published log, as it is: cut off in the middle, of five names for two roles."""

import json
from collections import defaultdict
from json import JSONDecoder
from pathlib import Path

import pytest

from sdpo.data.filters.guardrails import OFF
from sdpo.data.prepare.config import PrepareConfig
from sdpo.data.prepare.prepare import prepare
from sdpo.errors import DataError
from sdpo.interactions import conversation_of, iter_interactions

USER, ASSISTANT = {"human", "user"}, {"gpt", "chatgpt", "bing", "bard"}


@pytest.fixture(scope="module")
def rows(sharegpt) -> list[dict]:
    """Rows, read by the standard library up to the break."""
    text, found = Path(sharegpt).read_text(encoding="utf-8"), []
    decode, at = JSONDecoder().raw_decode, text.index("{")
    while True:
        try:
            row, at = decode(text, at)
        except json.JSONDecodeError:
            return found
        found.append(row)
        at = text.index("{", at)


def test_a_cut_file_stops_and_says_what_can_be_kept(sharegpt, tmp_path):
    config = PrepareConfig(inputs=(sharegpt,), out=str(tmp_path / "x.jsonl"), workers=1)
    with pytest.raises(DataError, match="--bad-rows skip keeps the 17,671 rows before the break"):
        prepare(config)
    assert not (tmp_path / "x.jsonl").exists()


def test_every_response_stands_between_its_question_and_its_follow_up(sharegpt, rows, tmp_path):
    report = prepare(
        PrepareConfig(
            inputs=(sharegpt,),
            out=str(tmp_path / "x.jsonl"),
            preset="all-turns",
            bad_rows="skip",
            role_map=("bing=assistant", "bard=assistant"),
            guardrails=OFF,
        )
    )
    assert report.counts["rows"] == len(rows) == 17_671
    answers = sum(t["from"] in ASSISTANT for row in rows for t in row["conversations"])
    assert report.counts["interactions"] + sum(report.interaction_drops.values()) == answers
    triples: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    """Question, answer and follow-up, one directly behind the other; some ids are two rows'."""
    for row in rows:
        talk = [(t["from"], t["value"].strip()) for t in row["conversations"]]
        talk = [turn for turn in talk if turn[0] != "system"]
        for (a, question), (b, answer), (c, followup) in zip(
            talk, talk[1:], talk[2:], strict=False
        ):
            if {a, c} <= USER and b in ASSISTANT and question and answer and followup:
                triples[row["id"]].add((question, answer, followup))
    seen = 0
    for interaction in iter_interactions(tmp_path / "x.jsonl"):
        asked = interaction.prompt[-1].content
        said = [interaction.response, interaction.followup]
        own = triples[conversation_of(interaction)]
        fits = (asked.endswith(question) and said == rest for question, *rest in own)
        assert any(fits), interaction.id
        seen += 1
    assert seen == report.counts["interactions"] > 40_000
