"""The paper's objective in one call: a policy gradient with each token's hindsight advantage."""

from typing import Unpack

import torch
from torch import Tensor

from ._impl.chunked import Inputs
from ._impl.op import call
from ._impl.options import Options
from .divergence import Divergence, TokenStats


def linear_sampled_token(
    hidden: Tensor,
    weight: Tensor,
    hindsight_hidden: Tensor,
    hindsight_weight: Tensor | None = None,
    *,
    targets: Tensor,
    old_logp: Tensor | None = None,
    ppo_clip: float | None = None,
    importance_clip: float | None = None,
    centre: Tensor | None = None,
    counted: Tensor | None = None,
    weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Divergence:
    """-A log p(y) per token, A = sg[log q(y) - log p(y)] (arXiv:2603.12273), or a clipped form.

    With weights known up front it costs four products, like a divergence: the advantage is formed
    inside the chunk, between statistics and gradient. Centring needs every advantage of a sequence
    first, and so a pass of its own: five products.

    Args:
        targets: (N,) the sampled tokens y.
        old_logp: (N,) log-probabilities that y was sampled with; the clips need them.
        ppo_clip: c > 0: -min(r A, clip(r, 1 - c, 1 + c) A), r = p(y) / p_old(y)
            (arXiv:1707.06347, eq. 7).
        importance_clip: c > 0: -sg[min(r, c)] A log p(y) (truncated importance sampling).
        centre: (N,) integer sequence of each token, in [0, N): the mean advantage of its sequence
            is subtracted from each (the paper's online runs).
        counted: (N,) bool: the tokens whose advantages make those means; None: all but masked ones.

    The other arguments and errors are ``linear_reverse_kl``'s.

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
    clip = ppo_clip or -(importance_clip or 0.0)
    x = Inputs(hidden, weight, hindsight_hidden, hindsight_weight, targets=targets)
    x = x._replace(old_logp=old_logp)
    if centre is None:
        out = call("sampled_token", x, weights, options, clip=clip)
        return Divergence(out.value, TokenStats(*out.stats.unbind()), out.loss)
    with torch.no_grad():
        both = call("sampled_token", x._replace(old_logp=None), None, options)
        stats = TokenStats(*both.stats.unbind())
        mask = options.get("mask")
        if mask is not None:
            mask = mask.to(hidden.device, non_blocking=True)
            counted = mask if counted is None else counted & mask
        advantage = centred(stats.logp_hindsight - stats.logp_policy, centre, counted)
    x = x._replace(hindsight=None, hindsight_weight=None, advantage=advantage)
    own: Options = {**options, "hindsight_bias": None}
    out = call("sampled_token", x, weights, own, clip=clip)
    return Divergence(out.value, stats, out.loss)


def centred(advantage_N: Tensor, sequence_N: Tensor, counted_N: Tensor | None) -> Tensor:
    """Advantages less the mean over their sequence's counted tokens; all (N,)."""
    one_N = torch.ones_like(advantage_N) if counted_N is None else counted_N.to(advantage_N.dtype)
    zero_N = torch.zeros_like(advantage_N)
    sum_N = zero_N.index_add(0, sequence_N, torch.where(one_N > 0, advantage_N, 0))
    count_N = zero_N.index_add(0, sequence_N, one_N).clamp(min=1)
    return advantage_N - (sum_N / count_N)[sequence_N]
