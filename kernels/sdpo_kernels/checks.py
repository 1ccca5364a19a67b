"""Argument checks shared by the public functions: a mistake raises before any work is done."""

from torch import Tensor


def check_linear(hidden: Tensor, weight: Tensor, prefix: str = "") -> None:
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


def check_targets(targets: Tensor, hidden: Tensor) -> None:
    """targets (N,) of an integer dtype, on the hidden states' device."""
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be (N,) = ({hidden.shape[0]},), got shape {tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets must be token ids of an integer dtype, got {targets.dtype}")
    if targets.device != hidden.device:
        raise ValueError(f"targets are on {targets.device}, hidden on {hidden.device}: move them")


def check_pair(hidden: Tensor, weight: Tensor, hindsight: Tensor, hindsight_weight: Tensor) -> None:
    """Both streams are sound and speak of the same tokens and the same vocabulary."""
    check_linear(hidden, weight)
    check_linear(hindsight, hindsight_weight, "hindsight_")
    if hindsight.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"hidden has {hidden.shape[0]} tokens and hindsight_hidden {hindsight.shape[0]}: "
            "both must hold the same response tokens"
        )
    if hindsight_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"weight has V={weight.shape[0]} and hindsight_weight V={hindsight_weight.shape[0]}: "
            "both must be over one vocabulary"
        )
