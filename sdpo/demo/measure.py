"""What the demo measures of a model: how it answers questions that nobody asks in training, what
training has left of its knowledge of other text, and how likely it is to open with an apology.

Answers are judged by the personas' rules, greedy ones and sampled ones apart. Perplexity is that of
the reference pages which every Python brings along.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import torch

from sdpo_parallel.transformers.engine import TransformersModel

from ..conversations import Message
from ..hindsight import HindsightConfig
from ..interactions import Interaction
from ..online.measures import Similarity, leaks
from ..online.openings import OpeningMass, opening_mass
from ..online.users.personas import load_persona
from .talk import Answer, Talker

REAL_TOKENS, WINDOW = 2048, 512
"""Tokens of real text that are read, and how many at a time."""
OPENED = 8
"""Questions whose answers' openings are read."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers to held-out questions, decoded in one way. Rates are shares of the answers."""

    preference: dict[str, float]
    """Persona -> rate of answers that are as it likes them."""
    words: float
    """Mean number."""
    finished: float
    """Rate of answers that ended by themselves."""
    leaks: float
    """Rate of answers that apologise or speak of a complaint which nobody made."""
    similarity: float | None
    """Mean similarity of question and answer; None: there is no embedding model here."""
    entropy: float
    """Mean over tokens of the entropy of the model's own distribution, nats."""
    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model."""

    greedy: Answers
    sampled: Answers
    perplexity: float
    """Of real text."""
    openings: OpeningMass
    """Probability of an answer that opens with an apology or thanks: to a question alone, and
    behind a complaint of the first persona as hindsight shows it."""


def as_json(measured: Measured) -> dict[str, Any]:
    """What was measured as JSON values, of the answers their texts."""
    values = asdict(measured)
    for decoding in ("greedy", "sampled"):
        values[decoding]["answers"] = [a["text"] for a in values[decoding]["answers"]]
    return values | {"openings": measured.openings._asdict()}


def measure(
    models: Mapping[str, str],
    questions: Sequence[str],
    personas: Sequence[str],
    *,
    seed: int,
    max_tokens: int,
    temperature: float,
    hindsight: HindsightConfig,
) -> dict[str, Measured]:
    """Measure each model, two at a time in processes of one thread each.

    Args:
        models: name -> Hugging Face folder.
        questions: asked one at a time, without a system message but the chat template's own.
        personas: names or files of those whose rules judge.
        temperature: of sampled answers.
        hindsight: how complaints are shown.
    """
    complained = complaints(questions[:OPENED], personas[0])
    context = get_context("spawn")
    with ProcessPoolExecutor(
        2, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        said: dict[str, list[Future[list[Answer]]]] = {}
        read: dict[str, Future[float]] = {}
        opened: dict[str, Future[OpeningMass]] = {}
        for name, folder in models.items():  # one after the other, so that workers keep theirs
            said[name] = [
                pool.submit(_answer, folder, questions, seed, max_tokens, heat)
                for heat in (0.0, temperature)
            ]
            read[name] = pool.submit(perplexity, folder)
            opened[name] = pool.submit(openings, folder, complained, hindsight)
        similarity = Similarity.load()
        judged = {
            name: [judge(questions, answers.result(), personas, similarity) for answers in both]
            for name, both in said.items()
        }
        return {
            name: Measured(
                greedy=greedy,
                sampled=sampled,
                perplexity=read[name].result(),
                openings=opened[name].result(),
            )
            for name, (greedy, sampled) in judged.items()
        }


@lru_cache(maxsize=1)
def _talker(folder: str) -> Talker:
    return Talker(folder)


def _answer(
    folder: str, questions: Sequence[str], seed: int, max_tokens: int, temperature: float
) -> list[Answer]:
    return _talker(folder).answer(
        questions, seed=seed, max_tokens=max_tokens, temperature=temperature
    )


def judge(
    questions: Sequence[str],
    answers: Sequence[Answer],
    personas: Sequence[str],
    similarity: Similarity | None,
) -> Answers:
    """What answers to these questions are worth."""
    texts = [answer.text for answer in answers]
    likes = {name: load_persona(name) for name in personas}
    return Answers(
        preference={
            name: fmean(persona.satisfied(a.text, a.finished) for a in answers)
            for name, persona in likes.items()
        },
        words=fmean(len(text.split()) for text in texts),
        finished=fmean(answer.finished for answer in answers),
        leaks=fmean(map(leaks, texts)),
        similarity=similarity and fmean(similarity(questions, texts)),
        entropy=fmean(e for answer in answers for e in answer.entropies),
        answers=tuple(answers),
    )


@torch.inference_mode()
def perplexity(folder: str) -> float:
    """Of `REAL_TOKENS` tokens of Python's reference pages, in windows of `WINDOW`."""
    talker = _talker(folder)
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 16 * REAL_TOKENS]
    ids = talker.tokenizer(text, add_special_tokens=False)["input_ids"][:REAL_TOKENS]
    rows_BT = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)
    losses = []
    for row_T in rows_BT:
        logits_TV = talker.model(row_T[None]).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits_TV, row_T[1:]).item())
    return math.exp(fmean(losses))


def complaints(questions: Sequence[str], persona: str) -> list[Interaction]:
    """Each question with one of the persona's complaints, in turn. The answers say nothing."""
    said = load_persona(persona).complaints
    return [
        Interaction(
            id=f"opening-{i}",
            prompt=(Message("user", question),),
            response="…",
            followup=said[i % len(said)],
        )
        for i, question in enumerate(questions)
    ]


@torch.inference_mode()
def openings(
    folder: str, interactions: Sequence[Interaction], hindsight: HindsightConfig
) -> OpeningMass:
    """How likely a model is to open with an apology, with and without a complaint to read."""
    talker = _talker(folder)
    policy = TransformersModel(talker.model)
    return opening_mass(policy, talker.tokenizer, interactions, hindsight)
