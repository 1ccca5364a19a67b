"""What the demo measures, on questions that are in no log: whom the model suits, what it kept.

Everything is the same for the same seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .world import (
    CORRECTIONS,
    HELD_OUT_QUESTIONS,
    STYLES,
    Hindsight,
    Message,
    answers_in,
    draw_questions,
    draw_task,
    user,
)

MAX_ANSWER_TOKENS = 16
"""Tokens generated at most; the longest right answer has 7, its end included."""
BATCH = 256
"""Conversations that are answered at a time."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Shares in [0, 1]."""

    preference: float
    """Held-out questions answered in the given style, without anyone asking for it."""
    hindsight_following: float
    """Held-out questions answered in the style that the hindsight context asks for, half of them
    in either. A policy that has collapsed onto one style scores a half."""
    other_tasks: float
    """Tasks solved word for word, decoding greedily."""


class Chat:
    """The model of a Hugging Face folder, which answers."""

    def __init__(self, folder: Path):
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def answers(
        self, conversations: Sequence[list[Message]], *, seed: int, greedy: bool = False
    ) -> list[str]:
        """The next message in each conversation, sampled at temperature 1 unless `greedy`.

        The caller's own random state is left as it was.
        """
        answers: list[str] = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for start in range(0, len(conversations), BATCH):
                inputs = self.tokenizer.apply_chat_template(
                    list(conversations[start : start + BATCH]),
                    add_generation_prompt=True,
                    padding=True,
                    padding_side="left",
                    return_dict=True,
                    return_tensors="pt",
                )
                sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
                tokens_BT = self.model.generate(
                    **inputs, do_sample=not greedy, max_new_tokens=MAX_ANSWER_TOKENS, **sampling
                )
                answer_BT = tokens_BT[:, inputs["input_ids"].shape[1] :]
                answers += self.tokenizer.batch_decode(answer_BT, skip_special_tokens=True)
        return answers


def evaluate(chat: Chat, *, style: str, hindsight: Hindsight, n: int, seed: int) -> Scores:
    """All three scores, each on `n` prompts."""
    rng = random.Random(seed)
    questions = draw_questions(rng, n, HELD_OUT_QUESTIONS)
    unasked = chat.answers([[user(q.text)] for q in questions], seed=seed)
    styles = [STYLES[i % len(STYLES)] for i in range(n)]
    prompts = [
        hindsight([user(q.text)], rng.choice(CORRECTIONS[wanted]))
        for q, wanted in zip(questions, styles, strict=True)
    ]
    asked = chat.answers(prompts, seed=seed)
    rng = random.Random(seed)
    tasks = [draw_task(rng) for _ in range(n)]
    solved = chat.answers([[user(task.text)] for task in tasks], seed=seed, greedy=True)
    return Scores(
        preference=fmean(map(answers_in, [style] * n, questions, unasked)),
        hindsight_following=fmean(map(answers_in, styles, questions, asked)),
        other_tasks=fmean(a.strip() == t.answer for a, t in zip(solved, tasks, strict=True)),
    )


def sample_answers(chat: Chat, *, n: int, seed: int) -> list[tuple[str, str]]:
    """`n` held-out questions with one sampled answer each; the same questions for the same seed."""
    questions = draw_questions(random.Random(seed), n, HELD_OUT_QUESTIONS)
    answers = chat.answers([[user(q.text)] for q in questions], seed=seed)
    return [(q.text, a) for q, a in zip(questions, answers, strict=True)]
