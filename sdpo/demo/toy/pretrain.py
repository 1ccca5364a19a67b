"""Pre-trains the demo's model: a Qwen3 of a few hundred thousand weights, in a minute on a CPU.

It learns to answer in either style equally often, to obey a hindsight context that asks for one, to
ignore any other hindsight context, and to solve the tasks. So it starts where a chat model starts:
able to do what its users want, without knowing what they want.

The style of an answer depends on the last user message alone: on a correction in it, or in the
hindsight context at its end, which takes precedence. Corrections in earlier messages are forgotten
at once, which is what users complain about and what training on their logs repairs.

Three things decide whether training on logs works. Hindsight contexts contradict wishes in the
prompt, so that the model still obeys them when it prefers one style. Some answers slip into the
wrong style, so that the hindsight pass has an opinion on the rest of an answer that it would not
have begun. And all right words are targets at once, so that irrelevant follow-ups change next to
nothing.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from .world import (
    END_TURN,
    LOG_QUESTIONS,
    STYLES,
    THINGS,
    Hindsight,
    Message,
    Question,
    assistant,
    build_tokenizer,
    draw_correction,
    draw_irrelevant,
    draw_task,
    right_answers,
    user,
)

PACKED_LENGTH = 192
"""Tokens in a row of packed lessons; the longest lessons have about 140."""
TURN_WEIGHTS = (5, 5, 1)
"""Weights of lessons with one, two and three exchanges."""
CONTEXT_WEIGHTS = {"none": 1, "irrelevant": 7, "correction": 5}
"""Weights of the hindsight contexts at a lesson's end: the hardest are the most frequent."""
CARELESS_SHARE = 0.6
"""Share of the answers to a correction that have a random style; half of these slip (`Lesson`)."""
N_RIGHT = len(STYLES) * max(map(len, THINGS.values()))
"""Targets per word: as many as a question has right answers."""
IGNORED = -100
VOCAB_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, so that its tensor-parallel shards are equal."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Sizes and schedule of the pre-training run."""

    hidden_size: int = 64
    n_layers: int = 3
    n_heads: int = 4
    init_std: float = 0.08
    """About 1 / sqrt(hidden_size); the 0.02 of wide models is too small for this one."""
    steps: int = 1200
    short_steps: int = 200
    """First steps on single exchanges without hindsight context, which cost a third as much."""
    batch_size: int = 24
    lr: float = 6e-3
    warmup_steps: int = 30
    weight_decay: float = 0.01


def pretrain(
    folder: Path, *, seed: int, hindsight: Hindsight, recipe: Pretraining | None = None
) -> Path:
    """Pre-train a model; write weights, configs, tokenizer and chat template to `folder`.

    Args:
        hindsight: the production template, whose words and meaning the model learns.
    """
    recipe = recipe or Pretraining()
    set_seed(seed)
    tokenizer = build_tokenizer(hindsight)
    model = _new_model(tokenizer, recipe)
    _fit(model, tokenizer, recipe, hindsight, random.Random(seed))
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A conversation, and for each of its answers all the answers that were right there.

    The answer in `messages` is one of the `right` ones, or a slip: the wrong style for the
    hindsight context before it. The hindsight pass reads answers of just that kind, and a model
    that never saw one would say anything after its first word; so it learns to finish it.
    """

    messages: list[Message]
    right: list[tuple[str, ...]]


def draw_lesson(rng: random.Random, hindsight: Hindsight, *, short: bool) -> Lesson:
    """One to three exchanges as they should be, the last often with a hindsight context.

    A `short` lesson is one exchange without a hindsight context.
    """
    n_turns = 1 if short else rng.choices((1, 2, 3), weights=TURN_WEIGHTS)[0]
    lesson = Lesson(messages=[], right=[])
    question: Question | None = None
    for _ in range(n_turns):
        text, question, right = _draw_exchange(rng, question)
        lesson.messages.extend((user(text), assistant(rng.choice(right))))
        lesson.right.append(right)
    return lesson if short else _with_context(rng, hindsight, lesson, question)


def _draw_exchange(
    rng: random.Random, previous: Question | None
) -> tuple[str, Question | None, tuple[str, ...]]:
    """The user's text, the question it asks (None for a task), and the right answers."""
    kind = rng.choice(("question", "wish", "task"))
    if kind == "task":
        task = draw_task(rng)
        return task.text, None, (task.answer,)
    if kind == "question":
        question = rng.choice(LOG_QUESTIONS)
        return question.text, question, right_answers(question)
    question = previous or rng.choice(LOG_QUESTIONS)
    style = rng.choice(STYLES)
    return draw_correction(rng, style, question), question, right_answers(question, style)


def _with_context(
    rng: random.Random, hindsight: Hindsight, lesson: Lesson, question: Question | None
) -> Lesson:
    """Add a follow-up to the last user message; the last answer obeys it if it asks for a style.

    It takes precedence over a wish in the message itself, so that obeying it does not depend on
    which style the model prefers without it.
    """
    *asked, reply = lesson.messages
    *before, right = lesson.right
    kind = rng.choices(list(CONTEXT_WEIGHTS), weights=list(CONTEXT_WEIGHTS.values()))[0]
    if kind == "none":
        return lesson
    if kind == "irrelevant":
        followup = draw_irrelevant(rng)
    else:
        wanted = rng.choice(STYLES)
        followup = draw_correction(rng, wanted, question if rng.random() < 0.5 else None)
        if question is not None:
            right = right_answers(question, wanted)
            said = right_answers(question) if rng.random() < CARELESS_SHARE else right
            reply = assistant(rng.choice(said))
    return Lesson(messages=[*hindsight(asked, followup), reply], right=[*before, right])


def _new_model(tokenizer: PreTrainedTokenizerFast, recipe: Pretraining) -> Qwen3ForCausalLM:
    special: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id}
    special["pad_token_id"] = tokenizer.pad_token_id
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads // 2,
        head_dim=recipe.hidden_size // recipe.n_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        **special,
        initializer_range=recipe.init_std,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    # The distribution itself, not its head: a sample is then a draw from the policy.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special
    )
    return model


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A lesson in tokens; `targets` maps each position that is taught to its right next words."""

    ids: list[int]
    targets: dict[int, list[int]]


def _tokenize(tokenizer: PreTrainedTokenizerFast, lessons: list[Lesson]) -> list[_Row]:
    rendered: Any = tokenizer.apply_chat_template(
        [lesson.messages for lesson in lessons],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )

    @cache
    def spell(text: str) -> list[int]:
        return tokenizer(text + END_TURN)["input_ids"]  # pyright: ignore[reportReturnType]

    rows = []
    tokens = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
    for lesson, (ids, said) in zip(lessons, tokens, strict=True):
        starts = [i for i, mark in enumerate(said) if mark and not said[i - 1]]
        answers = [m["content"] for m in lesson.messages if m["role"] == "assistant"]
        targets = {
            start + t: words
            for start, answer, right in zip(starts, answers, lesson.right, strict=True)
            for t, words in enumerate(_right_words(spell(answer), [spell(r) for r in right]))
        }
        rows.append(_Row(ids=ids, targets=targets))
    return rows


def _right_words(said: list[int], right: list[list[int]]) -> Iterator[list[int]]:
    """For each word of `said`, the `N_RIGHT` equally likely words that could stand there.

    They come from the right answers that began alike; if none did, it is the word itself.
    """
    for t, word in enumerate(said):
        words = [answer[t] for answer in right if answer[:t] == said[:t]] or [word]
        assert N_RIGHT % len(words) == 0
        yield words * (N_RIGHT // len(words))


def _pack(rows: list[_Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lessons laid end to end: (tokens_BT, targets_BTK, positions_BT).

    Positions restart with each lesson, which is where transformers' causal mask separates them;
    targets are -100 except for the assistant's words. Batches of similar lengths would waste as
    little, but terse answers are short: each batch would have one style, and training would swing
    between them.
    """
    length = max(PACKED_LENGTH, *(len(row.ids) for row in rows))
    bins: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        for packed in bins:
            if sum(len(r.ids) for r in packed) + len(row.ids) <= length:
                break
        else:
            bins.append(packed := [])
        packed.append(row)
    tokens_BT = torch.full((len(bins), length), pad_id)
    targets_BTK = torch.full((len(bins), length, N_RIGHT), IGNORED)
    positions_BT = torch.zeros((len(bins), length), dtype=torch.long)
    for b, packed in enumerate(bins):
        start = 0
        for row in packed:
            end = start + len(row.ids)
            tokens_BT[b, start:end] = torch.tensor(row.ids)
            positions_BT[b, start:end] = torch.arange(len(row.ids))
            at = torch.tensor(list(row.targets)) + start
            targets_BTK[b, at] = torch.tensor(list(row.targets.values()))
            start = end
    return tokens_BT, targets_BTK, positions_BT


def _fit(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Pretraining,
    hindsight: Hindsight,
    rng: random.Random,
) -> None:
    """Minimise the cross-entropy with the right next words; warm-up, then cosine to zero.

    All right words are targets at once, not one that is drawn: the model ends up calibrated, with
    the same distribution whatever irrelevant follow-up it reads, which sampled targets would blur.
    """
    pad: Any = tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )

    def schedule(step: int) -> float:
        rising = min(1.0, (step + 1) / recipe.warmup_steps)
        return rising * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    for step in range(recipe.steps):
        short = step < recipe.short_steps
        n = recipe.batch_size * (2 if short else 1)  # short lessons are about half as long
        lessons = [draw_lesson(rng, hindsight, short=short) for _ in range(n)]
        tokens_BT, targets_BTK, positions_BT = _pack(_tokenize(tokenizer, lessons), pad)
        out = model.model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False)
        hidden_BTD = out.last_hidden_state
        taught_BT = targets_BTK[:, 1:, 0] != IGNORED
        # Only the assistant's words reach lm_head: they are a small part of a lesson.
        logp_NV = model.lm_head(hidden_BTD[:, :-1][taught_BT]).log_softmax(-1)
        loss = -logp_NV.gather(1, targets_BTK[:, 1:][taught_BT]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
