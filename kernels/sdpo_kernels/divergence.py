"""Reverse KL, forward KL, JSD and top-K divergences per token between policy and hindsight.

p = softmax(hidden @ weight.T) is the policy, q = softmax(hindsight_hidden @ hindsight_weight.T)
the hindsight distribution. Values are differentiable in ``hidden``, ``weight`` and ``bias``; the
hindsight stream is a constant. Gradients with respect to the policy's logits z:

  reverse KL   p (log p - log q - KL)
  forward KL   p - q = -p expm1(log q - log p) = q expm1(log p - log q)
  JSD          (1 - beta) p (log p - log m - KL(p || m))

Oracle: reference.py in float64.
"""

from typing import Literal, NamedTuple, Unpack

from torch import Tensor

from ._impl.chunked import Inputs
from ._impl.op import Call, call
from ._impl.options import Options


class TokenStats(NamedTuple):
    """Detached statistics of both distributions, each (N,), in nats.

    ``logp_*`` are the log-probabilities of the targets; they are NaN where none were given.
    """

    logp_policy: Tensor
    logp_hindsight: Tensor
    entropy_policy: Tensor
    entropy_hindsight: Tensor
    lse_policy: Tensor
    lse_hindsight: Tensor


class Divergence(NamedTuple):
    """``value`` (N,), in nats, differentiable unless weights were given; then ``loss``, the scalar
    sum of weights * value, is. ``stats`` are detached."""

    value: Tensor
    stats: TokenStats
    loss: Tensor | None


def linear_reverse_kl(
    hidden: Tensor,
    weight: Tensor,
    hindsight_hidden: Tensor,
    hindsight_weight: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Divergence:
    """KL(policy || hindsight) per token: mode-seeking.

    Args:
        hidden: (N, D) policy hidden states before the head: float32, bfloat16, float16 or float64;
            differentiable.
        weight: (V, D) lm_head, of the same dtype; differentiable.
        hindsight_hidden: (N, D') hidden states of the same tokens with the follow-up in the prompt.
        hindsight_weight: (V, D') the teacher's lm_head; None: the policy's own, as a constant, in
            one product with the policy's.
        targets: (N,) token ids whose log-probabilities ``stats`` shall hold.
        weights: (N,) constants. Known up front, they make ``loss`` = sum of weights * values cost
            four products instead of six: its gradient is formed while the logits are there.
        options: see ``Options``.

    Returns:
        ``Divergence``; every tensor float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or setting does not fit; the message names the argument.
    """
    x = Inputs(hidden, weight, hindsight_hidden, hindsight_weight, targets=targets)
    return _divergence(call("reverse_kl", x, weights, options))


def linear_forward_kl(
    hidden: Tensor,
    weight: Tensor,
    hindsight_hidden: Tensor,
    hindsight_weight: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Divergence:
    """KL(hindsight || policy) per token: mass-covering. Arguments as ``linear_reverse_kl``."""
    x = Inputs(hidden, weight, hindsight_hidden, hindsight_weight, targets=targets)
    return _divergence(call("forward_kl", x, weights, options))


def linear_jsd(
    hidden: Tensor,
    weight: Tensor,
    hindsight_hidden: Tensor,
    hindsight_weight: Tensor | None = None,
    *,
    beta: float = 0.5,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Divergence:
    """Generalised Jensen-Shannon divergence per token, with hindsight as GKD's teacher.

    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p. ``beta`` lies strictly
    between 0 and 1, where it vanishes (arXiv:2306.13649, eq. 1); what other systems call beta = 0
    and 1 are ``linear_forward_kl`` and ``linear_reverse_kl``, whose other arguments it shares.
    """
    _check_beta(beta)
    x = Inputs(hidden, weight, hindsight_hidden, hindsight_weight, targets=targets)
    return _divergence(call("jsd", x, weights, options, beta=beta))


def linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    hindsight_hidden: Tensor,
    hindsight_weight: Tensor | None = None,
    *,
    k: int,
    support: Literal["policy", "hindsight"] = "policy",
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl",
    beta: float = 0.5,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Divergence:
    """A divergence per token over K + 1 buckets: the K likeliest tokens, and all others as one.

    A lower bound of the divergence over the vocabulary (data processing inequality), equal to it at
    K = V; the others' bucket keeps it a divergence, which a renormalised top K is not.

    Args:
        k: 1 to V. Ties at the K-th place are broken as ``torch.topk`` does.
        support: whose K likeliest tokens; the choice is a constant of the gradient.
        divergence: over the buckets, with ``beta`` for the JSD.

    The other arguments, results and errors are ``linear_reverse_kl``'s.
    """
    if support not in ("policy", "hindsight"):
        raise ValueError(f'support must be "policy" or "hindsight", got {support!r}')
    if divergence not in ("reverse_kl", "forward_kl", "jsd"):
        raise ValueError(f"divergence must be reverse_kl, forward_kl or jsd, got {divergence!r}")
    _check_beta(beta)
    x = Inputs(hidden, weight, hindsight_hidden, hindsight_weight, targets=targets)
    return _divergence(
        call(
            "topk",
            x,
            weights,
            options,
            k=k,
            support=support,
            buckets=divergence,
            beta=beta,
        )
    )


def _divergence(out: Call) -> Divergence:
    return Divergence(out.value, TokenStats(*out.stats.unbind()), out.loss)


def _check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise ValueError(
            f"beta must lie strictly between 0 and 1, got {beta}: "
            "use linear_forward_kl for beta=0 and linear_reverse_kl for beta=1"
        )
