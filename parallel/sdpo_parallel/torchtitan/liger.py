"""Liger's Triton kernels in torchtitan's modules, as overrides. Needs the liger extra.

RMSNorm, SwiGLU and rotary embeddings are swapped; names, parameters and sharding stay, and so do
checkpoints. The kernels see the rank's own part of every tensor: heads or hidden units under
tensor parallelism, positions under sequence and context parallelism; none of them mixes those.

Shapes: B rows, L tokens, N heads (of q or of k), H head dimension, D model, F hidden units.
"""

import os
from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
from spmd_types.runtime import get_partition_spec
from torch import Tensor
from torchtitan.config.override import derive, override
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

from ..errors import SdpoError

try:
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction
except ImportError as error:
    raise SdpoError(
        f"liger=True needs liger-kernel ({error}): pip install 'sdpo[liger]', or set liger=False"
    ) from error


def _typed_like(out: Tensor, like: Tensor) -> Tensor:
    """``out``, for the type checker sharded as ``like`` is."""
    if spmd.is_type_checking():
        spmd.assert_type(out, spmd.get_local_type(like), get_partition_spec(like))  # pyright: ignore
    return out


class LigerRMSNorm(RMSNorm):
    """x / rms(x) * weight over the last dimension, in float32 throughout, as torch's RMSNorm."""

    @dataclass(kw_only=True, slots=True)
    class Config(RMSNorm.Config):
        """No settings of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """The backward writes into its incoming gradient, of which the norm is the only reader."""
        offset, casting = 0.0, "gemma"  # Liger's name for float32 until the end; no 1 + weight
        with spmd.no_typecheck():
            out = LigerRMSNormFunction.apply(x, self.weight, self.eps, offset, casting)
        return _typed_like(out, x)


class LigerFeedForward(FeedForward):
    """w2(silu(w1 x) * w3 x), (B, L, D) -> (B, L, D); only the product in the middle is Liger's."""

    @dataclass(kw_only=True, slots=True)
    class Config(FeedForward.Config):
        """No settings of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """The backward writes into what it saved: one backward per forward."""
        gate_BLF, up_BLF = self.w1(x), self.w3(x)
        with spmd.no_typecheck():
            out_BLF = LigerSiLUMulFunction.apply(gate_BLF, up_BLF)
        return self.w2(_typed_like(out_BLF, gate_BLF))


def _rotate_halves(
    q_BLNH: Tensor, k_BLNH: Tensor, cos_BLH: Tensor, sin_BLH: Tensor
) -> tuple[Tensor, Tensor]:
    """Dimensions i and i + H/2 rotate by angle i; B of cos and sin may be 1.

    The kernel rotates q and k in place, behind autograd's back: they must be copies of the caller's
    own, as selective activation checkpointing keeps projections to compute from them again.
    """
    q_BNLH, k_BNLH = q_BLNH.transpose(1, 2), k_BLNH.transpose(1, 2)
    q_BNLH, k_BNLH = LigerRopeFunction.apply(q_BNLH, k_BNLH, cos_BLH, sin_BLH)
    return q_BNLH.transpose(1, 2), k_BNLH.transpose(1, 2)


class LigerCosSinRoPE(CosSinRoPE):
    """Qwen3's rotary embedding, which pairs dimensions as Liger does."""

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        """No settings of its own."""

    def forward(
        self, query: Tensor, key: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q, k (B, L, N, H), positions (B, L) -> rotated q, k of the same shapes."""
        cache_BLW = self._reshape_cache(query, positions)[:, :, 0]
        with spmd.no_typecheck():
            cos_BLH, sin_BLH = cache_BLW.chunk(2, dim=-1)
            q, k = _rotate_halves(query.clone(), key.clone(), cos_BLH, sin_BLH)
        return _typed_like(q, query), _typed_like(k, key)


class LigerComplexRoPE(ComplexRoPE):
    """Llama's rotary embedding, which in torchtitan pairs dimensions 2i and 2i + 1.

    Heads are reordered to Liger's pairing first (2i -> i, 2i + 1 -> i + H/2) and stay so: both q
    and k are, so their products, all that attention makes of them, are unchanged.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComplexRoPE.Config):
        """No settings of its own."""

    def forward(
        self, query: Tensor, key: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q, k (B, L, N, H), positions (B, L) -> rotated and reordered q, k."""
        cache_BLP = self._reshape_cache(query, positions)[:, :, 0]  # P = H/2, complex
        with spmd.no_typecheck():
            cos_BLH, sin_BLH = (torch.cat([t, t], -1) for t in (cache_BLP.real, cache_BLP.imag))
            q, k = (torch.cat([t[..., 0::2], t[..., 1::2]], -1) for t in (query, key))
            q, k = _rotate_halves(q, k, cos_BLH, sin_BLH)
        return _typed_like(q, query), _typed_like(k, key)


def _swap(target: Any, ours: Any) -> str:
    """Register ``ours`` in place of torchtitan's ``target``; returns the override's name."""

    def swap(config):
        if not torch.accelerator.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise SdpoError(
                "liger=True: Liger's kernels are Triton's and need a GPU; set liger=False"
            )
        return derive(config, ours.Config)

    swap.__name__ = ours.__name__
    override(target=target.Config, exact=True, description=ours.__name__)(swap)
    return f"{__name__}.{swap.__name__}"


OVERRIDES = [
    _swap(RMSNorm, LigerRMSNorm),
    _swap(FeedForward, LigerFeedForward),
    _swap(CosSinRoPE, LigerCosSinRoPE),
    _swap(ComplexRoPE, LigerComplexRoPE),
]
"""For torchtitan's ``OverrideConfig.imports``."""
