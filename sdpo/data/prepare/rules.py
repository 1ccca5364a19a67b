"""Which conversations are kept, and which of their answers become interactions.

"paper-wildchat" and "paper-wildfeedback" give the rows of the two preprocessing scripts published
with "Aligning Language Models from User Interactions" (arXiv:2603.12273,
github.com/lasgroup/user_interactions), ids and order included:

- WildChat: shuffled as Hugging Face's `Dataset.shuffle(seed=42)` shuffles all rows (numpy's PCG64
  permutation; `datasets` itself is not needed), and stopped at 15,000 conversations, or at 50,000
  interactions once 14,000 conversations are kept.
- WildFeedback: in file order, to the end; messages are neither stripped nor dropped before they
  are counted, histories may end with an assistant's message, and ids are row numbers. Rows whose
  answer or follow-up is blank are left out, as nothing could be trained on them.

"strict" is the WildChat rules without sampling or stop, on logs of every format, and with their
known faults mended: ids are the conversations' own, WildChat-1M's hashes included. "all-turns"
keeps every answered turn of one's own logs.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import dropwhile
from typing import Literal, NamedTuple

from ...conversations import Conversation, Message
from ...errors import SdpoError
from ..read.formats import is_among


class Drop(StrEnum):
    """Why a whole conversation gave nothing, in the order in which the reasons are tried."""

    UNREADABLE = "unreadable row"
    OPTED_OUT = "opted out"
    REDACTED = "redacted"
    FLAGGED = "flagged by moderation"
    LANGUAGE = "language"
    TOO_FEW_MESSAGES = "too few messages"
    TOO_LONG = "conversation too long"
    ASSISTANT_TOO_LONG = "assistant message too long"
    USER_TOO_LONG = "user message too long"
    USER_CAP = "over the cap of one user"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near-duplicate"


_TALKERS = {"user": "user", "assistant": "assistant"}
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_BOTH = _TALKERS | _SPEAKERS | {"model": "assistant", "chatgpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True, kw_only=True)
class ExtractionRules:
    """Which conversations are kept, in which order, and how much history an answer gets.

    Lengths are in characters; None switches a rule off. `languages` are lower-case, and only
    filter logs that have a language column: there, a row of unknown language is dropped.
    `enough_interactions` stops the extraction after the conversation that reaches it, but not
    before `enough_after_conversations` are kept.
    """

    roles: tuple[tuple[str, str], ...] = tuple(_BOTH.items())
    """What a log's roles mean; messages of others (system, tool) are no turns."""
    as_logged: bool = False
    """Count and cut messages as they are, blank ones and other roles included; only the history is
    cleaned. Otherwise they are stripped, and blank ones and other roles dropped, before all else;
    roles are then compared without case and surrounding blanks."""
    ids: Literal["own", "conversation_id", "place"] = "own"
    """What interactions' ids begin with. own: the conversation's id or hash, or else file and row;
    conversation_id: that alone, or else the place in the order; place: always that place."""
    history_ends_with_user: bool = True
    history_messages: int = 5
    languages: tuple[str, ...] | None = None
    min_messages: int = 0
    max_conversation_chars: int | None = None
    max_assistant_chars: int | None = None
    max_user_chars: int | None = None
    shuffle_seed: int | None = None
    max_conversations: int | None = None
    enough_interactions: int | None = None
    enough_after_conversations: int = 0

    def __post_init__(self) -> None:
        if self.history_messages < 1:
            raise SdpoError(f"history_messages is {self.history_messages}; it must be at least 1")
        if self.max_conversations is not None and self.max_conversations < 1:
            raise SdpoError(
                f"max_conversations is {self.max_conversations}; use at least 1, or None for all"
            )
        if self.languages is not None and any(name != name.lower() for name in self.languages):
            raise SdpoError(f"languages are {self.languages}; write them in lower case")


_STRICT = ExtractionRules(
    languages=("english", "en"),
    min_messages=3,
    max_conversation_chars=100_000,
    max_assistant_chars=4096,
    max_user_chars=4096,
)

PRESETS = {
    "strict": _STRICT,
    "paper-wildchat": replace(
        _STRICT,
        roles=tuple(_TALKERS.items()),
        ids="conversation_id",
        shuffle_seed=42,
        max_conversations=15_000,
        enough_interactions=50_000,
        enough_after_conversations=14_000,
    ),
    "paper-wildfeedback": replace(
        _STRICT,
        roles=tuple(_SPEAKERS.items()),
        as_logged=True,
        ids="place",
        history_ends_with_user=False,
        languages=None,
        max_user_chars=None,
    ),
    "all-turns": ExtractionRules(),
}
"""Rules by name; see the module's docstring."""


class Turn(NamedTuple):
    """An answer with its history and follow-up, as indices of the conversation's messages."""

    history: tuple[int, ...]
    answer: int
    """Also the interaction's turn_id; the follow-up is the message after it."""


class Extraction(NamedTuple):
    """What one conversation gave: why it was dropped, or its messages and turns (maybe none)."""

    dropped: Drop | None
    messages: list[Message]
    """Their roles are "user", "assistant" or, for any other, ""."""
    turns: list[Turn]
    without_history: int
    """Answers passed over because no usable history precedes them."""
    blank: int
    """Answers passed over because they, or the follow-up, are blank."""


def examine(conversation: Conversation, rules: ExtractionRules) -> Extraction:
    """Applies the rules to one conversation: every answer that the user replied to is a turn."""
    languages = rules.languages if conversation.has_language else None
    if languages is not None and not is_among(conversation.language, languages):
        return Extraction(Drop.LANGUAGE, [], [], 0, 0)
    roles = dict(rules.roles)
    if rules.as_logged:
        messages = [Message(roles.get(m.role, ""), m.content) for m in conversation.messages]
    else:
        messages = _cleaned(conversation.messages, roles)
    if dropped := _length_drop(messages, rules):
        return Extraction(dropped, messages, [], 0, 0)
    turns, without_history, blank = [], 0, 0
    for i in range(len(messages) - 1):
        if messages[i].role != "assistant" or messages[i + 1].role != "user":
            continue
        history = _history(messages, i, rules)
        if not history:
            without_history += 1
        elif rules.as_logged and not all(m.content.strip() for m in messages[i : i + 2]):
            blank += 1
        else:
            turns.append(Turn(history, i))
    return Extraction(None, messages, turns, without_history, blank)


def _cleaned(logged: tuple[Message, ...], roles: dict[str, str]) -> list[Message]:
    messages = []
    for message in logged:
        content = message.content.strip()
        role = roles.get(message.role) or roles.get(message.role.strip().lower())
        if content and role:
            messages.append(Message(role, content))
    return messages


def _length_drop(messages: list[Message], rules: ExtractionRules) -> Drop | None:
    if len(messages) < rules.min_messages:
        return Drop.TOO_FEW_MESSAGES
    total, longest = 0, {"user": 0, "assistant": 0, "": 0}
    for role, length in ((message.role, len(message.content)) for message in messages):
        total += length
        longest[role] = max(longest[role], length)
    if _exceeds(total, rules.max_conversation_chars):
        return Drop.TOO_LONG
    if _exceeds(longest["assistant"], rules.max_assistant_chars):
        return Drop.ASSISTANT_TOO_LONG
    if _exceeds(longest["user"], rules.max_user_chars):
        return Drop.USER_TOO_LONG
    return None


def _exceeds(length: int, limit: int | None) -> bool:
    return limit is not None and length > limit


def _history(messages: list[Message], end: int, rules: ExtractionRules) -> tuple[int, ...]:
    """Indices of the last few messages before `end`, from a user message on, the first of each run
    of one role. Empty if there is none, or if it may not end with an assistant's and does."""
    if rules.as_logged:
        spoken = [i for i in range(end) if messages[i].role and messages[i].content.strip()]
        recent = spoken[-rules.history_messages :]
    else:
        recent = range(max(0, end - rules.history_messages), end)
    turns: list[int] = []
    role = ""
    for i in dropwhile(lambda i: messages[i].role == "assistant", recent):
        if messages[i].role != role:
            turns.append(i)
            role = messages[i].role
    return () if rules.history_ends_with_user and role != "user" else tuple(turns)
