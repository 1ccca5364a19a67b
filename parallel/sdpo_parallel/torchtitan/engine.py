"""Training on torchtitan 0.3.0: a sharded model, its optimizer, teacher, checkpoints and export.

This folder holds the only importers of torchtitan. Parts are composed, no Trainer is subclassed.
What each rank holds and sends: parallel/README.md.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from ..checkpoints import Checkpoints
from ..config import EMA, CheckpointConfig, Frozen, LoraConfig, OptimizerConfig
from ..engine import EngineConfig
from ..errors import SdpoError
from ..huggingface import check_teacher, copy_assets, export_dtype, replace_folder
from ..teacher import TeacherState, reshard
from . import cpu
from .lm_head import hold

cpu.prepare()  # before torchtitan binds the device
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402

from .mesh import Mesh, check_layout  # noqa: E402
from .model import TorchtitanModel  # noqa: E402
from .weights import (  # noqa: E402
    merged_weights,
    peft_config,
    peft_weights,
    write_hf,
    write_peft,
)


class TorchtitanEngine:
    """An `Engine` on any layout of any number of ranks, for Qwen3 and Llama.

    Args:
        state: saved and restored with the model (step, place in the data).
    """

    def __init__(self, config: EngineConfig, state: Stateful):
        self.config = config
        self.mesh = Mesh(config.model, config.parallel)
        self.device, self.ranks = self.mesh.device, self.mesh.ranks
        self.row_multiple, self.context = self.mesh.row_multiple, self.mesh.context
        self.policy = _policy(config, self.mesh)
        self.module = self.policy.module
        self.teacher_state = self._teacher()
        self.teacher = self.teacher_state.model
        self.optimizers = _optimizer(config.optimizer, self.module)
        parts = {"model": self.module, "optimizer": self.optimizers}
        parts |= {"teacher": self.teacher_state, "run": state}
        self.checkpoints = Checkpoints(
            config.run_folder, config.checkpoint, parts, distributed=True
        )
        if self.ranks.is_main:
            choice = self.mesh.attention
            print(f"sdpo: attention {choice.backend} ({choice.why})", file=sys.stderr)

    def _teacher(self) -> TeacherState:
        config, mesh = self.config, self.mesh
        teacher = config.teacher
        outside = teacher.folder if isinstance(teacher, Frozen) else None
        if outside is not None:
            check_teacher(outside, config.model)
            check_layout(outside, config.parallel, dist.get_world_size())
        moves = isinstance(teacher, EMA)

        def copy() -> TorchtitanModel:
            return TorchtitanModel(
                outside or config.model,
                mesh,
                config.max_tokens,
                lora=config.lora if outside is None else LoraConfig(),
                trained=False,
                dtype="float32" if moves else config.parallel.resolve_dtype(mesh.device.type),
            )

        adapters_off = self.policy.adapters_off if config.lora.rank else None
        return TeacherState(teacher, self.policy, copy, adapters_off)

    # ---- weights and checkpoints -----------------------------------------------------------------
    def load(self) -> None:
        """Put the folder's weights in place, and the teacher's first."""
        self.policy.load()
        if isinstance(self.config.teacher, Frozen) and self.config.teacher.folder is not None:
            assert isinstance(self.teacher, TorchtitanModel)
            self.teacher.load()
        self.teacher_state.start()

    def resume(self) -> None:
        """Go on from the newest undamaged checkpoint, where there is one."""
        step = self.checkpoints.newest()
        if step is not None:
            self.checkpoints.load(step)
            self.policy.check_finite(f"{self.checkpoints.folder}/step-{step}")

    def save(self, step: int, manifest: Mapping[str, Any], *, wait: bool = False) -> None:
        """Write a checkpoint, in the background unless ``wait``."""
        self.release()
        self.checkpoints.save(step, {"layout": self.mesh.degrees, **manifest}, wait=wait)

    # ---- a step ----------------------------------------------------------------------------------
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a micro-batch; ``last``: it is the step's last."""
        hold(self.module.lm_head, until_last=not last)
        loss.backward()

    def clip_gradients(self) -> float:
        """Clip the gradients' norm, over all ranks; returns the norm before clipping."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        limit = self.config.optimizer.max_grad_norm
        return float(dist_utils.clip_grad_norm_(parameters, limit, foreach=True))

    def update(self, step: int) -> float:
        """Update weights and teacher with the gradients of step ``step`` (from 0), and drop them;
        returns the learning rate used."""
        lr = self.config.optimizer.lr_at(step, self.config.total_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        self.optimizers.step()
        self.discard()
        self.teacher_state.update()
        return lr

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizers.zero_grad()

    def release(self) -> None:
        """Free the weights that passes without a backward left gathered."""
        reshard(self.module)

    def check_agreement(self, what: str, value: str) -> None:
        """Refuse to train where ranks were started with different things.

        Raises:
            SdpoError: ``value`` is not the same on all ranks; the first that differs is named.
        """
        values: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(values, value, group=self.checkpoints.group)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise SdpoError(
                    f"{what} differs between ranks: rank {rank} has {other!r}, rank 0 "
                    f"{values[0]!r}; put it where all nodes read the same, or copy it to each again"
                )

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over ranks with tokens of their own: tensor ranks count once."""
        dist.all_reduce(x)
        return x / self.config.parallel.tensor

    # ---- out -------------------------------------------------------------------------------------
    def export(self, folder: str, *, adapters: bool = False) -> None:
        """Write a Hugging Face folder that transformers loads: weights (adapters merged), configs,
        tokenizer; or, with ``adapters``, a PEFT folder of the adapters alone."""
        _export(self.policy, self.config.checkpoint, folder, adapters=adapters)

    def close(self) -> None:
        """Finish what runs in the background and leave the process group."""
        self.checkpoints.finish()
        dist.barrier()
        dist.destroy_process_group()


def export_checkpoint(
    config: EngineConfig, step: int | None, out: str, *, adapters: bool = False
) -> None:
    """See `sdpo_parallel.build.export_checkpoint`."""
    mesh = Mesh(config.model, config.parallel)
    policy = _policy(config, mesh)
    parts = {"model": policy.module}
    checkpoints = Checkpoints(config.run_folder, config.checkpoint, parts, distributed=True)
    checkpoints.load(checkpoints.undamaged(step))
    _export(policy, config.checkpoint, out, adapters=adapters)
    dist.destroy_process_group()


def _policy(config: EngineConfig, mesh: Mesh) -> TorchtitanModel:
    return TorchtitanModel(config.model, mesh, config.max_tokens, lora=config.lora, trained=True)


def _export(
    policy: TorchtitanModel, config: CheckpointConfig, folder: str, *, adapters: bool
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
            write_peft(partial, weights, peft_config(weights, policy.lora, policy.folder))
    else:
        dtype = export_dtype(policy.folder, config.export_dtype)
        weights = merged_weights(policy.module, policy.lora)
        write_hf(adapter, {name: w.to(dtype) for name, w in weights.items()}, partial)
        if is_main:
            copy_assets(policy.folder, str(partial), dtype)
    dist.barrier()
    if is_main:
        replace_folder(str(partial), folder)
    dist.barrier()


def _optimizer(config: OptimizerConfig, module: torch.nn.Module) -> OptimizersContainer:
    kwargs = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    kwargs["weight_decay"] = config.weight_decay
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=kwargs)
    on_cpu = next(module.parameters()).device.type == "cpu"
    return OptimizersContainer.Config(
        param_groups=[group], implementation="foreach" if on_cpu else "fused"
    ).build(model_parts=[module])
