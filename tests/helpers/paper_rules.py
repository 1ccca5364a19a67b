"""The oracle of `paper-wildchat` and `paper-wildfeedback`: the published rules, plainly.

Written from the rules of "Aligning Language Models from User Interactions" (arXiv:2603.12273), not
from this repository's extraction, of which it imports nothing: loops over Python dicts, lengths in
code points, and Hugging Face's own shuffle. Rows come out as the paper's files hold them:

    {"id", "turn_id", "prompt": [{"from", "value"}], "completion": {...}, "user_response": {...}}
"""

from collections.abc import Iterable
from typing import Any

from datasets import Dataset

Row = dict[str, Any]

NAMES = {"user": "human", "assistant": "gpt"}


def paper_wildchat(
    log: Dataset, *, most: int = 15_000, enough_after: int = 14_000, enough: int = 50_000
) -> list[Row]:
    """Interactions of a log whose rows have `conversation`, `conversation_id` and `language`.

    Stops at `most` kept conversations, or at `enough` interactions once `enough_after`
    conversations are kept.
    """
    found: list[Row] = []
    kept = 0
    for place, row in enumerate(log.shuffle(seed=42)):
        assert isinstance(row, dict)
        if (row["language"] or "").strip().lower() not in ("english", "en"):
            continue
        messages = cleaned(row["conversation"] or [])
        if not fits(messages, {"gpt": 4096, "human": 4096}):
            continue
        kept += 1
        name = row["conversation_id"] or place
        for i in answers(messages):
            history = alternating(messages[:i][-5:])
            if history and history[-1]["from"] == "human":
                found.append(interaction(name, i, history, messages))
        if kept >= most or (kept >= enough_after and len(found) >= enough):
            break
    return found


def paper_wildfeedback(log: Iterable[Row]) -> list[Row]:
    """Interactions of rows with `conversations` or `conversation`: [{from, value}], as they come.

    Rows with a blank answer or follow-up are among them: see `trainable`.
    """
    found: list[Row] = []
    for place, row in enumerate(log):
        messages = row.get("conversations") or row.get("conversation") or []
        if not fits(messages, {"gpt": 4096}):
            continue
        for i in answers(messages):
            spoken = []
            for message in messages[:i]:
                if message.get("from") in ("human", "gpt") and (message.get("value") or "").strip():
                    spoken.append(message)
            if history := alternating(spoken[-5:]):
                found.append(interaction(place, i, history, messages))
    return found


def cleaned(conversation: Iterable[Row | None]) -> list[Row]:
    """Stripped messages of the user and the assistant that are not blank, as [{from, value}]."""
    messages = []
    for logged in conversation:
        message = logged or {}
        role = (message.get("role") or "").strip().lower()
        content = (message.get("content") or "").strip()
        if content and role in NAMES:
            messages.append({"from": NAMES[role], "value": content})
    return messages


def fits(messages: list[Row], most: dict[str, int]) -> bool:
    """Three messages, none longer than its sender's `most`, and 100,000 characters in all."""
    total = 0
    for message in messages:
        value = message.get("value") or ""
        total += len(value)
        if len(value) > most.get(message.get("from") or "", 100_000):
            return False
    return len(messages) >= 3 and not total > 100_000


def answers(messages: list[Row]) -> list[int]:
    """Places of the assistant's messages that the user replied to."""
    senders = [message.get("from") for message in messages]
    return [i for i in range(len(senders) - 1) if senders[i : i + 2] == ["gpt", "human"]]


def alternating(window: list[Row]) -> list[Row]:
    """The window without its leading assistant messages, and the first of each run of a sender."""
    history: list[Row] = []
    for message in window:
        if not history and message["from"] == "gpt":
            continue
        if history and history[-1]["from"] == message["from"]:
            continue
        history.append(message)
    return history


def interaction(name: object, i: int, history: list[Row], messages: list[Row]) -> Row:
    return {
        "id": f"{name}_{i}",
        "turn_id": i,
        "prompt": [turn(message) for message in history],
        "completion": turn(messages[i]),
        "user_response": turn(messages[i + 1]),
    }


def turn(message: Row) -> Row:
    return {"from": message["from"], "value": message["value"]}


def trainable(row: Row) -> bool:
    """The product's one departure: blank answers and follow-ups are left out."""
    answer, follow_up = row["completion"]["value"], row["user_response"]["value"]
    return bool((answer or "").strip() and (follow_up or "").strip())
