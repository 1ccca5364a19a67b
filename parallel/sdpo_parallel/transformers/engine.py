"""Any causal LM of transformers: for scoring, runs on one device, other people's loops.

    model = TransformersModel(AutoModelForCausalLM.from_pretrained(folder))
    out = two_pass_loss(model, batch, ReverseKL())

``TransformersModel`` takes any causal LM whose logits are ``hidden @ lm_head.weight.T``, with the
softcap or the scale that its config names.
``TransformersEngine`` trains one on a single device, with the trainer's checkpoints and export.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Iterator
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

from sdpo_kernels import logit_options

from ..config import LoraConfig, ParallelConfig
from ..engine import Engine, EngineConfig
from ..errors import SdpoError
from ..huggingface import (
    check_finite,
    check_length,
    check_teacher,
    check_weights,
    copy_assets,
    export_dtype,
    read_config,
    replace_folder,
    two_heads,
)
from ..inference import Dtype, Inference, InferenceConfig
from ..model import CausalModel, LMHead
from ..rounding import cast
from ..rows import Kept, Rows
from ..teacher import TeacherState
from .attention import NAME, Unreadable, install, uninstall, view
from .liger import apply_liger

PROBE = 128
"""Slots of a row that is read to see what a model can."""

# one process is what this engine is for
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class TransformersModel(CausalModel):
    """A causal LM of transformers as a `CausalModel`.

    Args:
        compute_dtype: dtype of the passes, where it is not that of the weights.

    Raises:
        SdpoError: its logits are not ``hidden @ lm_head.weight.T`` with a softcap or a scale that
            its config names (a bias, say): the objectives would get them wrong.

    Attributes:
        reads_tries: it reads rows whose sequences share slots.
        packs: documents of a row do not see each other; False: each is read in a row of its own.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype | None = None):
        self.module, self.dtype = model, compute_dtype or model.dtype
        self.reads_tries = self.packs = False
        self.decoder: Any = model.get_decoder()
        was_training = model.training
        model.eval()
        self._logits = logit_options(model.config)
        self._check_head()
        self.reads_tries = install(model) and self._can("reads_tries")
        if not self.reads_tries and model.config._attn_implementation == NAME:
            uninstall(model)
        self.packs = self.reads_tries or self._can("packs")
        model.train(was_training)

    def hidden_states(
        self, rows: Rows, *, keep: Kept | None = None, behind: Kept | None = None
    ) -> Tensor:
        """(N, D). A model that cannot read tries is given positions alone: most models of
        transformers mask documents wherever those restart; flash attention does so for a single
        row only, so rows are laid end to end there. Models that do not get one padded row per
        document."""
        tokens_BT, positions_BT, index_N = rows.tokens_BT, rows.positions_BT, rows.index_N
        inputs: dict[str, Any] = {"input_ids": tokens_BT, "position_ids": positions_BT}
        if self.reads_tries:
            inputs["sdpo_view"] = view(rows, keep, behind, self.dtype)
            inputs["attention_mask"] = tokens_BT.new_zeros(1, 1, 1, 1)  # none is to be made
        elif not self.packs:
            tokens_BT, index_N = _one_row_per_document(tokens_BT, positions_BT, index_N)
            inputs = {"input_ids": tokens_BT}
        elif "flash" in (self.module.config._attn_implementation or ""):
            inputs = {name: t.view(1, -1) for name, t in inputs.items()}
        mixed = self.dtype != self.module.dtype
        with torch.autocast(tokens_BT.device.type, self.dtype, enabled=mixed):
            out = self.decoder(**inputs, use_cache=False)
        return out.last_hidden_state.flatten(0, 1)[index_N].to(self.dtype)

    def lm_head(self) -> LMHead:
        weight: Any = self.module.get_output_embeddings().weight  # pyright: ignore
        return LMHead(weight.to(self.dtype), **self._logits)

    @torch.no_grad()
    def _check_head(self) -> None:
        head = self.module.get_output_embeddings()
        name = type(self.module).__name__
        if head is None or getattr(head, "bias", None) is not None:
            raise SdpoError(f"{name}: no lm_head without a bias; such models are not supported")
        probe = torch.tensor([[0, 1, 2]], device=self.module.device)
        products = self.decoder(input_ids=probe, use_cache=False).last_hidden_state @ head.weight.T
        # a softcap shows in large logits only, which random weights do not give
        large = torch.linspace(-99, 99, products.numel()).to(products).view(products.shape)
        for given in (None, large):
            hook = head.register_forward_hook(lambda *_, given=given: given)
            theirs = self.module(input_ids=probe, use_cache=False).logits.float()
            hook.remove()
            if not torch.isfinite(theirs).all():
                return  # broken weights are check_finite's to name
            ours = self._transformed((products if given is None else given).float())
            if ours.shape != theirs.shape or not _close(ours, theirs, 0.02):
                raise SdpoError(
                    f"{name}: its logits are not hidden @ lm_head.weight.T with the softcap and "
                    f"scale that its config names ({self._logits}); such models are not supported"
                )

    def _transformed(self, products: Tensor) -> Tensor:
        softcap, temperature = self._logits["softcap"], self._logits["temperature"]
        if softcap is not None:
            products = softcap * torch.tanh(products / softcap)
        return products / temperature

    @torch.no_grad()
    def _can(self, what: Literal["reads_tries", "packs"]) -> bool:
        """Whether a sequence reads the same, to the last bit, whichever other stands before it:
        one with which it shares its beginning (reads_tries), or none of it (packs).

        Anything else is a leak, however small: what differs is what the other sequence says. A
        model whose arithmetic depends on the values beside a row's own, such as a mixture of
        experts' on some devices, counts as leaking.
        """
        generator = torch.Generator().manual_seed(0)
        largest = self.module.get_output_embeddings().weight.shape[0]  # pyright: ignore
        device, common = self.module.device, 20 if what == "reads_tries" else 0
        shared, one, other, own = (
            torch.randint(1, min(largest, 1000), (n,), generator=generator).to(device)
            for n in (common, 40, 40, 30)
        )

        def read(*branches: Tensor) -> Tensor:
            """What the last branch reads behind the shared slots."""
            tokens = torch.cat([shared, *branches])
            place = torch.arange(PROBE, device=device)
            depth, end, stop = place.clone(), torch.full_like(place, PROBE), common
            for branch in branches:
                start, stop = stop, stop + len(branch)
                depth[start:stop], end[start:stop] = place[common : common + len(branch)], stop
            depth[stop:], end[:common] = 0, stop
            padded = torch.nn.functional.pad(tokens, (0, PROBE - stop))
            slots = place[stop - len(own) : stop]
            return self.hidden_states(
                Rows(padded[None], depth[None], place[None], end[None], slots)
            )

        setattr(self, what, True)  # as far as `read` is concerned
        try:
            first, second, alone = read(one, own), read(other, own), read(own)
        except (TypeError, Unreadable):  # it takes no positions, or no views
            return False
        if not torch.isfinite(alone).all():
            return True  # broken weights are check_finite's to name
        # positions that run on over a row leak nothing, and are no less wrong
        tolerance = 16 * torch.finfo(self.dtype).eps
        return torch.equal(first, second) and _close(first, alone, tolerance)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


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
    dtype: Dtype = "auto",
    compute_dtype: Dtype | None = None,
    liger: bool = False,
    share_prefix: bool = True,
) -> TransformersModel:
    """A local Hugging Face folder as a model of the two passes, on the first accelerator if any.

    Attention is SDPA's, or what transformers has for models without it; rows that share prefixes
    are read as attention.py says.

    Args:
        dtype: of the weights; ``auto``: bfloat16 on an accelerator, float32 on a CPU.
        compute_dtype: of the passes, where it is not that of the weights.
        liger: Liger's RMSNorm, SwiGLU and rotary embeddings; see liger.py.
        share_prefix: rows may share prefixes; False: flash-attn, which cannot read such rows, where
            it is installed and the passes run on a GPU in bfloat16.

    Raises:
        SdpoError: no such folder, no weights in it, weights that are not finite, or a lm_head that
            its config ties to the embeddings and that differs from them.
    """
    read_config(folder)
    check_weights(folder)
    disable_progress_bar()
    device, auto = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    dtype = auto if dtype == "auto" else dtype
    compute_dtype = auto if compute_dtype == "auto" else compute_dtype or dtype
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation=None if share_prefix else choose_attention(device, compute_dtype),
    )
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not embeddings.weight:
        raise two_heads(folder)  # transformers saw that they differ
    check_finite(model, folder)
    model = model.to(device).eval()  # pyright: ignore
    if liger:
        apply_liger(model)
    return TransformersModel(model, getattr(torch, compute_dtype))


def choose_attention(device: str, compute_dtype: str) -> str | None:
    """flash-attn where it is installed and can run; None: transformers' choice for the model."""
    can_flash = device.startswith("cuda") and compute_dtype == "bfloat16"
    return "flash_attention_2" if can_flash and is_flash_attn_2_available() else None


class TransformersEngine(Engine):
    """An `Engine` for any causal LM of transformers, on one device.

    Weights, gradients and optimizer state are float32; the passes run under autocast where
    ``parallel.compute_dtype`` says bfloat16.

    Args:
        state: saved and restored with the model (step, place in the data).
    """

    def __init__(self, config: EngineConfig, state: Stateful):
        self.check_support(config, _world_size())
        policy = self.build_policy(config)
        if not policy.packs:
            name = type(policy.module).__name__
            print(f"sdpo: {name} mixes packed documents: one a row", file=sys.stderr)
        module = policy.module.train()
        disable_dropout(module)
        if config.parallel.activation_checkpoint != "none":
            enable = getattr(module, "activation_checkpointing_enable", None)
            enable = enable or module.gradient_checkpointing_enable  # its name before 5.20
            enable({"use_reentrant": False})
        self.device = module.device
        teacher = TeacherState(config.teacher, policy, lambda: _teacher(config))
        optimizer = torch.optim.AdamW(module.parameters(), **config.optimizer.adamw())
        super().__init__(config, policy, teacher, optimizer, _Named(module, optimizer), state)

    @staticmethod
    def check_support(config: EngineConfig, ranks: int) -> None:
        _refuse_layouts(config.parallel, config.lora, ranks)
        longest = read_config(config.model).get("max_position_embeddings")
        check_length(config.model, longest, config.max_tokens)
        if config.teacher_folder is not None:
            check_teacher(config.teacher_folder, config.model)

    @staticmethod
    def build_policy(config: EngineConfig) -> TransformersModel:
        return _load(config, config.model, "float32")

    @staticmethod
    def build_inference(config: InferenceConfig) -> Inference:
        _refuse_layouts(config.parallel, LoraConfig(), _world_size())
        passes, liger = config.layout.compute_dtype, config.parallel.liger
        model = load_model(config.model, dtype=config.dtype, compute_dtype=passes, liger=liger)
        return Inference(model, model.module.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, w.detach()) for name, w in self.module.state_dict().items())

    @staticmethod
    def export_policy(
        policy: TransformersModel, config: EngineConfig, folder: str, *, adapters: bool = False
    ) -> None:
        if adapters:
            raise SdpoError("this run trained no adapters: it has none to export")
        partial = f"{folder}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        dtype = export_dtype(config.model, config.checkpoint.export_dtype)
        rounding, state = config.checkpoint.export_rounding, policy.module.state_dict()
        # a tied head stays the same tensor as the embeddings, which is then written once
        once = {w.data_ptr(): cast(w, dtype, rounding) for w in state.values()}
        weights = {name: once[w.data_ptr()] for name, w in state.items()}
        policy.module.save_pretrained(partial, state_dict=weights)
        copy_assets(config.model, partial, dtype)
        replace_folder(partial, folder)


def _load(config: EngineConfig, folder: str, dtype: Dtype) -> TransformersModel:
    parallel = config.parallel
    return load_model(
        folder,
        dtype=dtype,
        compute_dtype=parallel.compute_dtype,
        liger=parallel.liger,
        share_prefix=config.share_prefix,
    )


def _teacher(config: EngineConfig) -> TransformersModel:
    """In float32 where it starts as the policy, else as the passes compute."""
    if config.teacher_folder is None:
        return _load(config, config.model, "float32")
    return _load(config, config.teacher_folder, config.parallel.compute_dtype)


class _Named:
    """An optimizer's state by parameter names, as checkpoints hold it."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.module, self.optimizer = module, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.module, self.optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.module, self.optimizer, state_dict)


def _world_size() -> int:
    """How many ranks torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _refuse_layouts(parallel: ParallelConfig, lora: LoraConfig, ranks: int) -> None:
    """Refuse what only the torchtitan engine can do."""
    if ranks > 1:
        raise SdpoError(
            f"the transformers engine runs on one device, and here are {ranks} ranks: start it "
            "without torchrun, or use --engine torchtitan"
        )
    for name, off in {"replicate": 1, "tensor": 1, "context": 1, "cpu_offload": False}.items():
        if (value := getattr(parallel, name)) != off:
            raise SdpoError(
                f"parallel.{name}={value}: the transformers engine runs on one device; use "
                "--engine torchtitan"
            )
    if parallel.compile != "none":
        raise SdpoError("parallel.compile: the transformers engine does not compile; leave it out")
    if lora.rank:
        raise SdpoError("lora: the transformers engine trains whole weights; use torchtitan")
