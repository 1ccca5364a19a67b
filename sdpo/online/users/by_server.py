"""A user played by a model behind any OpenAI-compatible server."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from .asking import Ask, Asker
from .base import Exchange, Reply
from .personas import Persona
from .playing import Said, messages_for, read, reply

if TYPE_CHECKING:
    from pathlib import Path

    from .config import ServerUser


class ServedUser:
    """A user whose messages a server's model writes.

    What was said once to the same content, under any exchange's id, is taken from the run's book
    and costs nothing (source "cache"), so that a run goes on where it stopped.

    Args:
        folder: where the book of calls is, `calls.FILE`.

    Raises:
        SdpoError: the `openai` package or the server's key is missing.
    """

    def __init__(self, config: "ServerUser", persona: Persona, folder: "Path"):
        self.config, self.persona = config, persona
        self.asker = Asker(config, folder, partial(_read, config.max_chars), persona.name)
        self.calls = self.asker.calls

    def reply(self, exchanges: Sequence[Exchange], *, seed: int) -> list[Reply]:
        """What the model lets the user say; source "server" or "cache", "server:empty",
        "server:truncated", "server:refused", "server:long" where it was no message.

        The seed is not sent, as some servers refuse one: what repeats a reply is the book.

        Raises:
            SdpoError: the server gives no answers, the budget is spent, or a reply is faulty and
                ``on_failure`` is "stop".
        """
        replies = []
        heard = self.asker.ask([self.ask(exchange) for exchange in exchanges])
        for exchange, (said, cached) in zip(exchanges, heard, strict=True):
            source = "server" if not cached or said.fault else "cache"
            where = self.asker.where(exchange.id)
            replies.append(reply(said, source, self.config.on_failure, where))
        return replies

    def close(self) -> None:
        """Close the book."""
        self.asker.close()

    def ask(self, exchange: Exchange) -> Ask:
        """What the model is asked."""
        said = messages_for(self.persona, exchange, system=self.config.system)
        return Ask(exchange.id, [m.for_template() for m in said])


def _read(max_chars: int, text: str, cut: bool) -> Said:
    return read(text, cut=cut, max_chars=max_chars)
