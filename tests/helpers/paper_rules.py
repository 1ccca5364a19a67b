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
        if not fits(messages):
            continue
        kept += 1
        name = row["conversation_id"] or place
        for i in range(len(messages) - 1):
            if messages[i]["role"] != "assistant" or messages[i + 1]["role"] != "user":
                continue
            history = alternating(messages[:i][-5:], assistant="assistant", key="role")
            if not history or history[-1]["role"] != "user":
                continue
            found.append(
                {
                    "id": f"{name}_{i}",
                    "turn_id": i,
                    "prompt": [turn(message) for message in history],
                    "completion": turn(messages[i]),
                    "user_response": turn(messages[i + 1]),
                }
            )
        if kept >= most or (kept >= enough_after and len(found) >= enough):
            break
    return found


def cleaned(conversation: Iterable[Row | None]) -> list[Row]:
    messages = []
    for logged in conversation:
        message = logged or {}
        role = (message.get("role") or "").strip().lower()
        content = (message.get("content") or "").strip()
        if content and role in NAMES:
            messages.append({"role": role, "content": content})
    return messages


def fits(messages: list[Row]) -> bool:
    if len(messages) < 3:
        return False
    total = 0
    for message in messages:
        total += len(message["content"])
        if message["role"] == "assistant" and len(message["content"]) > 4096:
            return False
        if message["role"] == "user" and len(message["content"]) > 4096:
            return False
    return not total > 100_000


def alternating(window: list[Row], *, assistant: str, key: str) -> list[Row]:
    """The window without its leading assistant messages, and the first of each run of a role."""
    history: list[Row] = []
    for message in window:
        if not history and message[key] == assistant:
            continue
        if history and history[-1][key] == message[key]:
            continue
        history.append(message)
    return history


def turn(message: Row) -> Row:
    return {"from": NAMES[message["role"]], "value": message["content"]}


def paper_wildfeedback(log: Iterable[Row]) -> list[Row]:
    """Interactions of rows with `conversations` or `conversation`: [{from, value}], as they come.

    Rows with a blank answer or follow-up are among them: see `trainable`.
    """
    found: list[Row] = []
    for place, row in enumerate(log):
        messages = row.get("conversations") or row.get("conversation") or []
        if not raw_fits(messages):
            continue
        for i in range(len(messages) - 1):
            if messages[i].get("from") != "gpt" or messages[i + 1].get("from") != "human":
                continue
            spoken = []
            for message in messages[:i]:
                if message.get("from") in ("human", "gpt") and (message.get("value") or "").strip():
                    spoken.append(message)
            history = alternating(spoken[-5:], assistant="gpt", key="from")
            if not history:
                continue
            found.append(
                {
                    "id": f"{place}_{i}",
                    "turn_id": i,
                    "prompt": [raw_turn(message) for message in history],
                    "completion": raw_turn(messages[i]),
                    "user_response": raw_turn(messages[i + 1]),
                }
            )
    return found


def raw_fits(messages: list[Row]) -> bool:
    if len(messages) < 3:
        return False
    total = 0
    for message in messages:
        value = message.get("value") or ""
        total += len(value)
        if message.get("from") == "gpt" and len(value) > 4096:
            return False
    return not total > 100_000


def raw_turn(message: Row) -> Row:
    return {"from": message["from"], "value": message["value"]}


def trainable(row: Row) -> bool:
    """The product's one departure: blank answers and follow-ups are left out."""
    answer, follow_up = row["completion"]["value"], row["user_response"]["value"]
    return bool((answer or "").strip() and (follow_up or "").strip())
