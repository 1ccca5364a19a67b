"""The mesh of ranks that a model is laid out on: process group, degrees, attention."""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.distributed as dist

from ..config import ParallelConfig
from ..engine import ROW_MULTIPLE, Ranks
from ..errors import SdpoError
from ..huggingface import read_config
from . import cpu
from .attention import Choice, Machine, choose_attention, importable

cpu.prepare()  # before torchtitan binds the device
from torchtitan.config import CommConfig, ParallelismConfig  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.tools import utils  # noqa: E402


class Mesh:
    """The ranks of torchrun's process group, arranged as ``parallel`` says.

    Args:
        share_prefix: rows are to share prefixes, where the layout can.

    Raises:
        SdpoError: the degrees do not divide the ranks, or the sizes of the model in ``folder``.
    """

    def __init__(self, folder: str, parallel: ParallelConfig, *, share_prefix: bool = True):
        world_size = init_distributed(host_memory=parallel.cpu_offload)
        self.parallel = parallel
        self.device = utils.get_local_device()
        self.attention = _attention(parallel, self.device, share_prefix)
        _expect_many_shapes()
        check_layout(folder, parallel, world_size)
        self.titan = ParallelismConfig(
            data_parallel_replicate_degree=parallel.replicate,
            tensor_parallel_degree=parallel.tensor,
            enable_sequence_parallel=parallel.sequence_parallel,
            context_parallel_degree=parallel.context,
        )
        degrees = parallel.replicate, parallel.context, parallel.tensor
        self.dims = _dims(dist.group.WORLD, *degrees)
        dist_utils.set_spmd_backend(self.titan.spmd_backend)
        self.context: Callable[[], contextlib.AbstractContextManager[object]] = (
            dist_utils.get_spmd_context(parallel_dims=self.dims)
        )
        block = 2 * ROW_MULTIPLE if self.attention.backend == "flex_flash" else ROW_MULTIPLE
        self.row_multiple = math.lcm(block * parallel.context, parallel.tensor)
        batch = self.dims.get_optional_mesh("batch")
        self.ranks = Ranks(
            rank=dist.get_rank(),
            world_size=world_size,
            dp_rank=batch.get_local_rank() if batch is not None else 0,
            dp_degree=batch.size() if batch is not None else 1,
            cp_degree=parallel.context,
        )

    @property
    def degrees(self) -> dict[str, int]:
        """The mesh's degrees, as a checkpoint's manifest has them."""
        d = self.dims
        return {"replicate": d.dp_replicate, "shard": d.dp_shard, "context": d.cp, "tensor": d.tp}


def init_distributed(*, host_memory: bool = False) -> int:
    """Join torchrun's process group, or be a group of one; returns the world size.

    Args:
        host_memory: tensors in host memory take part in collectives, beside the accelerator's.
    """
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # 0: any that is free
    if dist.is_initialized():
        return dist.get_world_size()
    utils.device_module.set_device(utils.get_local_device())
    # far beyond what a run's own watchdog allows, which names the ranks that stall
    comm = CommConfig(init_timeout_seconds=7200, trace_buf_size=0)
    beside = host_memory and utils.device_type != "cpu"
    with quiet():
        return dist_utils.init_distributed(comm, enable_cpu_backend=beside, base_folder="")


def check_layout(folder: str, parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a layout that cannot run, before any weights load.

    Raises:
        SdpoError: the degrees do not divide the ranks, or the model's heads or widths.
    """
    parallel.shards(world_size)
    config = read_config(folder)
    fields = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    for field in fields:
        if (size := config.get(field)) is not None and size % parallel.tensor:
            raise SdpoError(
                f"tensor={parallel.tensor} does not divide {folder}/config.json's {field}={size}: "
                "choose a degree that does"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Mute torchtitan's warnings about settings that are ours, not the user's."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)


@lru_cache(maxsize=1)
def _dims(world: dist.ProcessGroup, replicate: int, context: int, tensor: int) -> ParallelDims:
    """One mesh per layout: FSDP2 finds the meshes that it derived by the equality of their parents,
    so a second engine of a process must use the first one's."""
    return ParallelDims(
        dp_replicate=replicate,
        dp_shard=-1,
        cp=context,
        tp=tensor,
        pp=1,
        ep=1,
        world_size=world.size(),
    )


def _attention(parallel: ParallelConfig, device: torch.device, share_prefix: bool) -> Choice:
    nvidia = device.type == "cuda" and torch.version.hip is None
    here = Machine(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if nvidia else None,
        context=parallel.context,
        installed=importable,
        compute_dtype=parallel.resolve_dtype(device.type),
        compiled=parallel.compile != "none",
        shares=share_prefix and parallel.context == 1,
    )
    return choose_attention(parallel.attention, here)


def _expect_many_shapes() -> None:
    """Packed rows come in many shapes: let compiled functions have as many versions, and never
    fall back to attention that forms all scores."""
    torch._dynamo.config.recompile_limit = 64  # pyright: ignore
    warnings.filterwarnings("error", message="flex_attention called without torch.compile")
