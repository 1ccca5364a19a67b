"""One torchtitan decoder on a mesh: built from a Hugging Face folder, read by the two passes."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from binpacking.to_constant_bin_number import to_constant_bin_number
from torch import Tensor

from ..branches import plan
from ..config import LoraConfig
from ..huggingface import check_finite, check_length, check_tied, check_weights
from ..model import CausalModel, LMHead
from ..rows import Kept, Rows, Sight
from . import cpu
from .lm_head import end_prefetch, gathered
from .mesh import Mesh, quiet

cpu.prepare()  # before torchtitan binds the device
from torchtitan.components.checkpointer.utils import canonical_fqn  # noqa: E402
from torchtitan.config import (  # noqa: E402
    TORCH_DTYPE_MAP,
    CompileConfig,
    OverrideConfig,
    TrainingConfig,
    apply_overrides,
)
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC  # noqa: E402
from torchtitan.tools import utils  # noqa: E402

from .context_parallel import gather_rows, share, sight_of  # noqa: E402
from .inner_attention import FLEX_THAT_KEEPS, FLEX_TO_CPU, Keeping, using  # noqa: E402
from .models import spec_from_hf  # noqa: E402
from .weights import load_weights, start_adapters  # noqa: E402


class TorchtitanModel(CausalModel):
    """A `CausalModel`, sharded over a mesh.

    Args:
        folder: local Hugging Face folder (Qwen3 or Llama).
        max_tokens: longest sequence; sizes the rotary cache.
        lora: adapters beside frozen weights, where its rank is not 0.
        trained: activations are checkpointed as the mesh's config says; False: for inference.
        dtype: of the stored weights; passes compute in the mesh's ``compute_dtype``.
    """

    def __init__(
        self,
        folder: str,
        mesh: Mesh,
        max_tokens: int,
        *,
        lora: LoraConfig,
        trained: bool,
        dtype: str = "float32",
    ):
        self.folder, self.mesh, self.max_tokens, self.lora = folder, mesh, max_tokens, lora
        self.attention = mesh.attention.backend
        self.varlen = self.attention == "varlen"
        self.by_sdpa = self.attention in ("branches", "dense")
        # an override makes flex what is asked for
        backend = "flex" if self.by_sdpa else self.attention
        self.spec = spec_from_hf(folder, attention=backend, lora=lora)
        check_weights(folder)
        if self.spec.model.enable_weight_tying:  # pyright: ignore
            check_tied(folder)
        check_length(folder, self.spec.model.max_seq_len, max_tokens)  # pyright: ignore
        self.module = self._build(trained, dtype)
        self.module._skip_lm_head = True  # forward then ends at the final norm
        self.vocabulary: int = self.module.config.vocab_size
        self.context = mesh.dims.get_optional_mesh("cp")
        tensor = mesh.dims.get_optional_mesh("tp")
        self.tensor_group = None if tensor is None else tensor.get_group()
        self.reads_tries = self.context is None and not self.varlen

    def hidden_states(
        self, rows: Rows, *, keep: Kept | None = None, behind: Kept | None = None
    ) -> Tensor:
        """(N, D) normed hidden states at the rows' ``index_N``, the same on all context and tensor
        ranks; a tensor rank's gradient of them may be partial."""
        tokens_BT, positions_BT, index_N = rows.tokens_BT, rows.positions_BT, rows.index_N
        if self.context is None:
            sight = rows.sight if behind is None else rows.sight.behind(behind.rows)
            with self._keeping(keep, behind):
                h_BTD = self.module(
                    tokens_BT, positions=positions_BT, attention_masks=self._masks(sight, rows)
                )
            return h_BTD.flatten(0, 1)[index_N]
        assert keep is None and behind is None
        (count, width), slots = positions_BT.shape, positions_BT.numel()
        part = share(width, self.context, index_N.device)
        slots_BL = torch.arange(count, device=index_N.device)[:, None] * width + part.mine_L
        h_BLD = self.module(
            tokens_BT[:, part.mine_L],
            positions=positions_BT[:, part.mine_L],
            attention_masks=self._masks(sight_of(rows, part), rows),
        )
        return gather_rows(h_BLD, slots_BL, slots, index_N, self.context.get_group())

    def _masks(self, sight: Sight, rows: Rows) -> Any:
        """``sight`` as the layers' attention takes it."""
        if self.varlen:
            return self.module.get_attention_masks(rows.positions_BT)
        if self.attention == "dense":
            return sight.dense()
        if self.attention == "branches":
            return plan(sight, self._compute_dtype())
        return sight.block_mask(self.module.config.first_attention.inner_attention.block_size)

    def _keeping(self, keep: Kept | None, behind: Kept | None) -> AbstractContextManager[None]:
        kept = keep or behind
        if kept is None:
            return contextlib.nullcontext()
        if keep is not None:
            keep.layers.update(enumerate(self._buffers(keep.rows)))
        role = "write" if keep is not None else "read"
        return using(self._layers(), list(kept.layers.values()), role)

    def _layers(self) -> list[Keeping]:
        return [layer.attention.inner_attention for layer in self.module.layers.values()]

    def _buffers(self, rows: Rows) -> list[tuple[Tensor, Tensor]]:
        """Room for each layer's keys and values, (B, T, heads of this rank, head size)."""
        attention = self.spec.model.layers[0].attention  # pyright: ignore
        heads = attention.n_kv_heads or attention.n_heads
        size = attention.head_dim or attention.dim // attention.n_heads
        shape = *rows.tokens_BT.shape, heads // self.mesh.parallel.tensor, size
        like = {"dtype": self._compute_dtype(), "device": rows.tokens_BT.device}
        return [(torch.empty(shape, **like), torch.empty(shape, **like)) for _ in self._layers()]

    def _compute_dtype(self) -> torch.dtype:
        return TORCH_DTYPE_MAP[self.mesh.parallel.resolve_dtype(self.mesh.device.type)]

    def lm_head(self) -> LMHead:
        """Gathered over the data-parallel ranks; with tensor parallelism, this rank's rows."""
        return gathered(self.module.lm_head, self.vocabulary, self.tensor_group)

    def own_responses(self, lengths: Sequence[int]) -> list[int] | None:
        """This context rank's share of a micro-batch's responses, balanced by their lengths; every
        rank computes the same assignment. None: all of them."""
        if self.context is None:
            return None
        bins = to_constant_bin_number(dict(enumerate(lengths)), self.context.size())
        return sorted(bins[self.context.get_local_rank()])  # pyright: ignore

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """A context in which the adapters add nothing."""
        layers = [m for m in self.module.modules() if hasattr(m, "_lora_scaling")]
        scales = [layer._lora_scaling for layer in layers]
        for layer in layers:
            layer._lora_scaling = 0.0
        try:
            yield
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer._lora_scaling = scale

    def load(self) -> None:
        """Read the folder's weights; adapters start at random and add nothing.

        Raises:
            SdpoError: a weight is not finite.
        """
        load_weights(self.module, self.adapter(), self.folder)
        start_adapters(self.module)
        check_finite(self.module, self.folder)

    def adapter(self) -> Any:
        """torchtitan's state dict adapter: names and shapes of Hugging Face, and back."""
        with quiet():
            return self.spec.state_dict_adapter(self.spec.model, self.folder)  # pyright: ignore

    def _build(self, trained: bool, dtype: str) -> Any:
        """The sharded module, its weights not yet set."""
        mesh, spec, parallel = self.mesh, self.spec, self.mesh.parallel
        training = TrainingConfig(
            seq_len=self.max_tokens,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            mixed_precision_param=parallel.resolve_dtype(mesh.device.type),
            enable_cpu_offload=parallel.cpu_offload,
        )
        checkpointing = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}
        model: Any = spec.model
        model.update_from_config(config=SimpleNamespace(parallelism=mesh.titan))
        for layer in model.layers:
            layer.attention.rope = replace(layer.attention.rope, max_seq_len=self.max_tokens)
        ours = FLEX_TO_CPU if self.by_sdpa else FLEX_THAT_KEEPS
        overrides: list[Any] = [] if self.varlen else [ours]
        if parallel.liger:
            from .liger import OVERRIDES  # the optional extra

            overrides += OVERRIDES
        with quiet():
            apply_overrides(OverrideConfig(imports=overrides), model)
        with torch.device("meta"), utils.set_default_dtype(TORCH_DTYPE_MAP[training.dtype]):
            module = model.build()
        trainable = {name for name, p in module.named_parameters() if p.requires_grad}
        if model.enable_weight_tying:
            _stay_tied(module)
        compiled = parallel.compile != "none"
        module = spec.parallelize_fn(
            module,
            parallel_dims=mesh.dims,
            training=training,
            parallelism=mesh.titan,
            compile_config=CompileConfig(
                enable=compiled, components=["model"], backend=parallel.compile
            ),
            ac_config=checkpointing[parallel.activation_checkpoint] if trained else None,
            dump_folder="",
        )
        module.to_empty(device="cpu" if parallel.cpu_offload else mesh.device.type)
        with torch.no_grad():
            module.init_weights(buffer_device=mesh.device if parallel.cpu_offload else None)
        end_prefetch(module.tok_embeddings)
        for name, p in module.named_parameters():  # sharding forgets which are frozen
            p.requires_grad_(canonical_fqn(name) in trainable)
        return module.train(trained)


def _stay_tied(module: Any) -> None:
    """torchtitan distributes embeddings and lm_head one by one, which parts them: FSDP2 would
    gather and reduce the one matrix twice."""
    distribute = module.parallelize

    def parallelize(dims: Any) -> None:
        distribute(dims)
        module.tok_embeddings.weight = module.lm_head.weight

    module.parallelize = parallelize
