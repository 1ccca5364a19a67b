"""SDPO's objective in one call: a policy gradient with each token's hindsight advantage."""

from typing import Unpack

import torch
from torch import Tensor

from . import reference
from ._impl.chunked import policy_gradient
from ._impl.op import call, to_device, weighted_sum
from ._impl.options import IGNORE_INDEX, Inputs, Options
from .divergence import Divergence, TokenStats


def linear_sampled_token(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor | None = None,
    *,
    targets: Tensor,
    old_logp: Tensor | None = None,
    ppo_clip: float | None = None,
    importance_clip: float | None = None,
    centre: Tensor | None = None,
    counted: Tensor | None = None,
    token_weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Divergence:
    """-A log p(y) per token, A = sg[log q(y) - log p(y)] (arXiv:2603.12273), or a clipped form.

    It costs four matmuls, like a divergence. Where more tokens than ``grad_bytes`` allows are to be
    differentiated, four if ``token_weights`` are given and nothing is centred, else five: the
    backward forms the student's logits again.

    Args:
        targets: (N,) the sampled tokens y, or -100 for rows to ignore, as in ``linear_logprob``.
        old_logp: (N,) log-probabilities that y was sampled with; the clips need them.
        ppo_clip: c > 0: -min(r A, clip(r, 1 - c, 1 + c) A), r = p(y) / p_old(y)
            (arXiv:1707.06347, eq. 7).
        importance_clip: c > 0: -sg[min(r, c)] A log p(y) (truncated importance sampling).
        centre: (N,) integer index of each token's sequence, in [0, N): the mean advantage of its
            sequence is subtracted from each (the paper's online runs).
        counted: (N,) bool: the tokens whose advantages make those means. None: all that ``mask``
            keeps and whose target is not -100.

    The other arguments and errors are those of ``linear_reverse_kl``.

    Returns:
        ``Divergence``, whose ``value`` is the loss per token.
    """
    for name, value in (("ppo_clip", ppo_clip), ("importance_clip", importance_clip)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
        if value is not None and old_logp is None:
            raise ValueError(f"{name} needs old_logp, the log-probabilities at sampling")
    if ppo_clip is not None and importance_clip is not None:
        raise ValueError("ppo_clip and importance_clip both correct for the sampler: set one")
    for name, value in (("centre", centre), ("counted", counted)):
        if value is not None and value.shape != targets.shape:
            raise ValueError(f"{name} must be (N,) like targets, got shape {tuple(value.shape)}")
    clips = [float(ppo_clip or 0.0), float(importance_clip or 0.0)]
    x = Inputs(student_hidden, lm_head_weight, teacher_hidden, teacher_lm_head_weight)
    x = x._replace(targets=targets, old_logp=old_logp)

    def finish(logp: Tensor, stats: TokenStats) -> tuple[Tensor, Tensor | None]:
        rows, weights = targets != IGNORE_INDEX, token_weights
        if (mask := options.get("mask")) is not None:
            rows = rows & to_device(mask, rows.device)
        advantage = stats.logp_teacher - stats.logp_student
        if centre is not None:
            advantage = centred(advantage, centre, rows if counted is None else counted & rows)
        old = None if old_logp is None else old_logp.to(logp.dtype)
        if options.get("impl") == "reference":
            names = dict(ppo_clip=ppo_clip, importance_clip=importance_clip)
            value = reference.policy_gradient(logp, advantage, old, **names)
        else:
            value = _PolicyGradient.apply(logp, advantage, old, *clips)
        value = torch.where(rows, value, 0)
        if weights is not None:
            weights = torch.where(rows, weights.to(value.dtype), 0)
        return value, weighted_sum(value, weights)

    kind = "sampled_token" if centre is None else "logprob"
    return Divergence(*call(kind, x, token_weights, options, finish, parameters=clips))


class _PolicyGradient(torch.autograd.Function):
    """Values of ``policy_gradient`` as a function of log p(y); an upstream gradient of 0 gives 0,
    however steep they are."""

    @staticmethod
    def forward(ctx, logp, advantage, old_logp, ppo_clip, importance_clip):  # pyright: ignore
        value, slope = policy_gradient(logp, advantage, old_logp, ppo_clip, importance_clip)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx, upstream):  # pyright: ignore
        (slope,) = ctx.saved_tensors
        return torch.where(upstream == 0, 0, upstream * slope), None, None, None, None


def centred(advantage_N: Tensor, sequence_N: Tensor, counted_N: Tensor) -> Tensor:
    """Advantages minus the mean over the counted tokens of their sequence; all (N,)."""
    one_N = counted_N.to(advantage_N.dtype)
    zero_N = torch.zeros_like(advantage_N)
    sum_N = zero_N.index_add(0, sequence_N, torch.where(one_N > 0, advantage_N, 0))
    count_N = zero_N.index_add(0, sequence_N, one_N).clamp(min=1)
    return advantage_N - (sum_N / count_N)[sequence_N]
