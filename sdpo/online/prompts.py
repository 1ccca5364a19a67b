"""Prompts that a policy is to answer, from a file, in the order in which a run draws them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..conversations import Message
from ..errors import DataError
from ..interactions import NAME_OF, prompt_of
from ..io.fields import as_id, as_object, bad
from ..io.rows import read_rows


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the policy answers: messages that end with a user's, without the system message that a
    run puts before them."""

    id: str
    messages: tuple[Message, ...]


def read_prompts(path: str | Path, system: str | None = None) -> list[Prompt]:
    """All prompts of a file, in its order, each text once.

    A ``.txt`` file has one in each line. Rows of JSONL and parquet files have a ``prompt``, a text
    or a list of messages as interactions have it, and perhaps an ``id``.

    Args:
        system: text of a system message for prompts that do not begin with one; "" is one, too.

    Raises:
        DataError: no such file, no prompt in it, or a row that is none; names file, row and field.
    """
    found: dict[tuple[Message, ...], Prompt] = {}
    for prompt in _lines(path) if str(path).endswith(".txt") else _rows(path):
        if system is not None and prompt.messages[0].role != "system":
            messages = (Message("system", system), *prompt.messages)
            prompt = Prompt(id=prompt.id, messages=messages)
        found.setdefault(prompt.messages, prompt)
    if not found:
        raise DataError("no prompts", file=str(path), hint="Give one text in each line")
    return list(found.values())


def _lines(path: str | Path) -> Iterator[Prompt]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        problem = f"the prompts cannot be read ({reason})"
        raise DataError(problem, file=str(path), hint="Check the file") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Prompt(id=str(number), messages=(Message("user", line.strip()),))


def _rows(path: str | Path) -> Iterator[Prompt]:
    for number, place, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            row = as_object(row, "row")
            prompt = row.get("prompt")
            texts = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = prompt_of(texts)
            if unknown := [m.role for m in messages if m.role not in NAME_OF]:
                hint = f"Use {', '.join(NAME_OF)}"
                raise bad("prompt", f"unknown role {unknown[0]!r}", hint)
            if messages[-1].role not in ("user", "tool"):
                problem = f"the prompt ends with a message of role {messages[-1].role!r}"
                raise bad("prompt", problem, "End it with the user message to be answered")
            yield Prompt(id=as_id(row.get("id"), str(number)), messages=messages)
        except DataError as error:
            raise error.at(file=str(path), row=place) from None


class Order:
    """The order in which prompts are drawn: every epoch all of them, shuffled anew.

    The first epoch's is ``torch.randperm`` from a generator of that seed, as TRL's trainers draw
    prompts.
    """

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed

    def take(self, start: int, count: int) -> list[int]:
        """Indices of the prompts number ``start`` and on."""
        return [self._epoch(i // self.n)[i % self.n] for i in range(start, start + count)]

    def _epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.n, generator=generator).tolist()
