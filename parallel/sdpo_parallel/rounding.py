"""Float32 weights as bfloat16, without losing what a small learning rate has changed.

To the nearest, an update smaller than half of a weight's last digit vanishes, whatever its sign:
a trained model may be its base again. Stochastic rounding goes up or down with probabilities that
make its mean exact (Gupta et al. 2015, arXiv:1502.02551), so that sums over many weights keep the
update. The random number is a hash of the weight's own bits: the same weight is rounded alike on
every layout and every time, and one that bfloat16 holds stays as it is.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .config import Rounding

_LOW = 0xFFFF
"""The bits of a float32 that a bfloat16 lacks."""
_HASH = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))
"""Shifts and factors of Wellons' lowbias32; the last shift is 16 again."""


def cast(weight: Tensor, dtype: torch.dtype, rounding: Rounding = "nearest") -> Tensor:
    """A weight, whole or a DTensor, in another dtype.

    Args:
        rounding: of float32 to bfloat16; any other cast is to the nearest.
    """
    if (weight.dtype, dtype, rounding) != (torch.float32, torch.bfloat16, "stochastic"):
        return weight.to(dtype)
    if isinstance(weight, DTensor):
        local = cast(weight.to_local(), dtype, rounding)
        place = weight.device_mesh, weight.placements
        return DTensor.from_local(local, *place, shape=weight.shape, stride=weight.stride())
    bits = weight.contiguous().view(torch.int32)
    up_or_down = (bits + (_hashed(bits) & _LOW)) & ~_LOW  # a carry is one step away from zero
    return torch.where(weight.isfinite(), up_or_down.view(torch.float32), weight).to(dtype)


def _hashed(bits: Tensor) -> Tensor:
    for shift, factor in _HASH:
        bits = (bits ^ _shifted(bits, shift)) * factor
    return bits ^ _shifted(bits, 16)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros behind."""
    return (bits >> by) & (2 ** (32 - by) - 1)
