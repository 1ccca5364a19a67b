"""The script that `sdpo data prepare` replaces: Hugging Face `datasets`, map, to_json.

    python -m benchmarks.prepare_rival FILE... --out rows.jsonl [--batched] [--guardrails]

The rules of the preset "strict", in the two ways that one writes them for `Dataset.map`: a function
over rows, then `filter`; or, with `--batched`, a function from rows to as many interactions as they
give, which passes over the data once and is the fastest that `map` allows. With `--guardrails` also
what preparation guards against: what depends on earlier rows in one loop between the maps.
Detectors are `sdpo.data`'s own, so that both sides find the same; the caller sees to it that the
rows are equal. Only needed columns are loaded, and there is no cache from another run.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from datasets import Dataset, load_dataset

# Detectors are imported where they are used: without --guardrails, this is the script that one
# writes with `datasets` alone, also in its memory.
Row = dict[str, Any]
Batch = dict[str, list[Any]]

COLUMNS = ["conversation_hash", "conversation", "language"]
MARKS = ["toxic", "redacted", "openai_moderation", "hashed_ip"]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
TALKERS = ("user", "assistant")
PER_USER = 1000
SIMILARITY = 0.8


def prepare(
    files: tyro.conf.Positional[tuple[str, ...]],
    *,
    out: Path,
    batched: bool = False,
    guardrails: bool = False,
    workers: int = 2,
) -> None:
    """Writes the interactions of logs as JSONL."""
    num_proc = workers if workers > 1 else None
    with tempfile.TemporaryDirectory(dir=out.parent) as cache:
        data = load_dataset(
            "parquet",
            data_files=list(files),
            split="train",
            columns=COLUMNS + MARKS * guardrails,
            cache_dir=cache,
            num_proc=num_proc,
        )
        assert isinstance(data, Dataset)
        if not batched:
            data = data.map(with_messages, num_proc=num_proc)
            data = data.filter(has_messages, num_proc=num_proc)
        elif guardrails:
            drop = data.column_names
            data = data.map(kept, batched=True, remove_columns=drop, num_proc=num_proc)
        if guardrails:
            data = data.map(sketched, batched=True, num_proc=num_proc)
            data = data.select(first_ones(data))
        drop, find = data.column_names, partial(interactions, guardrails=guardrails)
        data = data.map(find, batched=True, remove_columns=drop, num_proc=num_proc)
        ids = data["id"][:]
        data = data.remove_columns("id").add_column("id", unique(ids))  # pyright: ignore
        data.to_json(out, num_proc=num_proc)


# From rows of the log to messages that count.


def with_messages(row: Row) -> Row:
    """The row with its messages; none if it is dropped."""
    messages = [] if is_marked(row) else cleaned(row["conversation"], row["language"])
    return {"messages": messages}


def has_messages(row: Row) -> bool:
    """Whether the row is kept."""
    return len(row["messages"]) > 0


def kept(batch: Batch) -> Batch:
    """Those rows of a batch that are kept, with their messages."""
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    rows = [row | with_messages(row) for row in rows]
    names = [name for name in ("conversation_hash", "hashed_ip") if name in batch]
    rows = [row for row in rows if has_messages(row)]
    return {name: [row[name] for row in rows] for name in [*names, "messages"]}


def is_marked(row: Row) -> bool:
    """Whether the log itself says to leave the row alone; never, where its marks are not loaded."""
    if "toxic" not in row:
        return False
    verdicts, messages = row["openai_moderation"] or (), row["conversation"] or ()
    return (
        row["toxic"]
        or row["redacted"]
        or any(verdict["flagged"] for verdict in verdicts)
        or any(message["toxic"] or message["redacted"] for message in messages)
    )


def cleaned(logged: list[Row], language: str | None) -> list[Row]:
    """The messages of a conversation that count; empty if the rules drop it."""
    if (language or "").strip().lower() not in ("english", "en"):
        return []
    messages = []
    for message in logged or ():
        content = (message["content"] or "").strip()
        role = (message["role"] or "").strip().lower()
        if content or role in TALKERS:
            messages.append({"role": role, "content": content})
    lengths = [len(m["content"]) for m in messages if m["role"] in TALKERS and m["content"]]
    together = sum(len(message["content"]) for message in messages)
    right = len(lengths) >= 3 and together <= 100_000 and max(lengths) <= 4096
    return messages if right else []


# From messages to interactions.


def interactions(batch: Batch, guardrails: bool = False) -> Batch:
    """The interactions of several conversations, or rows of the log, as columns."""
    if "messages" not in batch:
        batch = kept(batch)
    found: Batch = {name: [] for name in ("id", "turn_id", "prompt", "completion", "user_response")}
    for id, messages in zip(batch["conversation_hash"], batch["messages"], strict=True):
        rows = guarded(id, messages) if guardrails else of_conversation(id, messages)
        for row in rows:
            for name, value in row.items():
                found[name].append(value)
    return found


def guarded(id: str, messages: list[Row]) -> Iterator[Row]:
    """Without personal data, and without follow-ups that are injections."""
    from sdpo.data.filters.injections import injection
    from sdpo.data.filters.pii import Redactor

    texts, _ = Redactor().redact([message["content"] for message in messages])
    pairs = zip(messages, texts, strict=True)
    for row in of_conversation(id, [message | {"content": text} for message, text in pairs]):
        if not injection(row["user_response"]["value"]):
            yield row


def of_conversation(id: str, messages: list[Row]) -> Iterator[Row]:
    """Every answer directly between two messages of the user's, with the history before it."""
    turns = [message for message in messages if message["role"] in TALKERS]
    places = [i for i, message in enumerate(messages) if message["role"] in TALKERS]
    for before, place, answer, after in zip(turns, places[1:], turns[1:], turns[2:], strict=False):
        asked = all(m["role"] == "user" and m["content"] for m in (before, after))
        if asked and answer["role"] == "assistant" and answer["content"]:
            earlier = messages[:place]
            n = sum(m["role"] in TALKERS and bool(m["content"]) for m in earlier)
            yield {
                "id": f"{id}_{n}",
                "turn_id": n,
                "prompt": [named(message) for message in history(earlier)],
                "completion": named(answer),
                "user_response": named(after),
            }


def history(before: list[Row]) -> list[Row]:
    """System messages, and the last five from a user message on, runs of one role joined."""
    system = [m for m in before if m["role"] not in TALKERS]
    recent = [m for m in before if m["role"] in TALKERS and m["content"]][-5:]
    turns = [*system, *dropwhile(lambda m: m["role"] == "assistant", recent)]
    runs = groupby(turns, key=lambda m: m["role"])
    return [{"role": role, "content": "\n\n".join(m["content"] for m in run)} for role, run in runs]


def named(message: Row) -> Row:
    """A message in the paper's shape."""
    return {"from": NAMES[message["role"]], "value": message["content"]}


# What depends on earlier rows.


def sketched(batch: Batch) -> Batch:
    """The columns that duplicates are recognised by."""
    from sdpo.data.filters.duplicates import fingerprints, sketches

    said = [[m for m in messages if m["content"]] for messages in batch["messages"]]
    texts = ["\n".join(m["content"] for m in messages) for messages in said]
    talk = ["\n".join(m["content"] for m in messages if m["role"] in TALKERS) for messages in said]
    return {"fingerprint": fingerprints(texts), "sketch": sketches(talk)}  # pyright: ignore


def first_ones(data: Dataset) -> list[int]:
    """Rows that repeat no earlier row, at most PER_USER of one user."""
    from sdpo.data.filters.duplicates import earlier_equal, earlier_similar

    columns = data.with_format("numpy")
    prints = np.stack(columns["fingerprint"][:]).astype(np.uint64)
    rows = np.flatnonzero(earlier_equal(prints) < 0)
    sketches = np.stack(columns["sketch"][:]).astype(np.uint32)
    rows = rows[earlier_similar(sketches[rows], SIMILARITY) < 0]
    users, found, seen = data["hashed_ip"][:], [], Counter()
    for row in rows.tolist():
        seen[users[row]] += 1
        if seen[users[row]] <= PER_USER:
            found.append(row)
    return found


def unique(ids: list[str]) -> list[str]:
    """Repeated ids are marked "~2", "~3", ..., as logs repeat their conversations' ids."""
    taken, seen, marked = set(ids), Counter(), []
    for id in ids:
        seen[id] += 1
        if (n := seen[id]) > 1:
            while f"{id}~{n}" in taken:
                n += 1
            taken.add(f"{id}~{n}")
            id = f"{id}~{n}"
        marked.append(id)
    return marked


if __name__ == "__main__":
    tyro.cli(prepare, description=__doc__)
