"""Which user a run talks to: one config for each kind, and `build_user`, which makes it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import SdpoError
from .base import User
from .by_model import ModelUser
from .by_rule import RuledUser
from .by_server import ServedUser
from .personas import Persona
from .playing import OnFailure
from .replay import ReplayedUser


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise SdpoError(f"{name} must be positive, got {value}")


def _check_sampling(config: "ChatServer | LocalUser") -> None:
    if config.temperature < 0:
        raise SdpoError(f"temperature must not be negative, got {config.temperature}")
    if not 0 < config.top_p <= 1:
        raise SdpoError(f"top_p must lie in (0, 1], got {config.top_p}")
    _positive(config, "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class RuleUser:
    """A user who says the persona's own sentences, by the persona's rule; costs nothing."""

    praise: float = 1.0
    """Probability of praise for an answer as the user wants it; otherwise they are silent."""
    irrelevant: float = 0.0
    """Probability that the user says something that has nothing to do with the answer."""

    def __post_init__(self):
        for name in ("praise", "irrelevant"):
            if not 0 <= getattr(self, name) <= 1:
                raise SdpoError(f"{name} is a probability, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What a run may spend on a server, over all times that it is resumed."""

    calls: int | None = None
    """Requests, retries included; none: no limit."""
    tokens: int | None = None
    """Tokens read and written. A call is sent only if the most that it may take is left."""

    def __post_init__(self):
        _positive(self, "calls", "tokens")


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """How long a server is waited for."""

    tries: int = 8
    """Requests for one reply, before the run stops."""
    timeout: float = 60.0
    """Seconds that one request may take."""
    first_wait: float = 1.0
    """Seconds to wait after the first failure; each further one doubles it."""
    longest_wait: float = 120.0
    """Seconds waited at most between two tries; a server that asks for more ends the run."""

    def __post_init__(self):
        _positive(self, "tries", "timeout", "first_wait", "longest_wait")

    def wait(self, failures: int, asked_for: float, share: float) -> float | None:
        """Seconds to wait after so many failures; None: the server asks for too many.

        Args:
            asked_for: seconds that the server asks for; 0: it does not say.
            share: in [0, 1), spreads requests that failed together over half of the time.
        """
        if asked_for > self.longest_wait:
            return None
        doubled = min(self.first_wait * 2.0 ** min(failures - 1, 60), self.longest_wait)
        return max(asked_for, doubled * (0.5 + share / 2))


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """A model behind an OpenAI-compatible server; needs the ``online`` extra."""

    url: str
    """Address of the API, such as http://127.0.0.1:8000/v1."""
    model: str
    """Model's name, as the server calls it."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; "" for a server without one."""
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 128
    """Tokens that a reply may have."""
    extra: str = ""
    """More of a request, as a JSON object; null takes a field out of it:
    {"chat_template_kwargs": {"enable_thinking": false}}."""
    concurrency: int = 8
    """Requests at a time."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def __post_init__(self):
        _check_sampling(self)
        _positive(self, "concurrency")
        if not self.url.startswith(("http://", "https://")):
            raise SdpoError(f"url must begin with http:// or https://, got {self.url!r}")
        if not self.model:
            raise SdpoError("model must name a model of the server")
        limits = ("max_tokens", "max_completion_tokens")
        given = [value for name, value in self.request([]).items() if name in limits]
        if not given or not all(type(value) is int and value > 0 for value in given):
            raise SdpoError(f"extra must leave a limit on a reply's tokens: {' or '.join(limits)}")

    def request(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The body of a request.

        Raises:
            SdpoError: ``extra`` is no JSON object, or asks for what would not be read.
        """
        try:
            extra = json.loads(self.extra or "{}")
        except ValueError as error:
            raise SdpoError(f"extra is not valid JSON ({error})") from None
        if not isinstance(extra, dict):
            raise SdpoError(f"extra must be a JSON object, got {self.extra}")
        if refused := [name for name in ("n", "stream", "model", "messages") if name in extra]:
            raise SdpoError(f"extra must not hold {refused[0]}")
        sampling = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_new_tokens,
        }
        body = {"model": self.model, "messages": messages} | sampling | extra
        return {name: value for name, value in body.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ServerUser(ChatServer):
    """A user played by a model behind an OpenAI-compatible server; needs the ``online`` extra."""

    system: bool = True
    """Whether the model takes a system message; otherwise the user's message holds it."""
    max_chars: int = 600
    """Characters that a reply may have."""
    on_failure: OnFailure = "silence"
    """Whether a reply that is empty, cut, refused or too long counts as silence or ends the run."""

    def __post_init__(self):
        super().__post_init__()
        _positive(self, "max_chars")


@dataclass(frozen=True, kw_only=True)
class LocalUser:
    """A user played by a model in this process; its own generation config is not used."""

    model: str
    """A local Hugging Face folder, or a name on the hub."""
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    """Tokens to choose from, 0 for all."""
    max_new_tokens: int = 128
    """Tokens that a reply may have."""
    max_prompt_tokens: int = 4096
    """Tokens of what the player is shown; longer messages lose their middle."""
    max_chars: int = 600
    """Characters that a reply may have."""
    batch: int = 16
    """Replies at a time."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the weights; auto: bfloat16 on a GPU, float32 on a CPU."""
    on_failure: OnFailure = "silence"
    """Whether a reply that is empty, cut, refused or too long counts as silence or ends the run."""

    def __post_init__(self):
        _check_sampling(self)
        _positive(self, "max_chars", "max_prompt_tokens", "batch")
        if self.top_k < 0:
            raise SdpoError(f"top_k must not be negative, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class ReplayUser:
    """A user who says again what was said in a recorded run."""

    rollouts: str
    """File, folder or glob of recorded rollouts, such as runs/online/rollouts."""
    match: Literal["content", "id"] = "content"
    """What must be the same: prompt and answer, or the rollout's id."""
    on_miss: Literal["stop", "silence"] = "stop"
    """Whether an exchange that was not recorded ends the run or gets no reply."""


AnyUser = RuleUser | ServerUser | LocalUser | ReplayUser
"""The users that a configuration may name."""


def build_user(config: AnyUser, persona: Persona, *, folder: Path) -> User:
    """The user of a config, with a persona. Of several ranks, one alone should have a user.

    Args:
        folder: the run's, where what a server said is kept.

    Raises:
        SdpoError: the persona cannot be played so, or what the user needs is missing.
    """
    match config:
        case RuleUser():
            return RuledUser(config, persona)
        case ServerUser():
            return ServedUser(config, persona, folder)
        case LocalUser():
            return ModelUser(config, persona)
        case ReplayUser():
            return ReplayedUser(config, persona)
