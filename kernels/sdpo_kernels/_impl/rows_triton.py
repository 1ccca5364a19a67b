"""Operations on rows of logits in memory, one Triton kernel each: the methods of
``rows_torch.Rows``, in float32, and the @triton.jit helpers that ``fused_triton`` shares.

Shapes: C tokens of a chunk, V columns. One program reads one row, left to right, in blocks; offsets
of rows are int64. Bytes per logit: stats reads 4 (and writes 4 where logits are transformed), the
gradient reads 4 and writes 2 in bf16, each per stream where two are read.

A gradient that is not kept is left in the float32 logits' memory, if it is narrower at half of
their place: block k of a row is read at bytes [4kB, 4(k+1)B) and written at [2kB, 2(k+1)B), behind
everything yet to be read. Warps of a program drift apart, so a barrier stands between a block's
loads and its stores.
"""
# launch options are not among a kernel's parameters, and no argument is a tl.constexpr
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .options import Spec
from .partials import PAIR, SINGLE
from .rows_torch import CENTRED, TWO_PASSES

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
FAR: tl.constexpr = tl.constexpr(1.0e38)
"""In place of an infinity that is multiplied by 0; -FAR is also the maximum of no logits."""
NEAR: tl.constexpr = tl.constexpr(0.3)
"""Exponents below which a power series replaces a difference."""


@triton.jit
def tanh(x):
    """To an ulp or two, with Cephes' polynomial for float32 where 1 - 2 / (e^2x + 1) cancels."""
    y = x * x
    series = 1.33314422036e-1 + y * (
        -5.37397155531e-2 + y * (2.06390887954e-2 - y * 5.70498872745e-3)
    )
    series = x + x * (y * (-3.33332819422e-1 + y * series))
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, series, tl.where(x < 0, -far, far))


@triton.jit
def transformed(x, cap, temperature, CAP: tl.constexpr, SCALE: tl.constexpr):
    """cap tanh(x / cap) / temperature."""
    if CAP:
        x = cap * tanh(x / cap)
    if SCALE:
        x = x / temperature
    return x


@triton.jit
def cap_grad(z, cap, temperature):
    """d z / d raw times the temperature, from logits z transformed with a cap."""
    t = z * (temperature / cap)
    return 1.0 - t * t


@triton.jit
def weighted(p, x):
    """p x, and 0 where p is 0, whatever x."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def log2_over(x, peak):
    """x log2(e) - peak, rounded once: hardware has powers of 2, and where ``peak`` is m log2(e) of
    a logit near x no digit is lost."""
    return tl.fma(x, LOG2E, -peak)


@triton.jit
def series(d):
    """(e^d - 1 - d) / d^2 for |d| < NEAR, to half an ulp."""
    return 0.5 + d * (0.16666616499 + d * (0.04166677222 + d * (0.00835566409 + d * 0.00138981768)))


@triton.jit
def expm1_nonpositive(x):
    """e^x - 1 for x <= 0: its series where the difference would lose digits."""
    return tl.where(x > -NEAR, x + x * (x * series(x)), tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def log1p_nonpositive(x):
    """log(1 + x) for -1 < x <= 0, to about an ulp.

    1 + x = 2^-k (1 + f) with -1/3 <= f < 1/3; f keeps the digits of x that 1 + x loses.
    """
    bits = (1.0 + x).to(tl.int32, bitcast=True) - 0x3F2AAAAB  # 2/3
    exponent = bits & -0x800000  # -k, where a float has it
    scale = (0x3F800000 - exponent).to(tl.float32, bitcast=True)  # 2^k
    f = tl.fma(x, scale, scale - 1.0)
    q = 0.20011167228 + f * (
        -0.16415956617 + f * (0.13995827735 + f * (-0.15388558805 + f * 0.14026251435))
    )
    q = -0.49999937415 + f * (0.33333197236 + f * (-0.2500782013 + f * q))
    return (f + f * f * q) + exponent.to(tl.float32) * (LN2 / 0x800000)


@triton.jit
def at_least(x, least):
    """The larger one; NaN stays NaN."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def taken_in(m, s, t, x):
    """Lanes' partials (m, s, t), (LANES,), with a block x (ROWS, LANES) of more logits.

    Base 2: m is the largest logit, s = sum 2^y and t = sum y 2^y, where y = (x - m) log2(e), which
    is 0 for the largest. Returns them, 2^y, and what sums under the old maxima are to be scaled by.
    """
    top = tl.maximum(m, tl.max(x, 0))
    shift = (m - top) * LOG2E
    scale = tl.exp2(shift)
    # a logit of -inf is none: 0 times a large number is 0
    y = at_least((x - top[None, :]) * LOG2E, -FAR)
    e = tl.exp2(y)
    t = scale * (t + s * shift) + tl.sum(e * y, 0)
    s = scale * s + tl.sum(e, 0)
    return top, s, t, e, scale


@triton.jit
def gathered(m, s, t):
    """All lanes' partials as one, t in base e, and the lanes' scale. Without a logit m is -FAR."""
    top = tl.max(m, 0)
    shift = (m - top) * LOG2E
    scale = tl.exp2(shift)
    t = tl.sum(weighted(scale, t + s * shift), 0) * LN2
    s = tl.sum(scale * s, 0)
    return top, s, t, scale


@triton.jit
def loaded(ptr, columns, vocabulary, MASKED: tl.constexpr):
    """Logits of a row; without a mask where all columns are within it."""
    if MASKED:
        x = tl.load(ptr + columns, mask=columns < vocabulary, other=float("-inf"))
    else:
        x = tl.load(ptr + columns)
    return x


@triton.jit
def replaced(
    ptr,
    x,
    bias_ptr,
    columns,
    vocabulary,
    cap,
    temperature,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Transformed logits, which take the raw ones' place in memory."""
    inside = columns < vocabulary
    if BIAS:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    if CAP or SCALE:
        x = transformed(x, cap, temperature, CAP, SCALE)
        if MASKED:
            x = tl.where(inside, x, float("-inf"))
    if BIAS or CAP or SCALE:
        tl.store(ptr + columns, x, mask=inside)
    return x


@triton.jit
def absorbed(
    m,
    s,
    t,
    n,
    r,
    w,
    c,
    z_ptr,
    u_ptr,
    bias_ptr,
    teacher_bias_ptr,
    columns,
    vocabulary,
    cap,
    temperature,
    PAIRED: tl.constexpr,
    BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Lanes' partials of both streams with a block of more columns.

    c = sum 2^y ((z - u) - (m - n)).
    """
    z = loaded(z_ptr, columns, vocabulary, MASKED)
    u = z
    if PAIRED:  # before z is waited for
        u = loaded(u_ptr, columns, vocabulary, MASKED)
    z = replaced(
        z_ptr, z, bias_ptr, columns, vocabulary, cap, temperature, BIAS, CAP, SCALE, MASKED
    )
    before = s
    offset = m - n
    m, s, t, e, scale = taken_in(m, s, t, z)
    if PAIRED:
        u = replaced(
            u_ptr,
            u,
            teacher_bias_ptr,
            columns,
            vocabulary,
            cap,
            temperature,
            TEACHER_BIAS,
            CAP,
            SCALE,
            MASKED,
        )
        n, r, w, _, _ = taken_in(n, r, w, u)
        now = m - n
        c = weighted(scale, c + before * (offset - now))
        # z - u is exact where the two almost agree; where e is 0 it may be infinite or NaN
        c += tl.sum(e * tl.where(e == 0, 0.0, (z - u) - now[None, :]), 0)
    return m, s, t, n, r, w, c


@triton.jit
def stats_kernel(
    z_ptr,
    u_ptr,
    bias_ptr,
    teacher_bias_ptr,
    targets_ptr,
    out_ptr,
    stats_ptr,
    tokens,
    vocabulary,
    z_stride,
    u_stride,
    stats_stride,
    cap,
    temperature,
    PAIRED: tl.constexpr,
    TARGETS: tl.constexpr,
    BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    u_ptr += row * u_stride
    out_ptr += row
    y = float("-inf")
    x = float("-inf")
    if TARGETS:
        # before the loop, which may replace the raw logits
        target = tl.load(targets_ptr + row)
        here = target >= 0
        y = tl.load(z_ptr + target, mask=here, other=float("-inf"))
        if BIAS:
            y += tl.load(bias_ptr + target, mask=here, other=0.0)
        y = tl.where(here, transformed(y, cap, temperature, CAP, SCALE), float("-inf"))
        if PAIRED:
            x = tl.load(u_ptr + target, mask=here, other=float("-inf"))
            if TEACHER_BIAS:
                x += tl.load(teacher_bias_ptr + target, mask=here, other=0.0)
            x = tl.where(here, transformed(x, cap, temperature, CAP, SCALE), float("-inf"))
        tl.debug_barrier()
    m = tl.full((LANES,), -FAR, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    t = tl.zeros((LANES,), tl.float32)
    n = m
    r = tl.zeros((LANES,), tl.float32)
    w = tl.zeros((LANES,), tl.float32)
    c = tl.zeros((LANES,), tl.float32)
    at = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = vocabulary // (ROWS * LANES) * (ROWS * LANES)
    for start in range(0, whole, ROWS * LANES):
        m, s, t, n, r, w, c = absorbed(
            m,
            s,
            t,
            n,
            r,
            w,
            c,
            z_ptr,
            u_ptr,
            bias_ptr,
            teacher_bias_ptr,
            start + at,
            vocabulary,
            cap,
            temperature,
            PAIRED,
            BIAS,
            TEACHER_BIAS,
            CAP,
            SCALE,
            False,
        )
    if whole < vocabulary:
        m, s, t, n, r, w, c = absorbed(
            m,
            s,
            t,
            n,
            r,
            w,
            c,
            z_ptr,
            u_ptr,
            bias_ptr,
            teacher_bias_ptr,
            whole + at,
            vocabulary,
            cap,
            temperature,
            PAIRED,
            BIAS,
            TEACHER_BIAS,
            CAP,
            SCALE,
            True,
        )
    lanes_s = s
    offset = m - n
    m, s, t, scale = gathered(m, s, t)
    if PAIRED:
        n, r, w, _ = gathered(n, r, w)
        c = tl.sum(weighted(scale, c + lanes_s * (offset - (m - n))), 0)
    else:
        n, r, w, c = 0.0, 1.0, 0.0, 0.0
    m = tl.where(m == -FAR, float("-inf"), m)
    n = tl.where(n == -FAR, float("-inf"), n)
    if WHOLE:
        log_s = tl.log(s)
        log_r = tl.log(r)
        tl.store(out_ptr, m)
        tl.store(out_ptr + tokens, log_s)
        tl.store(out_ptr + 2 * tokens, n)
        tl.store(out_ptr + 3 * tokens, log_r)
        tl.store(out_ptr + 4 * tokens, c / s)
        y = (y - m) - log_s
        x = (x - n) - log_r
        if not TARGETS:
            y = float("nan")
            x = float("nan")
        elif not PAIRED:
            x = 0.0
        stats_ptr += row
        tl.store(stats_ptr, y)
        tl.store(stats_ptr + stats_stride, x)
        tl.store(stats_ptr + 2 * stats_stride, log_s - t / s)
        tl.store(stats_ptr + 3 * stats_stride, log_r - w / r)
        tl.store(stats_ptr + 4 * stats_stride, m + log_s)
        tl.store(stats_ptr + 5 * stats_stride, n + log_r)
    else:
        tl.store(out_ptr, m)
        tl.store(out_ptr + tokens, s)
        tl.store(out_ptr + 2 * tokens, t)
        tl.store(out_ptr + 3 * tokens, y)
        if PAIRED:
            tl.store(out_ptr + 4 * tokens, n)
            tl.store(out_ptr + 5 * tokens, r)
            tl.store(out_ptr + 6 * tokens, w)
            tl.store(out_ptr + 7 * tokens, x)
            tl.store(out_ptr + 8 * tokens, c)


def stats(
    spec: Spec,
    z_CV: Tensor,
    u_CV: Tensor | None,
    targets_C: Tensor | None,
    bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
) -> Tensor:
    """See ``rows_torch.Rows.stats``."""
    out = z_CV.new_empty((SINGLE if u_CV is None else PAIR, z_CV.shape[0]))
    _launch_stats(spec, z_CV, u_CV, targets_C, bias_V, teacher_bias_V, out, None)
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
    """See ``rows_torch.Rows.whole_stats``; one launch."""
    out = z_CV.new_empty((5, z_CV.shape[0]))
    _launch_stats(spec, z_CV, u_CV, targets_C, bias_V, teacher_bias_V, out, out_6C)
    return out[: 2 if u_CV is None else 4], out[4]


def _launch_stats(spec, z_CV, u_CV, targets_C, bias_V, teacher_bias_V, out, stats_6C) -> None:
    _launch(
        stats_kernel,
        spec,
        z_CV,
        tuning.lane_tiles(z_CV.shape[1]),
        u_ptr=u_CV,
        bias_ptr=bias_V,
        teacher_bias_ptr=teacher_bias_V,
        targets_ptr=targets_C,
        out_ptr=out,
        stats_ptr=stats_6C,
        u_stride=0 if u_CV is None else u_CV.stride(0),
        stats_stride=0 if stats_6C is None else stats_6C.stride(0),
        PAIRED=u_CV is not None,
        TARGETS=targets_C is not None,
        BIAS=bias_V is not None,
        TEACHER_BIAS=teacher_bias_V is not None,
        WHOLE=stats_6C is not None,
    )


@triton.jit
def bounded(d):
    """d, finite, so that 0 d is 0."""
    return tl.minimum(tl.maximum(d, -FAR), FAR)


@triton.jit
def _reverse_kl(p, q, d, centre, beta):
    d = bounded(d)
    pd = p * d
    value = tl.where(tl.abs(d) < NEAR, pd * d * series(d), (q - p) - pd)
    return value, 0.0, -(p * (d + centre))


@triton.jit
def _forward_kl(p, q, d, centre, beta):
    # not from above: infinite where the student has no probability and the teacher has
    d = tl.maximum(d, -FAR)
    # q - p = p (e^d - 1) loses every digit where the two agree
    near = tl.abs(d) < NEAR
    pd = p * d
    y = d * series(d)
    value = tl.where(near, pd * ((d - y) + d * y), (p - q) + q * d)
    # the maximum of 0 and of a NaN, from q = 0 and an infinite d, is 0
    return tl.maximum(value, 0.0), 0.0, tl.where(near, -(pd + pd * y), p - q)


@triton.jit
def _jsd(p, q, d, centre, beta):
    # of the mixture M: log M - log p and log M - log q, from a non-positive exponent
    d = bounded(d)
    x = tl.where(d < 0, beta, 1.0 - beta) * expm1_nonpositive(-tl.abs(d))
    half = log1p_nonpositive(x)
    to_p = half + tl.maximum(d, 0.0)
    to_q = half - tl.minimum(d, 0.0)
    # M - p - p to_p and M - q - q to_q; far from 0, what M adds to both cancels
    near = tl.abs(d) < NEAR
    p_to_p = p * to_p
    of_p = tl.where(near, to_p * series(to_p), -1.0)
    of_q = tl.where(near, to_q * series(to_q), -1.0)
    value = (1.0 - beta) * (p_to_p * of_p) + beta * (q * to_q * of_q)
    return value, -p_to_p, p * ((beta - 1.0) * to_p + (beta - 1.0) * centre)


@triton.jit
def one_over(log_s, lost):
    """2^-lost / s."""
    power = log_s * LOG2E
    return tl.exp2(-power) * tl.exp2(-lost - tl.fma(log_s, LOG2E, -power))


FORMULAS = {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "jsd": _jsd}
"""Divergence -> a function of a block of one row that returns terms of the value, terms of the sum
that centres the gradient (0.0 unless in ``TWO_PASSES``), and the gradient.

  p, q    probabilities of student and teacher, both times one positive number: all that is returned
          is proportional to them
  d       log q - log p; infinite or NaN where a logit is
  centre  for ``CENTRED``: the sum of -p d over the whole vocabulary; for ``TWO_PASSES``: the second
          sum

Values of ``CENTRED`` are infinite where their centre is, whatever is returned.
"""


@triton.jit
def compared(
    value,
    second,
    z_ptr,
    u_ptr,
    grad_ptr,
    columns,
    vocabulary,
    peak,
    teacher_peak,
    ratio,
    apart,
    shift,
    centre,
    weight,
    beta,
    cap,
    temperature,
    FORMULA: tl.constexpr,
    SECOND: tl.constexpr,
    GRAD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The sums with a block of more columns, whose gradient is stored."""
    z = loaded(z_ptr, columns, vocabulary, MASKED)
    u = loaded(u_ptr, columns, vocabulary, MASKED)
    p = tl.exp2(log2_over(z, peak))
    q = tl.exp2(log2_over(u, teacher_peak)) * ratio
    # z - u, like m - n, is exact where the two almost agree
    of_value, of_second, grad = FORMULA(p, q, shift - ((z - u) - apart), centre, beta)
    value += of_value
    if SECOND:
        second += of_second
    if GRAD:
        grad *= weight
        if CAP:
            grad *= cap_grad(z, cap, temperature)
        # an infinite value has no gradient, and hidden states may be no numbers
        grad = tl.where(weight == 0, 0.0, grad)
        if IN_PLACE:
            tl.debug_barrier()
        grad = grad.to(grad_ptr.dtype.element_ty)
        if MASKED:
            tl.store(grad_ptr + columns, grad, mask=columns < vocabulary)
        else:
            tl.store(grad_ptr + columns, grad)
    return value, second


@triton.jit
def divergence_kernel(
    z_ptr,
    u_ptr,
    grad_ptr,
    norm_ptr,
    centre_ptr,
    weight_ptr,
    sums_ptr,
    tokens,
    vocabulary,
    z_stride,
    u_stride,
    grad_stride,
    beta,
    cap,
    temperature,
    FORMULA: tl.constexpr,
    TWO_PASSES: tl.constexpr,
    CENTRED: tl.constexpr,
    CENTRE: tl.constexpr,
    GRAD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    u_ptr += row * u_stride
    norm_ptr += row
    m = tl.load(norm_ptr)
    log_s = tl.load(norm_ptr + tokens)
    n = tl.load(norm_ptr + 2 * tokens)
    log_r = tl.load(norm_ptr + 3 * tokens)
    apart = m - n
    shift = log_s - log_r
    # p and q are s times the probabilities, and times what rounding took from the peaks
    peak = m * LOG2E
    teacher_peak = n * LOG2E
    lost = tl.fma(m, LOG2E, -peak)
    ratio = tl.exp2((lost - tl.fma(n, LOG2E, -teacher_peak)) + shift * LOG2E)
    factor = one_over(log_s, lost)
    centre = 0.0
    weight = 0.0
    infinite = False
    if CENTRE:
        centre = tl.load(centre_ptr + row)
        if CENTRED:
            infinite = centre == float("inf")
            centre -= shift
    if GRAD:
        grad_ptr += row * grad_stride
        weight = tl.load(weight_ptr + row)
        weight = tl.where(weight == 0, 0.0, weight * factor)  # which may be no number
        if SCALE:
            weight /= temperature
    value = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    whole = vocabulary // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        value, second = compared(
            value,
            second,
            z_ptr,
            u_ptr,
            grad_ptr,
            start + tl.arange(0, BLOCK),
            vocabulary,
            peak,
            teacher_peak,
            ratio,
            apart,
            shift,
            centre,
            weight,
            beta,
            cap,
            temperature,
            FORMULA,
            TWO_PASSES,
            GRAD,
            IN_PLACE,
            CAP,
            False,
        )
    if whole < vocabulary:
        value, second = compared(
            value,
            second,
            z_ptr,
            u_ptr,
            grad_ptr,
            whole + tl.arange(0, BLOCK),
            vocabulary,
            peak,
            teacher_peak,
            ratio,
            apart,
            shift,
            centre,
            weight,
            beta,
            cap,
            temperature,
            FORMULA,
            TWO_PASSES,
            GRAD,
            IN_PLACE,
            CAP,
            True,
        )
    if not (TWO_PASSES and GRAD):
        value = tl.sum(value, 0) * factor
        if CENTRED:
            value = tl.where(infinite, float("inf"), value)
        # the factor is no number where the student's logits are none; a formula may drop such terms
        value = tl.where(log_r == log_r, value, log_r)
        tl.store(sums_ptr + row, value)
        if TWO_PASSES:
            tl.store(sums_ptr + tokens + row, tl.sum(second, 0) * factor)


def divergence(
    spec: Spec,
    z_CV: Tensor,
    u_CV: Tensor,
    norm_4C: Tensor,
    centre_C: Tensor | None,
    weight_C: Tensor | None = None,
    grad_CV: Tensor | None = None,
) -> Tensor:
    """See ``rows_torch.Rows.divergence``. For ``TWO_PASSES`` the second call returns nothing."""
    two_passes = spec.kind in TWO_PASSES
    if two_passes and centre_C is None and weight_C is not None:
        sums = divergence(spec, z_CV, u_CV, norm_4C, None)
        divergence(spec, z_CV, u_CV, norm_4C, sums[1], weight_C, grad_CV)
        return sums
    fields = 1 if not two_passes else 0 if grad_CV is not None else 2
    sums = z_CV.new_empty((fields, z_CV.shape[0]))
    _launch(
        divergence_kernel,
        spec,
        z_CV,
        tuning.row_tiles(z_CV.shape[1], fields == 2),
        u_ptr=u_CV,
        grad_ptr=grad_CV,
        norm_ptr=norm_4C,
        centre_ptr=centre_C,
        weight_ptr=weight_C,
        sums_ptr=sums if fields else None,
        u_stride=u_CV.stride(0),
        grad_stride=0 if grad_CV is None else grad_CV.stride(0),
        beta=spec.parameters[0] if spec.parameters else 0.0,
        FORMULA=FORMULAS[spec.kind],
        TWO_PASSES=two_passes,
        CENTRED=spec.kind in CENTRED,
        CENTRE=centre_C is not None,
        GRAD=grad_CV is not None,
        IN_PLACE=_narrows(z_CV, grad_CV),
    )
    return sums


@triton.jit
def softmax_grad_kernel(
    z_ptr,
    grad_ptr,
    norm_ptr,
    a_ptr,
    b_ptr,
    targets_ptr,
    tokens,
    vocabulary,
    z_stride,
    grad_stride,
    cap,
    temperature,
    TARGETS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    grad_ptr += row * grad_stride
    m = tl.load(norm_ptr + row)
    log_s = tl.load(norm_ptr + tokens + row)
    a = tl.load(a_ptr + row)
    a = weighted(a, one_over(log_s, 0.0))
    b = 0.0
    target = -1
    if TARGETS:
        b = tl.load(b_ptr + row)
        target = tl.load(targets_ptr + row).to(tl.int32)
    if SCALE:
        a /= temperature
        b /= temperature
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = tl.load(z_ptr + columns, mask=inside, other=float("-inf"))
        grad = tl.where(a == 0, 0.0, a * tl.exp2((z - m) * LOG2E))
        if TARGETS:
            grad += tl.where(columns == target, b, 0.0)
        if CAP:  # a logit that was taken out after it was transformed is -inf
            grad = weighted(grad, cap_grad(z, cap, temperature))
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def softmax_grad(
    spec: Spec,
    z_CV: Tensor,
    norm_2C: Tensor,
    a_C: Tensor,
    b_C: Tensor | None,
    targets_C: Tensor | None,
    grad_CV: Tensor,
) -> None:
    """See ``rows_torch.Rows.softmax_grad``."""
    _launch(
        softmax_grad_kernel,
        spec,
        z_CV,
        tuning.row_tiles(z_CV.shape[1]),
        grad_ptr=grad_CV,
        norm_ptr=norm_2C,
        a_ptr=a_C,
        b_ptr=b_C,
        targets_ptr=targets_C,
        grad_stride=grad_CV.stride(0),
        TARGETS=b_C is not None,
        IN_PLACE=_narrows(z_CV, grad_CV),
    )


def _narrows(z_CV: Tensor, grad_CV: Tensor | None) -> bool:
    """Whether a gradient replaces wider logits."""
    if grad_CV is None or grad_CV.dtype == z_CV.dtype:
        return False
    return grad_CV.untyped_storage().data_ptr() == z_CV.untyped_storage().data_ptr()


def _launch(kernel, spec: Spec, z_CV: Tensor, tiles: dict[str, int], **arguments) -> None:
    """One program per row. In place of a tensor that it does not read, a kernel gets z."""
    for name, x in arguments.items():
        if x is None:
            arguments[name] = z_CV
        elif isinstance(x, Tensor) and x.ndim == 1:
            arguments[name] = x.contiguous()
    tokens, vocabulary = z_CV.shape
    with torch.cuda.device_of(z_CV):  # not the current one
        kernel[(tokens,)](
            z_ptr=z_CV,
            z_stride=z_CV.stride(0),
            tokens=tokens,
            vocabulary=vocabulary,
            cap=spec.softcap,
            temperature=spec.temperature,
            CAP=spec.softcap != 0,
            SCALE=spec.temperature != 1,
            **arguments,
            **tiles,
        )
