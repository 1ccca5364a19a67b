"""The conditions under which `sdpo signal` compares a response's advantages: which follow-up stands
in its hindsight context.

  own          the one that the response got;
  swapped      another conversation's;
  none         no text: what the template's wording does by itself;

and those that the rows of the file name, for example

    {"id": …, "prompt": …, "completion": …, "user_response": "Shorter, please.",
     "followups": {"irrelevant": "How far away is the moon?"}, "kind": "complaint"}
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ..errors import DataError
from ..interactions import Interaction, conversation_of, iter_interactions, to_row
from ..io.fields import as_object, as_text, bad
from ..io.files import written_whole
from ..io.rows import read_rows
from .score import FollowUps, partners

OWN, SWAPPED, NONE = "own", "swapped", "none"


@dataclass(frozen=True, kw_only=True)
class Case:
    """An interaction, and the follow-ups under which its response is read."""

    interaction: Interaction
    followups: dict[str, str] = field(default_factory=dict)
    """Condition -> text, beside its own."""
    kind: str = ""
    """Of its own follow-up."""

    @property
    def texts(self) -> dict[str, str]:
        """Condition -> text, its own first."""
        return {OWN: self.interaction.followup, **self.followups}


def plain_cases(path: str) -> Iterator[Case]:
    """The interactions of a file, with their own follow-ups alone."""
    return (Case(interaction=i) for i in iter_interactions(path))


def iter_cases(path: str, *, swap: bool, by: str, seed: int) -> Iterator[Case]:
    """The interactions of a file, in its order, with the follow-ups of all conditions.

    Args:
        swap: also those of other conversations.
        by: field that holds the kind of a row's own follow-up; rows may lack it.
        seed: decides which interactions exchange follow-ups.

    Raises:
        DataError: a row is no interaction; its follow-ups have other names than the first row's,
            names of ours, or no text; or one conversation has more than half of the interactions.
    """
    with tempfile.TemporaryFile() as file:
        conversations, texts = [], FollowUps(file)
        for i in iter_interactions(path) if swap else ():
            conversations.append(conversation_of(i))
            texts.append(i.followup)
        try:
            partner = partners(conversations, seed, path) if swap else None
        except DataError as error:
            raise error.hinting("Or compare without them: --no-swap") from None
        names: list[str] | None = None
        rows = zip(iter_interactions(path), read_rows(path), strict=True)
        for n, (interaction, (_, place, row)) in enumerate(rows):
            try:
                named, kind = _named(row), _kind(row, by)
                names = list(named) if names is None else names
                if set(named) != set(names):
                    problem = f"follow-ups {sorted(named)} where the first row has {sorted(names)}"
                    raise bad("followups", problem, "Give all rows the same")
            except DataError as error:
                raise error.at(file=path, row=place) from None
            swapped = {} if partner is None else {SWAPPED: texts[partner[n]]}
            followups = swapped | {NONE: ""} | {name: named[name] for name in names}
            yield Case(interaction=interaction, followups=followups, kind=kind)


def _named(row: Any) -> dict[str, str]:
    """The follow-ups that a row names."""
    named = as_object(row.get("followups") or {}, "followups")
    for name, text in named.items():
        where = f"followups.{name}"
        if name in (OWN, SWAPPED, NONE):
            raise bad(where, f"{name!r} is a condition of its own", "Use another name")
        if not as_text(text, where).strip():
            raise bad(where, "the follow-up is empty", "Write one, or drop the row")
    return named


def _kind(row: Any, by: str) -> str:
    value = row.get(by)
    return "" if value is None else as_text(value, by)


def write_cases(path: str | Path, cases: Iterable[Case]) -> None:
    """Write interactions with the follow-ups that they name, and their kinds, whole or not at
    all."""
    with written_whole(path) as file:
        for case in cases:
            more: Mapping[str, Any] = {"followups": case.followups, "kind": case.kind}
            row = to_row(case.interaction) | {name: value for name, value in more.items() if value}
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE).decode())
