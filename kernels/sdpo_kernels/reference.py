"""Definitions: per-token divergences between two softmax distributions, in plain torch.

Shapes: N tokens, V vocabulary, D hidden size.
  z_NV = h_ND @ w_VD.T   policy logits,     p = softmax(z)
  u_NV = g_ND @ v_VD.T   hindsight logits,  q = softmax(u)

Every function here materialises (N, V), runs in any floating dtype and differentiates by plain
autograd. In float64 it is the oracle of the tests; it is never on the training path.
"""

import math

import torch
from torch import Tensor


def log_softmax(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """log p, shape (N, V)."""
    return torch.log_softmax(hidden_ND @ weight_VD.T, dim=-1)


def logprob(logp_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log p(y), shape (N,)."""
    return logp_NV.gather(-1, targets_N[:, None])[:, 0]


def entropy(logp_NV: Tensor) -> Tensor:
    """-sum p log p, shape (N,), in nats."""
    return -(logp_NV.exp() * logp_NV).sum(-1)


def reverse_kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), shape (N,), in nats."""
    return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)


def forward_kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p), shape (N,), in nats."""
    return (logq_NV.exp() * (logq_NV - logp_NV)).sum(-1)


def jsd(logp_NV: Tensor, logq_NV: Tensor, beta: float) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, shape (N,), in nats.

    0 < beta < 1. The generalised JSD of GKD (arXiv:2306.13649, eq. 1) with the teacher as q.
    """
    logm_NV = torch.logaddexp(logq_NV + math.log(beta), logp_NV + math.log1p(-beta))
    return beta * forward_kl(logm_NV, logq_NV) + (1 - beta) * forward_kl(logm_NV, logp_NV)
