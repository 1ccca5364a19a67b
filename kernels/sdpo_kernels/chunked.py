"""Per-token divergences from hidden states, a chunk of tokens at a time: never (N, V) logits.

Shapes: N tokens, C tokens of one chunk, V vocabulary, D hidden size.
  z_CV = h_CD @ w_VD.T   policy logits, float32,     p = softmax(z)
  u_CV = g_CD @ v_VD.T   hindsight logits, float32,  q = softmax(u)

The forward keeps (N,) results only; the backward forms the logits of each chunk again, so any
per-token upstream gradient is right. Products: 2 forward, 4 backward (3 with a frozen head).
Logits, statistics and the head's gradient are float32 whatever the inputs' dtype (float64 stays
float64). Oracle: reference.py. Derivations: kernels/README.md.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_CHUNK_BYTES = 512 * 2**20
"""Logits of one stream that may be alive at once; the peak is a small multiple of it."""


class Rule(NamedTuple):
    """One divergence, on log-probabilities (C, V)."""

    value: Callable[[Tensor, Tensor], Tensor]
    """(log p, log q) -> (C,)"""
    grad: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(log p, log q, value) -> d value / dz, (C, V)"""


class TokenStats(NamedTuple):
    """Detached per-token statistics of both distributions, each (N,), in nats.

    ``logp_*`` are the log-probabilities of the targets; they are NaN where none were given.
    """

    logp_policy: Tensor
    logp_hindsight: Tensor
    entropy_policy: Tensor
    entropy_hindsight: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated *and returned* in float32 (float64 for float64), autocast or not."""
    out_dtype = accumulation_dtype(a.dtype)
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype != out_dtype:
            return torch.mm(a, b, out_dtype=out_dtype)
        return a.to(out_dtype) @ b.to(out_dtype)


def chunks(n: int, vocabulary: int, chunk_bytes: int, itemsize: int = 4) -> Iterator[slice]:
    """Slices of ``range(n)`` whose logits take at most ``chunk_bytes`` (but at least one row)."""
    rows = max(1, chunk_bytes // (vocabulary * itemsize))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def _log_softmax(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    return matmul(hidden_CD, weight_VD.T).log_softmax(-1)


def _entropy(logp_CV: Tensor) -> Tensor:
    return -(logp_CV.exp() * logp_CV).sum(-1)


class LinearDivergence(torch.autograd.Function):
    """(value, *TokenStats), each (N,); differentiable in the policy's hidden states and weight."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, hindsight_ND, hindsight_VD, targets_N, rule, nbytes):
        n, dtype = hidden_ND.shape[0], accumulation_dtype(hidden_ND.dtype)
        out = hidden_ND.new_full((5, n), torch.nan, dtype=dtype)
        for c in chunks(n, weight_VD.shape[0], nbytes, dtype.itemsize):
            logp_CV = _log_softmax(hidden_ND[c], weight_VD)
            logq_CV = _log_softmax(hindsight_ND[c], hindsight_VD)
            out[0, c] = rule.value(logp_CV, logq_CV)
            if targets_N is not None:
                out[1, c] = logp_CV.gather(-1, targets_N[c, None])[:, 0]
                out[2, c] = logq_CV.gather(-1, targets_N[c, None])[:, 0]
            out[3, c] = _entropy(logp_CV)
            out[4, c] = _entropy(logq_CV)
        value, *stats = out.clone().unbind()
        ctx.save_for_backward(hidden_ND, weight_VD, hindsight_ND, hindsight_VD, value)
        ctx.rule, ctx.nbytes = rule, nbytes
        ctx.mark_non_differentiable(*stats)
        return value, *stats

    @staticmethod
    def backward(ctx, upstream_N, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_ND, weight_VD, hindsight_ND, hindsight_VD, value_N = ctx.saved_tensors

        def dlogits(c: slice) -> Tensor:
            logp_CV = _log_softmax(hidden_ND[c], weight_VD)
            logq_CV = _log_softmax(hindsight_ND[c], hindsight_VD)
            return ctx.rule.grad(logp_CV, logq_CV, value_N[c, None])

        grads = _linear_backward(ctx, hidden_ND, weight_VD, upstream_N, dlogits)
        return *grads, None, None, None, None, None


class LinearLogProb(torch.autograd.Function):
    """(log p(y), entropy), each (N,); the log-probability is differentiable, entropy is not."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, nbytes):
        n, dtype = hidden_ND.shape[0], accumulation_dtype(hidden_ND.dtype)
        logp_N, entropy_N = hidden_ND.new_empty((2, n), dtype=dtype).unbind()
        for c in chunks(n, weight_VD.shape[0], nbytes, dtype.itemsize):
            logp_CV = _log_softmax(hidden_ND[c], weight_VD)
            logp_N[c] = logp_CV.gather(-1, targets_N[c, None])[:, 0]
            entropy_N[c] = _entropy(logp_CV)
        logp_N, entropy_N = logp_N.clone(), entropy_N.clone()
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.nbytes = nbytes
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx, upstream_N, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors

        def dlogits(c: slice) -> Tensor:
            grad_CV = _log_softmax(hidden_ND[c], weight_VD).exp_().neg_()
            at_target = torch.ones_like(grad_CV[:, :1])
            return grad_CV.scatter_add_(1, targets_N[c, None], at_target)

        return *_linear_backward(ctx, hidden_ND, weight_VD, upstream_N, dlogits), None, None


def _linear_backward(
    ctx,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    upstream_N: Tensor,
    dlogits: Callable[[slice], Tensor],
) -> list[Tensor | None]:
    """dH = G W and dW = G^T H, summed over chunks, G = upstream * ``dlogits(chunk)``, (C, V).

    G is rounded to the inputs' dtype before the products, as every mixed-precision linear layer
    does, but relative to the largest upstream gradient: a mean over many tokens would underflow
    in float16. The sum over chunks is float32.
    """
    scale = (
        upstream_N.abs().amax().clamp(min=torch.finfo(upstream_N.dtype).tiny)
        if len(upstream_N)
        else upstream_N.new_ones(())
    )
    relative_N = upstream_N / scale
    need_dh, need_dw = ctx.needs_input_grad[:2]
    dtype = accumulation_dtype(hidden_ND.dtype)
    dh_ND = torch.empty_like(hidden_ND) if need_dh else None
    dw_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_dw else None
    for c in chunks(hidden_ND.shape[0], weight_VD.shape[0], ctx.nbytes, dtype.itemsize):
        grad_CV = dlogits(c).mul_(relative_N[c, None]).to(weight_VD.dtype)
        if dh_ND is not None:
            dh_ND[c] = (matmul(grad_CV, weight_VD) * scale).to(dh_ND.dtype)
        if dw_VD is not None:
            dw_VD += matmul(grad_CV.T, hidden_ND[c])
    return [dh_ND, None if dw_VD is None else (dw_VD * scale).to(weight_VD.dtype)]
