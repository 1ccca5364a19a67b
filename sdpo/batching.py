"""Encoded interactions -> packed rows for both passes; which interactions a step trains on.

Shapes: B rows of T slots, N response tokens, S interactions of a micro-batch, K kinds of
truncation.

Rows hold whole sequences end to end, or, where prefixes are shared, one trie (`sdpo.tries`): slots
that sequences have in common are there once. What a slot sees is in `sdpo_parallel.rows`.

``assign`` distributes a step's examples over ranks and micro-batches so that all have as much to
do; every rank computes the same assignment from all lengths, and nothing is communicated.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import count, groupby
from typing import Literal

import numpy as np
import torch
from binpacking.to_constant_bin_number import to_constant_bin_number
from binpacking.to_constant_volume import to_constant_volume
from numpy.typing import NDArray
from torch import Tensor

from sdpo_parallel.engine import ROW_MULTIPLE
from sdpo_parallel.rows import Rows, Sharing

from .errors import SdpoError
from .hindsight import ALONE, Encoded, Reading, Truncated
from .interactions import Interaction, conversation_of
from .tries import Layout, join, lay_out


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much a step trains on and how it is cut to fit memory."""

    interactions_per_step: int = 128
    """Interactions of one optimizer step, over all ranks; of conversations at least as many."""
    unit: Literal["interaction", "conversation"] = "interaction"
    """What is drawn at a time: one interaction, as in the paper, or all of a conversation's, which
    then are in one step and can share what they have in common."""
    row_tokens: int = 8192
    """Slots of one packed row; raised to the longest sequence where that is longer."""
    micro_batch_tokens: int = 16384
    """Slots of one pass, prompts and padding included, that one rank computes at a time; only a
    single longer sequence exceeds it."""
    epochs: float = 1.0
    """How often every interaction is trained on; a fraction is a share of the units."""
    seed: int = 0
    """Shuffle seed."""
    share_prefix: Literal["auto", "none"] = "auto"
    """auto: what sequences of a micro-batch begin with alike is read once, where model, layout and
    attention can; none: every sequence is read whole."""

    def __post_init__(self):
        for name in ("interactions_per_step", "row_tokens", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise SdpoError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.epochs < math.inf:
            raise SdpoError(f"epochs must be positive and finite, got {self.epochs}")


@dataclass(frozen=True)
class Batch:
    """Both passes of one micro-batch. Everything of size N follows the order of ``targets_N``."""

    policy: Rows
    hindsight: Rows
    """No row at all where there is no second pass."""
    targets_N: Tensor
    """The response's token ids."""
    sequence_N: Tensor
    """Index of the interaction, in the micro-batch, that a token belongs to; of pairs, each
    response counts as one, the rejected behind the preferred."""
    offset_N: Tensor
    """A token's place in its response, from 0."""
    end_N: Tensor
    """True at the end-of-sequence token that closes a response."""
    old_logp_N: Tensor | None
    """log-probabilities under the policy that sampled the response, where all are known."""
    weight_S: Tensor
    """Interaction weights, normalised over the whole step, so that micro-batches and ranks add."""
    truncated_SK: Tensor
    """Whether an interaction lost tokens, by the K fields of ``Truncated``."""
    lengths: tuple[int, ...]
    """Tokens of each response, on the host."""
    sharing: Sharing
    slots: int
    """Slots of both passes, padding included."""
    tokens: int
    """Slots that hold a token."""
    unshared: int
    """Tokens of all sequences of both passes, each counted whole."""
    pairs: bool = False
    """Responses come in pairs."""

    def to(self, device: torch.device | str) -> "Batch":
        """Every tensor moved, asynchronously where the host memory is pinned."""

        def move(value):
            if isinstance(value, Rows):
                return value.to(device)
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def only(self, responses: Sequence[int]) -> tuple["Batch", Tensor]:
        """This batch with the loss of some responses only, and the indices of their tokens among
        the N. The rows of both passes stay whole."""
        keep_S = torch.tensor(responses, dtype=torch.long, device=self.weight_S.device)
        new_S = torch.full_like(self.weight_S, -1, dtype=torch.long)
        new_S[keep_S] = torch.arange(len(responses), device=keep_S.device)
        kept_N = (new_S[self.sequence_N] >= 0).nonzero()[:, 0]
        batch = replace(
            self,
            targets_N=self.targets_N[kept_N],
            sequence_N=new_S[self.sequence_N[kept_N]],
            offset_N=self.offset_N[kept_N],
            end_N=self.end_N[kept_N],
            old_logp_N=None if self.old_logp_N is None else self.old_logp_N[kept_N],
            weight_S=self.weight_S[keep_S],
            truncated_SK=self.truncated_SK[keep_S],
            lengths=tuple(self.lengths[i] for i in responses),
        )
        return batch, kept_N


@dataclass
class Cursor:
    """How many interactions of a `Stream` have been trained on: a place where a unit ends.

    It counts over all ranks, so a run resumes on any number of them.
    """

    n: int
    seed: int
    consumed: int = 0

    def state_dict(self) -> dict:
        """For the checkpoint."""
        return {"consumed": self.consumed, "seed": self.seed, "n": self.n}

    def load_state_dict(self, state: dict) -> None:
        """Continue where ``state`` was taken.

        Raises:
            SdpoError: the data's size or the seed is not that of the checkpoint.
        """
        for name in ("n", "seed"):
            if state[name] != getattr(self, name):
                raise SdpoError(
                    f"cannot resume: the checkpoint was made with {name}={state[name]}, this run "
                    f"has {name}={getattr(self, name)}; resume with the same data and seed"
                )
        self.consumed = state["consumed"]


def unit_of(interaction: Interaction, config: BatchConfig) -> str:
    """Name of the unit that an interaction is drawn with: its own id, or its conversation's."""
    return interaction.id if config.unit == "interaction" else conversation_of(interaction)


class Stream:
    """What a run draws: every epoch its units in a new shuffled order, cut into steps.

    A unit's interactions keep the data's order and are in one step. Places in the stream are
    counted in interactions: a unit has one of ``sizes``, an epoch ``n``, the whole run ``total``.

    Args:
        units: the name of each interaction's unit, in the data's order.
    """

    def __init__(self, units: Iterable[str], config: BatchConfig):
        numbers: dict[str, int] = {}
        self._unit = np.array([numbers.setdefault(name, len(numbers)) for name in units])
        self._config = config
        self._epoch = lru_cache(maxsize=2)(self._shuffled)
        self.n, self.sizes = len(self._unit), np.bincount(self._unit)
        epochs, more = divmod(max(1, round(len(self.sizes) * config.epochs)), len(self.sizes))
        self.total = epochs * self.n + (self._epoch(epochs)[1][more - 1] if more else 0)

    @cached_property
    def steps(self) -> int:
        """Steps of the whole run; the last may be smaller."""
        steps = end = 0
        while end < self.total:
            steps, end = steps + 1, self.end(end)
        return steps

    def step(self, start: int) -> list[int]:
        """Indices into the data of the step that begins at ``start``; none at the run's end."""
        return self.places(start, self.end(start)).tolist()

    def end(self, start: int) -> int:
        """Where the step that begins at ``start`` ends: with the unit that fills it."""
        last = min(start + self._config.interactions_per_step, self.total) - 1
        epoch, last = divmod(last, self.n)
        ends = self._epoch(epoch)[1]
        return epoch * self.n + ends[bisect_right(ends, last)]

    def places(self, start: int, stop: int) -> np.ndarray:
        """Indices into the data from ``start`` up to ``stop``."""
        first, last = start // self.n, max(start, stop - 1) // self.n
        drawn = np.concatenate([self._epoch(e)[0] for e in range(first, last + 1)])
        return drawn[start - first * self.n : stop - first * self.n]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Indices into the data in an epoch's order, and where in it each unit ends."""
        order = np.random.default_rng((self._config.seed, epoch)).permutation(len(self.sizes))
        rank = np.argsort(order)  # a unit's place in the order
        places = np.argsort(rank[self._unit], kind="stable")
        return places, np.cumsum(self.sizes[order]).tolist()


Example = tuple[Encoded, float]
"""An encoded interaction and its weight, normalised over the whole step."""
Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and a response."""


@dataclass(frozen=True)
class Bundle:
    """Examples that are computed together: one, or turns of a conversation, which share prefixes.

    Slots are counted without what it shares with others.
    """

    examples: list[Example]
    policy: int
    """Slots of the policy pass."""
    hindsight: int

    @property
    def cost(self) -> int:
        """Work in forward passes of one token: the policy's backward counts two."""
        return 3 * self.policy + self.hindsight


def bundles(examples: Iterable[Example], most: int, sharing: Sharing = "none") -> Iterator[Bundle]:
    """Examples as what is computed together, in their order.

    Args:
        examples: turns of a conversation that follow each other share prefixes.
        most: slots of a pass; a conversation that needs more is cut between its turns.
    """
    apart = count()  # a name for each that shares with none
    for _, turns in groupby(
        examples, lambda e: (sharing != "none" and e[0].conversation) or next(apart)
    ):
        group = list(turns)
        while group:
            n = len(group)
            while max(slots := _slots_of(group[:n], sharing)) > most and n > 1:
                n -= 1
            yield Bundle(group[:n], *slots)
            group = group[n:]


def by_conversation(examples: Sequence[Example]) -> list[Example]:
    """Turns of a conversation behind each other, where the first of them was."""
    first: dict[str, int] = {}
    for n, (e, _) in enumerate(examples):
        first.setdefault(e.conversation, n)
    return sorted(examples, key=lambda example: first[example[0].conversation])


def _slots_of(examples: Sequence[Example], sharing: Sharing) -> tuple[int, int]:
    """Slots of the policy and the hindsight pass, without padding."""
    policy, hindsight = pairs_of(examples)
    if sharing == "none":
        return _total(policy), _total(hindsight)
    first, second = _layouts(policy, hindsight, sharing)
    return first.slots, second.slots


def micro_batches(
    examples: Iterable[Example], config: BatchConfig, sharing: Sharing = "none"
) -> Iterator[Batch]:
    """One process's examples in order, cut so that no pass exceeds ``micro_batch_tokens``."""
    group: list[Bundle] = []
    for bundle in bundles(examples, config.micro_batch_tokens, sharing):
        if (
            group
            and _slots([*group, bundle], config, ROW_MULTIPLE, sharing) > config.micro_batch_tokens
        ):
            yield collate(_examples(group), config.row_tokens, sharing=sharing)
            group = []
        group.append(bundle)
    if group:
        yield collate(_examples(group), config.row_tokens, sharing=sharing)


@dataclass(frozen=True)
class Assignment:
    """Which rank computes what in a step: ``micro_batches[m][r]`` holds rank r's part of
    micro-batch m.

    All ranks have the same number of micro-batches, some perhaps empty, as each runs the same
    collectives; within one, ranks wait for the slowest.
    """

    micro_batches: list[list[list[Bundle]]]

    def of(self, rank: int) -> list[list[Example]]:
        """A rank's micro-batches."""
        return [_examples(ranks[rank]) for ranks in self.micro_batches]

    @property
    def idle(self) -> float:
        """Share of the step that the average rank waits for the busiest, estimated by cost."""
        costs = [[sum(u.cost for u in bin) for bin in ranks] for ranks in self.micro_batches]
        longest = sum(max(ranks) for ranks in costs)
        ranks = len(costs[0])
        return 1 - sum(map(sum, costs)) / (ranks * longest) if longest else 0.0

    @property
    def tokens(self) -> list[int]:
        """Slots of both passes by rank, padding not included."""
        slots = [
            [sum(u.policy + u.hindsight for u in bin) for bin in ranks]
            for ranks in self.micro_batches
        ]
        return [sum(column) for column in zip(*slots, strict=True)]


def assign(
    examples: Sequence[Example],
    dp_degree: int,
    config: BatchConfig,
    row_multiple: int,
    sharing: Sharing = "none",
) -> Assignment:
    """As few micro-batches as fit: ranks x micro-batches bins of equal cost (longest processing
    time first), bins of similar cost in the same micro-batch. What shares prefixes stays
    together."""
    if sharing != "none":
        examples = by_conversation(examples)
    found = list(bundles(examples, config.micro_batch_tokens, sharing))
    costs = {i: bundle.cost for i, bundle in enumerate(found)}
    most = max(sum(u.policy for u in found), sum(u.hindsight for u in found))
    rounds = max(1, -(-most // (dp_degree * config.micro_batch_tokens)))
    while True:
        bins = [sorted(b) for b in to_constant_bin_number(costs, dp_degree * rounds)]
        contents = [[found[i] for i in b] for b in bins]
        if all(
            len(c) <= 1 or _slots(c, config, row_multiple, sharing) <= config.micro_batch_tokens
            for c in contents
        ):
            break
        rounds += 1
    contents.sort(key=lambda c: -sum(bundle.cost for bundle in c))
    groups = [contents[m * dp_degree : (m + 1) * dp_degree] for m in range(rounds)]
    # alternate the direction, so that no rank gets the longest bin of every group
    return Assignment([g if m % 2 == 0 else g[::-1] for m, g in enumerate(groups)])


def _examples(bundles: Iterable[Bundle]) -> list[Example]:
    return [example for bundle in bundles for example in bundle.examples]


def _slots(
    bundles: Sequence[Bundle], config: BatchConfig, row_multiple: int, sharing: Sharing
) -> int:
    """Slots of the larger pass of a micro-batch, at most."""
    passes = [b.policy for b in bundles], [b.hindsight for b in bundles]
    if sharing != "none":  # one row
        return max(_rounded(sum(slots), row_multiple) for slots in passes)
    rows = [(_fit(lengths, config.row_tokens), lengths) for lengths in passes]
    return max(len(r) * _width(r, lengths, row_multiple) for r, lengths in rows)


def collate(
    examples: Sequence[Example],
    row_tokens: int,
    row_multiple: int = ROW_MULTIPLE,
    sharing: Sharing = "none",
    reading: Reading = "hindsight",
) -> Batch:
    """Examples -> one micro-batch. No examples give a batch of no tokens.

    Args:
        reading: what the examples were encoded for.
    """
    encoded = [e for whole, _ in examples for e in whole.sequences]
    lengths = torch.tensor([len(e.response) for e in encoded], dtype=torch.long)
    ends = [i == len(e.response) - 1 and e.ends for e in encoded for i in range(len(e.response))]
    old = [p for e in encoded for p in e.old_logprobs or ()]
    known = all(e.old_logprobs is not None for e in encoded)
    both = pairs_of(examples)
    (policy, hindsight), tokens = pack_passes(*both, row_tokens, row_multiple, sharing)
    if reading in ALONE:
        none = torch.empty(0, 0, dtype=torch.long)
        hindsight = Rows(none, none, none, none, none.flatten())
    return Batch(
        policy=policy,
        hindsight=hindsight,
        targets_N=torch.tensor([t for e in encoded for t in e.response], dtype=torch.long),
        sequence_N=torch.repeat_interleave(torch.arange(len(encoded)), lengths),
        offset_N=torch.tensor([i for e in encoded for i in range(len(e.response))]).long(),
        end_N=torch.tensor(ends, dtype=torch.bool),
        old_logp_N=torch.tensor(old, dtype=torch.float32) if known else None,
        weight_S=torch.tensor([w for e, w in examples for _ in e.sequences], dtype=torch.float32),
        truncated_SK=torch.tensor([e.truncated for e in encoded], dtype=torch.bool).view(
            -1, len(Truncated._fields)
        ),
        lengths=tuple(len(e.response) for e in encoded),
        sharing=sharing,
        slots=policy.tokens_BT.numel() + hindsight.tokens_BT.numel(),
        tokens=tokens,
        unshared=sum(map(_total, both)),
        pairs=reading == "pair",
    )


def pairs_of(examples: Sequence[Example]) -> tuple[list[Pair], list[Pair]]:
    """What the policy and the hindsight pass read: all responses behind their hindsight prompts,
    then behind each further one; all examples have as many, or none."""
    encoded = [e for whole, _ in examples for e in whole.sequences]
    policy: list[Pair] = [(e.policy, e.response) for e in encoded]
    prompts = zip(*((e.hindsight, *e.further) if e.hindsight else () for e in encoded), strict=True)
    responses = [e.response for e in encoded]
    return policy, [pair for column in prompts for pair in zip(column, responses, strict=True)]


def _total(pairs: Sequence[Pair]) -> int:
    return sum(len(p) + len(r) for p, r in pairs)


def pack_passes(
    policy: Sequence[Pair],
    hindsight: Sequence[Pair],
    row_tokens: int,
    row_multiple: int = ROW_MULTIPLE,
    sharing: Sharing = "none",
) -> tuple[tuple[Rows, Rows], int]:
    """(prompt, response) pairs of both passes -> their rows, and how many slots hold a token.

    Args:
        hindsight: any number of pairs, of whatever prompts and responses.
    """
    if sharing == "none":
        whole = pack(policy, row_tokens, row_multiple), pack(hindsight, row_tokens, row_multiple)
        return whole, _total(policy) + _total(hindsight)
    first, second = _layouts(policy, hindsight, sharing)
    total = first.slots + second.slots
    rows = _trie_row(first, policy, row_multiple, beyond=total)
    beyond = total + row_multiple  # the first's padding, too
    return (rows, _trie_row(second, hindsight, row_multiple, beyond=beyond)), total


def _layouts(
    policy: Sequence[Pair], hindsight: Sequence[Pair], sharing: Sharing
) -> tuple[Layout, Layout]:
    """How the slots of both passes are laid out, sharing prefixes."""
    sequences = [[np.array([*p, *r], np.int64) for p, r in pairs] for pairs in (policy, hindsight)]
    if sharing == "tries":
        return lay_out(sequences[0]), lay_out(sequences[1])
    # the state that predicts a response's first token is hindsight's own
    return join(sequences[0], sequences[1], [len(prompt) - 1 for prompt, _ in hindsight])


def _trie_row(layout: Layout, pairs: Sequence[Pair], row_multiple: int, beyond: int) -> Rows:
    """A layout as one row; padding is a sequence of its own, whose places begin ``beyond`` all."""
    width = _rounded(max(1, layout.slots), row_multiple)
    spare = np.arange(width - layout.slots)
    # a path may lack what lies in the other layout, and ends with the response
    index = [
        path[len(path) - len(response) - 1 : -1]
        for path, (_, response) in zip(layout.paths, pairs, strict=True)
    ]

    def row(slots: NDArray, padding: NDArray) -> Tensor:
        return torch.from_numpy(np.concatenate([slots, padding]))[None]

    return Rows(
        row(layout.tokens_T, np.zeros_like(spare)),
        row(layout.depth_T, np.zeros_like(spare)),
        row(layout.place_T, beyond + spare),
        row(layout.end_T, np.full_like(spare, beyond + len(spare))),
        torch.from_numpy(np.concatenate([np.empty(0, np.int64), *index])),
    )


def pack(pairs: Sequence[Pair], row_tokens: int, row_multiple: int = ROW_MULTIPLE) -> Rows:
    """(prompt, response) pairs -> rows, each sequence whole in one of them."""
    lengths = [len(p) + len(r) for p, r in pairs]
    rows = _fit(lengths, row_tokens)
    width = _width(rows, lengths, row_multiple)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros_like(tokens)
    end = np.full_like(tokens, width)  # padding is a sequence of its own
    predicts: list[np.ndarray] = [np.empty(0, np.int64)] * len(pairs)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            prompt, response = pairs[i]
            span = slice(at, at + lengths[i])
            tokens[r, span] = [*prompt, *response]
            positions[r, span] = np.arange(lengths[i])
            end[r, span] = span.stop
            first = r * width + at + len(prompt) - 1
            predicts[i] = np.arange(first, first + len(response))
            at = span.stop
    index = np.concatenate([np.empty(0, np.int64), *predicts])
    place = np.tile(np.arange(width), (len(rows), 1))
    flat = (tokens, positions, place, end, index)
    return Rows(*(torch.from_numpy(x) for x in flat))


def _fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices by row; at least one row."""
    width = max([row_tokens, *lengths])
    return [list(row) for row in to_constant_volume(dict(enumerate(lengths)), width)]


def _width(rows: list[list[int]], lengths: Sequence[int], multiple: int) -> int:
    return _rounded(max(1, max(sum(lengths[i] for i in row) for row in rows)), multiple)


def _rounded(slots: int, multiple: int) -> int:
    return -(-slots // multiple) * multiple
