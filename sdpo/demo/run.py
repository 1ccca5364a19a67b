"""What the demo reads from the folder of an online run."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

from ..online.record import Record, read_update
from ..online.users.personas import load_persona
from ..train.run_folder import read_metrics


def curve(folder: Path, personas: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each update, in order: its number and phase, what share of its answers each persona
    would be pleased with, their mean number of words, and the entropy of their tokens in nats."""
    likes = {name: load_persona(name) for name in personas}
    entropies = {row["step"]: row["entropy/policy"] for row in read_metrics(folder)}
    return [
        {
            "update": update,
            "phase": records[0].phase,
            "preference": {
                name: fmean(persona.satisfied(r.answer, r.finished) for r in records)
                for name, persona in likes.items()
            },
            "words": fmean(len(r.answer.split()) for r in records),
            "entropy": entropies[update],
        }
        for update, records in _updates(folder)
    ]


def _updates(folder: Path) -> Iterator[tuple[int, list[Record]]]:
    for update in count(1):
        records = read_update(folder, update)
        if records is None:
            return
        yield update, records
