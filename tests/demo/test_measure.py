"""What answers are worth."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo.demo.measure import REAL_TOKENS, complaints, judge, openings, perplexity
from sdpo.demo.talk import Answer
from sdpo.hindsight import HindsightConfig
from sdpo.online.users.personas import load_persona

SHORT = Answer(text="Bees make it of nectar.", finished=True, entropies=(1.0, 2.0))
SORRY = Answer(text="I'm sorry, I will keep it short.", finished=True, entropies=(3.0,))
CUT = Answer(text="Well, " + "bees " * 60, finished=False, entropies=(4.0,))


def test_answers_are_judged_by_each_persona():
    found = judge(["?"] * 3, [SHORT, SORRY, CUT], ["concise", "detailed"], None)
    assert found.preference == {"concise": 2 / 3, "detailed": 1 / 3}
    assert found.finished == 2 / 3 and found.leaks == 1 / 3
    assert found.words == (5 + 7 + 61) / 3
    assert found.entropy == 2.5, "a mean over tokens, not over answers"
    assert found.similarity is None and found.answers == (SHORT, SORRY, CUT)


def test_similarity_is_a_mean_over_the_answers():
    asked = []

    def similarity(questions, answers):
        asked.extend(zip(questions, answers, strict=True))
        return [0.25, 0.75]

    found = judge(["a?", "b?"], [SHORT, SORRY], ["concise"], similarity)  # pyright: ignore
    assert found.similarity == 0.5 and asked == [("a?", SHORT.text), ("b?", SORRY.text)]


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(models, tmp_path):
    """Which tokens there are is then all that counts."""
    folder = tmp_path / "model"
    model: Any = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(models("llama")).save_pretrained(folder)
    assert perplexity(str(folder)) == pytest.approx(model.config.vocab_size, rel=1e-4)
    assert REAL_TOKENS >= 2000 and not math.isnan(perplexity(models("llama")))


def test_openings_are_read_behind_the_personas_complaints_too(models):
    asked = complaints(["Why do bees dance?", "What is tea?"], "concise")
    said = load_persona("concise").complaints
    assert [i.followup for i in asked] == list(said[:2])
    assert [i.prompt[0].content for i in asked] == ["Why do bees dance?", "What is tea?"]
    found = openings(models("llama"), asked, HindsightConfig(template="wish"))
    assert 0 < found.policy < 1 and 0 < found.hindsight < 1 and found.policy != found.hindsight
