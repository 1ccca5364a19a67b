"""Reading on torchtitan: a sharded model without optimizer, teacher or checkpoints."""

import sys
from typing import Any

import torch.distributed as dist

from ..config import LoraConfig
from ..inference import Inference, InferenceConfig
from ..teacher import reshard
from .mesh import Mesh
from .model import TorchtitanModel


class TorchtitanInference(Inference):
    """An `Inference` on any layout of any number of ranks, for Qwen3 and Llama."""

    model: TorchtitanModel  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: InferenceConfig):
        mesh = Mesh(config.model, config.layout)
        weights, _ = config.dtypes(mesh.device.type)
        model = TorchtitanModel(
            config.model, mesh, config.max_tokens, lora=LoraConfig(), trained=False, dtype=weights
        )
        super().__init__(model, mesh.device)
        self.ranks, self.row_multiple, self.context = mesh.ranks, mesh.row_multiple, mesh.context
        if self.ranks.is_main:
            choice = mesh.attention
            print(f"sdpo: attention {choice.backend} ({choice.why})", file=sys.stderr)

    def load(self) -> None:
        self.model.load()

    def gather(self, value: Any) -> list[Any]:
        values = [value] * self.ranks.world_size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        reshard(self.model.module)
        dist.barrier()
        dist.destroy_process_group()
