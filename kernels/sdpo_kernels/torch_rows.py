"""Operations on rows of logits in memory, by torch operators: any device, float32 and float64.

Shapes: C tokens of a chunk, V columns (the vocabulary, or this rank's shard of it).
The contract is shared with ``triton_rows``, which does the same in one kernel each:

  stats        logits -> partials; afterwards the buffers hold the *transformed* logits
  divergence   both logits and row statistics -> values; the gradient replaces the policy's logits
  softmax_grad logits and row statistics -> a p + b onehot(y), in the logits' place

A few rows are worked on at a time, so that temporaries stay in the cache and cost no memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .partials import PAIR, SINGLE, RowStats
from .settings import Transform

BLOCK_ELEMENTS = 2**18
"""Logits worked on at a time: with their temporaries a few MB, of the order of an L2 cache."""


def stats(
    z_CV: Tensor,
    u_CV: Tensor | None,
    targets_C: Tensor | None,
    transform: Transform,
    bias_V: Tensor | None = None,
    hindsight_bias_V: Tensor | None = None,
) -> Tensor:
    """Partials (F, C) of raw logits, which are transformed in place.

    Args:
        targets_C: columns, -1 where the target is not among them.
    """
    out = z_CV.new_empty((SINGLE if u_CV is None else PAIR, z_CV.shape[0]))
    for r in _blocks(z_CV):
        z = _transform_(z_CV[r], transform, bias_V)
        targets = None if targets_C is None else targets_C[r]
        e = _stream_stats(z, targets, out[:4, r])
        if u_CV is not None:
            u = _transform_(u_CV[r], transform, hindsight_bias_V)
            _stream_stats(u, targets, out[4:8, r])
            out[8, r] = _weighted(e, z - u).sum(-1)
    return out


def _transform_(x: Tensor, transform: Transform, bias_V: Tensor | None) -> Tensor:
    if bias_V is not None:
        x += bias_V
    if transform.softcap:
        x.div_(transform.softcap).tanh_().mul_(transform.softcap)
    if transform.temperature != 1:
        x /= transform.temperature
    return x


def _stream_stats(x: Tensor, targets: Tensor | None, out_4C: Tensor) -> Tensor:
    m = x.amax(-1, keepdim=True) if x.shape[1] else x.new_full((x.shape[0], 1), -torch.inf)
    shifted = x - m.clamp(min=torch.finfo(x.dtype).min)
    e = shifted.exp()
    out_4C[0], out_4C[1] = m[:, 0], e.sum(-1)
    out_4C[2] = _weighted(e, shifted).sum(-1)
    out_4C[3] = -torch.inf
    if targets is not None and x.shape[1]:
        at = x.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        out_4C[3] = torch.where(targets >= 0, at, -torch.inf)
    return e


def divergence(
    kind: str,
    beta: float,
    z_CV: Tensor,
    u_CV: Tensor,
    row: RowStats,
    centre_C: Tensor | None,
    weight_C: Tensor | None,
    transform: Transform,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Values (1, C), or (2, C) for JSD: KL(p || m) and KL(q || m), of these columns only; and
    where weights are given ``weight * d value / d raw logits`` (C, V) in the logits' memory.

    Args:
        z_CV, u_CV: transformed logits.
        centre_C: what centres the gradient: sum p (z - u) for reverse KL, KL(p || m) for JSD.
    """
    values = z_CV.new_empty((2 if kind == "jsd" else 1, z_CV.shape[0]))
    for r in _blocks(z_CV):
        z, u = z_CV[r], u_CV[r]
        gap = z - u
        p = (z - _column(row.lse, r)).exp_()
        q = (u - _column(row.hindsight_lse, r)).exp_()
        # log q - log p: z - u is exact where the two almost agree
        d = (_column(row.lse, r) - _column(row.hindsight_lse, r)) - gap
        d = d.masked_fill_((p == 0) & (q == 0), 0)
        # q - p loses every digit where the two agree; expm1 of the non-positive exponent keeps them
        expm1 = torch.expm1(-d.abs())
        difference = torch.where(d < 0, p, -q).mul_(expm1)
        grad = None
        if kind == "reverse_kl":
            values[0, r] = _excess(p, d, difference).sum(-1)
            if weight_C is not None:
                grad = _weighted(p, gap.sub_(_column(centre_C, r)))
        elif kind == "forward_kl":
            values[0, r] = _excess(q, -d, -difference).sum(-1)
            if weight_C is not None:
                grad = -difference
        else:
            # log m - log p and log m - log q, from the non-positive exponent again
            half = torch.log1p(torch.where(d < 0, beta * expm1, (1 - beta) * expm1))
            to_p, to_q = half + d.clamp(min=0), half + (-d).clamp(min=0)
            values[0, r] = _excess(p, to_p, beta * difference).sum(-1)
            values[1, r] = _excess(q, to_q, (beta - 1) * difference).sum(-1)
            if weight_C is not None:
                grad = _weighted(p, to_p + _column(centre_C, r)).mul_(beta - 1)
        if grad is not None:
            grad *= _column(weight_C, r)
            z.copy_(_through_transform_(grad, z, transform))
    return values, None if weight_C is None else z_CV


def softmax_grad(
    z_CV: Tensor,
    lse_C: Tensor,
    a_C: Tensor,
    b_C: Tensor | None,
    targets_C: Tensor | None,
    transform: Transform,
    grad_dtype: torch.dtype,
) -> Tensor:
    """a p + b onehot(y) with respect to raw logits, (C, V), in the memory of transformed ones."""
    for r in _blocks(z_CV):
        z = z_CV[r]
        grad = (z - _column(lse_C, r)).exp_().mul_(_column(a_C, r))
        if b_C is not None and z.shape[1]:
            assert targets_C is not None
            here = targets_C[r] >= 0
            at = torch.where(here, b_C[r], 0)[:, None]
            grad.scatter_add_(1, targets_C[r].clamp(min=0)[:, None], at)
        z.copy_(_through_transform_(grad, z, transform))
    return z_CV


def transform_grad(z: Tensor, transform: Transform) -> Tensor | float:
    """d z / d raw, from the transformed logits z."""
    if not transform.softcap:
        return 1 / transform.temperature
    tanh = z * (transform.temperature / transform.softcap)
    return (1 - tanh * tanh) / transform.temperature


def _through_transform_(grad: Tensor, z: Tensor, transform: Transform) -> Tensor:
    return grad if transform.identity else _weighted(grad, transform_grad(z, transform))


def _excess(p: Tensor, d: Tensor, difference: Tensor) -> Tensor:
    """p (e^d - 1 - d) >= 0, given difference = p (e^d - 1); 0 where p is 0 and so is e^d p."""
    # by its series where the difference would lose more digits than the series' end
    small = 0.03 if d.dtype == torch.float64 else 0.3
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    return torch.where(d.abs() < small, p * series, difference - _weighted(p, d))


def _weighted(p: Tensor, x: Tensor | float) -> Tensor:
    """p x, and 0 where p is 0, whatever x."""
    return (p * x).masked_fill_(p == 0, 0)


def _column(x: Tensor | None, r: slice) -> Tensor:
    assert x is not None
    return x[r, None]


def _blocks(x_CV: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, x_CV.shape[1]))
    for start in range(0, x_CV.shape[0], rows):
        yield slice(start, start + rows)
