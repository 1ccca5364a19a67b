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

from .options import Transform
from .partials import PAIR, SINGLE

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
            out[8, r] = _dot(e, (z - u).sub_((out[0, r] - out[4, r])[:, None]))
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
    out_4C[2] = _dot(e, shifted)
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
    norm_4C: Tensor,
    centre_C: Tensor | None,
    weight_C: Tensor | None,
    transform: Transform,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Values (1, C), or (2, C) for JSD: KL(p || m) and KL(q || m), of these columns only; and
    where weights are given ``weight * d value / d raw logits`` (C, V) in ``grad_dtype``, in the
    logits' memory.

    Args:
        z_CV, u_CV: transformed logits.
        norm_4C: see ``RowStats.norm``.
        centre_C: what centres the gradient: ``RowStats.gap`` for reverse KL, KL(p || m) for JSD.
    """
    values = z_CV.new_empty((2 if kind == "jsd" else 1, z_CV.shape[0]))
    out_CV = None if weight_C is None else narrow(z_CV, grad_dtype)
    for r in _blocks(z_CV):
        z, u = z_CV[r], u_CV[r]
        norm = norm_4C[:, r, None].unbind()
        centre = None if centre_C is None else centre_C[r, None]
        found = None
        if kind != "jsd" and z.device.type == "cpu":  # elsewhere, to look at d is to wait for it
            found = _moderate_kl(kind, z, u, norm, centre)
        values[:, r], grad = found or _divergence(kind, beta, z, u, norm, centre)
        if out_CV is not None:
            assert weight_C is not None
            grad.mul_(weight_C[r, None])
            if found is None:  # an infinite value has no gradient, but a weight of 0 silences it
                grad.masked_fill_(weight_C[r, None] == 0, 0)
            out_CV[r] = _through_transform_(grad, z, transform)
    return values, out_CV


def _moderate_kl(kind: str, z, u, norm, centre) -> tuple[Tensor, Tensor] | None:
    """Values (1, C) and gradient (C, V) of the KLs in few operations; None where logits are
    infinite, or q is so much larger than p that p may have underflowed where q has not."""
    m, log_s, n, log_r = norm
    gap = (z - u).sub_(m - n)
    p = (z - m).sub_(log_s).exp_()
    d = (log_s - log_r) - gap
    if d.numel() and not d.amax() < 60:
        return None
    expm1 = torch.expm1(d)
    if kind == "reverse_kl":
        # of e^d - 1 - d >= 0 only roundings are negative
        value = (expm1 - d).clamp_(min=0).mul_(p).sum(-1)
        grad = gap if centre is None else gap.sub_(centre).mul_(p)
    else:
        # q (e^-d - 1 + d) = p ((e^d - 1) d + d - (e^d - 1))
        value = d.addcmul_(expm1, d).sub_(expm1).clamp_(min=0).mul_(p).sum(-1)
        grad = expm1.mul_(p).neg_()
    return (value[None], grad) if torch.isfinite(value).all() else None


def _divergence(kind: str, beta: float, z, u, norm, centre) -> tuple[Tensor, Tensor]:
    """Values (1 or 2, C) and gradient (C, V), wherever they are defined."""
    m, log_s, n, log_r = norm
    gap = (z - u).sub_(m - n)
    p, q = (z - m).sub_(log_s).exp_(), (u - n).sub_(log_r).exp_()
    # log q - log p: z - u, like m - n, is exact where the two almost agree
    d = (log_s - log_r) - gap
    d.masked_fill_((p == 0) & (q == 0), 0)
    # q - p loses every digit where the two agree; expm1 of the non-positive exponent keeps them
    expm1 = torch.expm1(-d.abs())
    difference = torch.where(d < 0, p, -q).mul_(expm1)
    if kind == "reverse_kl":
        grad = gap if centre is None else _weighted(p, gap - centre)
        return _excess(p, d, difference).sum(-1)[None], grad
    if kind == "forward_kl":
        return _excess(q, -d, -difference).sum(-1)[None], -difference
    # log m - log p and log m - log q, from the non-positive exponent again
    half = torch.log1p(torch.where(d < 0, beta * expm1, (1 - beta) * expm1))
    to_p, to_q = half + d.clamp(min=0), half + (-d).clamp(min=0)
    value = torch.stack(
        [
            _excess(p, to_p, beta * difference).sum(-1),
            _excess(q, to_q, (beta - 1) * difference).sum(-1),
        ]
    )
    return value, to_p if centre is None else _weighted(p, to_p + centre).mul_(beta - 1)


def softmax_grad(
    z_CV: Tensor,
    norm_2C: Tensor,
    a_C: Tensor,
    b_C: Tensor | None,
    targets_C: Tensor | None,
    transform: Transform,
    grad_dtype: torch.dtype,
) -> Tensor:
    """a p + b onehot(y) with respect to raw logits, (C, V) in ``grad_dtype``, in the memory of
    transformed ones."""
    out_CV = narrow(z_CV, grad_dtype)
    for r in _blocks(z_CV):
        z = z_CV[r]
        grad = (z - norm_2C[0, r, None]).sub_(norm_2C[1, r, None]).exp_().mul_(a_C[r, None])
        if b_C is not None and z.shape[1]:
            assert targets_C is not None
            at = torch.where(targets_C[r] >= 0, b_C[r], 0)[:, None]
            grad.scatter_add_(1, targets_C[r].clamp(min=0)[:, None], at)
        out_CV[r] = _through_transform_(grad, z, transform)
    return out_CV


def narrow(z_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, V) of ``dtype`` in the memory of (C, V) logits, each row at its row's start."""
    if dtype == z_CV.dtype or not z_CV.shape[1]:
        return z_CV.to(dtype)
    rows = z_CV.as_strided((z_CV.shape[0], z_CV.stride(0)), (z_CV.stride(0), 1))
    return rows.view(dtype)[:, : z_CV.shape[1]]


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


def _dot(p: Tensor, x: Tensor) -> Tensor:
    """sum p x over columns, where p = 0 counts as nothing, whatever x."""
    if p.device.type == "cpu":  # elsewhere, to look at the result is to wait for it
        total = (p * x).sum(-1)
        if torch.isfinite(total).all():
            return total
    return _weighted(p, x).sum(-1)


def _blocks(x_CV: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, x_CV.shape[1]))
    for start in range(0, x_CV.shape[0], rows):
        yield slice(start, start + rows)
