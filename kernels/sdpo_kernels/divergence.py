"""Reverse KL, forward KL and JSD per token between a policy and a hindsight stream.

p = softmax(hidden @ weight.T) is the policy, q = softmax(hindsight_hidden @ hindsight_weight.T)
the hindsight distribution. Values are differentiable in ``hidden`` and ``weight``; the hindsight
stream is a constant. Gradients with respect to the policy's logits z:

  reverse KL   p (log p - log q - KL)
  forward KL   p - q = -p expm1(log q - log p) = q expm1(log p - log q)
  JSD          (1 - beta) p (log p - log m - KL(p || m))

Oracle: reference.py in float64.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_pair, check_targets
from .chunked import DEFAULT_CHUNK_BYTES, LinearDivergence, Rule, TokenStats


class Divergence(NamedTuple):
    """``value`` (N,), differentiable, in nats; ``stats``: detached, of both streams."""

    value: Tensor
    stats: TokenStats


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) = sum p (e^d - 1 - d), d = log q - log p, shape (N,).

    Equal to sum p (-d), as both distributions sum to 1, but every term is non-negative: where p
    and q almost agree nothing cancels, and the value cannot be negative.
    """
    p, d = logp.exp(), logq - logp
    # e^d - 1 - d by its series where the difference would lose more digits than the series' end
    small = 0.03 if d.dtype == torch.float64 else 0.3
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    return torch.where(d.abs() < small, p * series, logq.exp() - p - p * d).sum(-1)


def _jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    logm = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))
    return beta * kl(logq, logm) + (1 - beta) * kl(logp, logm)


def _reverse_kl_grad(logp: Tensor, logq: Tensor, value: Tensor) -> Tensor:
    return logp.exp() * (logp - logq - value)


def _forward_kl_grad(logp: Tensor, logq: Tensor, value: Tensor) -> Tensor:
    # p - q loses every digit where the two agree; expm1 keeps them, and of its two forms the one
    # with the non-positive exponent cannot overflow
    d = logq - logp
    return torch.where(d < 0, -logp.exp(), logq.exp()) * torch.expm1(-d.abs())


REVERSE_KL = Rule(kl, _reverse_kl_grad)
FORWARD_KL = Rule(lambda logp, logq: kl(logq, logp), _forward_kl_grad)


def _jsd_rule(beta: float) -> Rule:
    def grad(logp: Tensor, logq: Tensor, value: Tensor) -> Tensor:
        logm = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))
        p, d = logp.exp(), logp - logm
        return (1 - beta) * p * (d - (p * d).sum(-1, keepdim=True))

    return Rule(lambda logp, logq: _jsd(logp, logq, beta), grad)


def linear_reverse_kl(
    hidden: Tensor,
    weight: Tensor,
    hindsight_hidden: Tensor,
    hindsight_weight: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Divergence:
    """KL(policy || hindsight) per token: mode-seeking.

    Args:
        hidden: (N, D) policy hidden states before the head; differentiable.
        weight: (V, D) lm_head; differentiable.
        hindsight_hidden: (N, D') hidden states of the same tokens with the follow-up in the prompt.
        hindsight_weight: (V, D') the teacher's lm_head; None: the policy's own, as a constant.
        targets: (N,) token ids whose log-probabilities ``stats`` shall hold.
        chunk_bytes: logits of one stream that may be alive at once, in bytes.

    Returns:
        ``Divergence(value, stats)``; every tensor (N,), float32 (float64 for float64), in nats.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    return _divergence(
        REVERSE_KL, hidden, weight, hindsight_hidden, hindsight_weight, targets, chunk_bytes
    )


def linear_forward_kl(
    hidden: Tensor,
    weight: Tensor,
    hindsight_hidden: Tensor,
    hindsight_weight: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Divergence:
    """KL(hindsight || policy) per token: mass-covering. Arguments as ``linear_reverse_kl``."""
    return _divergence(
        FORWARD_KL, hidden, weight, hindsight_hidden, hindsight_weight, targets, chunk_bytes
    )


def linear_jsd(
    hidden: Tensor,
    weight: Tensor,
    hindsight_hidden: Tensor,
    hindsight_weight: Tensor | None = None,
    *,
    beta: float = 0.5,
    targets: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Divergence:
    """Generalised Jensen-Shannon divergence per token, with hindsight as GKD's teacher.

    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p. ``beta`` lies strictly
    between 0 and 1, where it vanishes (arXiv:2306.13649, eq. 1); what other systems call beta = 0
    and 1 are ``linear_forward_kl`` and ``linear_reverse_kl``, whose other arguments it shares.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta must lie strictly between 0 and 1, got {beta}: "
            "use linear_forward_kl for beta=0 and linear_reverse_kl for beta=1"
        )
    return _divergence(
        _jsd_rule(beta), hidden, weight, hindsight_hidden, hindsight_weight, targets, chunk_bytes
    )


def _divergence(rule, hidden, weight, hindsight_hidden, hindsight_weight, targets, chunk_bytes):
    shared = weight if hindsight_weight is None else hindsight_weight
    check_pair(hidden, weight, hindsight_hidden, shared)
    if targets is not None:
        check_targets(targets, hidden)
    value, *stats = LinearDivergence.apply(  # pyright: ignore
        hidden, weight, hindsight_hidden.detach(), shared.detach(), targets, rule, chunk_bytes
    )
    return Divergence(value, TokenStats(*stats))
