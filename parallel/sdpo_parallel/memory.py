"""Bytes a rank holds at the peak of a step, from config.json alone. No torchtitan, no weights.

Computed from what torchtitan 0.3.0's Qwen3 and Llama blocks save for autograd, what FSDP2 gathers
and reduces, and what the chunked kernels allocate; tests/sdpo_parallel/test_memory_estimate.py
compares it with counted allocations.

Shapes: T tokens of a micro-batch's policy pass over ``context``, N response tokens, D hidden size,
F intermediate size, Q and K widths of all query and of all key heads, H head size, V vocabulary,
t ``tensor``, s = t with sequence parallelism (else 1), c ``context``, r adapters' rank.

What one layer saves for its backward, in elements of the compute dtype per token:

    input of the layer and of the second norm     2 D / s        norms keep their inputs
    inputs of wqkv and of w1, w3                  2 D            gathered over tensor ranks
    inputs of the query and key norms (Qwen3)     (Q + K) / t
    rotated queries, attention's output           2 Q / t
    keys and values                               2 K / t        x c: context ranks gather them
    w1 x, silu(w1 x), w3 x, their product         4 F / t
    outputs of adapters' A                        r each
    an elementwise norm (CPU)                     its normed input once more, before the weight
    dense attention                               the row's width: a float mask, made per layer
    branches of shared prefixes (CPU)             2 K / t for every token of whole sequences, joined
                                                  for each branch, in place of the slots' own

and in float32: the positions' rotary values (2 H; Llama: H), attention's log-sum-exp (Q / H t) and
the norms' inverse deviations. ``full`` checkpointing keeps D / s; ``selective`` keeps D / s and the
outputs of every other linear layer (wqkv, w1, w2; SelectiveAC counts them in the order in which
they run), of flash attention, and of reduce-scatters. Either holds one layer's whole set while it
is computed again.

Tied embeddings and lm_head are one parameter of FSDP2, gathered and reduced once; the lm_head's
gradient waits for the embeddings'.

The peak is the largest of these moments; all but ``update`` include the gathered lm_head:

    hindsight    all layers' kept tensors; the final norm's; h (N, D); all layers' keys and values
                 of the policy's slots, 2 K / t each, where hindsight reads on them, freed
                 afterwards; over the S slots of hindsight, one layer without gradient, the larger

                     attention  D / s + D + (2 Q + 2 K) / t, and all keys and values that it reads
                     MLP        2 D / s + D + 3 F / t

                 this layer and the next one gathered
    objective    all layers' kept tensors; the final norm's; h, g, dH (N, D); and what the kernels
                 need: a chunk's logits, its rows of h, g and dH, and either the gradient with
                 respect to all logits (N, V / t), which outlives the logits until dW is there, or
                 dW (V / t, D) in float32 and that gradient for as many chunks as there is room
    head         the same with, in place of the chunk, dW in the compute dtype; then, in place of
                 the float32 one, FSDP2's float32 input of the reduce-scatter
    layer        the last layer's whole set, the others' kept tensors; gradients inside its MLP,
                 2 F / t + D / s per token; this layer and the next one gathered; w2's gradient; the
                 head's gradient on its way
    embedding    the gradient of the embeddings, and its reduce-scatter's float32 input
    update       AdamW's temporaries, one float32 copy of what it trains (CPU: foreach; GPU: fused)

Left out, which makes the estimate too high: what torch.compile and Liger save, frozen norms under
adapters. Left out, which makes it too low: fragmentation, buffers of NCCL and cuBLAS (see USABLE).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import AutoConfig

from .config import EMA, Frozen, Live, LoraConfig, ParallelConfig, Teacher, TrustRegion
from .errors import SdpoError
from .rows import Sharing

MASTER = 4
"""Bytes of a float32: master weights, gradients reduced across ranks, each of AdamW's moments."""
BLOCK_BYTES = 12 * 2**20
"""Temporaries of the torch implementation of the kernels (``rows_torch.BLOCK_ELEMENTS``)."""
USABLE = 0.9
"""Assumed share of a device's memory that tensors can fill: CUDA's context, NCCL, cuBLAS and the
allocator's fragmentation take the rest."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that decide its memory."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Embeddings and lm_head are one matrix."""
    qk_norm: bool
    """Queries and keys are normed per head, and rotated by cosines and sines (Qwen3)."""

    @classmethod
    def from_config(cls, folder: str) -> "ModelShape":
        """From a Hugging Face folder's config.json; no weights are needed.

        Raises:
            SdpoError: no config.json, or none that transformers reads, or not a decoder's.
        """
        try:
            c: Any = AutoConfig.from_pretrained(folder)
        except (KeyError, ValueError, OSError) as error:
            raise SdpoError(f"{folder}: transformers cannot read config.json ({error})") from error
        try:
            hidden, heads = c.hidden_size, c.num_attention_heads
            return cls(
                hidden=hidden,
                layers=c.num_hidden_layers,
                heads=heads,
                kv_heads=getattr(c, "num_key_value_heads", None) or heads,
                head_dim=getattr(c, "head_dim", None) or hidden // heads,
                intermediate=getattr(c, "intermediate_size", None) or 4 * hidden,
                vocabulary=c.vocab_size,
                tied=bool(c.tie_word_embeddings),
                qk_norm=c.model_type == "qwen3",
            )
        except AttributeError as error:
            raise SdpoError(f"{folder}/config.json: not a decoder's ({error})") from error

    @property
    def q(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim

    def head(self, tensor: int = 1) -> float:
        """Weights of the lm_head on one of ``tensor`` ranks."""
        return self.vocabulary * self.hidden / tensor

    def layer(self, tensor: int = 1) -> float:
        """Weights of a layer on one of ``tensor`` ranks; norms are on all of them."""
        matrices = 2 * self.hidden * (self.q + self.kv) + 3 * self.hidden * self.intermediate
        return matrices / tensor + 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    def parameters(self, tensor: int = 1) -> float:
        """Weights of the model on one of ``tensor`` ranks."""
        edges = (1 if self.tied else 2) * self.head(tensor) + self.hidden
        return self.layers * self.layer(tensor) + edges

    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """torchtitan's name -> (inputs, outputs, True where tensor ranks split the outputs and not
        the inputs), in the order in which a layer runs them, Q, K and V apart."""
        d, f = self.hidden, self.intermediate
        return {
            "wq": (d, self.q, True),
            "wk": (d, self.kv, True),
            "wv": (d, self.kv, True),
            "wo": (self.q, d, False),
            "w1": (d, f, True),
            "w3": (d, f, True),
            "w2": (f, d, False),
        }

    def adapters(self, lora: LoraConfig, tensor: int = 1) -> float:
        """Weights of all adapters on one of ``tensor`` ranks: A (r, in) and B (out, r)."""
        each = (
            (inputs + out / tensor) if split else (inputs / tensor + out)
            for name, (inputs, out, split) in self.linears().items()
            if name in adapted(lora)
        )
        return self.layers * lora.rank * sum(each)


def adapted(lora: LoraConfig) -> set[str]:
    """Names of ``ModelShape.linears`` that get adapters."""
    both = {"wk", "wv"} if "wkv" in lora.targets else set()
    return {*lora.targets, *both} if lora.rank else set()


@dataclass(frozen=True, kw_only=True)
class Load:
    """The work of one micro-batch on one rank."""

    tokens: int
    """Slots of a micro-batch's policy pass, before context parallelism."""
    response_tokens: int
    """Tokens that predict a response token."""
    row_tokens: int
    """Slots of a row."""
    max_tokens: int
    """The longest sequence: rows of the rotary tables."""
    chunk_bytes: int
    """Logits of both passes that may be alive at once."""
    grad_bytes: int = 0
    """Gradients with respect to logits that may be kept from the forward to the backward."""
    hindsight_tokens: int = 0
    """Slots of a micro-batch's hindsight pass, before context parallelism."""
    sharing: Sharing = "none"
    unshared_tokens: int = 0
    """Tokens of the policy's sequences, each counted whole; for what shares prefixes on a CPU."""


class Moment(NamedTuple):
    """Bytes that come and go within a step."""

    gathered: float
    """Layers, the lm_head included."""
    activations: float
    head: float
    """Logits and the lm_head's gradient."""
    keys: float = 0.0
    """Those that hindsight reads on, and values."""


class _Rank:
    """One rank of a layout, and the sizes that follow."""

    def __init__(
        self,
        model: ModelShape,
        parallel: ParallelConfig,
        lora: LoraConfig,
        teacher: Teacher,
        ranks: int,
        load: Load,
        device_type: str = "cuda",
        teacher_model: ModelShape | None = None,
    ):
        self.shards = parallel.shards(ranks) * parallel.context
        for name in ("heads", "kv_heads", "intermediate", "vocabulary"):
            if (size := getattr(model, name)) % parallel.tensor:
                raise SdpoError(
                    f"tensor={parallel.tensor} does not divide the model's {name}={size}: "
                    "choose a degree that does"
                )
        self.model, self.parallel, self.lora, self.load = model, parallel, lora, load
        self.teacher, self.teacher_model = teacher, teacher_model or model
        self.on_cpu, self.trains_head = device_type == "cpu", not lora.rank
        # bytes of the compute dtype
        self.item = 4 if parallel.resolve_dtype(device_type) == "float32" else 2
        self.tokens = load.tokens / parallel.context
        self.hindsight = load.hindsight_tokens / parallel.context
        branches = self.on_cpu and parallel.compile == "none" and parallel.context == 1
        self.dense = parallel.attention == "dense" or (self.on_cpu and not branches)
        self.joins = self.on_cpu and not self.dense and load.sharing != "none"
        # width of the residual stream
        self.residual = model.hidden / (parallel.tensor if parallel.sequence_parallel else 1)
        # tensors of its input's size that a norm leaves: one, and its elementwise form two
        self.norm_copies = 2 if self.on_cpu else 1
        # a teacher with weights of its own; adapters switched off are the start's
        of_the_start = teacher == Frozen() or isinstance(teacher, TrustRegion)
        self.own_teacher = not isinstance(teacher, Live) and not (lora.rank and of_the_start)
        adapters = model.adapters(lora, parallel.tensor)
        whole = model.parameters(parallel.tensor)
        # weights of this rank, and those that its optimizer updates
        self.weights = (whole + adapters) / self.shards
        self.trained = (whole if self.trains_head else adapters) / self.shards

    def saved(self) -> float:
        """Bytes that one layer leaves for its backward: the first table of the module."""
        m, p = self.model, self.parallel
        t, copies = p.tensor, self.norm_copies
        items = 2 * copies * self.residual + 2 * m.hidden
        items += (2 * m.q + 4 * m.intermediate) / t
        keys = self.load.unshared_tokens if self.joins else self.load.tokens
        inverse = 2.0
        if m.qk_norm:
            items += copies * (m.q + m.kv) / t
            inverse += (m.heads + m.kv_heads) / t
        items += self.lora.rank * len(adapted(self.lora) & set(m.linears()))
        if self.dense:
            items += self.load.row_tokens
        rotary = (2 if m.qk_norm else 1) * m.head_dim
        each = self.item * items + 4 * (rotary + m.heads / t + inverse)
        return self.tokens * each + self.item * 2 * m.kv / t * keys

    def kept(self) -> float:
        """Bytes that one layer keeps from its forward to its backward."""
        mode, m, t = self.parallel.activation_checkpoint, self.model, self.parallel.tensor
        if mode == "none":
            return self.saved()
        items, single = self.residual, 0.0
        if mode == "selective":
            items += sum(self._matmul_widths()[::2])
            if not self.dense and not self.on_cpu:
                items += m.q / t
                single = m.heads / t
            if t > 1 and self.parallel.sequence_parallel:
                items += 2 * self.residual
        return self.tokens * (self.item * items + 4 * single)

    def _matmul_widths(self) -> list[float]:
        """Output widths of a layer's matmuls, in order."""
        t, rank = self.parallel.tensor, self.lora.rank
        widths = {
            name: out / t if split else float(out)
            for name, (_, out, split) in self.model.linears().items()
        }
        if not rank:  # Q, K and V are one matmul
            qkv = widths.pop("wq") + widths.pop("wk") + widths.pop("wv")
            return [qkv, *widths.values()]
        names = adapted(self.lora)
        return [w for name, o in widths.items() for w in ([o, rank, o] if name in names else [o])]

    def state(self) -> dict[str, float]:
        """Part -> bytes that stay allocated for the whole run; ``cpu_offload`` moves all of it."""
        teacher = 0.0
        if self.own_teacher:
            moves = isinstance(self.teacher, EMA)
            weights = self.teacher_model.parameters(self.parallel.tensor)
            weights += self.model.adapters(self.lora, self.parallel.tensor) if moves else 0
            teacher = weights * (MASTER if moves else self.item)
        return {
            "parameters": MASTER * self.weights,
            "gradients": MASTER * self.trained,
            "optimizer": 2 * MASTER * self.trained,
            "teacher": teacher / self.shards,
        }

    def rotary_tables(self) -> float:
        """Bytes for every layer, and for a teacher's."""
        m, models = self.model, 2 if self.own_teacher else 1
        return models * m.layers * 4 * (2 if m.qk_norm else 1) * m.head_dim * self.load.max_tokens

    def teacher_at_work(self) -> float:
        """The lm_head that a teacher's pass leaves gathered; a mixture's is of twice the width."""
        head = self.item * self.teacher_model.head(self.parallel.tensor)
        left = head if self.own_teacher else 0.0
        if isinstance(self.teacher, TrustRegion):
            left += 2 * head + self.item * self.load.response_tokens * self.model.hidden
        return left

    def logits(self) -> tuple[float, float]:
        """Tokens of a chunk; bytes of a token's gradient with respect to its logits."""
        v, n = self.model.vocabulary / self.parallel.tensor, self.load.response_tokens
        return min(max(1.0, self.load.chunk_bytes // (2 * 4 * v)), n), self.item * v

    def chunk(self) -> float:
        """A chunk's logits, the rows that are multiplied, and dH in float32."""
        m, (rows, _) = self.model, self.logits()
        temporaries = BLOCK_BYTES if self.on_cpu else 0
        logits = 2 * 4 * m.vocabulary / self.parallel.tensor
        return rows * (logits + (4 + 2 * self.item) * m.hidden) + temporaries

    def kernels(self) -> float:
        """What the objective holds besides hidden states and their gradients."""
        m, n, head = self.model, self.load.response_tokens, self.model.head(self.parallel.tensor)
        rows, row = self.logits()
        if n * row > self.load.grad_bytes:
            block = self.load.grad_bytes // (rows * row) * rows
            block *= row + (MASTER + self.item) * m.hidden
            return self.chunk() + block + MASTER * head * self.trains_head
        backward = self.item * head * self.trains_head + MASTER * n * m.hidden
        return n * row + max(self.chunk(), backward)

    def kept_keys(self) -> float:
        """Keys and values that hindsight's pass reads on, of all layers."""
        if self.load.sharing != "keys" or not isinstance(self.teacher, Live):
            return 0.0
        m = self.model
        return self.item * self.tokens * 2 * m.layers * m.kv / self.parallel.tensor

    def inference(self) -> float:
        """Bytes at work in one layer of the hindsight pass."""
        m, t, slots, item = self.teacher_model, self.parallel.tensor, self.hindsight, self.item
        read = self.load.hindsight_tokens + (self.load.tokens if self.kept_keys() else 0)
        attention = slots * (self.residual + m.hidden + (2 * m.q + 2 * m.kv) / t)
        attention += read * 2 * m.kv / t
        if self.dense:
            attention += slots * self.load.row_tokens
        if self.joins:  # masks of branches
            attention += slots * self.load.max_tokens
        mlp = slots * (2 * self.residual + m.hidden + 3 * m.intermediate / t)
        return item * max(attention, mlp)

    def moments(self) -> dict[str, Moment]:
        """The second table of the module."""
        m, item, t = self.model, self.item, self.parallel.tensor
        head, rows = m.head(t), item * self.load.response_tokens * m.hidden
        trains = self.trains_head
        mask = self.tokens * self.load.row_tokens if self.dense else 0.0
        stream = item * self.tokens * self.residual
        whole = item * self.tokens * m.hidden
        kept, gathered = m.layers * self.kept() + mask, item * head
        inside = item * self.tokens * 2 * m.intermediate / t + stream
        ending = kept + self.norm_copies * stream
        reducing = (item + MASTER) * head * trains
        weight_gradient = item * m.hidden * m.intermediate / t * trains
        moving = (item if m.tied else MASTER) * head * trains
        layers = 2 * item * self.teacher_model.layer(t)
        return {
            "hindsight": Moment(
                gathered + layers, ending + rows + self.inference(), 0.0, self.kept_keys()
            ),
            "objective": Moment(gathered, ending + 3 * rows, self.kernels()),
            "head": Moment(gathered, ending + 2 * rows + whole, reducing),
            "layer": Moment(
                gathered + 2 * item * m.layer(t) + weight_gradient,
                kept - self.kept() + self.saved() + inside,
                moving,
            ),
            "embedding": Moment(
                gathered, whole, reducing + (item * head * trains if m.tied else 0.0)
            ),
        }


def estimate(
    model: ModelShape,
    parallel: ParallelConfig,
    lora: LoraConfig,
    teacher: Teacher,
    *,
    ranks: int,
    load: Load,
    device_type: str = "cuda",
    teacher_model: ModelShape | None = None,
) -> dict[str, int]:
    """Bytes of a rank's device memory at the peak of a step, by part, and their total.

    Args:
        ranks: of the whole run.
        device_type: "cpu" assumes what a CPU runs: attention by branches, elementwise norms.
        teacher_model: of ``Frozen(folder)``, where it is not ``model``.

    Raises:
        SdpoError: the degrees do not divide ``ranks``, or ``tensor`` the model's sizes.
    """
    rank = _Rank(model, parallel, lora, teacher, ranks, load, device_type, teacher_model)
    state, on_cpu = rank.state(), device_type == "cpu"
    if parallel.cpu_offload and not on_cpu:
        state = dict.fromkeys(state, 0.0)
    weights = state.pop("teacher")

    def peak(moment: Moment, teacher: float) -> dict[str, int]:
        sizes = {**state, "rotary tables": rank.rotary_tables()}
        sizes |= {"gathered layers": moment.gathered, "activations": moment.activations}
        sizes |= {"kept keys and values": moment.keys, "head chunk and head gradient": moment.head}
        parts = {name: round(size) for name, size in (sizes | {"teacher": teacher}).items()}
        return parts | {"total": sum(parts.values())}

    teaching = weights + rank.teacher_at_work()
    peaks = [peak(moment, teaching) for moment in rank.moments().values()]
    if on_cpu:
        peaks.append(peak(Moment(0.0, MASTER * rank.trained, 0.0), weights))
    return max(peaks, key=lambda parts: parts["total"])


def kept_bytes(model: ModelShape, parallel: ParallelConfig, *, load: Load) -> int:
    """Bytes of the policy's keys and values that a live teacher's hindsight pass reads on, while it
    runs; 0 where it does not."""
    ranks = parallel.replicate * parallel.context * parallel.tensor
    return round(_Rank(model, parallel, LoraConfig(), Live(), ranks, load).kept_keys())


def host_bytes(
    model: ModelShape,
    parallel: ParallelConfig,
    lora: LoraConfig,
    teacher: Teacher,
    *,
    ranks: int,
    load: Load,
) -> int:
    """Bytes of host memory that a rank's ``cpu_offload`` moves parameters, gradients, optimizer
    state and teacher to; 0 without it."""
    if not parallel.cpu_offload:
        return 0
    return round(sum(_Rank(model, parallel, lora, teacher, ranks, load).state().values()))
