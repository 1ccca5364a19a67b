"""VocabShard: which rows of the lm_head a tensor-parallel rank holds, and what ranks exchange.

Every rank of the group calls with the same tokens and its own rows of the lm_head. Per chunk the
ranks gather a handful of numbers per token (see ``_impl/partials.py``); the lm_head's gradient
stays where its rows are, and the hidden states' gradient comes back *partial*: their sum over the
group is the gradient. Megatron and DTensor call that a ``Partial`` placement.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    _resolve_process_group,  # pyright: ignore[reportPrivateImportUsage]
)


@dataclass(frozen=True)
class VocabShard:
    """This rank holds rows ``[start, start + lm_head_weight.shape[0])`` of ``total``.

    Shards may be uneven and even empty; together, in any order, they must cover the vocabulary.
    The same inputs must require a gradient on every rank: the ranks' collectives follow from it.
    """

    group: dist.ProcessGroup
    start: int
    total: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, total: int) -> "VocabShard":
        """The rank's shard under ``torch.chunk``'s rule, which DTensor's ``Shard(0)`` follows."""
        size = -(-total // group.size())
        return cls(group, min(group.rank() * size, total), total)

    @property
    def rows(self) -> slice:
        """This rank's rows under ``of``'s rule: its part is ``lm_head_weight[shard.rows]``."""
        return slice(self.start, min(self.start + -(-self.total // self.group.size()), self.total))


def size(name: Any) -> int:
    """Number of ranks in the group."""
    return _resolve_process_group(name).size()


def gather(name: Any, partial: Tensor) -> Tensor:
    """(*) on each rank -> (ranks, *) on all: one collective."""
    group = _resolve_process_group(name)
    out = partial.new_empty((group.size() * partial.shape[0], *partial.shape[1:]))
    dist.all_gather_into_tensor(out, partial.contiguous(), group)
    return out.view(group.size(), *partial.shape)


def sum_(name: Any, x: Tensor) -> Tensor:
    """Sum over the group, in place."""
    dist.all_reduce(x, group=_resolve_process_group(name))
    return x


def local_targets(targets: Tensor, start: int, rows: int) -> Tensor:
    """Global token ids -> rows of this rank's shard, -1 where another rank holds them."""
    local = targets.long() - start
    return torch.where((local >= 0) & (local < rows), local, -1)
