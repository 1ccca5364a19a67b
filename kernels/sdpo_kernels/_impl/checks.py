"""Argument checks shared by the public functions: a mistake raises before any work is done."""

import torch
from torch import Tensor

from .options import IGNORE_INDEX, IMPLS, Inputs, Spec
from .tuning import HAS_TRITON


def check(x: Inputs, spec: Spec, mask: Tensor | None, token_weights: Tensor | None) -> None:
    """Check every tensor and setting of a call.

    Raises:
        ValueError: one does not fit; the message names the argument and says what to do.
    """
    student = "hidden" if spec.kind == "logprob" else "student_hidden"
    hidden, weight = x.student_hidden, x.lm_head_weight
    _check_linear(hidden, weight, student, "lm_head_weight")
    n, v = hidden.shape[0], weight.shape[0]
    if v == 0 and not spec.group:
        raise ValueError("lm_head_weight has no rows: the vocabulary is empty")
    if x.teacher_hidden is not None:
        _check_teacher(x, x.teacher_hidden)
    if x.teacher_bias is not None and x.teacher_lm_head_weight is None:
        raise ValueError(
            "teacher_bias needs teacher_lm_head_weight: a shared lm_head shares its bias"
        )
    for name in ("bias", "teacher_bias"):
        _check_vector(name, getattr(x, name), v, "V", hidden)
    for name in ("targets", "old_logp"):
        _check_vector(name, getattr(x, name), n, "N", hidden, integer=name == "targets")
    _check_vector("token_weights", token_weights, n, "N", hidden)
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("token_weights must not require a gradient: they are constants")
    if mask is not None:
        if mask.shape != (n,) or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be (N,) = ({n},) of bool, got {tuple(mask.shape)} of {mask.dtype}"
            )
        if mask.device.type != "cpu" and mask.device != hidden.device:
            raise ValueError(
                f"mask is on {mask.device}: it must be on the CPU or on {hidden.device}"
            )
    _check_spec(x, spec)


def check_targets(x: Inputs, vocabulary: int, counted: Tensor | None = None) -> None:
    """Check the token ids of all rows, or those that count, on a CPU; on a GPU to look at them is
    to wait.

    Raises:
        ValueError: one is neither in the vocabulary nor -100.
    """
    if x.targets is None or x.targets.device.type != "cpu":
        return
    outside = ((x.targets < 0) | (x.targets >= vocabulary)) & (x.targets != IGNORE_INDEX)
    if counted is not None:
        outside &= counted
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"targets[{row}] is {int(x.targets[row])}: targets must be token ids from 0 to "
            f"{vocabulary - 1}, or {IGNORE_INDEX} for rows to ignore"
        )


def _check_teacher(x: Inputs, teacher_hidden: Tensor) -> None:
    weight, name = x.teacher_lm_head_weight, "teacher_lm_head_weight"
    if weight is None:
        weight, name = x.lm_head_weight, "lm_head_weight"
    _check_linear(teacher_hidden, weight, "teacher_hidden", name)
    if teacher_hidden.shape[0] != x.student_hidden.shape[0]:
        raise ValueError(
            f"student_hidden has {x.student_hidden.shape[0]} tokens and teacher_hidden "
            f"{teacher_hidden.shape[0]}: both must hold the same tokens"
        )
    if weight.shape[0] != x.lm_head_weight.shape[0]:
        raise ValueError(
            f"lm_head_weight has V={x.lm_head_weight.shape[0]} and teacher_lm_head_weight "
            f"V={weight.shape[0]}: both must be over one vocabulary"
        )
    a, b = x.student_hidden, teacher_hidden
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"student_hidden is {a.dtype} on {a.device} and teacher_hidden {b.dtype} on "
            f"{b.device}: they must agree"
        )


def _check_linear(hidden: Tensor, weight: Tensor, h: str, w: str) -> None:
    """hidden (N, D) and weight (V, D), one dtype, one device."""
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
        raise ValueError(f"{name} is on {x.device}, the hidden states on {like.device}: move it")


def _check_spec(x: Inputs, spec: Spec) -> None:
    if not spec.temperature > 0:
        raise ValueError(f"temperature must be positive, got {spec.temperature}")
    if spec.chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, got {spec.chunk_bytes}")
    if spec.grad_bytes < 0:
        raise ValueError(f"grad_bytes must not be negative, got {spec.grad_bytes}")
    if spec.impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {spec.impl!r}")
    if spec.impl in ("triton", "fused"):
        if not HAS_TRITON:
            raise ValueError(f'impl="{spec.impl}" needs Triton, which is not installed')
        if x.student_hidden.dtype == torch.float64:
            raise ValueError(f'impl="{spec.impl}" computes in float32: use "torch" for float64')
    if spec.group:
        if spec.impl == "reference":
            raise ValueError('impl="reference" needs the whole vocabulary: no shard')
        end = spec.start + x.lm_head_weight.shape[0]
        if spec.start < 0 or end > spec.total:
            raise ValueError(
                f"shard: rows {spec.start} to {end} do not lie in a vocabulary of {spec.total}"
            )
    if spec.k > spec.total:
        raise ValueError(f"k must lie between 1 and V={spec.total}, got {spec.k}")
