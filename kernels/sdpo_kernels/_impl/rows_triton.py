"""Operations on rows of logits in memory, one Triton kernel each: ``rows_torch``'s functions, in
float32, and the @triton.jit helpers that ``fused_triton`` shares.

Shapes: C tokens of a chunk, V columns. One program reads one row, left to right, in blocks; offsets
of rows are int64. Bytes per logit: stats reads 4 (and writes 4 where logits are transformed), the
gradient reads 4 and writes 2 in bf16, each per stream where two are read.

A bf16 gradient is left in the float32 logits' memory: block k of a row is read at bytes
[4kB, 4(k+1)B) and written at [2kB, 2(k+1)B), behind everything yet to be read. Warps of a program
drift apart, so a barrier stands between a block's loads and its stores.
"""
# launch options are not among a kernel's parameters, and no argument is a tl.constexpr
# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matmul import narrow
from .options import Spec
from .partials import PAIR, SINGLE
from .rows_torch import TWO_PASSES
from .tuning import row_tiles


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
def online(m, s, t, x):
    """Partials (m, s, t) of one row, scalars, with a block x of more logits; -inf is none.

    Returns them, e^(x - m), and what sums under the old maximum are to be scaled by.
    """
    new_m = tl.maximum(m, tl.max(x, 0))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)
    shift = tl.where(s == 0, 0.0, m - base)
    scale = tl.exp(shift)
    e = tl.exp(x - base)
    t = scale * (t + s * shift) + tl.sum(weighted(e, x - base), 0)
    s = scale * s + tl.sum(e, 0)
    return new_m, s, t, e, scale


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1: the rounding of 1 + x is divided out again."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def excess(p, d, difference):
    """p (e^d - 1 - d) >= 0, given difference = p (e^d - 1); 0 where p is 0 and so is e^d p."""
    series = d * d * (0.5 + d * (1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d * (1.0 / 720)))))
    return tl.where(tl.abs(d) < 0.3, p * series, difference - weighted(p, d))


@triton.jit
def stats_kernel(
    z_ptr,
    u_ptr,
    bias_ptr,
    teacher_bias_ptr,
    targets_ptr,
    out_ptr,
    tokens,
    vocabulary,
    z_stride,
    u_stride,
    cap,
    temperature,
    PAIRED: tl.constexpr,
    TARGETS: tl.constexpr,
    BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    out_ptr += row
    m = float("-inf")
    s = 0.0
    t = 0.0
    y = float("-inf")
    n = float("-inf")
    r = 0.0
    w = 0.0
    x = float("-inf")
    c = 0.0
    if PAIRED:
        u_ptr += row * u_stride
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
    tl.store(out_ptr + 3 * tokens, y)
    if PAIRED:
        tl.store(out_ptr + 7 * tokens, x)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = tl.load(z_ptr + columns, mask=inside, other=float("-inf"))
        if BIAS:
            z += tl.load(bias_ptr + columns, mask=inside, other=0.0)
        if CAP or SCALE:
            z = tl.where(inside, transformed(z, cap, temperature, CAP, SCALE), float("-inf"))
        if BIAS or CAP or SCALE:
            tl.store(z_ptr + columns, z, mask=inside)
        before = s
        offset = m - n
        m, s, t, e, scale = online(m, s, t, z)
        if PAIRED:
            u = tl.load(u_ptr + columns, mask=inside, other=float("-inf"))
            if TEACHER_BIAS:
                u += tl.load(teacher_bias_ptr + columns, mask=inside, other=0.0)
            if CAP or SCALE:
                u = tl.where(inside, transformed(u, cap, temperature, CAP, SCALE), float("-inf"))
            if TEACHER_BIAS or CAP or SCALE:
                tl.store(u_ptr + columns, u, mask=inside)
            n, r, w, _, _ = online(n, r, w, u)
            c = scale * (c + weighted(before, offset - (m - n)))
            c += tl.sum(weighted(e, (z - u) - (m - n)), 0)
    tl.store(out_ptr, m)
    tl.store(out_ptr + tokens, s)
    tl.store(out_ptr + 2 * tokens, t)
    if PAIRED:
        tl.store(out_ptr + 4 * tokens, n)
        tl.store(out_ptr + 5 * tokens, r)
        tl.store(out_ptr + 6 * tokens, w)
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
    _launch(
        stats_kernel,
        spec,
        z_CV,
        u_ptr=u_CV,
        bias_ptr=bias_V,
        teacher_bias_ptr=teacher_bias_V,
        targets_ptr=targets_C,
        out_ptr=out,
        u_stride=0 if u_CV is None else u_CV.stride(0),
        PAIRED=u_CV is not None,
        TARGETS=targets_C is not None,
        BIAS=bias_V is not None,
        TEACHER_BIAS=teacher_bias_V is not None,
    )
    return out


@triton.jit
def _reverse_kl(p, q, d, gap, expm1, difference, centre, beta):
    return excess(p, d, difference), 0.0, weighted(p, gap - centre)


@triton.jit
def _forward_kl(p, q, d, gap, expm1, difference, centre, beta):
    return excess(q, -d, -difference), 0.0, -difference


@triton.jit
def _jsd(p, q, d, gap, expm1, difference, centre, beta):
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
    NARROW: tl.constexpr,
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
        p = tl.exp((z - m) - log_s)
        q = tl.exp((u - n) - log_r)
        # z - u, like m - n, is exact where the two almost agree
        gap = (z - u) - (m - n)
        d = tl.where((p == 0) & (q == 0), 0.0, (log_s - log_r) - gap)
        expm1 = expm1_nonpositive(-tl.abs(d))
        difference = tl.where(d < 0, p, -q) * expm1
        of_value, of_second, grad = FORMULA(p, q, d, gap, expm1, difference, centre, beta)
        value += of_value
        if TWO_PASSES:
            second += of_second
        if GRAD:
            if CAP or SCALE:
                grad = weighted(grad, transform_grad(z, cap, temperature, CAP, SCALE))
            if NARROW:
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
    weight_C: Tensor | None,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """See ``rows_torch.divergence``."""
    two_passes = spec.kind in TWO_PASSES
    sums = z_CV.new_empty((2 if two_passes else 1, z_CV.shape[0]))
    grad = None if weight_C is None else narrow(z_CV, grad_dtype)
    _launch(
        divergence_kernel,
        spec,
        z_CV,
        u_ptr=u_CV,
        grad_ptr=grad,
        norm_ptr=norm_4C,
        centre_ptr=centre_C,
        weight_ptr=weight_C,
        sums_ptr=sums,
        u_stride=u_CV.stride(0),
        grad_stride=0 if grad is None else grad.stride(0),
        beta=spec.parameters[0] if spec.parameters else 0.0,
        FORMULA=FORMULAS[spec.kind],
        TWO_PASSES=two_passes,
        CENTRE=centre_C is not None,
        GRAD=grad is not None,
        NARROW=grad_dtype != z_CV.dtype,
    )
    return sums, grad


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
    NARROW: tl.constexpr,
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
        grad = a * tl.exp((z - m) - log_s)
        if TARGETS:
            grad += tl.where(columns == target, b, 0.0)
        if CAP or SCALE:
            grad = weighted(grad, transform_grad(z, cap, temperature, CAP, SCALE))
        if NARROW:
            tl.debug_barrier()
        tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def softmax_grad(
    spec: Spec,
    z_CV: Tensor,
    norm_2C: Tensor,
    a_C: Tensor,
    b_C: Tensor | None,
    targets_C: Tensor | None,
    grad_dtype: torch.dtype,
) -> Tensor:
    """See ``rows_torch.softmax_grad``."""
    grad = narrow(z_CV, grad_dtype)
    _launch(
        softmax_grad_kernel,
        spec,
        z_CV,
        grad_ptr=grad,
        norm_ptr=norm_2C,
        a_ptr=a_C,
        b_ptr=b_C,
        targets_ptr=targets_C,
        grad_stride=grad.stride(0),
        TARGETS=b_C is not None,
        NARROW=grad_dtype != z_CV.dtype,
    )
    return grad


def _launch(kernel, spec: Spec, z_CV: Tensor, **arguments) -> None:
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
            **row_tiles(vocabulary),
        )
