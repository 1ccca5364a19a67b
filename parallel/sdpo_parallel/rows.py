"""Rows of slots that a pass reads, and what the slots of a row see of each other.

A row is laid out depth first: sequences that begin alike share the slots of what they have in
common. Every slot has a ``place`` in that order and an ``end``, the place after its last
descendant, and one rule says what attention may read:

    visible(query, key) = place[key] <= place[query] < end[key]

Sequences laid end to end, none sharing anything, are the special case in which ``end`` is that of
the sequence. Two passes whose places count the slots of both may read each other's keys: the rule
is the same.

Shapes: B rows of T slots, Q queries, K keys, N predicted tokens.
"""

from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

Sharing = Literal["none", "tries", "keys"]
"""What rows share. none: each holds whole sequences. tries: sequences that begin alike share slots;
a pass is one row. keys: hindsight's row holds only what the policy's has not, and reads the keys
and values of the policy's pass."""


@dataclass(frozen=True)
class Rows:
    """What one pass of a micro-batch reads; all integers are int64."""

    tokens_BT: Tensor
    positions_BT: Tensor
    """Depth of a slot in its sequence, from 0, for rotary embeddings."""
    place_BT: Tensor
    """Increases along a row. Every slot of padding is a sequence of its own."""
    end_BT: Tensor
    index_N: Tensor
    """The B*T slots whose hidden state predicts a response token, in the same order in both
    passes."""

    @classmethod
    def of(cls, tokens_BT: Tensor, positions_BT: Tensor, index_N: Tensor) -> "Rows":
        """Rows of whole sequences, which begin wherever positions are 0."""
        width = positions_BT.shape[1]
        place_BT = torch.arange(width, device=positions_BT.device).expand_as(positions_BT)
        starts_BT = torch.where(positions_BT == 0, place_BT, width)
        later_BT = torch.nn.functional.pad(starts_BT[:, 1:], (0, 1), value=width)
        end_BT = later_BT.flip(1).cummin(1).values.flip(1)
        return cls(tokens_BT, positions_BT, place_BT, end_BT, index_N)

    def to(self, device: torch.device | str) -> "Rows":
        """Moved, asynchronously where the host memory is pinned."""
        moved = (getattr(self, f.name).to(device, non_blocking=True) for f in fields(self))
        return Rows(*moved)

    @property
    def sight(self) -> "Sight":
        """What the slots see of each other."""
        return Sight(self.place_BT, self.place_BT, self.end_BT)


@dataclass
class Kept:
    """Keys and values of a pass, for a later pass to see: filled by one ``hidden_states``, read by
    another, then dropped.

    Attributes:
        layers: by layer, in the engine's own layout.
        closed: nothing is added any more: a block that is computed again in the backward would.
    """

    rows: Rows
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    closed: bool = False

    def drop(self) -> None:
        """Free the memory."""
        self.layers.clear()
        self.closed = True


class Sight(NamedTuple):
    """Which keys each query of a row sees, by places (B, Q), (B, K) and the keys' ends (B, K)."""

    query_BQ: Tensor
    key_BK: Tensor
    end_BK: Tensor

    def behind(self, rows: Rows) -> "Sight":
        """The same queries, with the keys of other rows before their own."""
        keys, ends = (rows.place_BT, self.key_BK), (rows.end_BT, self.end_BK)
        return Sight(self.query_BQ, torch.cat(keys, 1), torch.cat(ends, 1))

    def dense(self) -> Tensor:
        """(B, 1, Q, K), True where a query sees a key."""
        query_BQ1 = self.query_BQ[:, :, None]
        seen_BQK = (self.key_BK[:, None] <= query_BQ1) & (query_BQ1 < self.end_BK[:, None])
        return seen_BQK[:, None]

    def block_mask(self, block: int | tuple[int, int]) -> BlockMask:
        """The same for flex attention, from the least and greatest place of each block: the (Q, K)
        pairs are never formed.

        Args:
            block: queries and keys of a block; they divide Q and K.
        """
        of_queries, of_keys = (block, block) if isinstance(block, int) else block
        q_BnC = self.query_BQ.unflatten(1, (-1, of_queries))
        k_BmC, e_BmC = (t.unflatten(1, (-1, of_keys)) for t in (self.key_BK, self.end_BK))
        first, last = q_BnC.amin(-1)[:, :, None], q_BnC.amax(-1)[:, :, None]
        some = (k_BmC.amin(-1)[:, None] <= last) & (first < e_BmC.amax(-1)[:, None])
        all_ = (k_BmC.amax(-1)[:, None] <= first) & (last < e_BmC.amin(-1)[:, None])
        query, key, end = self.query_BQ, self.key_BK, self.end_BK

        def mask_mod(b, h, q, kv):
            return (key[b, kv] <= query[b, q]) & (query[b, q] < end[b, kv])

        return BlockMask.from_kv_blocks(
            *_listed(some & ~all_),
            *_listed(all_),
            BLOCK_SIZE=(of_queries, of_keys),
            mask_mod=mask_mod,
            seq_lengths=(query.shape[1], key.shape[1]),
        )


def _listed(blocks_Bnm: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries reads, and which, those first: (B, 1, n) and
    (B, 1, n, m) int32."""
    blocks = blocks_Bnm[:, None].int()
    order = blocks.argsort(dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32), order.contiguous()
