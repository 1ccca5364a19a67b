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
from .rows_torch import TWO_PASSES


@triton.jit
def expm1_nonpositive(x):
    """e^x - 1 for x <= 0: its series where the difference would lose digits."""
    series = x * (
        1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720)))))
    )
    return tl.where(x > -0.3, series, tl.exp(x) - 1.0)


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
def transform_grad(z, cap, temperature, CAP: tl.constexpr, SCALE: tl.constexpr):
    """d z / d raw, from the transformed logits z."""
    one = tl.full(z.shape, 1.0, tl.float32)
    if CAP:
        t = z * (temperature / cap)
        one = 1.0 - t * t
    if SCALE:
        one = one / temperature
    return one


@triton.jit
def weighted(p, x):
    """p x, and 0 where p is 0, whatever x."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def exp(x):
    """e^x as 2^(x log2 e), which is what the hardware has."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def absorbed(m, s, t, x):
    """Lanes' partials (m, s, t), (LANES,), with a block x (ROWS, LANES) of more logits.

    Returns them, e^(x - m), and what sums under the old maxima are to be scaled by. A lane without
    a logit has LOW for its maximum, which is far below any logit and no infinity.
    """
    new_m = tl.maximum(m, tl.max(x, 0))
    shift = m - new_m
    scale = exp(shift)
    below = x - new_m[None, :]
    e = exp(below)
    t = scale * (t + s * shift) + tl.sum(weighted(e, below), 0)
    s = scale * s + tl.sum(e, 0)
    return new_m, s, t, e, scale


@triton.jit
def gathered(m, s, t):
    """All lanes' partials as one, scalars, and the lanes' scale; a maximum of -inf: no logit."""
    top = tl.max(m, 0)
    shift = m - top
    scale = exp(shift)
    t = tl.sum(weighted(scale, t + s * shift), 0)
    s = tl.sum(scale * s, 0)
    return top, s, t, scale


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1: the rounding of 1 + x is divided out again."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def excess(p, d, difference):
    """p (e^d - 1 - d) >= 0, given difference = p (e^d - 1); 0 where p is 0 and so is e^d p."""
    return tl.where(tl.abs(d) < 0.3, p * (d * d * series(d)), difference - weighted(p, d))


@triton.jit
def series(d):
    """(e^d - 1 - d) / d^2 for |d| < 0.3."""
    return 0.5 + d * (
        1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d * (1.0 / 720 + d * (1.0 / 5040))))
    )


LOW = tl.constexpr(-1.0e38)
"""The maximum of no logits, while they are read."""


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
    m = tl.full((LANES,), LOW, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    t = tl.zeros((LANES,), tl.float32)
    n = tl.full((LANES,), LOW, tl.float32)
    r = tl.zeros((LANES,), tl.float32)
    w = tl.zeros((LANES,), tl.float32)
    c = tl.zeros((LANES,), tl.float32)
    at = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, vocabulary, ROWS * LANES):
        columns = start + at
        inside = columns < vocabulary
        z = tl.load(z_ptr + columns, mask=inside, other=float("-inf"))
        u = z
        if PAIRED:  # before z is waited for
            u = tl.load(u_ptr + columns, mask=inside, other=float("-inf"))
        if BIAS:
            z += tl.load(bias_ptr + columns, mask=inside, other=0.0)
        if CAP or SCALE:
            z = tl.where(inside, transformed(z, cap, temperature, CAP, SCALE), float("-inf"))
        if BIAS or CAP or SCALE:
            tl.store(z_ptr + columns, z, mask=inside)
        before = s
        offset = m - n
        m, s, t, e, scale = absorbed(m, s, t, z)
        if PAIRED:
            if TEACHER_BIAS:
                u += tl.load(teacher_bias_ptr + columns, mask=inside, other=0.0)
            if CAP or SCALE:
                u = tl.where(inside, transformed(u, cap, temperature, CAP, SCALE), float("-inf"))
            if TEACHER_BIAS or CAP or SCALE:
                tl.store(u_ptr + columns, u, mask=inside)
            n, r, w, _, _ = absorbed(n, r, w, u)
            c = scale * (c + weighted(before, offset - (m - n)))
            c += tl.sum(weighted(e, (z - u) - (m - n)[None, :]), 0)
    lanes_s = s
    offset = m - n
    m, s, t, scale = gathered(m, s, t)
    if PAIRED:
        n, r, w, _ = gathered(n, r, w)
        c = tl.sum(weighted(scale, c + weighted(lanes_s, offset - (m - n))), 0)
    else:
        n, r, w, c = 0.0, 1.0, 0.0, 0.0
    m = tl.where(m == LOW, float("-inf"), m)
    n = tl.where(n == LOW, float("-inf"), n)
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
    """See ``rows_torch.stats``."""
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
    """See ``rows_torch.whole_stats``; one launch."""
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
def _reverse_kl(p, q, d, gap, centre, beta):
    pd = weighted(p, d)
    value = tl.where(tl.abs(d) < 0.3, pd * d * series(d), (q - p) - pd)
    return value, 0.0, weighted(p, gap - centre)


@triton.jit
def _forward_kl(p, q, d, gap, centre, beta):
    # q - p loses every digit where the two agree
    near = tl.abs(d) < 0.3
    pd = weighted(p, d)
    qd = weighted(q, d)
    value = tl.where(near, qd * d * series(-d), (p - q) + qd)
    return value, 0.0, tl.where(near, -(pd + pd * d * series(d)), p - q)


@triton.jit
def _jsd(p, q, d, gap, centre, beta):
    expm1 = expm1_nonpositive(-tl.abs(d))
    difference = tl.where(d < 0, p, -q) * expm1
    half = log1p(tl.where(d < 0, beta, 1.0 - beta) * expm1)
    to_p = half + tl.maximum(d, 0.0)
    kl_p = excess(p, to_p, beta * difference)
    kl_q = excess(q, half + tl.maximum(-d, 0.0), (beta - 1.0) * difference)
    value = (1.0 - beta) * kl_p + beta * kl_q
    return value, kl_p, (beta - 1.0) * weighted(p, to_p + centre)


FORMULAS = {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "jsd": _jsd}
"""``rows_torch.FORMULAS`` for a block of one row: terms of the value, terms of the sum that centres
the gradient (0.0 unless in ``TWO_PASSES``), and the gradient."""


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
    centre = 0.0
    weight = 0.0
    if GRAD:
        grad_ptr += row * grad_stride
        weight = tl.load(weight_ptr + row)
        if CENTRE:
            centre = tl.load(centre_ptr + row)
    value = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = tl.load(z_ptr + columns, mask=inside, other=float("-inf"))
        u = tl.load(u_ptr + columns, mask=inside, other=float("-inf"))
        p = exp((z - m) - log_s)
        q = exp((u - n) - log_r)
        # z - u, like m - n, is exact where the two almost agree
        gap = (z - u) - (m - n)
        d = tl.where((p == 0) & (q == 0), 0.0, (log_s - log_r) - gap)
        of_value, of_second, grad = FORMULA(p, q, d, gap, centre, beta)
        value += of_value
        if TWO_PASSES:
            second += of_second
        if GRAD:
            if CAP or SCALE:
                grad = weighted(grad, transform_grad(z, cap, temperature, CAP, SCALE))
            if IN_PLACE:
                tl.debug_barrier()
            # an infinite value has no gradient, but a weight of 0 silences it
            grad = tl.where(weight == 0, 0.0, grad * weight)
            tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + row, tl.sum(value, 0))
    if TWO_PASSES:
        tl.store(sums_ptr + tokens + row, tl.sum(second, 0))


def divergence(
    spec: Spec,
    z_CV: Tensor,
    u_CV: Tensor,
    norm_4C: Tensor,
    centre_C: Tensor | None,
    weight_C: Tensor | None = None,
    grad_CV: Tensor | None = None,
) -> Tensor:
    """See ``rows_torch.divergence``."""
    two_passes = spec.kind in TWO_PASSES
    if two_passes and centre_C is None and weight_C is not None:
        sums = divergence(spec, z_CV, u_CV, norm_4C, None)
        divergence(spec, z_CV, u_CV, norm_4C, sums[1], weight_C, grad_CV)
        return sums
    sums = z_CV.new_empty((2 if two_passes else 1, z_CV.shape[0]))
    _launch(
        divergence_kernel,
        spec,
        z_CV,
        tuning.row_tiles(z_CV.shape[1]),
        u_ptr=u_CV,
        grad_ptr=grad_CV,
        norm_ptr=norm_4C,
        centre_ptr=centre_C,
        weight_ptr=weight_C,
        sums_ptr=sums,
        u_stride=u_CV.stride(0),
        grad_stride=0 if grad_CV is None else grad_CV.stride(0),
        beta=spec.parameters[0] if spec.parameters else 0.0,
        FORMULA=FORMULAS[spec.kind],
        TWO_PASSES=two_passes,
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
    b = 0.0
    target = -1
    if TARGETS:
        b = tl.load(b_ptr + row)
        target = tl.load(targets_ptr + row)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = tl.load(z_ptr + columns, mask=inside, other=float("-inf"))
        grad = tl.where(a == 0, 0.0, a * exp((z - m) - log_s))
        if TARGETS:
            grad += tl.where(columns == target, b, 0.0)
        if CAP or SCALE:
            grad = weighted(grad, transform_grad(z, cap, temperature, CAP, SCALE))
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
    """See ``rows_torch.softmax_grad``."""
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
