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

Both scripts drop system prompts, tools and blank messages first, so that what stood around them
closes up: an answer may come to stand behind a question that it did not answer. "strict" (the
WildChat rules without sampling or stop, on logs of every format; ids are the conversations' own,
WildChat-1M's hashes included) and "all-turns" (every answered turn of one's own logs) do not do so.
Under them an answer becomes an interaction only if the log has it directly between a question and
its follow-up, and if nothing is missing from its prompt that was said in the reach of its history.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import dropwhile
from typing import Literal, NamedTuple

from ...conversations import Conversation, Message, ToolMessage, tool_calls_text, tool_message
from ...errors import SdpoError
from ..read.formats import is_among


class Drop(StrEnum):
    """Why a whole conversation gave nothing, in the order in which the reasons are tried."""

    UNREADABLE = "unreadable row"
    OPTED_OUT = "opted out"
    REDACTED = "redacted"
    FLAGGED = "flagged by moderation"
    LANGUAGE = "language"
    UNKNOWN_ROLES = "messages of unknown role"
    TOO_FEW_MESSAGES = "too few messages"
    TOO_LONG = "conversation too long"
    ASSISTANT_TOO_LONG = "assistant message too long"
    USER_TOO_LONG = "user message too long"
    USER_CAP = "over the cap of one user"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near-duplicate"


class Unused(StrEnum):
    """Why an assistant's message became no interaction, in the order in which they are tried."""

    BLANK = "blank answer"
    CALL = "makes a tool call"
    PART = "holds a part that is not text"
    LAST = "no follow-up"
    BLANK_FOLLOWUP = "blank follow-up"
    PART_FOLLOWS = "follow-up with a part that is not text"
    UNKNOWN_FOLLOWS = "unknown role behind it"
    NOT_REPLIED_TO = "followed by the assistant or a tool"
    BLANK_QUESTION = "blank question"
    NO_QUESTION = "no question before it"
    SECOND = "behind another answer"
    ON_TOOL = "rests on a tool"
    ON_PART = "rests on a part that is not text"
    ON_UNKNOWN = "rests on an unknown role"
    PUBLISHED_BLANK = "blank answer or follow-up"
    """As the paper's presets count it."""
    NO_NEXT = "no answer behind the follow-up"
    """Where that is asked for."""


_TALKERS = {"user": "user", "assistant": "assistant"}
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_BOTH = _TALKERS | _SPEAKERS | {"model": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_OTHERS = {"system": "system", "developer": "system"}
_OTHERS |= dict.fromkeys(("tool", "function", "ipython", "observation"), "tool")
_OTHERS |= dict.fromkeys(("function_response", "tool_response", "tool_result"), "tool")
_OTHERS |= dict.fromkeys(("function_call", "tool_call"), "call")
_OTHERS |= dict.fromkeys(("reasoning", "thinking"), "reasoning")
ROLES = ("user", "assistant", "system", "tool", "call", "reasoning")
"""What a log's roles may mean."""
UNKNOWN_ROLE = "unknown role "
"""What names of unknown roles begin with in `Extraction.left_out`."""


@dataclass(frozen=True, kw_only=True)
class ExtractionRules:
    """Which conversations are kept, in which order, and how much history an answer gets.

    Lengths are in characters; None switches a rule off. `languages` are lower-case, and only
    filter logs that have a language column: there, a row of unknown language is dropped.
    `enough_interactions` stops the extraction after the conversation that reaches it, but not
    before `enough_after_conversations` are kept.
    """

    roles: tuple[tuple[str, str], ...] = tuple((_BOTH | _OTHERS).items())
    """What a log's roles mean, as one of `ROLES`; all others are unknown. Names are compared
    without case and surrounding blanks."""
    closing_up: bool = False
    """As the paper's scripts do: messages that are blank or neither the user's nor the assistant's
    are dropped first, those around them close up, and of a run of one role the first one counts."""
    as_logged: bool = False
    """With `closing_up`: count and cut messages as they are, blank ones and other roles included;
    only the history is cleaned. Otherwise messages are stripped and dropped before all else."""
    tools: Literal["drop", "keep"] = "drop"
    """drop: no answer that rests on a tool is kept; keep: calls and results stay in the prompt."""
    system: Literal["keep", "drop"] = "keep"
    """keep: what system messages say before an answer stands first in its prompt."""
    ids: Literal["own", "conversation_id", "place"] = "own"
    """What interactions' ids begin with. own: the conversation's id or hash, or else file and row;
    conversation_id: that alone, or else the place in the order; place: always that place."""
    next_response: bool = False
    """Keep the answer directly behind the follow-up, too, and no interaction without one."""
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

    @cached_property
    def meanings(self) -> dict[str, str]:
        """`roles`, to look them up."""
        return dict(self.roles)

    def __post_init__(self) -> None:
        for name, meaning in self.roles:
            if meaning not in ROLES[: 2 if self.closing_up else None]:
                raise SdpoError(f"role {name!r} as {meaning!r}: use one of {', '.join(ROLES)}")
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
        closing_up=True,
        ids="conversation_id",
        shuffle_seed=42,
        max_conversations=15_000,
        enough_interactions=50_000,
        enough_after_conversations=14_000,
    ),
    "paper-wildfeedback": replace(
        _STRICT,
        roles=tuple(_SPEAKERS.items()),
        closing_up=True,
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
    """Neighbours of one role, but tools, are one message of the prompt, joined by a blank line."""
    answer: int
    followup: int
    turn_id: int
    """How many messages of the user and the assistant that are not blank came before the answer."""
    next_answer: int | None = None
    """The answer behind the follow-up, where that is kept, too."""


class Extraction(NamedTuple):
    """What one conversation gave: why it was dropped, or its messages and turns (maybe none)."""

    dropped: Drop | None
    messages: list[Message]
    """Their roles are "user", "assistant", "system", "tool" or, for any other, ""."""
    turns: list[Turn]
    unused: dict[str, int]
    """Why answers are in no turn (`Unused`), and how many. With the turns that is all answers."""
    left_out: dict[str, int]
    """What is in no prompt: "unknown role NAME", "part image_url", "reasoning", ..., and of
    how many messages."""
    runs: bool = False
    """A history may have neighbours of one role."""
    has_tools: bool = False
    """Some message calls tools, or is what one gave."""
    system: tuple[int, ...] = ()
    """Which messages are the system's."""


def examine(conversation: Conversation, rules: ExtractionRules) -> Extraction:
    """Applies the rules to one conversation."""
    languages = rules.languages if conversation.has_language else None
    if languages is not None and not is_among(conversation.language, languages):
        return Extraction(Drop.LANGUAGE, [], [], {}, {})
    return (_published if rules.closing_up else _whole)(conversation, rules)


# Prompts that leave nothing out


class _Line(NamedTuple):
    """The turns of a conversation, each a letter; system messages and thoughts are no turns.

    u, a: text of the user, of the assistant; U, A: a blank message of theirs; c: a tool call; t: a
    tool's result; p, P: with a part that is not text, P if it is the assistant's; ?: of a role that
    is not known.
    """

    letters: str
    places: list[int]
    """(letters,) each turn's index in `messages`; -1 if it is in no prompt."""
    messages: list[Message]
    systems: list[tuple[int, int]]
    """(how many turns come before it, index in `messages`) of each system message."""
    left_out: dict[str, int]


_TEXT = {"user": "u", "assistant": "a"}
_BLANK = {"user": "U", "assistant": "A"}
_TOOL_PARTS = {"part tool_use": "c", "part tool_result": "t", "tool call without a name": "c"}
_NEVER = {"A": Unused.BLANK, "c": Unused.CALL, "P": Unused.PART}
"""Messages of the assistant that are no text."""
_BEHIND = {
    "": Unused.LAST,
    "U": Unused.BLANK_FOLLOWUP,
    "p": Unused.PART_FOLLOWS,
    "?": Unused.UNKNOWN_FOLLOWS,
    **dict.fromkeys("aActP", Unused.NOT_REPLIED_TO),
}
"""Turns after an answer that are no follow-up, and all others but u are none."""
_NOT_ALONE = set("aActP")
"""Turns after an answer that go on with it."""


def _whole(conversation: Conversation, rules: ExtractionRules) -> Extraction:
    """Every answer between a question and its follow-up, if all that was said in the reach of its
    history is text. The reach is as many messages with text as a history may have, and what stands
    between them."""
    line = _line_of(conversation, rules)
    letters, places, systems = line.letters, line.places, line.systems
    talkers = [at for at, letter in enumerate(letters) if letter in "ua"]
    dropped = _unknown_drop(letters, rules) or _length_drop(line.messages, len(talkers), rules)
    if dropped:
        return Extraction(dropped, line.messages, [], {}, line.left_out)
    plain = len(talkers) == len(letters) and "uu" not in letters and "aa" not in letters
    turns: list[Turn] = []
    unused: dict[str, int] = {} if plain else Counter(_NEVER[x] for x in letters if x in _NEVER)
    for n, at in enumerate(talkers):
        if letters[at] != "a":
            continue
        reach = talkers[n - rules.history_messages] if n >= rules.history_messages else 0
        why = _BEHIND.get(letters[at + 1 : at + 2])
        if why is None and not (plain and at):
            why = _unanswered(letters[reach:at], rules)
        if why is not None:
            unused[why] = unused.get(why, 0) + 1
            continue
        after = None
        if rules.next_response:
            if letters[at + 2 : at + 3] != "a" or letters[at + 3 : at + 4] in _NOT_ALONE:
                unused[Unused.NO_NEXT] = unused.get(Unused.NO_NEXT, 0) + 1
                continue
            after = places[at + 2]
        since = letters.index("u", reach)
        history = places[since:at] if plain else [i for i in places[since:at] if i >= 0]
        if systems:
            history = [index for before, index in systems if before <= at] + history
        turns.append(Turn(tuple(history), places[at], places[at + 1], n, after))
    return Extraction(
        dropped=None,
        messages=line.messages,
        turns=turns,
        unused=unused,
        left_out=line.left_out,
        runs=not plain or len(systems) > 1,
        has_tools=rules.tools == "keep" and ("c" in letters or "t" in letters),
        system=tuple(index for _, index in systems),
    )


def _unanswered(reach: str, rules: ExtractionRules) -> Unused | None:
    """Why a text behind these turns is no answer to them that can be kept; None: it is."""
    before = reach[-1:]
    if before == "u" and reach.strip("ua") == "":
        return None
    if before == "U":
        return Unused.BLANK_QUESTION
    if before in ("a", "A"):
        return Unused.SECOND
    if rules.tools == "drop" and ("t" in reach or "c" in reach):
        return Unused.ON_TOOL
    if "p" in reach or "P" in reach:
        return Unused.ON_PART
    if "?" in reach:
        return Unused.ON_UNKNOWN
    if before == "c":
        return Unused.SECOND
    return None if "u" in reach else Unused.NO_QUESTION


def _unknown_drop(letters: str, rules: ExtractionRules) -> Drop | None:
    """Whether a conversation is lost because nobody knows who speaks in it."""
    if "?" not in letters:
        return None
    n = sum(map(letters.count, "ua"))
    too_few = n < rules.min_messages <= n + letters.count("?")
    one_sided = "u" not in letters or not set(letters) & set("aAcP")
    return Drop.UNKNOWN_ROLES if too_few or one_sided else None


_ONLY_THOUGHT = re.compile(r"<think>(?:(?!</think>).)*(</think>)?", re.DOTALL)
"""A response that the user has seen nothing of."""


def _line_of(conversation: Conversation, rules: ExtractionRules) -> _Line:
    meanings, lost = rules.meanings, dict(conversation.lost)
    letters, places, messages, systems = "", [], [], []
    left_out = {"reasoning": conversation.reasoning} if conversation.reasoning else {}
    for i, logged in enumerate(conversation.messages):
        role, content = meanings.get(logged.role), logged.content
        if role is None:
            role = meanings.get(logged.role.strip().lower(), "")
        text = content.strip()
        only_thought = role == "assistant" and bool(_ONLY_THOUGHT.fullmatch(text))
        if only_thought:
            letter, kept = "A", None
            left_out["thought without an answer"] = left_out.get("thought without an answer", 0) + 1
        elif text and role in _TEXT and i not in lost and type(logged) is Message:
            letter, kept = _TEXT[role], logged
            if text != content or role != logged.role:
                kept = Message(role, text)
        elif role == "system" and text and i not in lost and rules.system == "keep":
            systems.append((len(letters), len(messages)))
            messages.append(Message(role, text))
            continue
        else:
            letter, kept, what = _odd(logged, role, text, lost.get(i), rules)
            if what:
                left_out[what] = left_out.get(what, 0) + 1
            if not letter:
                continue
        letters += letter
        places.append(-1 if kept is None else len(messages))
        if kept is not None:
            messages.append(kept)
    return _Line(letters, places, messages, systems, left_out)


def _odd(
    logged: Message, role: str, text: str, lost: str | None, rules: ExtractionRules
) -> tuple[str, Message | None, str | None]:
    """The letter of a turn that is not two texts, the message if it stays in prompts, and what to
    count it as if it does not."""
    if lost is not None and (role or not logged.role):
        own = "P" if role == "assistant" else "p"
        return _TOOL_PARTS.get(lost, own) if rules.tools == "drop" else own, None, lost
    if not role:
        return "?", None, UNKNOWN_ROLE + _shown(logged.role)
    if role == "reasoning" or (role == "system" and not text):
        return "", None, "reasoning" if role == "reasoning" else None
    if role == "system":
        return "", None, "system message"
    calls = logged.tool_calls if isinstance(logged, ToolMessage) else None
    if role == "call" and calls is None:
        calls, text = _calls_in(text), ""
        if calls is None and rules.tools == "keep":
            return "P", None, "tool call without a name"
    if role == "call" or calls is not None:
        message = ToolMessage("assistant", text, calls)
        return ("c", message, None) if rules.tools == "keep" else ("c", None, "tool call")
    if role == "tool":
        of_call, name = None, None
        if isinstance(logged, ToolMessage):
            of_call, name = logged.tool_call_id, logged.name
        message = tool_message("tool", text, tool_call_id=of_call, name=name)
        return ("t", message, None) if rules.tools == "keep" else ("t", None, "tool result")
    if text:  # an id of a call, or a name, on what is no tool's
        return _TEXT[role], Message(role, text), None
    return _BLANK[role], None, "blank message"


def _shown(role: str) -> str:
    """A role's name, for people."""
    name = role if len(role) <= 40 else f"{role[:40]}…"
    return (name if name.isprintable() else ascii(name)) or "(none)"


def _calls_in(text: str) -> str | None:
    """The calls that a message of the role function_call holds as JSON text; None: none."""
    try:
        value = json.loads(text)
        return tool_calls_text(value if isinstance(value, list) else [value])
    except (ValueError, RecursionError):
        return None


# As published


def _published(conversation: Conversation, rules: ExtractionRules) -> Extraction:
    """Every answer that the user replied to, once what is dropped has closed up.

    Of the answers that are in no turn, only those without a usable history and blank ones are
    counted."""
    roles = dict(rules.roles)
    if rules.as_logged:
        messages = [Message(roles.get(m.role, ""), m.content) for m in conversation.messages]
    else:
        messages = _cleaned(conversation.messages, roles)
    if dropped := _length_drop(messages, len(messages), rules):
        return Extraction(dropped, messages, [], {}, {})
    turns, unused = [], Counter()
    for i in range(len(messages) - 1):
        if messages[i].role != "assistant" or messages[i + 1].role != "user":
            continue
        history = _history(messages, i, rules)
        if not history:
            unused[Unused.NO_QUESTION] += 1
        elif rules.as_logged and not all(m.content.strip() for m in messages[i : i + 2]):
            unused[Unused.PUBLISHED_BLANK] += 1
        elif not rules.next_response:
            turns.append(Turn(history, i, i + 1, i))
        elif [m.role for m in messages[i + 2 : i + 3] if m.content.strip()] == ["assistant"]:
            turns.append(Turn(history, i, i + 1, i, i + 2))
        else:
            unused[Unused.NO_NEXT] += 1
    return Extraction(None, messages, turns, unused, {})


def _cleaned(logged: tuple[Message, ...], roles: dict[str, str]) -> list[Message]:
    messages = []
    for message in logged:
        content = message.content.strip()
        role = roles.get(message.role) or roles.get(message.role.strip().lower())
        if content and role:
            messages.append(Message(role, content))
    return messages


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


# Both


def _length_drop(messages: list[Message], turns: int, rules: ExtractionRules) -> Drop | None:
    if turns < rules.min_messages:
        return Drop.TOO_FEW_MESSAGES
    total, longest = 0, {"user": 0, "assistant": 0, "system": 0, "tool": 0, "": 0}
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
