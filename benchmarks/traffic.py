"""What one rank computes and sends in a step, computed from sizes alone.

Bytes are by the ring convention: a collective over R ranks whose whole tensor has S bytes makes
each rank send S (R - 1) / R; an all-reduce, twice that. counting.py holds them against real ranks.

N response tokens, V vocabulary, D hidden size, T slots of a pass, R ranks, M micro-batches.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sdpo_kernels._impl import tuning
from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.memory import MASTER, ModelShape

Operator = Literal["all-gather", "reduce-scatter", "all-reduce"]
Axis = Literal["shards", "replicas", "tensor", "context", "head"]
"""The ranks that a collective is over; ``head``: the kernels' own, over the tensor ranks."""


def shape_of(c: Mapping[str, Any]) -> ModelShape:
    """The shape in a Qwen3's config.json."""
    return ModelShape(
        hidden=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        intermediate=c["intermediate_size"],
        vocabulary=c["vocab_size"],
        tied=c["tie_word_embeddings"],
        qk_norm=True,
    )


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """The interactions of a step, all alike."""

    per_8_gpus: int = 128
    """Interactions per step on 8 GPUs, whatever ``scaling`` is."""
    scaling: Literal["weak", "strong"] = "weak"
    """weak: the step grows with the GPUs; strong: it does not."""
    prompt: int = 512
    """Tokens before the response in the policy's pass."""
    hindsight: int = 640
    """Tokens before the response in the hindsight pass."""
    response: int = 512
    micro_batch_tokens: int = 16_384
    """Slots of the larger pass that a rank computes at a time, before context parallelism."""
    policy_read: float = 1.0
    """Share of the policy pass' tokens that are read, as benchmarks.prefixes counts it; 1: no
    prefix is shared. Context parallelism shares none."""
    hindsight_read: float = 1.0
    """The same of the hindsight pass."""

    def __post_init__(self):
        for name in ("policy_read", "hindsight_read"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")

    def of_step(self, ranks: int) -> int:
        return round(self.per_8_gpus * (ranks / 8 if self.scaling == "weak" else 1))

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of an interaction's policy pass and hindsight pass."""
        return self.prompt + self.response, self.hindsight + self.response

    def read(self, parallel: ParallelConfig) -> tuple[float, float]:
        """Shares of both passes' tokens that a layout reads."""
        return (1.0, 1.0) if parallel.context > 1 else (self.policy_read, self.hindsight_read)


class Work(NamedTuple):
    """Work of the busiest group of context x tensor ranks in a step, by micro-batch."""

    micro_batches: int
    policy_slots: float
    hindsight_slots: float
    responses: float
    """Response tokens, N."""
    chunk_bytes: int


def work_of(each: Interactions, parallel: ParallelConfig, ranks: int) -> Work:
    """No slot is padding."""
    groups = parallel.shards(ranks) * parallel.replicate
    n = math.ceil(each.of_step(ranks) / groups)
    passes = [t * share for t, share in zip(each.lengths, each.read(parallel), strict=True)]
    m = math.ceil(n * max(passes) / each.micro_batch_tokens)
    sizes = (n * t / m for t in (*passes, each.response))
    return Work(m, *sizes, chunk_bytes=tuning.CHUNK_BYTES["cuda"])


def model_flops(
    shape: ModelShape,
    policy: int,
    hindsight: int,
    response: int,
    read: tuple[float, float] = (1.0, 1.0),
) -> tuple[float, float]:
    """Flops that one interaction needs, of layers and lm_head; its tokens in the policy's pass, in
    the hindsight pass, and in the response.

    Two per weight and token in a forward, four more in a backward; causal attention; the lm_head at
    response tokens only, without a gradient for the hindsight pass. Padding, recomputation and
    logits of prompts do not count.

    Args:
        read: shares of the two passes' tokens that are read where prefixes are shared: the last
            ones, which see all the others.
    """
    body = shape.layers * shape.layer() + shape.hidden
    layers = 0.0
    for t, passes, share in ((policy, 3, read[0]), (hindsight, 1, read[1])):
        pairs = t * t * (1 - (1 - share) ** 2)
        layers += passes * (2 * body * t * share + 2 * shape.layers * shape.q * pairs)
    return layers, 8 * shape.head() * response


def ring(operator: str, size: float, ranks: int) -> float:
    """Bytes that each rank sends, where the whole tensor has ``size`` bytes."""
    return size * (ranks - 1) / ranks * (2 if operator == "all-reduce" else 1)


class Sent(NamedTuple):
    """By one rank in a step, for one purpose; until ``ring`` has been applied, the bytes are those
    of the whole tensors."""

    what: str
    axis: Axis
    operator: Operator
    bytes: float
    collectives: float


def degrees(parallel: ParallelConfig, ranks: int) -> dict[Axis, int]:
    """Ranks of each axis' groups. FSDP2 shards over the context ranks, too."""
    return {
        "shards": parallel.shards(ranks) * parallel.context,
        "replicas": parallel.replicate,
        "tensor": parallel.tensor,
        "head": parallel.tensor,
        "context": parallel.context,
    }


def traffic(
    shape: ModelShape, work: Work, parallel: ParallelConfig, ranks: int, device_type: str = "cuda"
) -> list[Sent]:
    """What one rank sends in a step of reverse KL with a live teacher and no adapters."""
    item = 4 if parallel.resolve_dtype(device_type) == "float32" else 2
    sizes = degrees(parallel, ranks)
    flows = [
        *_weights(shape, work, parallel, item, sizes["shards"]),
        *_tensor(shape, work, parallel, item),
        *_head(shape, work, parallel),
        *_context(shape, work, parallel, item),
    ]
    return [
        s._replace(bytes=ring(s.operator, s.bytes, sizes[s.axis]))
        for s in flows
        if sizes[s.axis] > 1
    ]


def _weights(
    shape: ModelShape, work: Work, parallel: ParallelConfig, item: int, shards: int
) -> Iterator[Sent]:
    """FSDP2: layers and untied embeddings are gathered by each pass and by the backward; the head's
    group once a step. All gradients are reduced once a micro-batch, in float32."""
    m, t = work.micro_batches, parallel.tensor
    edge = 0 if shape.tied else shape.head(t)
    each, groups = shape.layers * shape.layer(t) + edge, shape.layers + (edge > 0)
    for name in ("hindsight pass", "policy pass", "backward"):
        yield Sent(f"weights, {name}", "shards", "all-gather", m * item * each, m * groups)
    last = item * (shape.head(t) + shape.hidden)
    yield Sent("weights, head", "shards", "all-gather", last, 1)
    gradients = m * MASTER * shape.parameters(t)
    yield Sent("gradients", "shards", "reduce-scatter", gradients, m * (groups + 1))
    yield Sent("gradients", "replicas", "all-reduce", gradients / shards, m * (groups + 1))


def _passes(parallel: ParallelConfig, work: Work) -> tuple[float, float]:
    """Slots of a rank of both passes; and of what a checkpointed layer computes again."""
    again = 0 if parallel.activation_checkpoint == "none" else work.policy_slots
    return (work.hindsight_slots + work.policy_slots) / parallel.context, again / parallel.context


def _tensor(shape: ModelShape, work: Work, parallel: ParallelConfig, item: int) -> Iterator[Sent]:
    """Activations enter attention and MLP whole and leave them as addends, 2 L times and once more
    at the model's ends; a backward turns each around."""
    m, layers = work.micro_batches, shape.layers
    forward, again = _passes(parallel, work)
    slots = (2 * layers + 1) * (forward + work.policy_slots / parallel.context)
    number = m * ((2 * layers + 1) * 3 + 2 * layers * (again > 0))
    size = m * item * shape.hidden * (slots + 2 * layers * again)
    norms = layers * 2 * shape.head_dim * shape.qk_norm
    if parallel.sequence_parallel:
        yield Sent("activations, gathered", "tensor", "all-gather", size, number)
        yield Sent("activations, added up", "tensor", "reduce-scatter", size, number)
        norms += (2 * layers + 1) * shape.hidden
    else:
        yield Sent("activations, added up", "tensor", "all-reduce", size, number)
    several = layers * (2 * shape.qk_norm + 2 * parallel.sequence_parallel)
    several += parallel.sequence_parallel
    yield Sent("norms' gradients", "tensor", "all-reduce", m * MASTER * norms, m * several)


def _head(shape: ModelShape, work: Work, parallel: ParallelConfig) -> Iterator[Sent]:
    """The kernels': kernels/README.md, Tensor parallel."""
    m, n, t = work.micro_batches, work.responses / parallel.context, parallel.tensor
    rows = max(1, work.chunk_bytes // (2 * 4 * -(-shape.vocabulary // t)))
    chunks = m * math.ceil(n / rows)
    yield Sent("logits' statistics", "head", "all-gather", m * 36 * n * t, chunks)
    yield Sent("values", "head", "all-reduce", m * 4 * n, m)


def _context(shape: ModelShape, work: Work, parallel: ParallelConfig, item: int) -> Iterator[Sent]:
    """Keys and values of each layer are gathered, their gradients reduced; the rows that the head
    reads are exchanged after both passes, and the policy's gradient of them."""
    m, layers, t = work.micro_batches, shape.layers, parallel.tensor
    again = parallel.activation_checkpoint != "none"
    slots = work.hindsight_slots + work.policy_slots * (1 + again)
    pair = 2 * m * layers * item * shape.kv / t
    yield Sent("keys, values", "context", "all-gather", pair * slots, 2 * m * layers * (2 + again))
    back = pair * work.policy_slots
    yield Sent("their gradients", "context", "reduce-scatter", back, 2 * m * layers)
    rows = 3 * m * item * work.responses * shape.hidden
    yield Sent("response rows", "context", "all-reduce", rows, 3 * m)
