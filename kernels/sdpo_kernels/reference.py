"""Definitions: per-token divergences between two softmax distributions, in plain torch.

Shapes: N tokens, V vocabulary, D hidden size, K tokens of a top-K support.
  z_NV = transform(h_ND @ w_VD.T + b_V)  student logits,  p = softmax(z)
  u_NV = transform(g_ND @ v_VD.T + c_V)  teacher logits,  q = softmax(u)
  transform(x) = softcap tanh(x / softcap) / temperature

Every function here materialises (N, V), runs in any floating dtype and differentiates by plain
autograd. In float64 it is the oracle of the tests; training never runs it.
"""

import math

import torch
from torch import Tensor


def logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """z, shape (N, V): softcap before temperature, like Gemma and its samplers."""
    x = hidden_ND @ weight_VD.T
    if bias_V is not None:
        x = x + bias_V
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def log_softmax(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None, **k) -> Tensor:
    """log p, shape (N, V). Arguments as for ``logits``."""
    return torch.log_softmax(logits(hidden_ND, weight_VD, bias_V, **k), dim=-1)


def logprob(logp_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log p(y), shape (N,)."""
    return logp_NV.gather(-1, targets_N[:, None])[:, 0]


def entropy(logp_NV: Tensor) -> Tensor:
    """-sum p log p, shape (N,), in nats."""
    return -_expectation(logp_NV, logp_NV)


def reverse_kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), shape (N,), in nats."""
    return _expectation(logp_NV, logp_NV - logq_NV)


def forward_kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p), shape (N,), in nats."""
    return _expectation(logq_NV, logq_NV - logp_NV)


def jsd(logp_NV: Tensor, logq_NV: Tensor, beta: float) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, shape (N,), in nats.

    0 < beta < 1. The generalised JSD of GKD (arXiv:2306.13649, eq. 1) with the teacher as q.
    """
    logm_NV = torch.logaddexp(logq_NV + math.log(beta), logp_NV + math.log1p(-beta))
    return beta * forward_kl(logm_NV, logq_NV) + (1 - beta) * forward_kl(logm_NV, logp_NV)


def topk_buckets(logp_NV: Tensor, indices_NK: Tensor) -> Tensor:
    """(N, K + 1): log-probabilities of the K tokens ``indices`` and of all others together."""
    at_k = logp_NV.gather(-1, indices_NK)
    others = logp_NV.scatter(-1, indices_NK, -math.inf)
    return torch.cat([at_k, others.logsumexp(-1, keepdim=True)], dim=-1)


def policy_gradient(
    logp_N: Tensor,
    advantage_N: Tensor,
    old_logp_N: Tensor | None = None,
    *,
    ppo_clip: float | None = None,
    importance_clip: float | None = None,
) -> Tensor:
    """(N,): -A log p, or its clipped forms. Differentiable in ``logp_N`` only.

    PPO clip: -min(r A, clip(r, 1 - c, 1 + c) A), r = p / p_old (arXiv:1707.06347, eq. 7).
    Importance clip: -sg[min(r, c)] A log p (truncated importance sampling).
    """
    advantage_N = advantage_N.detach()
    if ppo_clip is None and importance_clip is None:
        return -advantage_N * logp_N
    assert old_logp_N is not None
    if ppo_clip is not None:
        ratio_N = (logp_N - old_logp_N).exp()
        clipped_N = ratio_N.clamp(1 - ppo_clip, 1 + ppo_clip)
        return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    ratio_N = (logp_N.detach() - old_logp_N).exp().clamp(max=importance_clip)
    return -ratio_N * advantage_N * logp_N


def _expectation(logp_NV: Tensor, x_NV: Tensor) -> Tensor:
    """sum p x; p = 0 contributes nothing, whatever x."""
    p_NV = logp_NV.exp()
    return (p_NV * x_NV.masked_fill(p_NV == 0, 0)).sum(-1)
