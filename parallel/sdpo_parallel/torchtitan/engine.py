"""Training on torchtitan 0.3.0: a sharded model, its optimizer, teacher, checkpoints and export.

This folder holds the only importers of torchtitan. Parts are composed, no Trainer is subclassed.
What each rank holds and sends: parallel/README.md.
"""

import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from ..checkpoints import PATIENCE
from ..config import EMA, LoraConfig, OptimizerConfig
from ..engine import Engine, EngineConfig
from ..huggingface import (
    check_length,
    check_teacher,
    copy_assets,
    export_dtype,
    replace_folder,
)
from ..inference import InferenceConfig
from ..rounding import cast
from ..teacher import TeacherState, reshard
from . import cpu
from .lm_head import hold

cpu.prepare()  # before torchtitan binds the device
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402

from .inference import TorchtitanInference  # noqa: E402
from .mesh import Mesh, check_layout  # noqa: E402
from .model import TorchtitanModel  # noqa: E402
from .models import spec_from_hf  # noqa: E402
from .weights import AdapterState, merged_weights, peft_weights, whole, write_hf, write_peft  # noqa: E402


class TorchtitanEngine(Engine):
    """An `Engine` on any layout of any number of ranks, for Qwen3 and Llama.

    Args:
        state: saved and restored with the model (step, place in the data).
    """

    policy: TorchtitanModel  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: EngineConfig, state: Stateful):
        policy = self.build_policy(config)
        self.mesh = mesh = policy.mesh
        self.device, self.ranks = mesh.device, mesh.ranks
        self.row_multiple, self.context = mesh.row_multiple, mesh.context
        optimizers = _optimizers(config.optimizer, policy.module)
        (optimizer,) = optimizers
        # not the checkpoints', which a background save may be using; patient, as a rank may wait
        # for another that waits for somebody else
        self._objects: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        super().__init__(config, policy, _teacher(config, policy), optimizer, optimizers, state)
        if self.ranks.is_main:
            choice = mesh.attention
            print(f"sdpo: attention {choice.backend} ({choice.why})", file=sys.stderr)

    def _why_not(self) -> str:
        if self.ranks.cp_degree > 1:
            return "context parallelism splits rows"
        return f"attention {self.mesh.attention.backend} reads whole sequences"

    @staticmethod
    def check_support(config: EngineConfig, ranks: int) -> None:
        spec: Any = spec_from_hf(config.model, lora=config.lora)
        check_length(config.model, spec.model.max_seq_len, config.max_tokens)
        check_layout(config.model, config.parallel, ranks)
        if config.teacher_folder is not None:
            check_layout(config.teacher_folder, config.parallel, ranks)
            check_teacher(config.teacher_folder, config.model)

    @staticmethod
    def build_policy(config: EngineConfig) -> TorchtitanModel:
        mesh = Mesh(config.model, config.parallel, share_prefix=config.share_prefix)
        return TorchtitanModel(
            config.model, mesh, config.max_tokens, lora=config.lora, trained=True
        )

    @staticmethod
    def checkpointed(
        policy: TorchtitanModel, config: EngineConfig, *, alone: bool = False
    ) -> Stateful:
        """With LoRA the adapters: what they stand beside is in the model's folder."""
        if not config.lora.rank:
            return policy.module
        if alone:
            policy.load()
        return AdapterState(policy.module)

    @staticmethod
    def build_inference(config: InferenceConfig) -> TorchtitanInference:
        return TorchtitanInference(config)

    @staticmethod
    def export_policy(
        policy: TorchtitanModel, config: EngineConfig, folder: str, *, adapters: bool = False
    ) -> None:
        partial = Path(f"{folder}.partial")
        is_main = policy.mesh.ranks.is_main
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        reshard(policy.module)
        adapter = policy.adapter()
        if adapters:
            weights = peft_weights(policy.module, adapter)
            if is_main:
                write_peft(partial, weights, policy.lora, policy.folder)
        else:
            dtype = export_dtype(policy.folder, config.checkpoint.export_dtype)
            weights = merged_weights(policy.module, policy.lora)
            rounding = config.checkpoint.export_rounding
            cast_weights = {name: cast(w, dtype, rounding) for name, w in weights.items()}
            write_hf(adapter, cast_weights, partial)
            if is_main:
                copy_assets(policy.folder, str(partial), dtype)
        dist.barrier()
        if is_main:
            replace_folder(str(partial), folder)
        dist.barrier()

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        self.release()
        merged = merged_weights(self.policy.module, self.policy.lora)
        for name, weight in self.policy.adapter().to_hf(merged).items():
            yield name, whole(weight)

    @classmethod
    def export_checkpoint(
        cls, config: EngineConfig, step: int | None, folder: str, *, adapters: bool = False
    ) -> None:
        super().export_checkpoint(config, step, folder, adapters=adapters)
        dist.destroy_process_group()

    def load(self) -> None:
        self.policy.load()
        if self.config.teacher_folder is not None:
            assert isinstance(self.teacher, TorchtitanModel)
            self.teacher.load()
        super().load()

    def save(self, step: int, manifest: Mapping[str, Any], *, wait: bool = False) -> None:
        self.release()
        super().save(step, {"layout": self.mesh.degrees, **manifest}, wait=wait)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        hold(self.policy.module.lm_head, until_last=not last)
        super().backward(loss, last=last)

    def clip_gradients(self) -> float:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        limit = self.config.optimizer.max_grad_norm
        return float(dist_utils.clip_grad_norm_(parameters, limit, foreach=True))

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.ranks.world_size
        dist.all_gather_object(values, value, group=self._objects)
        return values

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x / self.config.parallel.tensor

    def close(self) -> None:
        super().close()
        dist.barrier()
        dist.destroy_process_group()


def _teacher(config: EngineConfig, policy: TorchtitanModel) -> TeacherState:
    outside, parallel = config.teacher_folder, config.parallel
    if outside is not None:
        check_teacher(outside, config.model)
        check_layout(outside, parallel, dist.get_world_size())
    moves = isinstance(config.teacher, EMA)

    def copy() -> TorchtitanModel:
        return TorchtitanModel(
            outside or config.model,
            policy.mesh,
            config.max_tokens,
            lora=config.lora if outside is None else LoraConfig(),
            trained=False,
            dtype="float32" if moves else parallel.resolve_dtype(policy.mesh.device.type),
        )

    adapters_off = policy.adapters_off if config.lora.rank else None
    return TeacherState(config.teacher, policy, copy, adapters_off)


def _optimizers(config: OptimizerConfig, module: torch.nn.Module) -> OptimizersContainer:
    """One AdamW, with torchtitan's names in its state."""
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=config.adamw())
    on_cpu = next(module.parameters()).device.type == "cpu"
    return OptimizersContainer.Config(
        param_groups=[group], implementation="foreach" if on_cpu else "fused"
    ).build(model_parts=[module])
