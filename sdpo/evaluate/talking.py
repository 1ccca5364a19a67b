"""Models that are talked to, in this process or behind a server, through a book.

Whatever was answered once to the same model, messages and sampling is taken from the book: a killed
command goes on where it was, and a report can be made again without a model.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.engine import Ranks
from sdpo_parallel.huggingface import load_tokenizer

from ..chat import chat_format
from ..conversations import Message
from ..errors import SdpoError
from ..io.progress import progress
from ..online.evaluate import text_of
from ..online.sampler import InProcessSampler, SamplingConfig
from ..online.users.asking import Ask, Asker
from ..online.users.calls import Call, Calls, Outcome, Spent
from ..online.users.config import BudgetConfig, ChatServer
from ..online.users.playing import Said
from .models import Model

_DECIDE = ("max_new_tokens", "temperature", "top_p", "seed")
"""Settings on which a local model's answer depends."""
T = TypeVar("T")
SHARE = 64
"""Requests that a server is given at a time, between two looks at the progress bar."""


@dataclass(frozen=True, kw_only=True)
class TalkConfig:
    """How models answer."""

    max_new_tokens: int = 1024
    """Longer answers are cut."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int = 0
    """Of answers that are drawn in this process; servers are sent none."""
    batch: int = 32
    """Answers that a model in this process gives at a time."""
    concurrency: int = 16
    """Requests that a server has at a time."""
    key_variable: str = ""
    """Environment variable that holds the servers' key; "" where they want none."""
    extra: str = ""
    """More of a request to a server, as a JSON object."""
    budget: BudgetConfig = BudgetConfig()
    """What servers may be asked for; of each model apart."""

    def __post_init__(self):
        if self.temperature < 0:
            raise SdpoError(f"temperature must not be negative, got {self.temperature}")


class Answer(NamedTuple):
    """What a model said; ``finished``: it ended by itself and was not cut at the limit."""

    text: str
    finished: bool


class Question(NamedTuple):
    """Messages that end with a user's, and an id of one's own."""

    id: str
    messages: tuple[Message, ...]


class Talker(Protocol):
    """A model that answers."""

    def answer(self, asks: Sequence[Question], says: str) -> list[Answer]:
        """An answer to each, in order.

        Args:
            says: what the progress bar says.

        Raises:
            SdpoError: the model cannot be had, refuses or has no budget left.
        """
        ...

    def spent(self) -> Spent:
        """Calls and tokens, over all times that the command ran."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...


def talker(model: Model, config: TalkConfig, books: Path, *, offline: bool = False) -> Talker:
    """Someone to talk to.

    Args:
        books: folder of the books.
        offline: take everything from the book.
    """
    kind = Served if model.url else Local
    return kind(model, config, books / model.name, offline)


class Served:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, model: Model, config: TalkConfig, book: Path, offline: bool):
        self.model, self.offline = model, offline
        self.asker = Asker(_server(model, config), book, _whole, "evaluate")

    def answer(self, asks: Sequence[Question], says: str) -> list[Answer]:
        sent = [Ask(ask.id, [m.for_template() for m in ask.messages]) for ask in asks]
        if self.offline:
            calls, keys = self.asker.calls, [self.asker.request(ask).key for ask in sent]
            _known(sum(calls.found(key) is None for key in keys), asks, self.model, calls)
        found = list[Answer]()
        for some in _watched(sent, SHARE, says):
            found += [_answer(heard.said.text) for heard in self.asker.ask(some)]
        return found

    def spent(self) -> Spent:
        return self.asker.calls.spent()

    def close(self) -> None:
        self.asker.close()


class Local:
    """A model of a Hugging Face folder, loaded when the book does not know an answer."""

    def __init__(self, model: Model, config: TalkConfig, book: Path, offline: bool):
        self.model, self.config, self.offline = model, config, offline
        self.calls = Calls(book)
        self._loaded: InProcessSampler | None = None
        self._identity = model.identity
        self._tokenizer = load_tokenizer(model.tokenizer)
        self._chat = chat_format(self._tokenizer)

    def answer(self, asks: Sequence[Question], says: str) -> list[Answer]:
        keys = [self._key(ask) for ask in asks]
        known = {key: found for key in keys if (found := self.calls.found(key)) is not None}
        new = {key: ask for key, ask in zip(keys, asks, strict=True) if key not in known}
        if self.offline:
            _known(len(new), asks, self.model, self.calls)
        for some in _watched(list(new.items()), self.config.batch, says):
            known |= {key: (text,) for key, text in self._batch(some)}
        return [_answer(known[key][0]) for key in keys]

    def spent(self) -> Spent:
        return self.calls.spent()

    def close(self) -> None:
        self._loaded = None
        self.calls.close()

    def _key(self, ask: Question) -> str:
        config = {k: v for k, v in asdict(self.config).items() if k in _DECIDE}
        messages = [m.for_template() for m in ask.messages]
        content = [self._identity, config, messages, ask.id if config["temperature"] else ""]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _batch(self, asks: Sequence[tuple[str, Question]]) -> Iterator[tuple[str, str]]:
        """Answers of the model, written down."""
        prompts = [self._chat.prompt_ids(ask.messages) for _, ask in asks]
        numbers = [
            self.calls.send(self._call(key, ask, len(prompt)), calls=None, tokens=None)
            for (key, ask), prompt in zip(asks, prompts, strict=True)
        ]
        seeds = [(int(key[:15], 16) ^ self.config.seed) for key, _ in asks]
        rollouts = self._sampler().sample(prompts, seeds, greedy=not self.config.temperature)
        for (key, _), number, prompt, out in zip(asks, numbers, prompts, rollouts, strict=True):
            said = _whole(text_of(out, self._tokenizer), not out.finished).text
            read, written = len(prompt), len(out.token_ids)
            assert number is not None and said is not None  # no limit was given
            self.calls.end(number, Outcome("said", read + written, read, written, None, said))
            yield key, said

    def _call(self, key: str, ask: Question, read: int) -> Call:
        request = json.dumps([m.for_template() for m in ask.messages], ensure_ascii=False)
        most = read + self.config.max_new_tokens
        return Call(key, ask.id, "evaluate", "", self.model.where, 1, most, request)

    def _sampler(self) -> InProcessSampler:
        if self._loaded is None:
            config = self.config
            sampling = SamplingConfig(
                temperature=config.temperature or 1.0,
                top_p=config.top_p,
                max_new_tokens=config.max_new_tokens,
                batch=config.batch,
            )
            self._loaded = InProcessSampler(
                sampling, _Place.here(), self.model.model, self._chat, ParallelConfig()
            )
        return self._loaded


@dataclass(frozen=True)
class _Place:
    """This process alone, as a sampler asks for it."""

    ranks: Ranks
    device: torch.device

    @classmethod
    def here(cls) -> "_Place":
        return cls(Ranks(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def gather(self, value: Any) -> list[Any]:
        return [value]


def _server(model: Model, config: TalkConfig) -> ChatServer:
    return ChatServer(
        url=model.url,
        model=model.model,
        key_variable=config.key_variable,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        extra=config.extra,
        concurrency=config.concurrency,
        budget=config.budget,
    )


def _whole(text: str, cut: bool) -> Said:
    """All that a model said, in the one text that a book has room for."""
    return Said(json.dumps([text.strip(), not cut], ensure_ascii=False))


def _answer(said: str | None) -> Answer:
    return Answer("", True) if said is None else Answer(*json.loads(said))  # None: it declined


def _known(missing: int, asks: Sequence[Question], model: Model, book: Calls) -> None:
    if missing:
        raise SdpoError(
            f"{book.path}: {missing} of {len(asks)} answers of {model.name} are not in it, and "
            "this is offline: run the command once without --offline"
        )


def _watched(items: Sequence[T], size: int, says: str) -> Iterator[Sequence[T]]:
    """Parts of ``size``, with a progress bar."""
    with progress(says, len(items), shown=bool(items)) as tell:
        for start in range(0, len(items), size):
            some = items[start : start + size]
            yield some
            tell(len(some))
