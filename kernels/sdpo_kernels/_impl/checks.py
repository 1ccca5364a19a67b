"""Argument checks shared by the public functions: a mistake raises before any work is done."""

import torch
from torch import Tensor

from .chunked import Inputs
from .options import PATHS, Spec
from .tuning import HAS_TRITON


def check(x: Inputs, spec: Spec, weights: Tensor | None) -> None:
    """Every tensor and setting of a call.

    Raises:
        ValueError: one does not fit; the message names the argument and says what to do.
    """
    sharded = bool(spec.group)
    _check_linear(x.hidden, x.weight)
    n, v = x.hidden.shape[0], x.weight.shape[0]
    if v == 0 and not sharded:
        raise ValueError("weight has no rows: the vocabulary is empty")
    if x.hindsight is not None:
        other = x.weight if x.hindsight_weight is None else x.hindsight_weight
        _check_linear(x.hindsight, other, "hindsight_")
        if x.hindsight.shape[0] != n:
            raise ValueError(
                f"hidden has {n} tokens and hindsight_hidden {x.hindsight.shape[0]}: "
                "both must hold the same response tokens"
            )
        if other.shape[0] != v:
            raise ValueError(
                f"weight has V={v} and hindsight_weight V={other.shape[0]}: "
                "both must be over one vocabulary"
            )
        if x.hindsight.dtype != x.hidden.dtype or x.hindsight.device != x.hidden.device:
            raise ValueError(
                f"hidden is {x.hidden.dtype} on {x.hidden.device} and hindsight_hidden "
                f"{x.hindsight.dtype} on {x.hindsight.device}: they must agree"
            )
    if x.hindsight_bias is not None and x.hindsight_weight is None:
        raise ValueError("hindsight_bias without hindsight_weight: a shared head shares its bias")
    for name in ("bias", "hindsight_bias"):
        _check_vector(name, getattr(x, name), v, "V", x.hidden)
    for name in ("targets", "old_logp", "advantage"):
        _check_vector(name, getattr(x, name), n, "N", x.hidden, integer=name == "targets")
    _check_vector("weights", weights, n, "N", x.hidden)
    if weights is not None and weights.requires_grad:
        raise ValueError("weights must not require a gradient: they are constants of the loss")
    if x.mask is not None:
        if x.mask.shape != (n,) or x.mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be (N,) = ({n},) of bool, got {tuple(x.mask.shape)} of {x.mask.dtype}"
            )
        if x.mask.device.type != "cpu" and x.mask.device != x.hidden.device:
            raise ValueError(f"mask is on {x.mask.device}: it must be on the CPU or with hidden")
    _check_spec(x, spec)


def _check_linear(hidden: Tensor, weight: Tensor, prefix: str = "") -> None:
    """hidden (N, D) and weight (V, D), one dtype, one device."""
    h, w = f"{prefix}hidden", f"{prefix}weight"
    if hidden.ndim != 2:
        raise ValueError(f"{h} must be (N, D), got shape {tuple(hidden.shape)}: flatten it first")
    if weight.ndim != 2:
        raise ValueError(f"{w} must be (V, D), got shape {tuple(weight.shape)}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{h} has D={hidden.shape[1]} and {w} has D={weight.shape[1]}: they must agree"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(
            f"{h} is {hidden.dtype} and {w} is {weight.dtype}: both must be one floating dtype"
        )
    if hidden.device != weight.device:
        raise ValueError(f"{h} is on {hidden.device} and {w} on {weight.device}: move one of them")


def _check_vector(
    name: str, x: Tensor | None, size: int, letter: str, like: Tensor, integer: bool = False
) -> None:
    if x is None:
        return
    if x.shape != (size,):
        raise ValueError(f"{name} must be ({letter},) = ({size},), got shape {tuple(x.shape)}")
    if integer and (x.is_floating_point() or x.is_complex() or x.dtype.itemsize == 1):
        raise ValueError(f"{name} must be token ids of an integer dtype, got {x.dtype}")
    if not integer and not x.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, hidden on {like.device}: move one of them")


def _check_spec(x: Inputs, spec: Spec) -> None:
    if not spec.temperature > 0:
        raise ValueError(f"temperature must be positive, got {spec.temperature}")
    if spec.chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, got {spec.chunk_bytes}")
    if spec.softcap < 0:
        raise ValueError("softcap must be positive; None for none")
    if spec.path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {spec.path!r}")
    if spec.path in ("triton", "fused"):
        if not HAS_TRITON:
            raise ValueError(f'path="{spec.path}" needs Triton, which is not installed: "torch"')
        if x.hidden.dtype.itemsize == 8:
            raise ValueError(f'path="{spec.path}" computes in float32: "torch" for float64')
    if spec.group:
        if spec.path == "reference":
            raise ValueError('path="reference" needs the whole vocabulary: no shard')
        end = spec.start + x.weight.shape[0]
        if spec.start < 0 or end > spec.total:
            raise ValueError(
                f"shard: rows {spec.start} to {end} do not lie in a vocabulary of {spec.total}"
            )
    total = spec.total if spec.group else x.weight.shape[0]
    if spec.kind == "topk" and not 1 <= spec.k <= total:
        raise ValueError(f"k must lie between 1 and V={total}, got {spec.k}")
