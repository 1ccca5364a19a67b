"""Reverse KL, forward KL and JSD per token between a student and a teacher.

p = softmax(student_hidden @ lm_head_weight.T) is the student, and
q = softmax(teacher_hidden @ teacher_lm_head_weight.T) the teacher. Values are differentiable in
``student_hidden``, ``lm_head_weight`` and ``bias``; the teacher is a constant. Gradients with
respect to the student's logits z:

  reverse KL   p (log p - log q - KL)
  forward KL   p - q = -p expm1(log q - log p) = q expm1(log p - log q)
  JSD          (1 - beta) p (log p - log m - KL(p || m))

Oracle: reference.py in float64.
"""

from typing import NamedTuple, Unpack

from torch import Tensor

from ._impl.op import call
from ._impl.options import Inputs, Options
from ._impl.partials import TokenStats


class Divergence(NamedTuple):
    """Per-token values, their statistics, and the loss."""

    value: Tensor
    """(N,), in nats; differentiable if no token weights were given."""
    stats: TokenStats
    """Detached log-probabilities of the targets, entropies and log-sum-exps."""
    loss: Tensor | None
    """The scalar sum of token_weights * value, differentiable; None without token weights."""


def linear_reverse_kl(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Divergence:
    """KL(student || teacher) per token: mode-seeking.

    Args:
        student_hidden: (N, D) hidden states before the lm_head: float32, bfloat16, float16 or
            float64; differentiable.
        lm_head_weight: (V, D), of the same dtype; differentiable.
        teacher_hidden: (N, D') the teacher's hidden states of the same tokens.
        teacher_lm_head_weight: (V, D'). None: the student's own, as a constant, in one matmul with
            the student's.
        targets: (N,) token ids whose log-probabilities ``stats`` will hold; rows whose target is
            -100 are as masked, as in ``linear_logprob``.
        token_weights: (N,) constants, of ``loss`` = sum of token_weights * value. Where more tokens
            than ``grad_bytes`` allows are to be differentiated, it costs four matmuls if they are
            given, as gradients are formed while the logits exist, and six if not.
        options: see ``Options``.

    Returns:
        ``Divergence``; every tensor float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or setting does not fit; the message names the argument.
    """
    x = Inputs(student_hidden, lm_head_weight, teacher_hidden, teacher_lm_head_weight)
    return Divergence(*call("reverse_kl", x._replace(targets=targets), token_weights, options))


def linear_forward_kl(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Divergence:
    """KL(teacher || student) per token: mass-covering. Arguments as for ``linear_reverse_kl``."""
    x = Inputs(student_hidden, lm_head_weight, teacher_hidden, teacher_lm_head_weight)
    return Divergence(*call("forward_kl", x._replace(targets=targets), token_weights, options))


def linear_jsd(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor | None = None,
    *,
    beta: float = 0.5,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Divergence:
    """Generalised Jensen-Shannon divergence per token, as in GKD.

    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p. ``beta`` lies strictly
    between 0 and 1, where it vanishes (arXiv:2306.13649, eq. 1); what other systems call beta = 0
    and 1 are ``linear_forward_kl`` and ``linear_reverse_kl``. Other arguments as for
    ``linear_reverse_kl``.
    """
    check_beta(beta)
    x = Inputs(student_hidden, lm_head_weight, teacher_hidden, teacher_lm_head_weight)
    x = x._replace(targets=targets)
    return Divergence(*call("jsd", x, token_weights, options, parameters=[float(beta)]))


def check_beta(beta: float) -> None:
    """Raise ValueError unless 0 < beta < 1."""
    if not 0 < beta < 1:
        raise ValueError(
            f"beta must lie strictly between 0 and 1, got {beta}: "
            "use linear_forward_kl for beta=0 and linear_reverse_kl for beta=1"
        )
