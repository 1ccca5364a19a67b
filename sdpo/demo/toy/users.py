"""Simulated users: they talk to a model, and their conversations become a log file.

A user asks, and the model answers, sampled at temperature 1. Users object to an answer in the wrong
style, often asking the question again; they praise one in the right style, or ask the next
question. A few pay no attention and talk about something else. Nobody labels anything: what a user
wanted shows only in what they said next. The file has WildChat's columns.
"""

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import md5
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .evaluate import Chat
from .world import (
    LOG_QUESTIONS,
    PRAISE,
    REMARKS,
    STYLES,
    Message,
    Question,
    answers_in,
    assistant,
    draw_correction,
    draw_questions,
    user,
)

MAX_ANSWERS = 2
"""Answers that a user gets in one conversation before leaving."""
LEAVING_SHARE = 0.6
"""Probability that a user leaves after reacting to an answer."""
NOISE = 0.1
"""Share of follow-ups that have nothing to do with the answer before them."""
FIRST_MESSAGE_AT = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass
class _Talk:
    """A conversation in progress: what the user is asking now, and what was said."""

    question: Question
    messages: list[Message]
    left: bool = False


def simulate_logs(
    model_folder: Path,
    out_parquet: Path,
    *,
    preference: str,
    n_conversations: int,
    seed: int,
) -> Path:
    """Write the conversations of users who prefer the style `preference` with the model."""
    chat = Chat(model_folder)
    rng = random.Random(seed)
    talks = [
        _Talk(question, [user(question.text)])
        for question in draw_questions(rng, n_conversations, LOG_QUESTIONS)
    ]
    for turn in range(MAX_ANSWERS):
        going_on = [talk for talk in talks if not talk.left]
        answers = chat.answers([t.messages for t in going_on], seed=MAX_ANSWERS * seed + turn)
        for talk, answer in zip(going_on, answers, strict=True):
            _follow_up(rng, talk, answer, preference)
    rows = [_wildchat_row(i, talk.messages) for i, talk in enumerate(talks)]
    pq.write_table(pa.Table.from_pylist(rows), out_parquet)
    return out_parquet


def _follow_up(rng: random.Random, talk: _Talk, answer: str, preference: str) -> None:
    """Add the answer and the user's reaction to it, after which they may leave.

    Nobody corrects the style of an answer that does not answer the question at all.
    """
    talk.messages.append(assistant(answer))
    talk.left = rng.random() < LEAVING_SHARE
    pleased = answers_in(preference, talk.question, answer)
    displeased = any(answers_in(s, talk.question, answer) for s in STYLES if s != preference)
    if rng.random() < NOISE or not (pleased or displeased):
        text, talk.left = rng.choice(REMARKS), True
    elif displeased:
        text = draw_correction(rng, preference, None if talk.left else talk.question)
    elif talk.left:
        text = rng.choice(PRAISE)
    else:
        talk.question = rng.choice(LOG_QUESTIONS)
        text = talk.question.text
    talk.messages.append(user(text))


def _wildchat_row(index: int, messages: list[Message]) -> dict:
    """A conversation in WildChat-1M's columns."""
    said = repr((index, [m["content"] for m in messages]))
    marks = {"language": "English", "toxic": False, "redacted": False}
    return {
        "conversation_hash": md5(said.encode(), usedforsecurity=False).hexdigest(),
        "model": "sdpo-demo",
        "timestamp": FIRST_MESSAGE_AT + timedelta(minutes=index),
        "conversation": [
            {"content": m["content"], "role": m["role"], **marks, "turn_identifier": i}
            for i, m in enumerate(messages)
        ],
        "turn": len(messages) // 2,
        **marks,
    }
