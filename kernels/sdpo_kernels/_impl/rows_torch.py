"""Operations on rows of logits in memory, by torch operators: any device, float32 and float64.

Shapes: C tokens of a chunk, V columns (the vocabulary, or this rank's shard of it).
``rows_triton`` has the methods of ``Rows`` as functions, one kernel each:

  stats         logits -> partials; afterwards the buffers hold the *transformed* logits
  whole_stats   the same, and what ``partials.finish`` makes of partials of the whole vocabulary
  divergence    both logits and row statistics -> sums, and the gradient
  softmax_grad  logits and row statistics -> a p + b onehot(y)

A gradient may be left in the memory of the student's logits: see ``matmul.narrow``.

A few rows are processed at a time, in workspaces that are allocated once: the page faults of fresh
temporaries cost more than the arithmetic. What the statistics of a block leave there, exponentials
and the difference of the streams, is where its gradient begins.
``FORMULAS`` has the divergences: docs/adding-an-objective.md.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .matmul import chunks
from .options import Spec
from .partials import PAIR, SINGLE, finish, weighted

BLOCK_ELEMENTS = 2**19
"""Logits processed at a time: with the workspaces some 10 MB, in a cache that cores share."""
LARGEST_MODERATE = {"reverse_kl": 60.0, "forward_kl": 60.0, "jsd": 10.0}
"""log q - log p beyond which p may have underflowed where q has not; for a JSD, whose digits count
more where it is almost log 2, beyond which p e^(log q - log p) has fewer of them than q."""
LOG2_E = 1.4426950408889634


class Rows:
    """The operations of one call, and their workspaces."""

    def __init__(self) -> None:
        self._spaces: Tensor | None = None
        self._read: Tensor | None = None
        """The block whose e^(z - max z) and gap the first two workspaces hold."""

    def stats(
        self,
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
        for r in blocks(z_CV):
            z = _transform_(spec, z_CV[r], bias_V)
            e, gap, spare, other_e = self._workspaces(z)
            targets = None if targets_C is None else targets_C[r]
            _stream_stats(z, targets, e, spare, out[:4, r])
            if u_CV is not None:
                u = _transform_(spec, u_CV[r], teacher_bias_V)
                _stream_stats(u, targets, other_e, spare, out[4:8, r])
                _gap(z, u, out[0, r, None], out[4, r, None], gap)
                out[8, r] = _dot(e, gap, spare)
        self._read = None
        return out

    def whole_stats(
        self,
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
        parts = self.stats(spec, z_CV, u_CV, targets_C, bias_V, teacher_bias_V)
        if z_CV.shape[0] <= block_rows(z_CV):
            self._read = z_CV
        norm, gap, found = finish(parts)
        torch.stack(found, out=out_6C)
        if targets_C is None:
            out_6C[:2] = torch.nan
        return norm, gap

    def divergence(
        self,
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
            centre_C: what centres the gradient: ``gap`` of ``partials.finish``, or, for a
                divergence of ``TWO_PASSES``, the second sum over the whole vocabulary. None for the
                latter: not known yet, or, if weights are given, the sum over these columns.

        Returns:
            sums: (1, C): the value; or (2, C): the value, and what centres the gradient.
        """
        sums = z_CV.new_empty((2 if spec.kind in TWO_PASSES else 1, z_CV.shape[0]))
        for r in blocks(z_CV):
            z, u = z_CV[r], u_CV[r]
            norm = norm_4C[:, r, None].unbind()
            centre, weight = (None if t is None else t[r, None] for t in (centre_C, weight_C))
            found = self._moderate(spec, z, u, norm, centre, weight, self._read is z_CV)
            if found is None:
                found = _anywhere(spec, z, u, norm, centre, weight)
            sums[:, r], grad = found
            if grad_CV is not None:
                assert grad is not None
                grad_CV[r] = _through_transform_(spec, grad, z)
        self._read = None
        return sums

    def _moderate(self, spec: Spec, z, u, norm, centre, weight, read: bool) -> "_Found | None":
        """In few operations, for finite logits whose distributions are not too far apart."""
        if spec.kind not in MODERATE or z.device.type != "cpu":
            return None  # elsewhere, to look at d is to wait for the device
        e, gap, d, spare = self._workspaces(z)
        m, log_s, n, log_r = norm
        if not read:
            _exponentials(z, m, d, e)
            _gap(z, u, m, n, gap)
        torch.sub(log_s - log_r, gap, out=d)
        if d.numel() and not d.amax() < LARGEST_MODERATE[spec.kind]:
            return None
        to_p = (-log_s).exp_()
        return MODERATE[spec.kind](e, d, gap, spare, to_p, centre, weight, *spec.parameters)

    def softmax_grad(
        self,
        spec: Spec,
        z_CV: Tensor,
        norm_2C: Tensor,
        a_C: Tensor,
        b_C: Tensor | None,
        targets_C: Tensor | None,
        grad_CV: Tensor,
    ) -> None:
        """a p + b onehot(y) with respect to raw logits, into ``grad_CV``, from transformed ones,
        whose memory it may be; no p where a is 0, whatever the logits are."""
        for r in blocks(z_CV):
            z = z_CV[r]
            m, log_s = norm_2C[:2, r, None].unbind()
            e, _, grad, _ = self._workspaces(z)
            if self._read is not z_CV:
                _exponentials(z, m, grad, e)
            torch.mul(e, (-log_s).exp_().mul_(a_C[r, None]), out=grad)
            silent = a_C[r, None] == 0
            if z.device.type != "cpu" or silent.any():
                grad.masked_fill_(silent, 0)
            if b_C is not None and z.shape[1]:
                assert targets_C is not None
                at = torch.where(targets_C[r] >= 0, b_C[r], 0)[:, None]
                grad.scatter_add_(1, targets_C[r].clamp(min=0)[:, None], at)
            grad_CV[r] = _through_transform_(spec, grad, z)
        self._read = None

    def _workspaces(self, z: Tensor) -> list[Tensor]:
        """Four of the block's shape."""
        spaces = self._spaces
        if spaces is None or spaces.shape[1] < z.shape[0] or spaces.shape[2] != z.shape[1]:
            spaces = self._spaces = z.new_empty((4, *z.shape))
        return [space[: z.shape[0]] for space in spaces]


def blocks(x_CV: Tensor) -> Iterator[slice]:
    """Rows that are processed at a time."""
    return chunks(x_CV.shape[0], block_rows(x_CV))


def block_rows(x_CV: Tensor) -> int:
    """Their number."""
    return max(1, BLOCK_ELEMENTS // max(1, x_CV.shape[1]))


def _transform_(spec: Spec, x: Tensor, bias_V: Tensor | None) -> Tensor:
    if bias_V is not None:
        x += bias_V
    if spec.softcap:
        x.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if spec.temperature != 1:
        x /= spec.temperature
    return x


def _stream_stats(
    x: Tensor, targets: Tensor | None, e: Tensor, spare: Tensor, out_4C: Tensor
) -> None:
    """m, s, t and y of a block; e^(x - m) in ``e``."""
    out_4C[::3] = -torch.inf
    if x.shape[1]:
        torch.amax(x, -1, out=out_4C[0])
        if targets is not None:
            at = x.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            out_4C[3] = torch.where(targets >= 0, at, -torch.inf)
    _exponentials(x, out_4C[0, :, None], spare, e)
    torch.sum(e, -1, out=out_4C[1])
    out_4C[2] = _dot(e, spare, spare) / LOG2_E


def _exponentials(x: Tensor, m: Tensor, spare: Tensor, e: Tensor) -> None:
    """e^(x - m) as a power of 2, the faster one, whose exponent is left in ``spare``."""
    torch.sub(x, m.clamp(min=torch.finfo(x.dtype).min), out=spare).mul_(LOG2_E)
    torch.exp2(spare, out=e)


def _gap(z: Tensor, u: Tensor, m: Tensor, n: Tensor, out: Tensor) -> Tensor:
    """(z - u) - (m - n): both differences are exact where the two almost agree."""
    return torch.sub(z, u, out=out).sub_(m - n)


def _dot(p: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """sum p x over columns, formed in ``out``; p = 0 contributes nothing, whatever x."""
    torch.mul(p, x, out=out)
    if p.device.type == "cpu":  # elsewhere, to look at the result is to wait for it
        total = out.sum(-1)
        if torch.isfinite(total).all():
            return total
    return out.masked_fill_(p == 0, 0).sum(-1)


_Found = tuple[Tensor, Tensor | None]
"""Sums (1 or 2, C), and the gradient (C, V) if weights are given."""


def _moderate_reverse_kl(e, d, gap, spare, to_p, centre, weight) -> _Found | None:
    # e^d - 1 - d >= 0: only rounding makes it negative
    value = _sum(torch.expm1(d, out=spare).sub_(d), e, to_p)
    if not torch.isfinite(value).all():
        return None
    return value.T, None if weight is None else gap.sub_(centre).mul_(e).mul_(weight * to_p)


def _moderate_forward_kl(e, d, gap, spare, to_p, centre, weight) -> _Found | None:
    # q (e^-d - 1 + d) = p ((e^d - 1) d + d - (e^d - 1))
    expm1 = torch.expm1(d, out=spare)
    value = _sum(d.addcmul_(expm1, d).sub_(expm1), e, to_p)
    if not torch.isfinite(value).all():
        return None
    return value.T, None if weight is None else expm1.mul_(e).mul_(-weight * to_p)


def _moderate_jsd(e, d, gap, spare, to_p, centre, weight, beta: float) -> _Found | None:
    # x = (m - p) / p = beta (e^d - 1), and p (x - log(1 + x)) >= 0
    expm1 = torch.expm1(d, out=spare)
    log_m_over_p = torch.mul(expm1, beta, out=gap).log1p_()
    # the same with q, y = (m - q) / q = (1 - beta) (e^-d - 1): q y = -(1 - beta) p (e^d - 1)
    log_q_over_m = d.sub_(log_m_over_p)
    kl_q = _sum(log_q_over_m.addcmul_(expm1, log_q_over_m).sub_(expm1, alpha=1 - beta), e, to_p)
    kl_p = _sum(expm1.mul_(beta).sub_(log_m_over_p), e, to_p)
    # KL(p || m) once more, now rounded as the gradient that it centres
    own_centre = torch.mul(e, log_m_over_p, out=expm1).sum(-1, keepdim=True) * -to_p
    sums = torch.cat([(1 - beta) * kl_p + beta * kl_q, own_centre], 1)
    if not torch.isfinite(sums).all():
        return None
    if weight is None:
        return sums.T, None
    grad = log_m_over_p.add_(own_centre if centre is None else centre)
    return sums.T, grad.mul_(e).mul_(weight * to_p * (beta - 1))


def _sum(terms: Tensor, e: Tensor, to_p: Tensor) -> Tensor:
    """sum p terms, (C, 1), of non-negative terms, which only rounding makes negative."""
    return terms.clamp_(min=0).mul_(e).sum(-1, keepdim=True) * to_p


MODERATE = {
    "reverse_kl": _moderate_reverse_kl,
    "forward_kl": _moderate_forward_kl,
    "jsd": _moderate_jsd,
}
"""Divergences in few operations. The functions get e^(z - max z), d = log q - log p, gap and one
more workspace, (C, V), of which they may overwrite all but the first; p's factor of the first, the
centre and the weights, (C, 1). They return None where the value turns out infinite."""


def _anywhere(spec: Spec, z, u, norm, centre, weight) -> _Found:
    """Wherever they are defined, by the formula."""
    sums, grad = _evaluate(spec, z, u, norm, centre)
    if weight is None:
        return sums, None
    if spec.kind in TWO_PASSES and centre is None:
        _, grad = _evaluate(spec, z, u, norm, sums[1, :, None])
    # an infinite value has no gradient, but a weight of 0 silences it
    return sums, grad.mul_(weight).masked_fill_(weight == 0, 0)


def _evaluate(spec: Spec, z, u, norm, centre) -> tuple[Tensor, Tensor]:
    """Sums (1 or 2, C) and gradient (C, V), wherever they are defined."""
    m, log_s, n, log_r = norm
    gap = _gap(z, u, m, n, torch.empty_like(z))
    p, q = (z - m).sub_(log_s).exp_(), (u - n).sub_(log_r).exp_()
    d = (log_s - log_r) - gap
    d.masked_fill_((p == 0) & (q == 0), 0)
    # q - p loses every digit where the two agree; expm1 of a non-positive number keeps them
    expm1 = torch.expm1(-d.abs())
    difference = torch.where(d < 0, p, -q).mul_(expm1)
    *sums, grad = FORMULAS[spec.kind](p, q, d, gap, expm1, difference, centre, *spec.parameters)
    return torch.stack(sums), grad


def _reverse_kl(p, q, d, gap, expm1, difference, centre) -> tuple[Tensor, ...]:
    return excess(p, d, difference).sum(-1), weighted(p, gap - centre)


def _forward_kl(p, q, d, gap, expm1, difference, centre) -> tuple[Tensor, ...]:
    return excess(q, -d, -difference).sum(-1), -difference


def _jsd(p, q, d, gap, expm1, difference, centre, beta: float) -> tuple[Tensor, ...]:
    # log m - log p and log m - log q, from the non-positive exponent again
    half = torch.log1p(torch.where(d < 0, beta * expm1, (1 - beta) * expm1))
    to_p, to_q = half + d.clamp(min=0), half + (-d).clamp(min=0)
    kl_p = excess(p, to_p, beta * difference).sum(-1)
    kl_q = excess(q, to_q, (beta - 1) * difference).sum(-1)
    grad = to_p if centre is None else weighted(p, to_p + centre).mul_(beta - 1)
    return (1 - beta) * kl_p + beta * kl_q, -weighted(p, to_p).sum(-1), grad


FORMULAS = {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "jsd": _jsd}
"""Divergence -> a function of blocks of rows, (C, V), that returns its value (C,), for
``TWO_PASSES`` the sum that centres its gradient (C,), and the gradient in the logits (C, V).

  p, q        probabilities of student and teacher
  d           log q - log p
  gap         (z - u) - (max z - max u)
  expm1       e^-|d| - 1
  difference  q - p without cancellation
  centre      (C, 1); None for ``TWO_PASSES`` when the gradient is not needed yet
"""
CENTRED = {"reverse_kl"}
"""Divergences whose gradient is centred by ``gap``, and is no number where that is infinite."""
TWO_PASSES = {"jsd"}
"""Divergences whose gradient needs a sum over the whole vocabulary that ``partials`` lack."""


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
