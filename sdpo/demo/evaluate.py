"""What the demo measures, on questions that are in no log: whom the model suits, what it kept.

Every score takes a `transformers` model and tokenizer, as loaded from an exported folder, and is
the same number for the same seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Shares in [0, 1]."""

    preference: float
    """Held-out questions answered in the given style, without anyone asking for it."""
    hindsight_following: float
    """Held-out questions answered in the style that the hindsight context asks for."""
    other_tasks: float
    """Tasks solved, word for word."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    *,
    seed: int,
    greedy: bool = False,
    batch_size: int = 256,
) -> list[str]:
    """The model's next message in each conversation, sampled at temperature 1 unless `greedy`.

    The caller's own random state is left as it was.
    """
    was_training = model.training
    model.eval()
    answers: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(conversations), batch_size):
            inputs: Any = tokenizer.apply_chat_template(
                list(conversations[start : start + batch_size]),
                add_generation_prompt=True,
                padding=True,
                padding_side="left",
                return_dict=True,
                return_tensors="pt",
            ).to(model.device)  # pyright: ignore[reportAttributeAccessIssue]
            sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
            tokens_BT = model.generate(  # pyright: ignore[reportCallIssue]
                **inputs, do_sample=not greedy, max_new_tokens=MAX_ANSWER_TOKENS, **sampling
            )
            said_BT = tokens_BT[:, inputs["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(said_BT, skip_special_tokens=True)
    model.train(was_training)
    return answers


def preference_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    style: str,
    *,
    n: int = 400,
    seed: int = 0,
) -> float:
    """Share of `n` held-out questions that the model answers in `style` without being asked to."""
    questions = draw_questions(random.Random(seed), n, HELD_OUT_QUESTIONS)
    answers = generate(model, tokenizer, [[user(q.text)] for q in questions], seed=seed)
    return _mean(answers_in(style, q, a) for q, a in zip(questions, answers, strict=True))


def hindsight_following(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    hindsight: Hindsight,
    *,
    n: int = 400,
    seed: int = 0,
) -> float:
    """Share of held-out questions answered as the hindsight context asks, half in either style.

    A policy that has collapsed onto one style ignores follow-ups that ask for the other, and scores
    a half.
    """
    rng = random.Random(seed)
    questions = draw_questions(rng, n, HELD_OUT_QUESTIONS)
    styles = [STYLES[i % len(STYLES)] for i in range(n)]
    prompts = [
        hindsight([user(question.text)], rng.choice(CORRECTIONS[style]))
        for question, style in zip(questions, styles, strict=True)
    ]
    answers = generate(model, tokenizer, prompts, seed=seed)
    return _mean(
        answers_in(style, question, answer)
        for style, question, answer in zip(styles, questions, answers, strict=True)
    )


def other_tasks_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, n: int = 400, seed: int = 0
) -> float:
    """Share of `n` tasks the model solves word for word, decoding greedily."""
    rng = random.Random(seed)
    tasks = [draw_task(rng) for _ in range(n)]
    prompts = [[user(task.text)] for task in tasks]
    answers = generate(model, tokenizer, prompts, seed=seed, greedy=True)
    return _mean(a.strip() == task.answer for a, task in zip(answers, tasks, strict=True))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    style: str,
    hindsight: Hindsight,
    n: int = 400,
    seed: int = 0,
) -> Scores:
    """All three scores, each on `n` prompts."""
    return Scores(
        preference=preference_rate(model, tokenizer, style, n=n, seed=seed),
        hindsight_following=hindsight_following(model, tokenizer, hindsight, n=n, seed=seed),
        other_tasks=other_tasks_accuracy(model, tokenizer, n=n, seed=seed),
    )


def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, n: int = 4, seed: int = 0
) -> list[tuple[str, str]]:
    """`n` held-out questions with one sampled answer each; the same questions for the same seed."""
    questions = draw_questions(random.Random(seed), n, HELD_OUT_QUESTIONS)
    answers = generate(model, tokenizer, [[user(q.text)] for q in questions], seed=seed)
    return [(q.text, a) for q, a in zip(questions, answers, strict=True)]


def _mean(hits) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)
