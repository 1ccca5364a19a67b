"""Operations on rows of logits in memory, by torch operators: any device, float32 and float64.

Shapes: C tokens of a chunk, V columns (the vocabulary, or this rank's shard of it).
``rows_triton`` has the same functions as one kernel each:

  stats         logits -> partials; afterwards the buffers hold the *transformed* logits
  whole_stats   the same, and what ``partials.finish`` makes of partials of the whole vocabulary
  divergence    both logits and row statistics -> sums, and the gradient
  softmax_grad  logits and row statistics -> a p + b onehot(y)

A gradient may be left in the memory of the student's logits: see ``matmul.narrow``.

A few rows are processed at a time, so that temporaries stay in the cache and cost no memory.
``FORMULAS`` has the divergences: docs/adding-an-objective.md.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .matmul import chunks
from .options import Spec
from .partials import PAIR, SINGLE, finish, weighted

BLOCK_ELEMENTS = 2**18
"""Logits processed at a time: with their temporaries a few MB, about the size of an L2 cache."""


def stats(
    spec: Spec,
    z_CV: Tensor,
    u_CV: Tensor | None,
    targets_C: Tensor | None,
    bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
) -> Tensor:
    """Partials (F, C) of raw logits, which are transformed in place.

    Args:
        targets_C: columns, -1 where the target is not among them.
    """
    out = z_CV.new_empty((SINGLE if u_CV is None else PAIR, z_CV.shape[0]))
    for r in _blocks(z_CV):
        z = _transform_(spec, z_CV[r], bias_V)
        targets = None if targets_C is None else targets_C[r]
        e = _stream_stats(z, targets, out[:4, r])
        if u_CV is not None:
            u = _transform_(spec, u_CV[r], teacher_bias_V)
            _stream_stats(u, targets, out[4:8, r])
            out[8, r] = _dot(e, (z - u).sub_((out[0, r] - out[4, r])[:, None]))
    return out


def whole_stats(
    spec: Spec,
    z_CV: Tensor,
    u_CV: Tensor | None,
    targets_C: Tensor | None,
    bias_V: Tensor | None,
    teacher_bias_V: Tensor | None,
    out_6C: Tensor,
) -> tuple[Tensor, Tensor]:
    """``stats`` of the whole vocabulary, finished: (norm, gap) of ``partials.finish``, and the
    fields of ``TokenStats`` in ``out_6C``; NaN for log-probabilities without targets."""
    norm, gap, found = finish(stats(spec, z_CV, u_CV, targets_C, bias_V, teacher_bias_V))
    torch.stack(found, out=out_6C)
    if targets_C is None:
        out_6C[:2] = torch.nan
    return norm, gap


def _transform_(spec: Spec, x: Tensor, bias_V: Tensor | None) -> Tensor:
    if bias_V is not None:
        x += bias_V
    if spec.softcap:
        x.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if spec.temperature != 1:
        x /= spec.temperature
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
    spec: Spec,
    z_CV: Tensor,
    u_CV: Tensor,
    norm_4C: Tensor,
    centre_C: Tensor | None,
    weight_C: Tensor | None = None,
    grad_CV: Tensor | None = None,
) -> Tensor:
    """Sums over these columns and, given weights, ``weight * d value / d raw logits`` in
    ``grad_CV``, of any dtype, which may be in the student's logits' memory.

    Args:
        z_CV, u_CV: transformed logits.
        norm_4C: see ``partials.finish``.
        centre_C: what centres the gradient: ``gap`` of ``partials.finish``, or, for a divergence of
            ``TWO_PASSES``, the second sum over the whole vocabulary, from a first call without it.

    Returns:
        sums: (1, C): the value; or (2, C): the value, and what centres the gradient.
    """
    sums = z_CV.new_empty((2 if spec.kind in TWO_PASSES else 1, z_CV.shape[0]))
    for r in _blocks(z_CV):
        z, u = z_CV[r], u_CV[r]
        norm = norm_4C[:, r, None].unbind()
        centre = None if centre_C is None else centre_C[r, None]
        found = None
        # elsewhere, to look at d is to wait for the device
        if spec.kind in ("reverse_kl", "forward_kl") and z.device.type == "cpu":
            found = _moderate_kl(spec.kind, z, u, norm, centre)
        sums[:, r], grad = found or _evaluate(spec, z, u, norm, centre)
        if grad_CV is not None:
            assert weight_C is not None
            grad.mul_(weight_C[r, None])
            if found is None:  # an infinite value has no gradient, but a weight of 0 silences it
                grad.masked_fill_(weight_C[r, None] == 0, 0)
            grad_CV[r] = _through_transform_(spec, grad, z)
    return sums


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
        # e^d - 1 - d >= 0: only rounding makes it negative
        value = (expm1 - d).clamp_(min=0).mul_(p).sum(-1)
        grad = gap if centre is None else gap.sub_(centre).mul_(p)
    else:
        # q (e^-d - 1 + d) = p ((e^d - 1) d + d - (e^d - 1))
        value = d.addcmul_(expm1, d).sub_(expm1).clamp_(min=0).mul_(p).sum(-1)
        grad = expm1.mul_(p).neg_()
    return (value[None], grad) if torch.isfinite(value).all() else None


def _evaluate(spec: Spec, z, u, norm, centre) -> tuple[Tensor, Tensor]:
    """Sums (1 or 2, C) and gradient (C, V), wherever they are defined."""
    m, log_s, n, log_r = norm
    # z - u, like m - n, is exact where the two almost agree
    gap = (z - u).sub_(m - n)
    p, q = (z - m).sub_(log_s).exp_(), (u - n).sub_(log_r).exp_()
    d = (log_s - log_r) - gap
    d.masked_fill_((p == 0) & (q == 0), 0)
    # q - p loses every digit where the two agree; expm1 of a non-positive number keeps them
    expm1 = torch.expm1(-d.abs())
    difference = torch.where(d < 0, p, -q).mul_(expm1)
    *sums, grad = FORMULAS[spec.kind](p, q, d, gap, expm1, difference, centre, *spec.parameters)
    return torch.stack(sums), grad


def _reverse_kl(p, q, d, gap, expm1, difference, centre) -> tuple[Tensor, ...]:
    grad = gap if centre is None else weighted(p, gap - centre)
    return excess(p, d, difference).sum(-1), grad


def _forward_kl(p, q, d, gap, expm1, difference, centre) -> tuple[Tensor, ...]:
    return excess(q, -d, -difference).sum(-1), -difference


def _jsd(p, q, d, gap, expm1, difference, centre, beta: float) -> tuple[Tensor, ...]:
    # log m - log p and log m - log q, from the non-positive exponent again
    half = torch.log1p(torch.where(d < 0, beta * expm1, (1 - beta) * expm1))
    to_p, to_q = half + d.clamp(min=0), half + (-d).clamp(min=0)
    kl_p = excess(p, to_p, beta * difference).sum(-1)
    kl_q = excess(q, to_q, (beta - 1) * difference).sum(-1)
    grad = to_p if centre is None else weighted(p, to_p + centre).mul_(beta - 1)
    return (1 - beta) * kl_p + beta * kl_q, kl_p, grad


FORMULAS = {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "jsd": _jsd}
"""Divergence -> a function of blocks of rows, (C, V), that returns its value (C,), for
``TWO_PASSES`` the sum that centres its gradient (C,), and the gradient in the logits (C, V).

  p, q        probabilities of student and teacher
  d           log q - log p
  gap         (z - u) - (max z - max u)
  expm1       e^-|d| - 1
  difference  q - p without cancellation
  centre      (C, 1), or None, when the gradient is not needed yet
"""
CENTRED = {"reverse_kl"}
"""Divergences whose gradient is centred by ``gap``, and is no number where that is infinite."""
TWO_PASSES = {"jsd"}
"""Divergences whose gradient needs a sum over the whole vocabulary that ``partials`` lack."""


def softmax_grad(
    spec: Spec,
    z_CV: Tensor,
    norm_2C: Tensor,
    a_C: Tensor,
    b_C: Tensor | None,
    targets_C: Tensor | None,
    grad_CV: Tensor,
) -> None:
    """a p + b onehot(y) with respect to raw logits, into ``grad_CV``, from transformed ones, whose
    memory it may be; no p where a is 0, whatever the logits are."""
    for r in _blocks(z_CV):
        z = z_CV[r]
        grad = (z - norm_2C[0, r, None]).sub_(norm_2C[1, r, None]).exp_().mul_(a_C[r, None])
        silent = a_C[r, None] == 0
        if z.device.type != "cpu" or silent.any():
            grad.masked_fill_(silent, 0)
        if b_C is not None and z.shape[1]:
            assert targets_C is not None
            at = torch.where(targets_C[r] >= 0, b_C[r], 0)[:, None]
            grad.scatter_add_(1, targets_C[r].clamp(min=0)[:, None], at)
        grad_CV[r] = _through_transform_(spec, grad, z)


def transform_grad(spec: Spec, z: Tensor) -> Tensor | float:
    """d z / d raw, from the transformed logits z."""
    if not spec.softcap:
        return 1 / spec.temperature
    tanh = z * (spec.temperature / spec.softcap)
    return (1 - tanh * tanh) / spec.temperature


def _through_transform_(spec: Spec, grad: Tensor, z: Tensor) -> Tensor:
    plain = spec.temperature == 1 and not spec.softcap
    return grad if plain else weighted(grad, transform_grad(spec, z))


def excess(p: Tensor, d: Tensor, difference: Tensor) -> Tensor:
    """p (e^d - 1 - d) >= 0, given difference = p (e^d - 1); 0 where p and e^d p are 0."""
    # by its series where the difference would lose more digits than the series' end
    small = 0.03 if d.dtype == torch.float64 else 0.3
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    return torch.where(d.abs() < small, p * series, difference - weighted(p, d))


def _dot(p: Tensor, x: Tensor) -> Tensor:
    """sum p x over columns; p = 0 contributes nothing, whatever x."""
    if p.device.type == "cpu":  # elsewhere, to look at the result is to wait for it
        total = (p * x).sum(-1)
        if torch.isfinite(total).all():
            return total
    return weighted(p, x).sum(-1)


def _blocks(x_CV: Tensor) -> Iterator[slice]:
    return chunks(x_CV.shape[0], max(1, BLOCK_ELEMENTS // max(1, x_CV.shape[1])))
