"""A language model as the two passes read it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sdpo_kernels import VocabShard

from .rows import Kept, Rows


class HeadOptions(TypedDict):
    """What every kernel that reads an lm_head is told of it."""

    shard: VocabShard | None
    softcap: float | None
    temperature: float


class LMHead(NamedTuple):
    """``weight``: (V, D), or with a ``shard`` this rank's rows of it. Its logits are
    softcap tanh(hidden @ weight.T / softcap) / temperature, or without a softcap the products
    alone, over the temperature."""

    weight: Tensor
    shard: VocabShard | None = None
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def options(self) -> HeadOptions:
        """Everything but the weight, as keyword arguments of the kernels."""
        return HeadOptions(shard=self.shard, softcap=self.softcap, temperature=self.temperature)


class CausalModel(Protocol):
    """A language model as the two passes read it."""

    reads_tries: bool = False
    """It can read rows whose sequences share slots, and keep keys and values for a later pass."""

    def hidden_states(
        self, rows: Rows, *, keep: Kept | None = None, behind: Kept | None = None
    ) -> Tensor:
        """(N, D): what the lm_head reads at the rows' ``index_N``.

        Args:
            keep: filled with the keys and values of all slots.
            behind: kept by an earlier pass of the same weights; these rows see those keys, too.
        """
        ...

    def lm_head(self) -> LMHead:
        """The weight, (V, D) or this rank's rows of it, whose gradient reaches the parameter, and
        what becomes of its products."""
        ...

    def own_responses(self, lengths: Sequence[int]) -> list[int] | None:
        """Indices of the responses whose loss this rank computes, where several ranks read the
        same micro-batch with responses of these lengths; None: all of them."""
        return None


class ModuleModel(CausalModel, Protocol):
    """A model of the two passes that is one torch module."""

    @property
    def module(self) -> torch.nn.Module:
        """Holds all of its parameters."""
        ...


def local(p: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p
