"""A model that answers, against `generate`."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo.chat import chat_format
from sdpo.conversations import Message
from sdpo.demo.talk import Talker

QUESTIONS = ["tell me a story", "list five green apples please", "no", "a short fox in paris"]


@pytest.fixture
def talker(models) -> Talker:
    return Talker(models("llama"))


@pytest.fixture
def generated(models):
    """Question -> ids of the greedy answer of `generate`, one question at a time, unpadded."""
    model: Any = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(models("llama"))

    def answer(question: str, n: int) -> list[int]:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**asked, do_sample=False, max_new_tokens=n, min_new_tokens=n)
        return out[0, asked["input_ids"].shape[1] :].tolist()

    return answer


def test_greedy_answers_are_those_of_generate(talker, generated):
    """Each as far as it goes: an answer that has ended changes nothing for those that go on."""
    expected = {q: generated(q, 16) for q in QUESTIONS}
    # ids that end the first answer after a few tokens, and not all of the others
    talker.ends = frozenset(expected[QUESTIONS[0]][3:4])
    answers = talker.answer(QUESTIONS, seed=0, temperature=0, max_tokens=16)
    lengths = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = expected[question]
        end = next((i for i, token in enumerate(ids) if token in talker.ends), None)
        ids = ids if end is None else ids[: end + 1]
        assert answer.text == talker.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.finished == (end is not None)
        lengths.append(len(answer.entropies))
        assert lengths[-1] == len(ids)
    assert min(lengths) <= 4 and max(lengths) == 16


def test_sampled_answers_follow_the_models_own_distribution(talker):
    """At temperature 1 and whole, whatever the model's generation config says."""
    talker.model.generation_config.update(do_sample=True, temperature=0.01, top_k=1)
    asked = chat_format(talker.tokenizer).prompt_ids([Message("user", QUESTIONS[0])])
    with torch.no_grad():
        p_V = talker.model(torch.tensor([asked])).logits[0, -1].softmax(-1)
    expected = Counter[str]()
    for token, p in enumerate(p_V.tolist()):
        expected[talker.tokenizer.decode([token], skip_special_tokens=True).strip()] += p
    n = 600
    answers = talker.answer(QUESTIONS[:1] * n, seed=1, max_tokens=1)
    found = Counter(answer.text for answer in answers)
    for text, p in expected.most_common(8):
        assert abs(found[text] / n - p) < 4 * (p * (1 - p) / n) ** 0.5, text
    entropy = -(p_V * p_V.log()).sum().item()
    assert answers[0].entropies == pytest.approx((entropy,), rel=1e-3)
    some, again, others = (talker.answer(QUESTIONS, seed=s, max_tokens=4) for s in (3, 3, 4))
    assert some == again != others
