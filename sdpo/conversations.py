"""Conversations as they were logged.

`sdpo.data.read.formats` makes them from a log's rows; `sdpo.data.prepare.rules` decides which of
their turns are worth training on.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is what the log says: "user", "assistant", "human", "gpt", "system", ..."""

    role: str
    content: str

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a log, as it was logged: nothing stripped, dropped or reordered.

    Args:
        source: "path:row", the row counted as in `DataError`.
        has_language: the log has a column of languages. Without one nothing is known; with one,
            `language` None means that this row's language is unknown.
        named: `id` is the log's own `conversation_id` or `id`, not its hash of the conversation
            or made from the row's place.
        user: a hashed address or a user's id.
        names: everything that the log calls the row and its user.
        flagged: the log's moderation flagged the conversation or one of its messages.
        redacted: the log's publisher redacted the conversation or one of its messages.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    language: str | None = None
    has_language: bool = False
    named: bool = True
    user: str | None = None
    names: tuple[str, ...] = ()
    model: str | None = None
    flagged: bool = False
    redacted: bool = False
