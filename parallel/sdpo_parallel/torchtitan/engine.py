"""torchtitan 0.3.0 as an engine: a sharded model from a Hugging Face folder, and its training.

With titan_models.py, context_parallel.py, cpu.py, cpu_attention.py and liger_modules.py the only
importers of torchtitan. Parts are composed, no Trainer is subclassed. What each rank holds and
sends: parallel/README.md.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from binpacking.to_constant_bin_number import to_constant_bin_number
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from ..checkpoints import Checkpoints
from ..config import (
    EMA,
    CheckpointConfig,
    Frozen,
    Live,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    Teacher,
)
from ..huggingface import (
    check_finite,
    check_length,
    check_teacher,
    copy_assets,
    export_dtype,
    read_config,
    replace_folder,
)
from ..teacher import Teaching, local, reshard
from . import cpu
from .attention import Choice, choose_attention, importable
from .lm_head import LMHead, end_prefetch, gathered, hold

cpu.prepare()  # before torchtitan binds the device
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: E402
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save  # noqa: E402
from torchtitan.components.checkpointer.utils import canonical_fqn  # noqa: E402
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig  # noqa: E402
from torchtitan.config import (  # noqa: E402
    TORCH_DTYPE_MAP,
    CommConfig,
    CompileConfig,
    OverrideConfig,
    ParallelismConfig,
    TrainingConfig,
    apply_overrides,
)
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC  # noqa: E402
from torchtitan.protocols.model_spec import ModelSpec  # noqa: E402
from torchtitan.tools import utils  # noqa: E402

from .context_parallel import block_mask, dense_mask, gather_rows, share  # noqa: E402
from .cpu_attention import document_mask  # noqa: E402
from .models import (  # noqa: E402
    load_weights,
    merged_weights,
    peft_config,
    peft_weights,
    spec_from_hf,
    start_adapters,
)

CHECKPOINTS = "checkpoints"


class TitanModel:
    """A torchtitan decoder as ``hidden_states`` and ``lm_head``."""

    def __init__(self, module: Any, dims: ParallelDims, *, dense: bool):
        self.module = module
        self.dense, self.masks = dense, document_mask if dense else module.get_attention_masks
        inner = module.config.first_attention.inner_attention
        self.block = getattr(inner, "block_size", 128)
        module._skip_lm_head = True  # forward then ends at the final norm
        self.vocabulary: int = module.config.vocab_size
        self.context = dims.get_optional_mesh("cp")
        tensor = dims.get_optional_mesh("tp")
        self.tensor_group = None if tensor is None else tensor.get_group()

    def hidden_states(self, tokens_BT: Tensor, positions_BT: Tensor, index_N: Tensor) -> Tensor:
        """(N, D) normed hidden states at the flat slots ``index_N``, the same on all context and
        tensor ranks; a tensor rank's gradient of them may be partial."""
        if self.context is None:
            masks = self.masks(positions_BT)
            h_BTD = self.module(tokens_BT, positions=positions_BT, attention_masks=masks)
            return h_BTD.flatten(0, 1)[index_N]
        (rows, width), slots = positions_BT.shape, positions_BT.numel()
        part = share(width, self.context, index_N.device)
        slots_BL = torch.arange(rows, device=index_N.device)[:, None] * width + part.mine_L
        tokens_BL, positions_BL = tokens_BT[:, part.mine_L], positions_BT[:, part.mine_L]
        document_BT = (positions_BT == 0).cumsum(-1)
        if self.dense:
            masks = dense_mask(document_BT, part)
        else:
            masks = block_mask(document_BT, part, self.block)
        h_BLD = self.module(tokens_BL, positions=positions_BL, attention_masks=masks)
        return gather_rows(h_BLD, slots_BL, slots, index_N, self.context.get_group())

    def lm_head(self) -> LMHead:
        """Gathered over the data-parallel ranks; with tensor parallelism, this rank's rows."""
        return gathered(self.module.lm_head, self.vocabulary, self.tensor_group)

    def own_responses(self, lengths: Sequence[int]) -> list[int] | None:
        """Which responses of a micro-batch this context rank computes the loss of; None: all.

        Every rank reckons the same from their lengths.
        """
        if self.context is None:
            return None
        bins = to_constant_bin_number(dict(enumerate(lengths)), self.context.size())
        return sorted(bins[self.context.get_local_rank()])  # pyright: ignore


def init_distributed(*, host_memory: bool = False, timeout_seconds: int = 7200) -> int:
    """Join torchrun's process group, or be a group of one; returns the world size.

    Args:
        host_memory: tensors in host memory take part in collectives, beside the accelerator's.
        timeout_seconds: of a collective; far beyond what a run's own watch allows, which names who
            stalls.
    """
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
        alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {k: str(v) for k, v in alone.items()}
    if dist.is_initialized():
        return dist.get_world_size()
    utils.device_module.set_device(utils.get_local_device())
    comm = CommConfig(init_timeout_seconds=timeout_seconds, trace_buf_size=0)
    with _quiet():
        return dist_utils.init_distributed(comm, enable_cpu_backend=host_memory, base_folder="")


@lru_cache(maxsize=1)
def _mesh(world: dist.ProcessGroup, replicate: int, context: int, tensor: int) -> ParallelDims:
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


def _expect_many_shapes() -> None:
    """Packed rows come in many shapes: let compiled functions have as many versions, and never
    fall back to attention that forms all scores."""
    torch._dynamo.config.recompile_limit = 64  # pyright: ignore
    warnings.filterwarnings("error", message="flex_attention called without torch.compile")


def _stay_tied(module: Any) -> None:
    """torchtitan distributes embeddings and head one by one, which parts them: FSDP2 would gather
    and reduce the one matrix twice."""
    distribute = module.parallelize

    def parallelize(dims: ParallelDims) -> None:
        distribute(dims)
        module.tok_embeddings.weight = module.lm_head.weight

    module.parallelize = parallelize


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mute torchtitan's warnings about settings that are ours, not the user's."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)


def _attention(parallel: ParallelConfig, device: torch.device) -> Choice:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return choose_attention(
        parallel.attention,
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if nvidia else None,
        context=parallel.context,
        installed=importable,
        compute_dtype=parallel.resolve_dtype(device.type),
    )


def check_layout(folder: str, parallel: ParallelConfig, ranks: int) -> None:
    """Refuse what cannot run, before any weights load.

    Raises:
        ValueError: the degrees do not divide the ranks, or the model's heads or widths.
    """
    parallel.shards(ranks)
    config = read_config(folder)
    fields = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    for field in fields:
        if (size := config.get(field)) is not None and size % parallel.tensor:
            raise ValueError(
                f"tensor={parallel.tensor} does not divide {folder}/config.json's {field}={size}: "
                "choose a degree that does"
            )


class TitanEngine:
    """Training of one model over a mesh of ranks: parameters, teacher, checkpoints, export.

    Args:
        folder: local Hugging Face folder (Qwen3 or Llama) to start from.
        run_folder: checkpoints go to ``run_folder/checkpoints/step-N``.
        total_steps: of the whole run, for the learning rate.
        max_tokens: longest sequence of either pass; sizes the rotary cache.
        state: saved and restored with the model (step, data cursor).
    """

    def __init__(
        self,
        folder: str,
        *,
        run_folder: str,
        total_steps: int,
        max_tokens: int,
        state: Stateful,
        optimizer: OptimizerConfig,
        parallel: ParallelConfig,
        checkpoint: CheckpointConfig,
        teacher: Teacher | None = None,
        lora: LoraConfig | None = None,
    ):
        self.folder, self.parallel = folder, parallel
        self.optimizer, self.total_steps = optimizer, total_steps
        self.lora, self.max_tokens = lora or LoraConfig(), max_tokens
        self._teacher_spec: ModelSpec | None = None
        world = init_distributed(host_memory=parallel.cpu_offload)
        device = utils.get_local_device()
        self.attention = _attention(parallel, device)
        _expect_many_shapes()
        self.spec = self._spec(folder, self.lora)
        check_layout(folder, parallel, world)
        self.titan = ParallelismConfig(
            data_parallel_replicate_degree=parallel.replicate,
            tensor_parallel_degree=parallel.tensor,
            enable_sequence_parallel=parallel.sequence_parallel,
            context_parallel_degree=parallel.context,
        )
        degrees = parallel.replicate, parallel.context, parallel.tensor
        self.dims = _mesh(dist.group.WORLD, *degrees)
        dist_utils.set_spmd_backend(self.titan.spmd_backend)
        self.context: Callable[[], contextlib.AbstractContextManager] = dist_utils.get_spmd_context(
            parallel_dims=self.dims
        )
        self.device = device
        block = 256 if self.attention.backend == "flex_flash" else 128
        self.row_multiple = math.lcm(block * parallel.context, parallel.tensor)
        self.module = self._build(self.spec, trained=True)
        self.policy = self._model(self.module)
        self.teaching = self._teaching(teacher or Live())
        self.teacher = self.teaching.model
        self.export_dtype = export_dtype(folder, checkpoint.export_dtype)
        self.optimizers = _optimizer(optimizer, self.module)
        parts = {"model": self.module, "optimizer": self.optimizers}
        parts |= {"teacher": self.teaching, "run": state}
        self.checkpoints = Checkpoints(
            Path(run_folder) / CHECKPOINTS, checkpoint, parts, distributed=True
        )
        mesh = self.dims.get_optional_mesh("batch")
        self.rank = mesh.get_local_rank() if mesh is not None else 0
        self.ranks = mesh.size() if mesh is not None else 1
        self.world_rank, self.world = dist.get_rank(), world
        self.is_main = self.world_rank == 0
        if self.is_main:
            print(
                f"sdpo: attention {self.attention.backend} ({self.attention.why})", file=sys.stderr
            )
        self.copies = parallel.context
        """Ranks that read the same micro-batch and add up in ``sum_over_ranks``."""

    # ---- building --------------------------------------------------------------------------------
    def _spec(self, folder: str, lora: LoraConfig) -> ModelSpec:
        backend = self.attention.backend
        backend = "flex" if backend == "dense" else backend  # an override makes it dense
        spec = spec_from_hf(folder, attention=backend, lora=lora)
        longest: int = spec.model.max_seq_len  # pyright: ignore
        check_length(folder, longest, self.max_tokens)
        return spec

    def _build(self, spec: ModelSpec, *, trained: bool, dtype: str = "float32") -> Any:
        """A module on this mesh, its weights not yet set."""
        parallel = self.parallel
        training = TrainingConfig(
            seq_len=self.max_tokens,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            mixed_precision_param=parallel.resolve_dtype(self.device.type),
            enable_cpu_offload=parallel.cpu_offload,
        )
        checkpointing = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}
        model: Any = spec.model
        model.update_from_config(config=SimpleNamespace(parallelism=self.titan))
        for layer in model.layers:
            layer.attention.rope = replace(layer.attention.rope, max_seq_len=self.max_tokens)
        with _quiet():
            apply_overrides(OverrideConfig(imports=self._overrides()), model)
        with torch.device("meta"), utils.set_default_dtype(TORCH_DTYPE_MAP[training.dtype]):
            module = model.build()
        trainable = {name for name, p in module.named_parameters() if p.requires_grad}
        if model.enable_weight_tying:
            _stay_tied(module)
        compiled = parallel.compile != "none"
        module = spec.parallelize_fn(
            module,
            parallel_dims=self.dims,
            training=training,
            parallelism=self.titan,
            compile_config=CompileConfig(
                enable=compiled, components=["model"], backend=parallel.compile
            ),
            ac_config=checkpointing[parallel.activation_checkpoint] if trained else None,
            dump_folder="",
        )
        module.to_empty(device="cpu" if parallel.cpu_offload else self.device.type)
        with torch.no_grad():
            module.init_weights(buffer_device=self.device if parallel.cpu_offload else None)
        end_prefetch(module.tok_embeddings)
        for name, p in module.named_parameters():  # sharding forgets which are frozen
            p.requires_grad_(canonical_fqn(name) in trainable)
        return module.train(trained)

    def _model(self, module: Any) -> TitanModel:
        return TitanModel(module, self.dims, dense=self.attention.backend == "dense")

    def _overrides(self) -> list[Any]:
        """torchtitan's modules that are swapped for others."""
        out: list[Any] = []
        if self.attention.backend == "dense":
            out.append("sdpo_parallel.torchtitan.cpu_attention.flex_to_dense")
        if self.parallel.liger:
            from .liger import OVERRIDES

            out += OVERRIDES
        return out

    def _teaching(self, teacher: Teacher) -> Teaching:
        outside = teacher.folder if isinstance(teacher, Frozen) else None
        if outside is not None:
            check_teacher(outside, self.folder)
            check_layout(outside, self.parallel, dist.get_world_size())
        moves = isinstance(teacher, EMA)

        def copy() -> tuple[TitanModel, torch.nn.Module]:
            lora = self.lora if outside is None else LoraConfig()
            spec = self._spec(outside or self.folder, lora)
            dtype = "float32" if moves else self.parallel.resolve_dtype(self.device.type)
            module = self._build(spec, trained=False, dtype=dtype)
            self._teacher_spec = spec
            return self._model(module), module

        switch = self._adapters_off if self.lora.rank else None
        return Teaching(teacher, self.policy, self.module, copy, switch)

    @contextlib.contextmanager
    def _adapters_off(self) -> Iterator[None]:
        layers = [m for m in self.module.modules() if hasattr(m, "_lora_scaling")]
        scales = [layer._lora_scaling for layer in layers]
        for layer in layers:
            layer._lora_scaling = 0.0
        try:
            yield
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer._lora_scaling = scale

    # ---- weights and checkpoints -----------------------------------------------------------------
    def _adapter(self, spec: ModelSpec, folder: str) -> Any:
        with _quiet():
            return spec.state_dict_adapter(spec.model, folder)  # pyright: ignore

    def load(self) -> None:
        """The Hugging Face folder's weights, and the teacher's first."""
        load_weights(self.module, self._adapter(self.spec, self.folder), self.folder)
        start_adapters(self.module)
        self._check(self.module, self.folder)
        teacher = self.teaching.config
        if isinstance(teacher, Frozen) and teacher.folder is not None:
            assert self.teaching.module is not None and self._teacher_spec is not None
            adapter = self._adapter(self._teacher_spec, teacher.folder)
            load_weights(self.teaching.module, adapter, teacher.folder)
            self._check(self.teaching.module, teacher.folder)
        self.teaching.start()

    def resume(self) -> None:
        """Go on from the newest undamaged checkpoint, where there is one."""
        step = self.checkpoints.newest()
        if step is not None:
            self.checkpoints.load(step)
            self._check(self.module, f"{self.checkpoints.folder}/step-{step}")

    def save(self, step: int, manifest: Mapping[str, Any], *, wait: bool = False) -> None:
        """Write a checkpoint."""
        self.release()
        self.checkpoints.save(step, {"layout": self.layout, **manifest}, wait=wait)

    @property
    def layout(self) -> dict[str, int]:
        """Degrees of the mesh."""
        d = self.dims
        return {"replicate": d.dp_replicate, "shard": d.dp_shard, "context": d.cp, "tensor": d.tp}

    def _check(self, module: torch.nn.Module, source: str) -> None:
        check_finite(((canonical_fqn(n), local(p)) for n, p in module.named_parameters()), source)

    # ---- a step ----------------------------------------------------------------------------------
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of a micro-batch; ``last``: of this step."""
        hold(self.module.lm_head, until_last=not last)
        loss.backward()

    def clip_gradients(self) -> float:
        """Returns the gradient norm before clipping, over all ranks."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        norm = dist_utils.clip_grad_norm_(parameters, self.optimizer.max_grad_norm, foreach=True)
        return float(norm)

    def update(self, step: int) -> float:
        """Update weights and teacher with the gradients of step ``step`` (from 0), and drop them;
        returns the learning rate used."""
        lr = self.optimizer.lr * self.optimizer.factor(step, self.total_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        self.optimizers.step()
        self.discard()
        self.teaching.update()
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
            ValueError: ``value`` is not the same on all ranks; the first that differs is named.
        """
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.checkpoints.group)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"{what} differs between ranks: rank {rank} has {other!r}, rank 0 "
                    f"{values[0]!r}; put it where all nodes read the same, or copy it to each again"
                )

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over ranks with tokens of their own: tensor ranks count once."""
        dist.all_reduce(x)
        return x / self.parallel.tensor

    # ---- out -------------------------------------------------------------------------------------
    def export(self, folder: str, *, adapters: bool = False) -> None:
        """Write a Hugging Face folder that transformers loads: weights (adapters merged), configs,
        tokenizer; or, with ``adapters``, a PEFT folder of the adapters alone."""
        partial = Path(f"{folder}.partial")
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        reshard(self.module)
        adapter = self._adapter(self.spec, self.folder)
        if adapters:
            weights = peft_weights(self.module, adapter)
            if self.is_main:
                _write_peft(partial, weights, peft_config(weights, self.lora, self.folder))
        else:
            weights = merged_weights(self.module, self.lora)
            weights = {name: w.to(self.export_dtype) for name, w in weights.items()}
            _write_hf(adapter, weights, partial)
            if self.is_main:
                copy_assets(self.folder, str(partial), self.export_dtype)
        dist.barrier()
        if self.is_main:
            replace_folder(str(partial), folder)
        dist.barrier()

    def close(self) -> None:
        """Finish what runs in the background and leave the process group."""
        self.checkpoints.finish()
        dist.barrier()
        dist.destroy_process_group()


def _write_hf(adapter: Any, weights: dict[str, Any], folder: Path) -> None:
    """Safetensors, as many files as the source had."""
    from torch.distributed.checkpoint._consolidate_hf_safetensors import (
        consolidate_safetensors_files_on_every_rank,
    )

    hf = adapter.to_hf(weights)
    files = adapter.fqn_to_index_mapping
    writer = HuggingFaceStorageWriter(
        path=str(folder / "sharded" if files else folder),
        save_distributed=True,
        fqn_to_index_mapping=files,
        enable_consolidation=not files,
    )
    dcp_save(hf, storage_writer=writer)
    if files:
        consolidate_safetensors_files_on_every_rank(
            input_dir=str(folder / "sharded"), output_dir=str(folder), fqn_to_index_mapping=files
        )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "sharded", ignore_errors=True)


def _write_peft(folder: Path, weights: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _optimizer(config: OptimizerConfig, module: torch.nn.Module) -> OptimizersContainer:
    kwargs = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    kwargs["weight_decay"] = config.weight_decay
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=kwargs)
    on_cpu = next(module.parameters()).device.type == "cpu"
    return OptimizersContainer.Config(
        param_groups=[group], implementation="foreach" if on_cpu else "fused"
    ).build(model_parts=[module])
