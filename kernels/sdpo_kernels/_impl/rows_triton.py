"""Operations on rows of logits in memory, one Triton kernel each. The contract is ``torch_rows``'s.

Shapes: C tokens of a chunk, V columns. One program reads one row, left to right, in blocks; offsets
of rows are int64. Bytes per logit: stats reads 4 (and writes 4 where logits are transformed), the
gradient reads 4 and writes 2 in bf16, each per stream where two are read.

A bf16 gradient is left in the float32 logits' memory: block k of a row is read at bytes
[4kB, 4(k+1)B) and written at [2kB, 2(k+1)B), behind everything yet to be read. Warps of a program
drift apart, so a barrier stands between a block's loads and its stores.
"""
# a launch's num_warps and num_stages are not among the kernel's parameters
# pyright: reportCallIssue=false

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .options import Transform
from .partials import PAIR, SINGLE
from .rows_torch import narrow
from .tiles import (
    excess,
    expm1_nonpositive,
    log1p,
    online,
    transform_grad,
    weighted,
)
from .tiles import transform as transformed
from .tuning import row_tiles

KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}


@triton.jit
def stats_kernel(
    z_ptr,
    u_ptr,
    bias_ptr,
    hindsight_bias_ptr,
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
    HINDSIGHT_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
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
            if HINDSIGHT_BIAS:
                x += tl.load(hindsight_bias_ptr + target, mask=here, other=0.0)
            x = tl.where(here, transformed(x, cap, temperature, CAP, SCALE), float("-inf"))
        tl.debug_barrier()
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
            if HINDSIGHT_BIAS:
                u += tl.load(hindsight_bias_ptr + columns, mask=inside, other=0.0)
            if CAP or SCALE:
                u = tl.where(inside, transformed(u, cap, temperature, CAP, SCALE), float("-inf"))
            if HINDSIGHT_BIAS or CAP or SCALE:
                tl.store(u_ptr + columns, u, mask=inside)
            n, r, w, _, _ = online(n, r, w, u)
            c = scale * (c + weighted(before, offset - (m - n)))
            c += tl.sum(weighted(e, (z - u) - (m - n)), 0)
    out_ptr += row
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
    z_CV: Tensor,
    u_CV: Tensor | None,
    targets_C: Tensor | None,
    transform: Transform,
    bias_V: Tensor | None = None,
    hindsight_bias_V: Tensor | None = None,
) -> Tensor:
    """See ``torch_rows.stats``."""
    tokens, vocabulary = z_CV.shape
    paired = u_CV is not None
    out = z_CV.new_empty((PAIR if paired else SINGLE, tokens))
    u = z_CV if u_CV is None else u_CV
    block, warps = row_tiles(vocabulary)
    with on_device(z_CV):
        stats_kernel[(tokens,)](
            z_CV,
            u,
            _or(bias_V, z_CV),
            _or(hindsight_bias_V, z_CV),
            _or(targets_C, z_CV),
            out,
            tokens,
            vocabulary,
            z_CV.stride(0),
            u.stride(0),
            transform.softcap,
            transform.temperature,
            PAIRED=paired,
            TARGETS=targets_C is not None,
            BIAS=bias_V is not None,
            HINDSIGHT_BIAS=hindsight_bias_V is not None,
            CAP=transform.softcap != 0,
            SCALE=transform.temperature != 1,
            BLOCK=block,
            num_warps=warps,
        )
    return out


@triton.jit
def divergence_kernel(
    z_ptr,
    u_ptr,
    grad_ptr,
    norm_ptr,
    centre_ptr,
    weight_ptr,
    values_ptr,
    tokens,
    vocabulary,
    z_stride,
    u_stride,
    grad_stride,
    beta,
    cap,
    temperature,
    KIND: tl.constexpr,
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
        if KIND != 1:
            centre = tl.load(centre_ptr + row)
    value = tl.zeros((BLOCK,), tl.float32)
    other = tl.zeros((BLOCK,), tl.float32)
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
        if KIND == 0:
            value += excess(p, d, difference)
            grad = weighted(p, gap - centre)
        elif KIND == 1:
            value += excess(q, -d, -difference)
            grad = -difference
        else:
            half = log1p(tl.where(d < 0, beta, 1.0 - beta) * expm1)
            to_p = half + tl.maximum(d, 0.0)
            value += excess(p, to_p, beta * difference)
            other += excess(q, half + tl.maximum(-d, 0.0), (beta - 1.0) * difference)
            grad = (beta - 1.0) * weighted(p, to_p + centre)
        if GRAD:
            if CAP or SCALE:
                grad = weighted(grad, transform_grad(z, cap, temperature, CAP, SCALE))
            if NARROW:
                tl.debug_barrier()
            # an infinite value has no gradient, but a weight of 0 silences it
            grad = tl.where(weight == 0, 0.0, grad * weight)
            tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(values_ptr + row, tl.sum(value, 0))
    if KIND == 2:
        tl.store(values_ptr + tokens + row, tl.sum(other, 0))


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
    """See ``torch_rows.divergence``; the gradient is in ``grad_dtype``."""
    tokens, vocabulary = z_CV.shape
    values = z_CV.new_empty((2 if kind == "jsd" else 1, tokens))
    grad = None if weight_C is None else narrow(z_CV, grad_dtype)
    block, warps = row_tiles(vocabulary)
    with on_device(z_CV):
        divergence_kernel[(tokens,)](
            z_CV,
            u_CV,
            _or(grad, z_CV),
            norm_4C,
            _or(centre_C, z_CV),
            _or(weight_C, z_CV),
            values,
            tokens,
            vocabulary,
            z_CV.stride(0),
            u_CV.stride(0),
            0 if grad is None else grad.stride(0),
            beta,
            transform.softcap,
            transform.temperature,
            KIND=KINDS[kind],
            GRAD=grad is not None,
            NARROW=grad_dtype != z_CV.dtype,
            CAP=transform.softcap != 0,
            SCALE=transform.temperature != 1,
            BLOCK=block,
            num_warps=warps,
        )
    return values, grad


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
    z_CV: Tensor,
    norm_2C: Tensor,
    a_C: Tensor,
    b_C: Tensor | None,
    targets_C: Tensor | None,
    transform: Transform,
    grad_dtype: torch.dtype,
) -> Tensor:
    """See ``torch_rows.softmax_grad``; the gradient is in ``grad_dtype``."""
    tokens, vocabulary = z_CV.shape
    grad = narrow(z_CV, grad_dtype)
    block, warps = row_tiles(vocabulary)
    with on_device(z_CV):
        softmax_grad_kernel[(tokens,)](
            z_CV,
            grad,
            norm_2C,
            a_C,
            _or(b_C, z_CV),
            _or(targets_C, z_CV),
            tokens,
            vocabulary,
            z_CV.stride(0),
            grad.stride(0),
            transform.softcap,
            transform.temperature,
            TARGETS=b_C is not None,
            NARROW=grad_dtype != z_CV.dtype,
            CAP=transform.softcap != 0,
            SCALE=transform.temperature != 1,
            BLOCK=block,
            num_warps=warps,
        )
    return grad


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the tensors' device, not to the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _or(x: Tensor | None, placeholder: Tensor) -> Tensor:
    """A pointer for an argument that the kernel does not read."""
    return placeholder if x is None else x.contiguous() if x.ndim == 1 else x
