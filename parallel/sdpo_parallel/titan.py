"""torchtitan 0.3.0 as an engine: a sharded model from a Hugging Face folder, and its training.

The one module that imports torchtitan (with cpu.py and cpu_attention.py, which it loads). Parts
are composed, no Trainer is subclassed. What each rank holds: parallel/README.md.
"""

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from . import cpu
from .config import CheckpointConfig, OptimizerConfig, ParallelConfig
from .hf_folder import check_finite, copy_assets, export_dtype, read_config, replace_folder

cpu.prepare()  # before torchtitan binds the device
import torchtitan.models.llama3 as llama3  # noqa: E402
import torchtitan.models.qwen3 as qwen3  # noqa: E402
from torch.distributed.checkpoint.stateful import Stateful  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torchtitan.components.checkpoint import AsyncMode, CheckpointManager  # noqa: E402
from torchtitan.components.checkpointer.utils import canonical_fqn  # noqa: E402
from torchtitan.components.optimizer import (  # noqa: E402
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)
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
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear  # noqa: E402
from torchtitan.models.common.nn_modules import RMSNorm  # noqa: E402
from torchtitan.protocols.model_spec import ModelSpec  # noqa: E402
from torchtitan.tools import utils  # noqa: E402

from .cpu_attention import document_mask  # noqa: E402

CHECKPOINTS = "checkpoints"


# ---- a Hugging Face config as a torchtitan model -------------------------------------------------
def spec_from_hf(folder: str) -> ModelSpec:
    """The torchtitan model that a Hugging Face folder's config.json describes.

    Raises:
        ValueError: the architecture, or one of its options, is not one that torchtitan computes
            exactly as transformers does; the message names the field.
    """
    read_config(folder)
    try:  # for what config.json leaves to defaults
        c = AutoConfig.from_pretrained(folder).to_dict()
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{folder}/config.json: transformers cannot read it ({error})") from error
    build = {"qwen3": _qwen3, "llama": _llama}.get(c.get("model_type", ""))
    if build is None:
        raise ValueError(
            f"{folder}/config.json: model_type {c.get('model_type')!r} has no torchtitan model "
            "here (qwen3 and llama have); use --engine transformers"
        )
    _refuse(folder, c, "hidden_act", allowed=("silu", None))
    _refuse(folder, c, "attention_bias", allowed=(False, None))
    _refuse(folder, c, "mlp_bias", allowed=(False, None))
    _refuse(folder, c, "use_sliding_window", allowed=(False, None))
    _refuse(folder, c, "partial_rotary_factor", allowed=(1.0, None))
    spec = build(folder, c)
    spec.flavor = Path(folder).name
    return spec


def _refuse(folder: str, config: dict, field: str, allowed: tuple) -> None:
    if config.get(field) not in allowed:
        raise ValueError(
            f"{folder}/config.json: {field}={config[field]!r} is not supported by the torchtitan "
            "engine; use --engine transformers"
        )


def _norm(c: dict, dim: int) -> RMSNorm.Config:
    ones = {"weight": torch.nn.init.ones_}
    return RMSNorm.Config(normalized_shape=dim, eps=c["rms_norm_eps"], param_init=ones)


def _rope(folder: str, c: dict) -> dict:
    """theta and scaling of the rotary embedding, in RoPE.Config's words."""
    r = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = r.get("rope_theta") or c.get("rope_theta") or 10000.0
    kind = r.get("rope_type", r.get("type", "default"))
    if kind == "default":
        return {"theta": theta, "scaling": "none"}
    if kind == "llama3" and c["model_type"] == "llama":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {name: r[name] for name in names}
        return {"theta": theta, "scaling": "llama", "scaling_factor": r["factor"], **scaling}
    raise ValueError(
        f"{folder}/config.json: rope_type {kind!r} is not supported by the torchtitan engine; "
        "use --engine transformers"
    )


def _decoder(c: dict, module, layers: list) -> dict:
    """What every decoder config holds around its layers."""
    dim, vocabulary, tied = c["hidden_size"], c["vocab_size"], bool(c.get("tie_word_embeddings"))
    embedding = module._EMBEDDING_SKIP_INIT if tied else module._EMBEDDING_INIT
    head = module._LINEAR_INIT
    return dict(
        dim=dim,
        vocab_size=vocabulary,
        norm=_norm(c, dim),
        enable_weight_tying=tied,
        layers=layers,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary, embedding_dim=dim, param_init=embedding
        ),
        lm_head=Linear.Config(in_features=dim, out_features=vocabulary, param_init=head),
    )


def _qwen3(folder: str, c: dict) -> ModelSpec:
    head_dim = c["head_dim"]
    length = c["max_position_embeddings"]
    layers = qwen3._build_qwen3_layers(
        n_layers=c["num_hidden_layers"],
        dim=c["hidden_size"],
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        hidden_dim=c["intermediate_size"],
        attn_backend="flex",
        rope=CosSinRoPE.Config(dim=head_dim, max_seq_len=length, **_rope(folder, c)),
    )
    for layer in layers:  # the builder knows one eps
        layer.attention_norm = layer.ffn_norm = _norm(c, c["hidden_size"])
        layer.attention.qk_norm = _norm(c, head_dim)  # pyright: ignore
    spec = qwen3.model_registry("debugmodel")
    spec.model = qwen3.Qwen3Model.Config(**_decoder(c, qwen3, layers))
    return spec


def _llama(folder: str, c: dict) -> ModelSpec:
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    if head_dim * heads != c["hidden_size"]:
        raise ValueError(
            f"{folder}/config.json: head_dim {head_dim} x {heads} heads is not hidden_size "
            f"{c['hidden_size']}; the torchtitan engine needs it; use --engine transformers"
        )
    length = c["max_position_embeddings"]
    layers = llama3._build_llama3_layers(
        n_layers=c["num_hidden_layers"],
        dim=c["hidden_size"],
        n_heads=heads,
        n_kv_heads=c["num_key_value_heads"],
        hidden_dim=c["intermediate_size"],
        attn_backend="flex",
        rope=ComplexRoPE.Config(dim=head_dim, max_seq_len=length, **_rope(folder, c)),
    )
    for layer in layers:
        layer.attention_norm = layer.ffn_norm = _norm(c, c["hidden_size"])
    spec = llama3.model_registry("debugmodel")
    spec.model = llama3.Llama3Model.Config(**_decoder(c, llama3, layers))
    return spec


# ---- the model behind the seam of the two passes -------------------------------------------------
def reshard(model: torch.nn.Module) -> None:
    """Free every gathered parameter. A model that ran no backward still holds its root group
    gathered: it would serve stale weights, and its parameters would not be the sharded ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class TitanModel:
    """A torchtitan decoder as ``hidden_states`` and ``lm_head``."""

    def __init__(self, module: Any):
        self.module = module
        module._skip_lm_head = True  # forward then ends at the final norm

    def hidden_states(self, tokens_BT: Tensor, positions_BT: Tensor, index_N: Tensor) -> Tensor:
        """(N, D) normed hidden states at the flat slots ``index_N``."""
        on_cpu = tokens_BT.device.type == "cpu"
        build_masks = document_mask if on_cpu else self.module.get_attention_masks
        masks = build_masks(positions_BT)
        h_BTD = self.module(tokens_BT, positions=positions_BT, attention_masks=masks)
        return h_BTD.flatten(0, 1)[index_N]

    def lm_head(self) -> Tensor:
        """(V, D), gathered. FSDP2's post-backward reduce-scatters its gradient."""
        if isinstance(self.module.lm_head, FSDPModule):
            self.module.lm_head.unshard()
        return self.module.lm_head.weight  # pyright: ignore[reportAttributeAccessIssue]


# ---- the engine ----------------------------------------------------------------------------------
def init_distributed(timeout_seconds: int = 600) -> int:
    """Join torchrun's process group, or be a group of one; returns the world size."""
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
        return dist_utils.init_distributed(comm, base_folder="")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mute torchtitan's warnings about settings that are ours, not the user's."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)


class TitanEngine:
    """FSDP2 training of one model: parameters, optimizer, checkpoints, export.

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
    ):
        self.folder, self.run_folder = folder, run_folder
        spec = spec_from_hf(folder)
        longest: int = spec.model.max_seq_len  # pyright: ignore
        if max_tokens > longest:
            raise ValueError(
                f"prompt and response limits allow {max_tokens} tokens, but {folder} has "
                f"max_position_embeddings={longest}: lower the limits"
            )
        world = init_distributed()
        if world % parallel.replicate:
            raise ValueError(f"replicate={parallel.replicate} does not divide {world} ranks")
        titan = ParallelismConfig(data_parallel_replicate_degree=parallel.replicate)
        self.dims = ParallelDims.from_config(titan, world)
        dist_utils.set_spmd_backend(titan.spmd_backend)
        self.context: Callable[[], contextlib.AbstractContextManager] = dist_utils.get_spmd_context(
            parallel_dims=self.dims
        )
        self.device = utils.get_local_device()
        module = self._build(spec, titan, parallel, max_tokens)
        self.policy = TitanModel(module)
        self.max_grad_norm = optimizer.max_grad_norm
        self.export_dtype = export_dtype(folder, checkpoint.export_dtype)
        self.optimizers = _optimizer(optimizer, module, self.device)
        self.schedules = LRSchedulersContainer(
            self.optimizers, lambda step: optimizer.factor(step, total_steps)
        )
        with _quiet():
            self.checkpointer = CheckpointManager.Config(
                enable=True,
                folder=CHECKPOINTS,
                interval=checkpoint.interval,
                keep_latest_k=checkpoint.keep,
                initial_load_in_hf=True,
                last_save_model_only=False,
            ).build(
                dataloader=None,
                model_parts=[module],
                optimizers=self.optimizers,
                lr_schedulers=self.schedules,
                states={"run": state},
                sd_adapter=spec.state_dict_adapter(spec.model, folder),  # pyright: ignore
                base_folder=run_folder,
            )
        self.checkpointer.states.pop("dataloader")  # the cursor in ``state`` is ours
        mesh = self.dims.get_optional_mesh("batch")
        self.group = mesh.get_group() if mesh is not None else None
        self.rank = mesh.get_local_rank() if mesh is not None else 0
        self.ranks = mesh.size() if mesh is not None else 1
        self.is_main = dist.get_rank() == 0

    def _build(
        self, spec: ModelSpec, titan: ParallelismConfig, parallel: ParallelConfig, max_tokens: int
    ) -> torch.nn.Module:
        dtype = parallel.resolve_dtype(self.device.type)
        training = TrainingConfig(seq_len=max_tokens, mixed_precision_param=dtype)
        checkpointing = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}
        model: Any = spec.model
        model.update_from_config(config=SimpleNamespace(parallelism=titan))
        for layer in model.layers:
            layer.attention.rope = replace(layer.attention.rope, max_seq_len=max_tokens)
        if self.device.type == "cpu":
            dense = OverrideConfig(imports=["sdpo_parallel.cpu_attention.flex_to_dense"])
            apply_overrides(dense, model)
        with torch.device("meta"), utils.set_default_dtype(TORCH_DTYPE_MAP[training.dtype]):
            module = model.build()
        module = spec.parallelize_fn(
            module,
            parallel_dims=self.dims,
            training=training,
            parallelism=titan,
            compile_config=CompileConfig(),
            ac_config=checkpointing[parallel.activation_checkpoint],
            dump_folder=self.run_folder,
        )
        module.to_empty(device=self.device.type)
        with torch.no_grad():
            module.init_weights(buffer_device=None)
        return module.train()

    def load(self) -> bool:
        """The newest finished checkpoint of the run, else the Hugging Face weights.

        Returns True where a checkpoint was found.
        """
        found = self.checkpointer._find_load_step() >= 0
        self.checkpointer.load()
        check_finite(
            ((canonical_fqn(n), _local(p)) for n, p in self.policy.module.named_parameters()),
            self.run_folder if found else self.folder,
        )
        return found

    def save(self, step: int, last: bool = False) -> bool:
        """Write a checkpoint if ``step`` is due one."""
        reshard(self.policy.module)
        return self.checkpointer.save(step, last_step=last)

    def clip_gradients(self) -> float:
        """Returns the gradient norm before clipping, over all ranks."""
        parameters = list(self.policy.module.parameters())
        return float(dist_utils.clip_grad_norm_(parameters, self.max_grad_norm, foreach=True))

    def update(self) -> float:
        """Update the weights and zero the gradients; returns the learning rate used."""
        lr = self.schedules.schedulers[0].get_last_lr()[0]
        self.optimizers.step()
        self.schedules.step()
        self.optimizers.zero_grad()
        return float(lr)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over data-parallel ranks."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def max_over_ranks(self, x: int) -> int:
        """The largest ``x`` of all data-parallel ranks."""
        return int(self._reduce(torch.tensor(x, device=self.device), dist.ReduceOp.MAX))

    def _reduce(self, x: Tensor, op) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, op=op, group=self.group)
        return x

    def export(self, folder: str) -> None:
        """Write a Hugging Face folder that transformers loads: weights, configs, tokenizer."""
        module, partial = self.policy.module, f"{folder}.partial"
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            Path(partial).mkdir(parents=True)
        dist.barrier()
        reshard(module)
        weights = {name: w.to(self.export_dtype) for name, w in module.state_dict().items()}
        self.checkpointer.dcp_save(weights, partial, async_mode=AsyncMode.DISABLED, to_hf=True)
        dist.barrier()
        if self.is_main:
            shutil.rmtree(Path(partial) / "sharded", ignore_errors=True)
            copy_assets(self.folder, partial, self.export_dtype)
            replace_folder(partial, folder)
        dist.barrier()

    def close(self) -> None:
        """Finish what runs in the background and leave the process group."""
        self.checkpointer.close()
        dist.barrier()
        dist.destroy_process_group()


def _optimizer(config: OptimizerConfig, module, device: torch.device) -> OptimizersContainer:
    kwargs = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    kwargs["weight_decay"] = config.weight_decay
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=kwargs)
    fused = "foreach" if device.type == "cpu" else "fused"
    return OptimizersContainer.Config(param_groups=[group], implementation=fused).build(
        model_parts=[module]
    )


def _local(p: Tensor) -> Tensor:
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p
