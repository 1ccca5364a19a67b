"""The demo's world: a small chat grammar in which every question has two right styles of answer.

Somebody asks for a thing ("Hello, name a color please.") and may be answered *tersely* ("Blue.")
or in a *friendly* sentence ("Sure, how about blue?"). Users object to the style that they do not
like, praise an answer, or talk about something else. A second family of requests, the *tasks*, has
exactly one right answer and no style: they show what training must leave alone.

Texts, tokenizer and the parsing of answers are here; nothing in this module knows a model. Every
draw takes a `random.Random`, so that a seed fixes the world's whole history.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from zlib import crc32

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Message = dict[str, str]
"""A chat message: `{"role": "user" | "assistant", "content": text}`."""

Hindsight = Callable[[list[Message], str], list[Message]]
"""Puts a follow-up into the prompt that it followed, as the hindsight pass reads it."""

STYLES = ("terse", "friendly")

THINGS = {
    "color": ("red", "blue", "green", "white"),
    "animal": ("cat", "dog", "horse", "otter"),
    "fruit": ("apple", "pear", "plum", "fig"),
    "city": ("Rome", "Paris", "Oslo", "Lima"),
    "tree": ("oak", "pine", "birch", "elm"),
    "instrument": ("piano", "violin", "flute", "drum"),
    "metal": ("iron", "copper", "silver", "zinc"),
    "drink": ("tea", "coffee", "milk", "cocoa"),
}
OPENERS = ("", "Hi. ", "Hello! ", "Hey! ")
REQUESTS = (
    "Name {}",
    "Tell me {}",
    "Give me {}",
    "Suggest {}",
    "Think of {}",
    "I need {}",
    "Pick {}",
)
CLOSERS = (".", " please.", " if you can.", " for my list.")
HELD_OUT_SHARE = 4
"""One question in this many is kept out of pre-training and of every log."""

CORRECTIONS = {
    "terse": (
        "Too long. Just the answer please.",
        "No filler, one word only.",
        "Shorter please.",
        "Skip the small talk, I only want the word.",
        "That is too wordy.",
    ),
    "friendly": (
        "Too short. Say it in a full sentence please.",
        "Be friendly and write a whole sentence.",
        "That was a bit rude.",
        "Warmer please, you sound like a machine.",
        "One word is not enough.",
    ),
}
PRAISE = (
    "Thanks!",
    "Perfect, thank you.",
    "Great, I like that.",
    "Exactly what I wanted.",
    "Nice.",
)
REMARKS = (
    "What time is it?",
    "It is raining here.",
    "Do you like music?",
    "I am off to lunch.",
    "My sister is learning to swim.",
    "lol",
    "Ok.",
    "brb, phone",
)

LETTERS = tuple("bdfgkmtz")
CYCLES = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("January", "March", "May", "July", "September", "November"),
    ("spring", "summer", "autumn", "winter"),
)
LARGEST_ADDEND = 5

BOS_TURN, END_TURN, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML. `{% generation %}` marks what the assistant says, its end of turn included."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request for one `thing`, answerable in either style."""

    text: str
    thing: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A request without style: `answer` is the only right reply."""

    text: str
    answer: str


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _all_questions() -> Iterator[Question]:
    for opener, request, closer, thing in product(OPENERS, REQUESTS, CLOSERS, THINGS):
        article = "an" if thing[0] in "aeiou" else "a"
        text = opener + request.format(f"{article} {thing}") + closer
        yield Question(text=text, thing=thing)


def _is_held_out(question: Question) -> bool:
    return crc32(question.text.encode()) % HELD_OUT_SHARE == 0


LOG_QUESTIONS = tuple(q for q in _all_questions() if not _is_held_out(q))
HELD_OUT_QUESTIONS = tuple(q for q in _all_questions() if _is_held_out(q))


def right_answers(question: Question, style: str | None = None) -> tuple[str, ...]:
    """Every right answer in `style`, or in any style; all styles have the same number."""
    values = THINGS[question.thing]
    answers = {
        "terse": tuple(f"{value[0].upper()}{value[1:]}." for value in values),
        "friendly": tuple(f"Sure, how about {value}?" for value in values),
    }
    return answers[style] if style else answers["terse"] + answers["friendly"]


def answers_in(style: str, question: Question, text: str) -> bool:
    """Whether `text` is a right answer to `question` in `style`."""
    return text.strip() in right_answers(question, style)


def draw_correction(rng: random.Random, style: str, question: Question | None = None) -> str:
    """A user's wish for `style`, followed by the `question` if it should be answered again."""
    wish = rng.choice(CORRECTIONS[style])
    return f"{wish} {question.text}" if question else wish


def is_correction(text: str) -> bool:
    """Whether a follow-up objects to the style of the answer before it."""
    return any(text.strip().startswith(phrases) for phrases in CORRECTIONS.values())


def draw_irrelevant(rng: random.Random) -> str:
    """A follow-up that says nothing about the answer's style: praise, a remark, the next question.

    Questions are the most frequent, as they are the hardest to ignore.
    """
    drawn = rng.choice(rng.choices((PRAISE, REMARKS, LOG_QUESTIONS), weights=(1, 1, 2))[0])
    return drawn.text if isinstance(drawn, Question) else drawn


def draw_task(rng: random.Random) -> Task:
    """A request with one right answer: copying, reversing, adding, continuing a cycle."""
    kind = rng.choice(("copy", "reverse", "add", "next"))
    if kind == "add":
        a, b = rng.randint(0, LARGEST_ADDEND), rng.randint(0, LARGEST_ADDEND)
        return Task(text=f"What is {a} plus {b}?", answer=f"{a + b}")
    if kind == "next":
        cycle = rng.choice(CYCLES)
        at = rng.randrange(len(cycle))
        return Task(text=f"What follows {cycle[at - 1]}?", answer=f"{cycle[at]}")
    letters = rng.sample(LETTERS, 3)
    if kind == "copy":
        return Task(text=f"Repeat: {' '.join(letters)}", answer=" ".join(letters))
    return Task(text=f"Reverse: {' '.join(letters)}", answer=" ".join(reversed(letters)))


def _texts() -> Iterator[str]:
    """Texts that together contain every word of the world in every position that it can take."""
    for question in _all_questions():
        yield question.text
        yield from right_answers(question)
    for phrases in (*CORRECTIONS.values(), PRAISE, REMARKS, *CYCLES, LETTERS):
        yield from phrases
    yield from ("What is plus?", "What follows?", "Repeat:", "Reverse:", "user\n", "assistant\n")
    yield from (str(n) for n in range(2 * LARGEST_ADDEND + 1))


def build_tokenizer(hindsight: Hindsight) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one token per word of the world and of the hindsight context.

    Words are looked up whole before any merge (Llama 3's `ignore_merges`), and anything else falls
    back to bytes, so every string round-trips. Padding has its own token: if it were the end of a
    turn, a mask over padding would also hide the end of every answer.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    context = hindsight([user("")], "")[-1]["content"]
    texts = [context, *_texts()]
    # A follow-up in its context, like the second item of a list, starts with a space.
    texts += [f" {text}" for text in texts]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [PAD, BOS_TURN, END_TURN, *alphabet, *sorted(words - set(alphabet))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (PAD, BOS_TURN, END_TURN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TURN,
        pad_token=PAD,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def draw_questions(rng: random.Random, n: int, pool: Sequence[Question]) -> list[Question]:
    """`n` questions from `pool`, which repeat only after all of it has been drawn."""
    rounds = [rng.sample(pool, len(pool)) for _ in range(-(-n // len(pool)))]
    return [question for questions in rounds for question in questions][:n]
