"""Statistics of one stream straight from hidden states: a matmul and an online softmax in one
Triton kernel. Logits live in registers only; forward only.

Shapes: N tokens, V rows of the lm_head, D hidden size, R tiles of the vocabulary.
A persistent grid walks over (tokens, vocabulary) tiles of the matmul, tokens first within a group,
so that a group's hidden states and lm_head rows stay in the L2 cache. A tile ends as four float32
numbers per token (see ``partials``): 16 N R bytes instead of 4 N V. Tiles are loaded by tensor
descriptors (TMA on Hopper and later) where the rows' strides allow it.
Oracle: reference.py.
"""
# launch options are not among a kernel's parameters
# pyright: reportCallIssue=false

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import partials
from .options import Spec
from .rows_triton import FAR, LN2, LOG2E, at_least, transformed
from .tuning import FP_FUSION, fused_tiles, multiprocessors

GROUP = 8
"""Token tiles that share a vocabulary tile while it is in the cache."""


@triton.jit
def fused_stats_kernel(
    hidden,
    weight,
    bias_ptr,
    targets_ptr,
    out_ptr,
    tokens,
    vocabulary,
    hidden_size,
    hidden_stride,
    weight_stride,
    cap,
    temperature,
    TARGETS: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_n = tl.cdiv(tokens, BLOCK_N)
    tiles_v = tl.cdiv(vocabulary, BLOCK_V)
    for tile in range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0)):
        group = tile // (GROUP * tiles_v)
        within = tile % (GROUP * tiles_v)
        group_size = min(tiles_n - group * GROUP, GROUP)
        tile_n = group * GROUP + within % group_size
        tile_v = within // group_size
        rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in range(0, hidden_size, BLOCK_D):
            if DESCRIPTORS:
                h = hidden.load([tile_n * BLOCK_N, k])
                w = weight.load([tile_v * BLOCK_V, k])
            else:
                at = k + tl.arange(0, BLOCK_D)
                inside = (at < hidden_size)[None, :]
                h_at = rows.to(tl.int64)[:, None] * hidden_stride + at[None, :]
                w_at = columns.to(tl.int64)[:, None] * weight_stride + at[None, :]
                h = tl.load(hidden + h_at, mask=(rows < tokens)[:, None] & inside, other=0.0)
                w = tl.load(weight + w_at, mask=(columns < vocabulary)[:, None] & inside, other=0.0)
            if UPCAST:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(h, w.T, z, input_precision="ieee")
        if BIAS:
            z += tl.load(bias_ptr + columns, mask=columns < vocabulary, other=0.0)[None, :]
        z = transformed(z, cap, temperature, CAP, SCALE)
        z = tl.where((columns < vocabulary)[None, :], z, float("-inf"))
        # (tiles, fields, tokens); each field is stored as soon as it is known, to free registers
        out = out_ptr + tile_v.to(tl.int64) * 4 * tokens + rows
        if TARGETS:
            target = tl.load(targets_ptr + rows, mask=rows < tokens, other=-1).to(tl.int32)
            y = tl.max(tl.where(columns[None, :] == target[:, None], z, float("-inf")), 1)
        else:
            y = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        tl.store(out + 3 * tokens, y, mask=rows < tokens)
        m = tl.max(z, 1)
        tl.store(out, m, mask=rows < tokens)
        m = tl.where(m == float("-inf"), 0.0, m)
        z = at_least((z - m[:, None]) * LOG2E, -FAR)
        e = tl.exp2(z)
        tl.store(out + tokens, tl.sum(e, 1), mask=rows < tokens)
        tl.store(out + 2 * tokens, tl.sum(e * z, 1) * LN2, mask=rows < tokens)


def stream_stats(
    spec: Spec,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor | None,
) -> Tensor:
    """Partials (4, N) of one stream, float32.

    Args:
        hidden_ND: float32, bfloat16 or float16.
        bias_V: float32.
        targets_N: rows of this weight, -1 where the target is not among them.
    """
    (n, d), v = hidden_ND.shape, weight_VD.shape[0]
    device = hidden_ND.device
    if not n or not v:
        empty = torch.zeros((partials.SINGLE, n), device=device)
        empty[0] = empty[3] = -torch.inf
        return empty
    hidden_ND, weight_VD = (
        x if x.stride(1) == 1 else x.contiguous() for x in (hidden_ND, weight_VD)
    )
    tiles = fused_tiles(device, hidden_ND.element_size())
    count = triton.cdiv(v, tiles.vocabulary)
    out = torch.empty((count, partials.SINGLE, n), device=device)
    block_h, block_w = [tiles.tokens, tiles.hidden], [tiles.vocabulary, tiles.hidden]
    by_descriptor = all(_describable(x) for x in (hidden_ND, weight_VD))
    grid = min(triton.cdiv(n, tiles.tokens) * count, multiprocessors(device))
    with torch.cuda.device_of(hidden_ND):  # not the current one
        fused_stats_kernel[(grid,)](
            TensorDescriptor.from_tensor(hidden_ND, block_h) if by_descriptor else hidden_ND,
            TensorDescriptor.from_tensor(weight_VD, block_w) if by_descriptor else weight_VD,
            out if bias_V is None else bias_V,
            out if targets_N is None else targets_N,
            out,
            n,
            v,
            d,
            hidden_ND.stride(0),
            weight_VD.stride(0),
            spec.softcap,
            spec.temperature,
            TARGETS=targets_N is not None,
            BIAS=bias_V is not None,
            CAP=spec.softcap != 0,
            SCALE=spec.temperature != 1,
            DESCRIPTORS=by_descriptor,
            UPCAST=not hidden_ND.is_cuda,  # the interpreter's bf16 matmuls are wrong
            GROUP=GROUP,
            BLOCK_N=tiles.tokens,
            BLOCK_V=tiles.vocabulary,
            BLOCK_D=tiles.hidden,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **FP_FUSION,
        )
    return partials.merge(out)


def _describable(x: Tensor) -> bool:
    """Whether TMA can address it: a Hopper GPU or later, and rows that start at 16-byte boundaries.
    Not float32, whose exact matmuls then spill."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.element_size() == 2 and _has_tma(x.device)


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
