"""Block sizes and the choice of a path: tables over device and shape, nothing is timed at run time.

Chosen by counting bytes and registers (`python -m benchmarks.resources` shows the compiler's
account); not yet measured on a GPU.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""It is not on every platform."""


class Choice(NamedTuple):
    """The path of calls on a kind of device, from so many tokens on; the first that fits."""

    device: str
    path: str
    min_tokens: int = 0
    half: bool = False
    """Only for half-precision inputs."""
    statistics: bool = False
    """Only where one stream is read at a time and no gradient is asked for."""


PATHS = (
    # float32 products that are exact run far from the tensor cores' speed: cuBLAS's are better
    Choice("cuda", "fused", min_tokens=64, half=True, statistics=True),
    Choice("cuda", "triton"),
)
"""Everything else: torch."""

CHUNK_BYTES = {"cuda": 2560 * 2**20, "cpu": 192 * 2**20}
"""Logits alive at once, by device. On a GPU, 2048 tokens of two streams at V = 151,936: enough that
adding to the head's float32 gradient (8 V D bytes a chunk) stays well under the product itself."""


class FusedTiles(NamedTuple):
    """Tiles of the fused statistics kernel, in tokens, vocabulary rows and hidden units."""

    tokens: int
    vocabulary: int
    hidden: int
    warps: int
    stages: int


FUSED = {
    (8, False): FusedTiles(128, 128, 32, warps=8, stages=3),
    (9, False): FusedTiles(128, 128, 64, warps=8, stages=4),
    (10, False): FusedTiles(128, 128, 64, warps=8, stages=4),
    (10, True): FusedTiles(128, 64, 64, warps=8, stages=3),
}
"""By major compute capability, and whether the head has a softcap where that needs other tiles to
stay clear of spills. Float32 operands take half the hidden units."""

ROW_BLOCK, ROW_WARPS = 2048, 8
"""Logits of a row that a program works on at a time: 8 per thread."""


def choose_path(device: torch.device, dtype: torch.dtype, tokens: int, statistics: bool) -> str:
    """The path of ``auto``: a row of ``PATHS``, or torch where Triton is not there or cannot."""
    if dtype != torch.float64 and HAS_TRITON:
        for row in PATHS:
            fits = row.device == device.type and tokens >= row.min_tokens
            if fits and statistics >= row.statistics and (dtype.itemsize == 2) >= row.half:
                return row.path
    return "torch"


def chunk_bytes(device: torch.device) -> int:
    """The default memory for logits on a device."""
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])


def row_tiles(vocabulary: int) -> tuple[int, int]:
    """(block, warps) of the kernels that read rows of logits."""
    block = min(ROW_BLOCK, max(128, 1 << (vocabulary - 1).bit_length()))
    return block, max(1, block * ROW_WARPS // ROW_BLOCK)


@functools.cache
def fused_tiles(device: torch.device, itemsize: int, softcap: bool) -> FusedTiles:
    """Tiles of the fused kernel; small ones where it is interpreted on a CPU."""
    if device.type != "cuda":
        return FusedTiles(16, 32, 16, warps=4, stages=1)
    return fused_tiles_of(torch.cuda.get_device_capability(device)[0], itemsize, softcap)


def fused_tiles_of(major: int, itemsize: int, softcap: bool) -> FusedTiles:
    """Tiles by major compute capability: those of the newest one known that is not newer."""
    known = max((m for m, _ in FUSED if m <= major), default=8)
    tiles = FUSED.get((known, softcap), FUSED[known, False])
    return tiles if itemsize == 2 else tiles._replace(hidden=tiles.hidden // 2)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent grid."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
