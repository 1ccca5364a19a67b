"""Any causal LM of transformers: for scoring, runs on one device, other people's loops.

    model = TransformersModel(AutoModelForCausalLM.from_pretrained(folder))
    out = two_pass_loss(model, batch, ReverseKL())

``TransformersModel`` takes any causal LM whose logits are ``hidden @ lm_head.weight.T``.
``TransformersEngine`` trains one on a single device, with the trainer's checkpoints and export.
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from ..checkpoints import Checkpoints
from ..config import Frozen, LoraConfig, ParallelConfig
from ..engine import ROW_MULTIPLE, EngineConfig, LMHead, Ranks
from ..errors import SdpoError
from ..huggingface import (
    check_finite,
    check_length,
    check_teacher,
    copy_assets,
    export_dtype,
    read_config,
    replace_folder,
)
from ..teacher import TeacherState
from .liger import apply_liger

# one process is what this engine is for
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class TransformersModel:
    """A causal LM of transformers as a `CausalModel`.

    Args:
        compute_dtype: dtype of the passes, where it is not that of the weights.

    Raises:
        SdpoError: its logits are not ``hidden @ lm_head.weight.T`` alone (a bias, a softcap, a
            scale): the objectives would get them wrong.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype | None = None):
        self.module, self.dtype = model, compute_dtype or model.dtype
        self.decoder: Any = model.get_decoder()
        was_training = model.training
        model.eval()
        self._check_head()
        self.packs = self._keeps_documents_apart()
        model.train(was_training)

    def hidden_states(self, tokens_BT: Tensor, positions_BT: Tensor, index_N: Tensor) -> Tensor:
        """(N, D). Most models of transformers mask documents wherever positions restart; flash
        attention does so for a single row only, so rows are laid end to end there. Models that
        do not get one padded row per document."""
        inputs = {"input_ids": tokens_BT, "position_ids": positions_BT}
        if not self.packs:
            tokens_BT, index_N = _one_row_per_document(tokens_BT, positions_BT, index_N)
            inputs = {"input_ids": tokens_BT}
        elif "flash" in (self.module.config._attn_implementation or ""):
            inputs = {name: t.view(1, -1) for name, t in inputs.items()}
        mixed = self.dtype != self.module.dtype
        with torch.autocast(tokens_BT.device.type, self.dtype, enabled=mixed):
            out = self.decoder(**inputs, use_cache=False)
        return out.last_hidden_state.flatten(0, 1)[index_N].to(self.dtype)

    def own_responses(self, lengths: Sequence[int]) -> None:
        """All of them."""

    def lm_head(self) -> LMHead:
        """(V, D)."""
        weight: Any = self.module.get_output_embeddings().weight  # pyright: ignore
        return LMHead(weight.to(self.dtype))

    @torch.no_grad()
    def _check_head(self) -> None:
        head = self.module.get_output_embeddings()
        name = type(self.module).__name__
        if head is None or getattr(head, "bias", None) is not None:
            raise SdpoError(f"{name}: no lm_head without a bias; such models are not supported")
        for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if (value := getattr(self.module.config, field, None)) is not None and (
                value != 1 or field == "final_logit_softcapping"
            ):
                raise SdpoError(
                    f"{name}: {field}={value} changes its logits (a softcap or a scale); such "
                    "models are not supported"
                )
        probe = torch.tensor([[0, 1, 2]], device=self.module.device)
        hidden = self.decoder(input_ids=probe, use_cache=False).last_hidden_state[0]
        ours = (hidden @ head.weight.T).float()  # pyright: ignore[reportCallIssue]
        theirs = self.module(input_ids=probe, use_cache=False).logits[0].float()
        if not torch.isfinite(theirs).all():
            return  # broken weights are check_finite's to name
        if (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
            raise SdpoError(
                f"{name}: its logits are not hidden @ lm_head.weight.T (a softcap or a scale?); "
                "such models are not supported"
            )

    @torch.no_grad()
    def _keeps_documents_apart(self) -> bool:
        """Whether a document packed behind another reads as it does alone."""
        document = torch.tensor([3, 1, 4, 1, 5, 2], device=self.module.device)
        alone = self.decoder(input_ids=document[None], use_cache=False).last_hidden_state[0]
        twice = torch.cat([document, document])[None]
        positions = torch.arange(len(document), device=document.device).repeat(2)[None]
        try:
            out = self.decoder(input_ids=twice, position_ids=positions, use_cache=False)
        except TypeError:  # it takes no positions
            return False
        behind = out.last_hidden_state[0, len(document) :]
        if not torch.isfinite(alone).all():
            return True  # broken weights are check_finite's to name
        tolerance = 16 * torch.finfo(self.module.dtype).eps
        return bool((behind - alone).abs().max() <= tolerance * alone.abs().max())


def _one_row_per_document(
    tokens_BT: Tensor, positions_BT: Tensor, index_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Packed rows -> right-padded rows of one document each, and ``index_N`` among their slots.

    Documents that are not read are left out. Causal models need no mask for padding on the right.
    """
    positions, tokens = positions_BT.flatten(), tokens_BT.flatten()
    document = (positions == 0).cumsum(0) - 1
    read, row_N = document[index_N].unique(return_inverse=True)
    if len(read) == 0:
        return tokens_BT[:1, :1], index_N
    starts = (positions == 0).nonzero()[:, 0]
    pieces = [tokens[document == d] for d in read.tolist()]
    padded = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    return padded, row_N * padded.shape[1] + (index_N - starts[read][row_N])


def disable_dropout(model: PreTrainedModel) -> None:
    """Both passes must read the same network: with dropout their difference would be noise."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def load_model(
    folder: str,
    *,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    device: str | None = None,
    attention: str | None = None,
    compute_dtype: torch.dtype | None = None,
    liger: bool = False,
) -> TransformersModel:
    """A local Hugging Face folder as a model of the two passes.

    Args:
        dtype: of the weights; ``auto``: bfloat16 on an accelerator, float32 on a CPU.
        device: where to; None: the first accelerator, else the CPU.
        compute_dtype: of the passes, where it is not that of the weights.
        attention: transformers' ``attn_implementation``; None: flash_attention_2 where flash-attn
            is installed and the model runs on a GPU in bfloat16, else sdpa.
        liger: Liger's RMSNorm, SwiGLU and rotary embeddings; see liger_patch.py.

    Raises:
        SdpoError: no such folder, no weights in it, or weights that are not finite.
    """
    read_config(folder)
    disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    attention = attention or choose_attention(device, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    check_finite(model.named_parameters(), folder)
    model = model.to(device).eval()  # pyright: ignore
    if liger:
        apply_liger(model)
    return TransformersModel(model, compute_dtype)


def choose_attention(device: str, compute_dtype: str) -> str:
    """flash-attn where it is installed and can run, else SDPA."""
    can_flash = device.startswith("cuda") and compute_dtype == "bfloat16"
    return "flash_attention_2" if can_flash and is_flash_attn_2_available() else "sdpa"


class TransformersEngine:
    """An `Engine` for any causal LM of transformers, on one device.

    Weights, gradients and optimizer state are float32; the passes run under autocast where
    ``parallel.compute_dtype`` says bfloat16.

    Args:
        state: saved and restored with the model (step, place in the data).
    """

    ranks, row_multiple = Ranks(), ROW_MULTIPLE

    def __init__(self, config: EngineConfig, state: Stateful):
        _refuse_layouts(config.parallel, config.lora)
        longest = read_config(config.model).get("max_position_embeddings")
        check_length(config.model, longest, config.max_tokens)
        teacher = config.teacher
        if isinstance(teacher, Frozen) and teacher.folder is not None:
            check_teacher(teacher.folder, config.model)
        self.config = config
        self.policy = _load(config, config.model, "float32")
        self.module = self.policy.module.train()
        disable_dropout(self.module)
        if config.parallel.activation_checkpoint != "none":
            enable = getattr(self.module, "activation_checkpointing_enable", None)
            enable = enable or self.module.gradient_checkpointing_enable  # its name before 5.20
            enable({"use_reentrant": False})
        self.device = self.module.device
        self.teacher_state = TeacherState(teacher, self.policy, lambda: _copy(config))
        self.teacher = self.teacher_state.model
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
        )
        parts = {"model": self.module, "optimizer": _Optimizer(self.module, self.optimizer)}
        parts |= {"teacher": self.teacher_state, "run": state}
        self.checkpoints = Checkpoints(
            config.run_folder, config.checkpoint, parts, distributed=False
        )

    def context(self) -> contextlib.AbstractContextManager[None]:
        """Passes need nothing around them here."""
        return contextlib.nullcontext()

    def load(self) -> None:
        """Set the teacher's first weights; the folder's are in place."""
        self.teacher_state.start()

    def resume(self) -> None:
        """Go on from the newest undamaged checkpoint, where there is one."""
        step = self.checkpoints.newest()
        if step is not None:
            self.checkpoints.load(step)

    def save(self, step: int, manifest: Mapping[str, Any], *, wait: bool = False) -> None:
        """Write a checkpoint."""
        self.checkpoints.save(step, manifest, wait=wait)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a micro-batch."""
        loss.backward()

    def clip_gradients(self) -> float:
        """Clip the gradients' norm; returns the norm before clipping."""
        limit = self.config.optimizer.max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit))

    def update(self, step: int) -> float:
        """Update weights and teacher with the gradients of step ``step`` (from 0), and drop them;
        returns the learning rate used."""
        lr = self.config.optimizer.lr_at(step, self.config.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard()
        self.teacher_state.update()
        return lr

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def release(self) -> None:
        """Nothing is gathered here."""

    def check_agreement(self, what: str, value: str) -> None:
        """There is one rank."""

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """There is one rank: ``x`` itself."""
        return x

    def export(self, folder: str, *, adapters: bool = False) -> None:
        """Write a Hugging Face folder: weights, configs, tokenizer."""
        _export(self.policy, self.config, folder, adapters=adapters)

    def close(self) -> None:
        """Nothing runs in the background."""


def export_checkpoint(
    config: EngineConfig, step: int | None, out: str, *, adapters: bool = False
) -> None:
    """See `sdpo_parallel.build.export_checkpoint`."""
    policy = _load(config, config.model, "float32")
    parts = {"model": policy.module}
    checkpoints = Checkpoints(config.run_folder, config.checkpoint, parts, distributed=False)
    checkpoints.load(checkpoints.undamaged(step))
    _export(policy, config, out, adapters=adapters)


def _load(
    config: EngineConfig, folder: str, dtype: Literal["bfloat16", "float32"]
) -> TransformersModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = config.parallel.resolve_dtype(device)
    return load_model(
        folder,
        dtype=dtype,
        device=device,
        attention=choose_attention(device, compute),
        compute_dtype=getattr(torch, compute),
        liger=config.parallel.liger,
    )


def _copy(config: EngineConfig) -> TransformersModel:
    """The teacher's model: in float32 where it starts as the policy, else as the passes compute."""
    folder = config.teacher.folder if isinstance(config.teacher, Frozen) else None
    if folder is None:
        return _load(config, config.model, "float32")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _load(config, folder, config.parallel.resolve_dtype(device))


def _export(
    policy: TransformersModel, config: EngineConfig, folder: str, *, adapters: bool
) -> None:
    if adapters:
        raise SdpoError("this run trained no adapters: it has none to export")
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    dtype = export_dtype(config.model, config.checkpoint.export_dtype)
    weights = {name: w.to(dtype) for name, w in policy.module.state_dict().items()}
    policy.module.save_pretrained(partial, state_dict=weights)
    copy_assets(config.model, partial, dtype)
    replace_folder(partial, folder)


class _Optimizer:
    """An optimizer's state by parameter names, as checkpoints hold it."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.module, self.optimizer = module, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.module, self.optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.module, self.optimizer, state_dict)


def _refuse_layouts(parallel: ParallelConfig, lora: LoraConfig | None) -> None:
    """Refuse what only the torchtitan engine can do."""
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise SdpoError(
            f"the transformers engine trains on one device, and torchrun started {world} ranks: "
            "start it without torchrun, or use --engine torchtitan"
        )
    for name, off in {"replicate": 1, "tensor": 1, "context": 1, "cpu_offload": False}.items():
        if (value := getattr(parallel, name)) != off:
            raise SdpoError(
                f"parallel.{name}={value}: the transformers engine trains on one device; use "
                "--engine torchtitan"
            )
    if parallel.compile != "none":
        raise SdpoError("parallel.compile: the transformers engine does not compile; leave it out")
    if lora is not None and lora.rank:
        raise SdpoError("lora: the transformers engine trains whole weights; use torchtitan")
