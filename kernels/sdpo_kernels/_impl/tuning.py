"""Block sizes and the choice of an implementation, by device and shape; nothing is timed at run
time.

Row kernels and chunks as measured on an H200 (benchmarks/LOG.md); the fused kernel's tiles are
chosen by counting bytes and registers (`python -m benchmarks.resources` prints what the compiler
reports).
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""It is not on every platform."""

FUSED_MIN_TOKENS = 64

CHUNK_BYTES = {"cuda": 1280 * 2**20, "cpu": 192 * 2**20}
"""Logits alive at once, by device. On a GPU, 1024 tokens of two streams at V = 151,936."""

GRAD_BYTES = {"cuda": 2560 * 2**20, "cpu": 0}
"""Gradients with respect to logits that a call may keep for its backward, by device. On a GPU, 8192
tokens at V = 151,936 in half precision: no more than a float32 dW of D = 4096 would take."""

ROW_BLOCK, ROW_WARPS, ROW_REGISTERS = 4096, 16, 64
"""Logits of a row that a program processes at a time, 8 per thread, and the registers a thread may
have at most: with 64, two programs share a multiprocessor."""
TWO_PASS_REGISTERS = 128
"""The same for the values of a divergence of two passes, which would spill with fewer."""

LANES, LANE_ROWS, LANE_WARPS = 1024, 2, 8
"""Running statistics of a row that the statistics kernel keeps apart until its end, 4 per thread,
and the logits that each takes in at a time."""

FP_FUSION = {"enable_fp_fusion": True}
"""Fused multiply-adds: Triton's default until 3.10, here whatever the release."""


class FusedTiles(NamedTuple):
    """Tiles of the fused statistics kernel, in tokens, vocabulary rows and hidden units."""

    tokens: int
    vocabulary: int
    hidden: int
    warps: int
    stages: int


FUSED = {
    8: FusedTiles(128, 128, 32, warps=8, stages=3),
    9: FusedTiles(128, 128, 64, warps=8, stages=4),
}
"""Tiles from this major compute capability on. Float32 operands take half the hidden units."""


def choose_impl(
    device: torch.device, dtype: torch.dtype, tokens: int, widths: Sequence[int], statistics: bool
) -> str:
    """What ``impl="auto"`` stands for.

    Args:
        widths: hidden sizes of the streams.
        statistics: one stream is read at a time, and no gradient is asked for.
    """
    if device.type != "cuda" or dtype == torch.float64 or not HAS_TRITON:
        return "torch"
    # exact float32 matmuls run far from the tensor cores' speed: cuBLAS is better at them
    fused = statistics and dtype.itemsize == 2 and tokens >= FUSED_MIN_TOKENS
    # other rows can be read neither by descriptors nor by wide accesses, and spill registers
    fused = fused and all(d * dtype.itemsize % 16 == 0 for d in widths)
    return "fused" if fused else "triton"


def chunk_bytes(device: torch.device) -> int:
    """The default memory for logits on a device."""
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])


def grad_bytes(device: torch.device) -> int:
    """The default memory for kept gradients on a device."""
    return GRAD_BYTES.get(device.type, GRAD_BYTES["cpu"])


def lane_tiles(vocabulary: int) -> dict[str, int]:
    """Tiles and launch options of the statistics kernel."""
    lanes = min(LANES, max(128, 1 << (vocabulary - 1).bit_length()))
    warps = max(1, lanes * LANE_WARPS // LANES)
    return {"LANES": lanes, "ROWS": LANE_ROWS, "num_warps": warps, **FP_FUSION}


def row_tiles(vocabulary: int, first_of_two: bool = False) -> dict[str, int]:
    """Block size and launch options of the kernels that read rows of logits.

    Args:
        first_of_two: the values of a divergence of two passes.
    """
    block = min(ROW_BLOCK, max(128, 1 << (vocabulary - 1).bit_length()))
    warps = max(1, block * ROW_WARPS // ROW_BLOCK)
    # Triton for AMD has no such option
    registers = TWO_PASS_REGISTERS if first_of_two else ROW_REGISTERS
    limit = {} if torch.version.hip else {"maxnreg": registers}
    return {"BLOCK": block, "num_warps": warps, **limit, **FP_FUSION}


@functools.cache
def fused_tiles(device: torch.device, itemsize: int) -> FusedTiles:
    """Tiles of the fused kernel; small ones where it is interpreted on a CPU."""
    if device.type != "cuda":
        return FusedTiles(16, 32, 16, warps=4, stages=1)
    return fused_tiles_for(torch.cuda.get_device_capability(device)[0], itemsize)


def fused_tiles_for(major: int, itemsize: int) -> FusedTiles:
    """Tiles for a major compute capability: those of the newest known one that is not newer."""
    tiles = FUSED[max((known for known in FUSED if known <= major), default=8)]
    return tiles if itemsize == 2 else tiles._replace(hidden=tiles.hidden // 2)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent grid."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
