"""The attention of every layer, as torchtitan overrides: it can keep its keys and values, and see
those that an earlier pass kept.

    KeepingFlexAttention   torchtitan's, with block masks
    CpuAttention           SDPA, branch by branch or with a dense mask: flex attention has no
                           backward on a CPU, varlen attention no CPU kernel

Shapes: B rows, L slots, N heads, H head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import spmd_types as spmd
import torch
import torch.nn.functional as F
from spmd_types.runtime import get_partition_spec
from torch import Tensor
from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import FlexAttention

from ..branches import Plan, attend


class Keeping(FlexAttention):
    """Base: what is kept lies in buffers, which compiled blocks can write to as well.

    Attributes:
        store: keys and values (B, L, N, H) of the pass that keeps them; None: nothing is kept.
        role: whether this pass writes them, or has them before its own.
    """

    store: tuple[Tensor, Tensor] | None = None
    role: Literal["write", "read"] = "write"

    def kept(self, k_BLNH: Tensor, v_BLNH: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that this pass sees."""
        if self.store is None:
            return k_BLNH, v_BLNH
        keys, values = self.store
        if self.role == "read":
            return torch.cat([keys, k_BLNH], 1), torch.cat([values, v_BLNH], 1)
        with torch.no_grad():
            keys.copy_(k_BLNH)
            values.copy_(v_BLNH)
        return k_BLNH, v_BLNH


@contextmanager
def using(
    layers: list[Keeping],
    buffers: list[tuple[Tensor, Tensor]],
    role: Literal["write", "read"],
) -> Iterator[None]:
    """A context in which each layer writes or reads its buffers. Blocks that the backward computes
    again do so outside of it."""
    for layer, pair in zip(layers, buffers, strict=True):
        layer.store, layer.role = pair, role
    try:
        yield
    finally:
        for layer in layers:
            layer.store = None


class KeepingFlexAttention(Keeping):
    """Flex attention: q, k, v (B, L, N, H) -> (B, L, N, H)."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """No settings of its own."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, **options
    ) -> Tensor:
        """The argument names are torchtitan's: ``parallelize`` binds them."""
        with spmd.no_typecheck():
            k_BLNH, v_BLNH = self.kept(k_BLNH, v_BLNH)
        return super().forward(q_BLNH, k_BLNH, v_BLNH, **options)


class CpuAttention(Keeping):
    """FlexAttention's contract by SDPA: q, k, v (B, L, N, H) -> (B, L, N, H)."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """No settings of its own."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Tensor | list[Plan],
        scale: float | None = None,
        enable_gqa: bool = False,
        **unused,
    ) -> Tensor:
        """The argument names are torchtitan's: ``parallelize`` binds them.

        Args:
            attention_masks: a plan of branches for each row, or (B, 1, L, keys), True where a
                query sees a key.
        """
        assert not any(unused.values()), f"not supported on CPU: {unused}"
        with spmd.no_typecheck():
            k_BLNH, v_BLNH = self.kept(k_BLNH, v_BLNH)
            q, k, v = (t.transpose(1, 2) for t in (q_BLNH, k_BLNH, v_BLNH))
            if isinstance(attention_masks, list):
                out = attend(q, k, v, attention_masks, scale)
            else:
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa
                )
            out = out.transpose(1, 2)
        if spmd.is_type_checking():
            local = spmd.get_local_type(q_BLNH)
            spmd.assert_type(out, local, get_partition_spec(q_BLNH))  # pyright: ignore
        return out


@override(target=FlexAttention.Config, description="flex attention that keeps keys and values")
def flex_that_keeps(config: FlexAttention.Config) -> KeepingFlexAttention.Config:
    """FlexAttention.Config -> KeepingFlexAttention.Config."""
    return derive(config, KeepingFlexAttention.Config)


@override(target=FlexAttention.Config, description="SDPA for a CPU")
def flex_to_cpu(config: FlexAttention.Config) -> CpuAttention.Config:
    """FlexAttention.Config -> CpuAttention.Config."""
    return derive(config, CpuAttention.Config)


FLEX_THAT_KEEPS = f"{__name__}.{flex_that_keeps.__name__}"
"""For torchtitan's ``OverrideConfig.imports``."""
FLEX_TO_CPU = f"{__name__}.{flex_to_cpu.__name__}"
"""The same, on a CPU."""
