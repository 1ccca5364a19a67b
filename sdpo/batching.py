"""Encoded interactions -> packed rows for both passes; which interactions a step trains on.

Shapes: B rows of T slots, N response tokens, S interactions of a micro-batch.

Sequences are packed whole into rows; ``positions`` restart at 0 with each of them, which is all
that an attention mask needs (each slot of padding at a row's end is a document of its own).
``index`` names the B*T slots whose hidden state predicts a response token, in the same order in
both passes.

Not here: how ranks are balanced against each other; each takes every ``world``-th interaction.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .hindsight import Encoded

ROW_MULTIPLE = 128
"""Rows are as wide as their longest needs, rounded up: the block of flex attention's masks, and
few enough shapes for compiled kernels."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much a step trains on and how it is cut to fit memory."""

    interactions_per_step: int = 128
    """Over all ranks; independent of their number."""
    row_tokens: int = 8192
    """Slots of one packed row; raised to the longest sequence where that is longer."""
    micro_batch_tokens: int = 16384
    """Slots of one pass, prompts and padding included, that one rank computes at a time; only a
    single longer sequence exceeds it."""
    epochs: float = 1.0
    seed: int = 0
    """Of the order of the interactions."""

    def __post_init__(self):
        for name in ("interactions_per_step", "row_tokens", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be positive and finite, got {self.epochs}")


@dataclass(frozen=True)
class Rows:
    """One pass of a micro-batch."""

    tokens_BT: Tensor
    positions_BT: Tensor
    index_N: Tensor


@dataclass(frozen=True)
class Batch:
    """Both passes of one micro-batch. Everything of size N follows the order of ``targets_N``."""

    policy: Rows
    hindsight: Rows
    targets_N: Tensor
    """The response's token ids."""
    sequence_N: Tensor
    """Which of the micro-batch's interactions a token belongs to."""
    offset_N: Tensor
    """Its place in the response, from 0."""
    end_N: Tensor
    """True at the end-of-sequence token that closes a response."""
    old_logp_N: Tensor | None
    """log-probabilities under the policy that sampled the response, where all are known."""
    weight_S: Tensor
    """Interaction weights, normalised over the whole step, so that micro-batches and ranks add."""
    truncated_3: Tensor
    """Interactions that lost tokens in the policy prompt, hindsight prompt, response."""

    def to(self, device: torch.device | str) -> "Batch":
        """Every tensor moved, asynchronously where the host memory is pinned."""

        def move(value):
            if isinstance(value, Rows):
                return Rows(*(move(getattr(value, f.name)) for f in fields(value)))
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass
class Cursor:
    """How many interactions of the endless shuffled stream have been trained on.

    It counts over all ranks, so a run resumes on any number of them.
    """

    n: int
    seed: int
    consumed: int = 0

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices into the data: epoch after epoch, each its own shuffle."""
        out = [self._at(i) for i in range(self.consumed, self.consumed + count)]
        self.consumed += count
        return out

    def _at(self, i: int) -> int:
        epoch, place = divmod(i, self.n)
        return int(_order(self.n, self.seed, epoch)[place])

    def state_dict(self) -> dict:
        """For the checkpoint."""
        return {"consumed": self.consumed, "seed": self.seed, "n": self.n}

    def load_state_dict(self, state: dict) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: the data's size or the seed is not that of the checkpoint.
        """
        for name in ("n", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"cannot resume: the checkpoint was made with {name}={state[name]}, this run "
                    f"has {name}={getattr(self, name)}; resume with the same data and seed"
                )
        self.consumed = state["consumed"]


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def steps_in(n: int, config: BatchConfig) -> int:
    """Steps that see ``n`` interactions ``config.epochs`` times; the last may be smaller."""
    return -(-total_interactions(n, config) // config.interactions_per_step)


def total_interactions(n: int, config: BatchConfig) -> int:
    """Interactions of the whole run, repeats counted; at least one."""
    return max(1, round(n * config.epochs))


def micro_batches(items: Sequence[tuple[Encoded, float]], config: BatchConfig) -> Iterator[Batch]:
    """One rank's share of a step, cut so that neither pass exceeds ``micro_batch_tokens``.

    Args:
        items: (encoded interaction, weight normalised over the whole step).
    """
    group: list[tuple[Encoded, float]] = []
    for item in items:
        if group and _slots([*group, item], config.row_tokens) > config.micro_batch_tokens:
            yield collate(group, config.row_tokens)
            group = []
        group.append(item)
    if group:
        yield collate(group, config.row_tokens)


def _slots(items: Sequence[tuple[Encoded, float]], row_tokens: int) -> int:
    """Slots of the larger pass of a micro-batch."""
    policy = [len(e.policy) + len(e.response) for e, _ in items]
    hindsight = [len(e.hindsight) + len(e.response) for e, _ in items]
    rows = [(_fit(lengths, row_tokens), lengths) for lengths in (policy, hindsight)]
    return max(len(r) * _width(r, lengths) for r, lengths in rows)


def collate(items: Sequence[tuple[Encoded, float]], row_tokens: int) -> Batch:
    """Interactions and their weights -> one micro-batch. No items give a batch of no tokens."""
    encoded = [e for e, _ in items]
    lengths = torch.tensor([len(e.response) for e in encoded], dtype=torch.long)
    ends = [i == len(e.response) - 1 and e.ends for e in encoded for i in range(len(e.response))]
    old = [p for e in encoded for p in e.old_logprobs or ()]
    known = bool(encoded) and all(e.old_logprobs is not None for e in encoded)
    return Batch(
        policy=pack([(e.policy, e.response) for e in encoded], row_tokens),
        hindsight=pack([(e.hindsight, e.response) for e in encoded], row_tokens),
        targets_N=torch.tensor([t for e in encoded for t in e.response], dtype=torch.long),
        sequence_N=torch.repeat_interleave(torch.arange(len(encoded)), lengths),
        offset_N=torch.tensor([i for e in encoded for i in range(len(e.response))]).long(),
        end_N=torch.tensor(ends, dtype=torch.bool),
        old_logp_N=torch.tensor(old, dtype=torch.float32) if known else None,
        weight_S=torch.tensor([w for _, w in items], dtype=torch.float32),
        truncated_3=torch.tensor([e.truncated for e in encoded]).view(-1, 3).sum(0),
    )


def pack(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], row_tokens: int) -> Rows:
    """(prompt, response) pairs -> rows, each sequence whole in one of them."""
    lengths = [len(p) + len(r) for p, r in sequences]
    return _lay_out(sequences, lengths, _fit(lengths, row_tokens))


def _fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices by row: longest first into the first row with room. At least one row."""
    width = max([row_tokens, *lengths])
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            rows.append([])
            room.append(width)
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows or [[]]


def _width(rows: list[list[int]], lengths: Sequence[int]) -> int:
    used = max(1, max(sum(lengths[i] for i in row) for row in rows))
    return -(-used // ROW_MULTIPLE) * ROW_MULTIPLE


def _lay_out(sequences, lengths: list[int], rows: list[list[int]]) -> Rows:
    width = _width(rows, lengths)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros_like(tokens)
    predicts: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            prompt, response = sequences[i]
            tokens[r, at : at + lengths[i]] = [*prompt, *response]
            positions[r, at : at + lengths[i]] = np.arange(lengths[i])
            first = r * width + at + len(prompt) - 1
            predicts[i] = np.arange(first, first + len(response))
            at += lengths[i]
    index = np.concatenate(predicts) if predicts else np.empty(0, np.int64)
    return Rows(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(index))
