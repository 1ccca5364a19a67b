"""The matmuls between hidden states, logits and gradients, with float32 results.

Shapes: C tokens of a chunk, V rows of the lm_head, D hidden size. Half-precision operands are
multiplied as they are where the device has such a matmul with a float32 result. CPUs have none:
there logits come from operands cast a few rows of the lm_head at a time, and bfloat16 gradients,
which are rounded anyway, from bfloat16 matmuls. float64 stays float64. Call with autocast off.

torch multiplies float32 on a CPU by MKL, which keeps AVX-512 to Intel's; oneDNN does not, and its
linear layer is as exact. The switch that lets oneDNN multiply bfloat16 into float32
(``torch.backends.mkldnn.matmul.fp32_precision``) stays untouched: other threads would see it.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

HEAD_ROWS = 4096
"""Rows of an lm_head that are multiplied at a time on a CPU, where operands are cast or the result
is copied."""
BIAS_ROWS = 128
"""Rows of G that are cast to float32 at a time, for the bias's gradient."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _half_matmuls(x: Tensor) -> bool:
    """The CPU multiplies such operands no slower than float32."""
    return x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def linear_by_onednn() -> bool:
    """Whether float32 logits come from oneDNN."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )


def chunks(n: int, rows: int) -> Iterator[slice]:
    """Consecutive slices of ``range(n)`` of at most ``rows``."""
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def logits(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> None:
    """h W^T into float32 memory (float64 for float64)."""
    dtype = out_CV.dtype
    onednn = dtype == torch.float32 and hidden_CD.device.type == "cpu" and linear_by_onednn()
    if hidden_CD.dtype == dtype and not onednn:
        torch.mm(hidden_CD, weight_VD.T, out=out_CV)
    elif hidden_CD.is_cuda:
        torch.mm(hidden_CD, weight_VD.T, out_dtype=dtype, out=out_CV)
    else:
        hidden_CD = hidden_CD.to(dtype)
        for v in chunks(weight_VD.shape[0], HEAD_ROWS):
            weight = weight_VD[v].to(dtype)
            if onednn and hidden_CD.numel():
                linear = torch.ops.mkldnn._linear_pointwise
                out_CV[:, v] = linear(hidden_CD, weight, None, "none", [], "")
            else:
                torch.mm(hidden_CD, weight.T, out=out_CV[:, v])


def hidden_gradient(grad_CV: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """G W, (C, D), accumulated in float32 and returned in it, or in bfloat16."""
    if weight_VD.dtype == dtype:
        return grad_CV @ weight_VD
    if weight_VD.is_cuda:
        return torch.mm(grad_CV.to(weight_VD.dtype), weight_VD, out_dtype=dtype)
    if grad_CV.dtype == weight_VD.dtype and _half_matmuls(weight_VD):
        return grad_CV @ weight_VD
    out_CD = weight_VD.new_zeros((grad_CV.shape[0], weight_VD.shape[1]), dtype=dtype)
    for v in chunks(weight_VD.shape[0], HEAD_ROWS):
        out_CD.addmm_(grad_CV[:, v].to(dtype), weight_VD[v].to(dtype))
    return out_CD


def add_weight_gradient(
    dweight_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor, first: bool
) -> None:
    """dW += G^T H, in float32; the first sum replaces what dW holds."""
    dtype, beta = dweight_VD.dtype, 0 if first else 1
    if hidden_CD.dtype == dtype:
        dweight_VD.addmm_(grad_CV.T, hidden_CD, beta=beta)
    elif hidden_CD.is_cuda:
        grad_CV, out = grad_CV.to(hidden_CD.dtype), dweight_VD
        torch.addmm(out, grad_CV.T, hidden_CD, out_dtype=dtype, beta=beta, out=out)
    elif grad_CV.dtype == hidden_CD.dtype and _half_matmuls(hidden_CD):
        for v in chunks(grad_CV.shape[1], HEAD_ROWS):
            product = grad_CV[:, v].T @ hidden_CD
            dweight_VD[v].copy_(product) if first else dweight_VD[v].add_(product)
    else:
        hidden_CD = hidden_CD.to(dtype)
        for v in chunks(grad_CV.shape[1], HEAD_ROWS):
            dweight_VD[v].addmm_(grad_CV[:, v].T.to(dtype), hidden_CD, beta=beta)


def weight_gradient(grad_NV: Tensor, hidden_ND: Tensor, scale_N: Tensor) -> Tensor:
    """G^T diag(s) H, (V, D) in the hidden states' dtype.

    float16 has too few exponents for s H, and too few to be summed in: there s is relative to its
    largest, and the sum float32.
    """
    dtype = hidden_ND.dtype
    if dtype == scale_N.dtype or (dtype == torch.bfloat16 and hidden_ND.is_cuda):
        return grad_NV.T @ scaled(hidden_ND, scale_N)
    if not len(scale_N):
        return hidden_ND.new_zeros(grad_NV.shape[1], hidden_ND.shape[1])
    top = scale_N.abs().amax().clamp_(min=torch.finfo(scale_N.dtype).tiny)
    sum_VD = scale_N.new_empty((grad_NV.shape[1], hidden_ND.shape[1]))
    add_weight_gradient(sum_VD, grad_NV, scaled(hidden_ND, scale_N / top), first=True)
    return torch.mul(sum_VD, top, out=torch.empty_like(sum_VD, dtype=dtype))


def scaled(hidden_ND: Tensor, scale_N: Tensor) -> Tensor:
    """diag(s) H, rounded to H's dtype; 0 where s is 0, whatever H is."""
    out = (hidden_ND * scale_N[:, None]).masked_fill_((scale_N == 0)[:, None], 0)
    return out.to(hidden_ND.dtype)


def bias_gradient(grad_NV: Tensor, scale_N: Tensor) -> Tensor:
    """G^T s, (V,) in s's dtype; G is cast a few rows at a time."""
    out = scale_N.new_zeros(grad_NV.shape[1])
    for c in chunks(len(scale_N), BIAS_ROWS):
        out += scale_N[c] @ grad_NV[c].to(scale_N.dtype)
    return out


def narrow(z_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, V) of ``dtype`` in the memory of (C, V) logits, each row at its row's start."""
    if dtype == z_CV.dtype or not z_CV.shape[1]:
        return z_CV.to(dtype)
    rows = z_CV.as_strided((z_CV.shape[0], z_CV.stride(0)), (z_CV.stride(0), 1))
    return rows.view(dtype)[:, : z_CV.shape[1]]
