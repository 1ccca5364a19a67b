"""Interactions (x, y, o): a prompt history, the model's answer, the user's next message.

`prepare` makes them from conversation logs by explicit rules, `write_interactions` and
`read_interactions` keep them as JSONL in the row shape of the paper's own data:

    {"id": "c1_3", "turn_id": 3, "prompt": [{"from": "human", "value": ...}, ...],
     "completion": {"from": "gpt", "value": ...}, "user_response": {"from": "human", "value": ...}}

with `weight`, `completion_token_ids` and `completion_logprobs` only where they are set.

The preset "paper-wildchat" gives the rows of the WildChat preprocessing published with "Aligning
Language Models from User Interactions" (arXiv:2603.12273), in its order and under its ids. It
departs in one way: where the log repeats a conversation's id, the paper repeats the row's id, and
`prepare` marks the later ones ("c1_3~2"), so that an id names one interaction.
"""

import heapq
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from sdpo.conversations import (
    Conversation,
    Message,
    Paths,
    as_id,
    as_list,
    as_object,
    as_text,
    count_rows,
    fault,
    json_rows,
    kind,
    located,
    read_file,
    resolve_paths,
    sniff_format,
)

_ROLE_OF = {"human": "user", "gpt": "assistant", "system": "system"}
_NAME_OF = {role: name for name, role in _ROLE_OF.items()}
_KNOWN_ROLES = "user, assistant or system (human, gpt or system after `from`)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Interaction:
    """One training example. Raises DataError, naming the field, if it could not be trained on.

    prompt: x, ends with a user message. completion: y, not blank. user_response: o, not blank.
    turn_id: the answer's index in its cleaned conversation. weight: of its loss, finite, >= 0.
    completion_token_ids, completion_logprobs: y as it was sampled and log π_old(y_t) in nats,
    for online data; as long as each other.
    """

    id: str
    prompt: tuple[Message, ...]
    completion: str
    user_response: str
    turn_id: int | None = None
    weight: float = 1.0
    completion_token_ids: tuple[int, ...] | None = None
    completion_logprobs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_turns(self)
        _check_weight(self.weight)
        if self.completion_token_ids is not None:
            _check_token_ids(self.completion_token_ids)
        if self.completion_logprobs is not None:
            _check_logprobs(self.completion_logprobs, self.completion_token_ids)


def _check_turns(interaction: Interaction) -> None:
    if not interaction.id:
        raise fault("id", "the id is empty", "Give every interaction its own id")
    if not interaction.prompt:
        raise fault("prompt", "the prompt has no messages", "Give the history, or drop the row")
    for i, message in enumerate(interaction.prompt):
        if message.role not in _NAME_OF:
            problem = f"unknown role {message.role!r}"
            raise fault(f"prompt[{i}]", problem, f"Use {_KNOWN_ROLES}; leave tool messages out")
    if (last := interaction.prompt[-1].role) != "user":
        problem = f"the prompt ends with a message of role {last!r}, not a user message"
        raise fault("prompt", problem, "Cut it after the user message that was answered")
    if not interaction.completion.strip():
        problem = "an interaction whose response is empty teaches nothing"
        raise fault("completion", problem, "Drop the row")
    if not interaction.user_response.strip():
        problem = "an interaction whose user response is empty has no feedback to learn from"
        raise fault("user_response", problem, "Drop the row")


def _check_weight(weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        problem = f"the weight is {_shown(weight)}, not a finite number >= 0"
        raise fault("weight", problem, "Use 0 to switch a row off, or leave the field out for 1")


def _check_token_ids(ids: tuple[int, ...]) -> None:
    if not ids:
        problem = "no token ids, though the completion has text"
        raise fault("completion_token_ids", problem, "Leave the field out where they are unknown")
    for i, token in enumerate(ids):
        if not _is_integer(token) or token < 0:
            problem = f"{token!r} is not a token id, an integer >= 0"
            raise fault(f"completion_token_ids[{i}]", problem, "Log the ids as they were sampled")


def _check_logprobs(logprobs: tuple[float, ...], ids: tuple[int, ...] | None) -> None:
    name = "completion_logprobs"
    if ids is None:
        problem = "log-probabilities without the tokens that they belong to"
        raise fault(name, problem, "Add completion_token_ids, or leave both out")
    if len(logprobs) != len(ids):
        problem = f"{len(logprobs)} log-probabilities for {len(ids)} token ids"
        raise fault(name, problem, "Log one per sampled token")
    for i, value in enumerate(logprobs):
        if not (math.isfinite(value) and value <= 0):
            problem = f"{_shown(value)} is not a log-probability, finite and <= 0"
            raise fault(f"{name}[{i}]", problem, "Log natural logarithms of probabilities")


def _shown(value: float) -> str:
    return "NaN" if math.isnan(value) else str(value)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


# The file format


def read_interactions(path: str | Path) -> list[Interaction]:
    """All interactions of a JSONL file; see `iter_interactions`."""
    return list(iter_interactions(path))


def iter_interactions(path: str | Path) -> Iterator[Interaction]:
    """Streams the interactions of a JSONL file, in its order.

    Messages may be {"from": "human"|"gpt"|"system", "value"} or {"role": "user"|"assistant"|
    "system", "content"}; completion and user_response may also be plain strings. A row without an
    id gets its line number; other optional fields may be left out or null. Unknown fields are
    ignored.

    Raises DataError, naming file, line and field, for a row that is not an interaction and for an
    id that an earlier row has.
    """
    path = Path(path)
    line_of: dict[str, int] = {}
    for line, row in json_rows(path):
        with located(f"{path}, line {line}"):
            interaction = _from_row(row, default_id=str(line))
            if (first := line_of.setdefault(interaction.id, line)) != line:
                problem = f"{interaction.id!r} is the id of line {first} too"
                raise fault("id", problem, "Give every row its own id, or none")
        yield interaction


def write_interactions(path: str | Path, interactions: Iterable[Interaction]) -> int:
    """Writes interactions as JSONL, whole or not at all, and returns how many.

    The rows go to a temporary file beside `path`, which replaces `path` once it is complete; an
    exception, from `interactions` too, leaves `path` as it was. Missing folders are created.
    Raises DataError if two interactions have the same id.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    ids: set[str] = set()
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for interaction in interactions:
                if interaction.id in ids:
                    problem = f"{interaction.id!r} is the id of two interactions"
                    raise fault("id", problem, "Give each its own id")
                ids.add(interaction.id)
                row = _to_row(interaction)
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return len(ids)


def _to_row(interaction: Interaction) -> dict[str, Any]:
    row: dict[str, Any] = {"id": interaction.id}
    if interaction.turn_id is not None:
        row["turn_id"] = interaction.turn_id
    row["prompt"] = [_to_turn(message) for message in interaction.prompt]
    row["completion"] = _to_turn(Message("assistant", interaction.completion))
    row["user_response"] = _to_turn(Message("user", interaction.user_response))
    if interaction.weight != 1.0:
        row["weight"] = interaction.weight
    for name in ("completion_token_ids", "completion_logprobs"):
        if (values := getattr(interaction, name)) is not None:
            row[name] = values
    return row


def _to_turn(message: Message) -> dict[str, str]:
    return {"from": _NAME_OF[message.role], "value": message.content}


def _from_row(row: dict[str, Any], default_id: str) -> Interaction:
    prompt = as_list(row.get("prompt"), "prompt")
    return Interaction(
        id=as_id(row.get("id"), default_id),
        prompt=tuple(_from_turn(turn, f"prompt[{i}]") for i, turn in enumerate(prompt)),
        completion=_spoken_by("assistant", row.get("completion"), "completion"),
        user_response=_spoken_by("user", row.get("user_response"), "user_response"),
        turn_id=_turn_id(row.get("turn_id")),
        weight=_weight(row.get("weight")),
        completion_token_ids=_token_ids(row.get("completion_token_ids")),
        completion_logprobs=_logprobs(row.get("completion_logprobs")),
    )


def _from_turn(turn: object, name: str) -> Message:
    turn = as_object(turn, name)
    if "from" not in turn:
        role = as_text(turn.get("role"), f"{name}.role")
        return Message(role, as_text(turn.get("content"), f"{name}.content"))
    sender = as_text(turn["from"], f"{name}.from")
    if sender not in _ROLE_OF:
        problem = f"unknown sender {sender!r}"
        raise fault(f"{name}.from", problem, f"Use {_KNOWN_ROLES}; leave tool messages out")
    return Message(_ROLE_OF[sender], as_text(turn.get("value"), f"{name}.value"))


def _spoken_by(role: str, turn: object, name: str) -> str:
    if not isinstance(turn, dict):
        return as_text(turn, name)
    message = _from_turn(turn, name)
    if message.role != role:
        raise fault(name, f"a message of role {message.role!r}", f"It must be of role {role!r}")
    return message.content


def _turn_id(value: object) -> int | None:
    if value is None or _is_integer(value):
        return value
    raise fault("turn_id", f"found {kind(value)}, not an integer", "Leave it out if unknown")


def _weight(value: object) -> float:
    return 1.0 if value is None else _number(value, "weight")


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fault(name, f"found {kind(value)} where a number is needed", "Write it as a number")
    try:
        return float(value)
    except OverflowError:
        raise fault(name, "the number is too large for a float", "Write a smaller one") from None


def _token_ids(value: object) -> tuple[int, ...] | None:
    return None if value is None else tuple(as_list(value, "completion_token_ids"))


def _logprobs(value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    name = "completion_logprobs"
    return tuple(_number(v, f"{name}[{i}]") for i, v in enumerate(as_list(value, name)))


# Extraction


class Drop(StrEnum):
    """Why a whole conversation gave nothing, in the order in which the reasons are tried."""

    LANGUAGE = "language"
    TOO_FEW_MESSAGES = "too few messages"
    TOO_LONG = "conversation too long"
    ASSISTANT_TOO_LONG = "assistant message too long"
    USER_TOO_LONG = "user message too long"


@dataclass(frozen=True, kw_only=True)
class ExtractionRules:
    """Which conversations are kept, in which order, and how much history an answer gets.

    Lengths are in characters of the cleaned conversation; None switches a rule off. `languages`
    are lower-case, and only filter logs that have a language column: there, a row of unknown
    language is dropped. `enough_interactions` stops the extraction after the conversation that
    reaches it, but not before `enough_after_conversations` are kept.
    """

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
            raise ValueError(f"history_messages is {self.history_messages}; it must be at least 1")
        if self.max_conversations is not None and self.max_conversations < 1:
            raise ValueError(
                f"max_conversations is {self.max_conversations}; use at least 1, or None for all"
            )
        if self.languages is not None and any(name != name.lower() for name in self.languages):
            raise ValueError(f"languages are {self.languages}; write them in lower case")

    def enough(self, conversations: int, interactions: int) -> bool:
        """Whether to stop after having kept so many conversations and interactions."""
        if self.max_conversations is not None and conversations >= self.max_conversations:
            return True
        return (
            self.enough_interactions is not None
            and conversations >= self.enough_after_conversations
            and interactions >= self.enough_interactions
        )


PRESETS = {
    "paper-wildchat": ExtractionRules(
        languages=("english", "en"),
        min_messages=3,
        max_conversation_chars=100_000,
        max_assistant_chars=4096,
        max_user_chars=4096,
        shuffle_seed=42,
        max_conversations=15_000,
        enough_interactions=50_000,
        enough_after_conversations=14_000,
    ),
    "all-turns": ExtractionRules(),
}
"""The paper's rules for WildChat, and every answered turn of one's own logs in the logs' order."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """What one conversation gave: why it was dropped, or its interactions (maybe none)."""

    dropped: Drop | None = None
    interactions: tuple[Interaction, ...] = ()
    without_history: int = 0  # answers passed over because no usable history precedes them


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `prepare` read and kept: rows = conversations_read + rows that it stopped before.

    conversations_read = conversations_kept + drops.total(). A kept conversation may give no
    interaction; answers without a usable history before them are counted one by one.
    """

    files: int
    rows: int
    conversations_read: int
    conversations_kept: int
    drops: Counter[Drop] = field(default_factory=Counter)
    answers_without_history: int
    ready_interactions: int
    interactions: int
    renamed_ids: int


def extract(conversation: Conversation, rules: ExtractionRules) -> list[Interaction]:
    """The interactions of one conversation; none if `examine` drops it."""
    return list(examine(conversation, rules).interactions)


def examine(conversation: Conversation, rules: ExtractionRules) -> Extraction:
    """Applies the rules to one conversation; every answer that the user replied to is a candidate.

    Messages are stripped, and empty ones and those of roles other than user and assistant are
    dropped, before anything is counted. An interaction's id is "{conversation id}_{i}" with i the
    answer's index among what remains.
    """
    if rules.languages is not None and not _speaks(conversation, rules.languages):
        return Extraction(Drop.LANGUAGE)
    messages = _clean(conversation.messages)
    if dropped := _length_drop(messages, rules):
        return Extraction(dropped)
    answered = [
        i
        for i in range(len(messages) - 1)
        if messages[i].role == "assistant" and messages[i + 1].role == "user"
    ]
    histories = {i: _history(messages[:i], rules.history_messages) for i in answered}
    interactions = tuple(
        Interaction(
            id=f"{conversation.id}_{i}",
            prompt=history,
            completion=messages[i].content,
            user_response=messages[i + 1].content,
            turn_id=i,
        )
        for i, history in histories.items()
        if history
    )
    return Extraction(None, interactions, len(answered) - len(interactions))


def _speaks(conversation: Conversation, languages: tuple[str, ...]) -> bool:
    if not conversation.has_language:
        return True
    return (conversation.language or "").strip().lower() in languages


def _clean(messages: Iterable[Message]) -> list[Message]:
    cleaned = (Message(m.role.strip().lower(), m.content.strip()) for m in messages)
    return [m for m in cleaned if m.content and m.role in ("user", "assistant")]


def _length_drop(messages: list[Message], rules: ExtractionRules) -> Drop | None:
    def longest(role: str) -> int:
        return max((len(m.content) for m in messages if m.role == role), default=0)

    if len(messages) < rules.min_messages:
        return Drop.TOO_FEW_MESSAGES
    if _exceeds(sum(len(m.content) for m in messages), rules.max_conversation_chars):
        return Drop.TOO_LONG
    if _exceeds(longest("assistant"), rules.max_assistant_chars):
        return Drop.ASSISTANT_TOO_LONG
    if _exceeds(longest("user"), rules.max_user_chars):
        return Drop.USER_TOO_LONG
    return None


def _exceeds(length: int, limit: int | None) -> bool:
    return limit is not None and length > limit


def _history(before: list[Message], most: int) -> tuple[Message, ...]:
    """The last `most` messages, from a user message on, the first of each run of one role.

    Empty if that does not end with a user message: there is then nothing to answer.
    """
    recent = dropwhile(lambda m: m.role == "assistant", before[-most:])
    turns = tuple(next(run) for _, run in groupby(recent, key=lambda m: m.role))
    return turns if turns and turns[-1].role == "user" else ()


def prepare(paths: Paths, rules: ExtractionRules) -> tuple[list[Interaction], Report]:
    """Interactions of logs and of ready triples, each file read as what it is.

    Ready triples come first, validated and otherwise as they are: no rule applies to them. Then
    come the conversations' interactions, in the order of all rows of all files or, with a
    `shuffle_seed`, in that of Hugging Face's `Dataset.shuffle(seed)` over the same rows. The
    logs are streamed; only conversations that can still be kept are held in memory.

    Raises DataError for unreadable data.
    """
    files = resolve_paths(paths)
    ready = [file for file in files if sniff_format(file) == "triples"]
    logs = [file for file in files if file not in ready]
    passed_on = [interaction for file in ready for interaction in iter_interactions(file)]

    n_rows = sum(map(count_rows, logs))
    drops, kept = _examine_all(logs, _places(n_rows, rules.shuffle_seed), rules)
    kept, n_read = _until_enough(kept, n_rows, rules)
    extracted = [interaction for _, found in kept for interaction in found.interactions]
    interactions, renamed = _with_unique_ids(passed_on + extracted)
    return interactions, Report(
        files=len(files),
        rows=n_rows,
        conversations_read=n_read,
        conversations_kept=len(kept),
        drops=Counter(reason for reason in drops[:n_read] if reason),
        answers_without_history=sum(found.without_history for _, found in kept),
        ready_interactions=len(passed_on),
        interactions=len(interactions),
        renamed_ids=renamed,
    )


def _places(n_rows: int, seed: int | None) -> list[int]:
    """The place in the extraction's order of every row of the files."""
    if seed is None:
        return list(range(n_rows))
    order = np.random.default_rng(seed).permutation(n_rows)  # as datasets.Dataset.shuffle draws it
    return np.argsort(order).tolist()


def _examine_all(
    logs: list[Path], places: list[int], rules: ExtractionRules
) -> tuple[list[Drop | None], list[tuple[int, Extraction]]]:
    """Every place's reason for a drop, and (place, extraction) of the kept ones, in order.

    With `max_conversations` only so many, those of the first places, are held at any time: later
    ones would come after the stop. A place that comes too late is not examined at all.
    """
    drops: list[Drop | None] = [None] * len(places)
    kept: list[tuple[int, Extraction]] = []  # a heap on the negated place: its root comes last
    conversations = (c for file in logs for c in read_file(file))
    for place, conversation in zip(places, conversations, strict=True):
        full = rules.max_conversations is not None and len(kept) >= rules.max_conversations
        if full and place > -kept[0][0]:
            continue
        found = examine(conversation, rules)
        drops[place] = found.dropped
        if found.dropped is None:
            (heapq.heappushpop if full else heapq.heappush)(kept, (-place, found))
    return drops, sorted((-place, found) for place, found in kept)


def _until_enough(
    kept: list[tuple[int, Extraction]], n_rows: int, rules: ExtractionRules
) -> tuple[list[tuple[int, Extraction]], int]:
    """Cuts `kept` where the rules say stop; also how many rows were read by then."""
    interactions = 0
    for n_kept, (place, found) in enumerate(kept, start=1):
        interactions += len(found.interactions)
        if rules.enough(n_kept, interactions):
            return kept[:n_kept], place + 1
    return kept, n_rows


def _with_unique_ids(interactions: list[Interaction]) -> tuple[list[Interaction], int]:
    """Marks repeated ids "~2", "~3", ...: public logs do repeat conversation ids."""
    taken = {interaction.id for interaction in interactions}
    seen: Counter[str] = Counter()
    unique = []
    for interaction in interactions:
        seen[interaction.id] += 1
        if (n := seen[interaction.id]) > 1:
            while (new_id := f"{interaction.id}~{n}") in taken:
                n += 1
            taken.add(new_id)
            interaction = replace(interaction, id=new_id)
        unique.append(interaction)
    return unique, sum(seen.values()) - len(seen)
