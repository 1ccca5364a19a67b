"""The demo's questions."""

import re

from sdpo.demo.prompts import held_out_prompts, training_prompts


def test_no_two_questions_are_alike():
    """No two share four in five of their words."""
    words = [set(re.findall(r"\w+", p.lower())) for p in training_prompts() + held_out_prompts()]
    for i, some in enumerate(words):
        for others in words[:i]:
            assert len(some & others) < 0.8 * len(some | others), (some, others)


def test_each_is_one_short_question():
    for prompt in training_prompts() + held_out_prompts():
        assert re.fullmatch(r"[A-Z][^?.!\n]+\?", prompt) and len(prompt.split()) <= 16, prompt


def test_held_out_questions_are_in_no_training():
    training, held_out = set(training_prompts()), set(held_out_prompts())
    assert len(held_out) == 64 and len(training) >= 384 and not training & held_out
