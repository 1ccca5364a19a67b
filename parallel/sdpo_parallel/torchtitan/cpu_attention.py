"""Document-masked attention that trains on a CPU, as a torchtitan override.

Flex attention has no backward on CPU, varlen attention no CPU kernel, and torchtitan compiles
its mask builder; a dense mask, built once per pass, with SDPA computes the same.
"""

from dataclasses import dataclass

import spmd_types as spmd
import torch.nn.functional as F
from spmd_types.runtime import get_partition_spec
from torch import Tensor
from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import FlexAttention


def document_mask(positions_BT: Tensor) -> Tensor:
    """(B, 1, T, T), True where a query may see a key: the same document, and not later."""
    document_BT = (positions_BT == 0).cumsum(-1)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril()[:, None]


class DenseMaskAttention(FlexAttention):
    """FlexAttention's contract, with a dense mask: q, k, v (B, L, N heads, H) -> (B, L, N, H)."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """No settings of its own."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Tensor,
        scale: float | None = None,
        enable_gqa: bool = False,
        **unused,
    ) -> Tensor:
        """The argument names are torchtitan's: ``parallelize`` binds them."""
        assert not any(unused.values()), f"not supported on CPU: {unused}"
        q, k, v = (t.transpose(1, 2) for t in (q_BLNH, k_BLNH, v_BLNH))
        with spmd.no_typecheck():
            out: Tensor = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa
            )
        if spmd.is_type_checking():
            spmd.assert_type(out, spmd.get_local_type(q), get_partition_spec(q))  # pyright: ignore
        return out.transpose(1, 2)


@override(target=FlexAttention.Config, description="dense-mask SDPA for CPU")
def flex_to_dense(config: FlexAttention.Config) -> DenseMaskAttention.Config:
    """FlexAttention.Config -> DenseMaskAttention.Config."""
    return derive(config, DenseMaskAttention.Config)


FLEX_TO_DENSE = f"{__name__}.{flex_to_dense.__name__}"
"""For torchtitan's ``OverrideConfig.imports``."""
