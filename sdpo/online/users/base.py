"""What a user is to a run: somebody who sees an answer and says something, or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ...conversations import Message

if TYPE_CHECKING:
    from .personas import Persona


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What a user sees: what they asked and what they got.

    Args:
        id: of the rollout; a user's choices are drawn from it and a seed alone.
        prompt: the conversation up to and including the message that was answered.
        answer: the answer's text, without control tokens.
        finished: the answer ended by itself and was not cut at a limit.
    """

    id: str
    prompt: tuple[Message, ...]
    answer: str
    finished: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a user said.

    Args:
        text: their next message; None: they say nothing.
        source: where it comes from: "rule", "server", "cache", "model" or "replay". A colon and a
            word behind it say what was special about it, such as "server:empty" and
            "rule:irrelevant".
    """

    text: str | None
    source: str


class User(Protocol):
    """Somebody with a persona who reacts to answers."""

    @property
    def persona(self) -> "Persona":
        """Who it is."""
        ...

    def reply(self, exchanges: Sequence[Exchange], *, seed: int) -> list[Reply]:
        """The next message to each exchange, in their order.

        Raises:
            SdpoError: no more replies can be had; says why and what to do.
        """
        ...

    def close(self) -> None:
        """Let go of what the user holds: connections, files, a model."""
        ...
