"""From bytes and flops to the seconds of a step, by stated links and a GPU's datasheet."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

from benchmarks.fits import Fit, objective_terms
from benchmarks.traffic import (
    Axis,
    Interactions,
    Sent,
    Work,
    degrees,
    model_flops,
    traffic,
    work_of,
)
from sdpo_parallel.config import Live, LoraConfig, ParallelConfig
from sdpo_parallel.memory import Load, ModelShape, estimate

OVERLAPPED = ("shards", "replicas")
GIB = 2**30
DEGREES = (1, 2, 4, 8)
COPIES = (8, 64)
"""GPUs of one copy of the model, in the layouts with several."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """Links between GPUs: bytes per second in one direction, and latencies."""

    nvlink: float = 450e9
    """Within a node, bytes/s of a GPU (H100, H200: half of 900 GB/s)."""
    infiniband: float = 50e9
    """Between nodes, bytes/s of a GPU's own adapter (400 Gbit/s)."""
    achieved: float = 0.8
    """Share of both that collectives reach."""
    node: int = 8
    """GPUs per node."""
    launch: float = 10e-6
    """Latency of a collective, whatever its number of ranks."""
    nvlink_hop: float = 1e-6
    """Latency of each step of a ring within a node."""
    infiniband_hop: float = 5e-6
    """Latency of each step of a ring between nodes."""


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A kind of GPU."""

    name: str
    memory_gib: float
    peak: float
    """Dense bfloat16 flop/s of the datasheet."""
    efficiency: float = 0.40
    """Model flops that are done, over ``peak``."""
    source: str = "no GPU has been measured: efficiency 0.40 is an assumption"
    """Where the efficiency comes from."""
    head: Fit | None = None
    """Seconds of the objective over N, V, D, where this was measured on a GPU."""


GPUS = {
    "a100": GPU(name="A100", memory_gib=80, peak=312e12),
    "h100": GPU(name="H100", memory_gib=80, peak=989e12),
    "h200": GPU(name="H200", memory_gib=140, peak=989e12),
    "b200": GPU(name="B200", memory_gib=180, peak=2250e12),
}


class Route(NamedTuple):
    """A group's ring: steps by kind of link, and the share of each rank's bytes by InfiniBand."""

    nvlink_steps: int
    infiniband_steps: int
    infiniband_share: float


def route(axis: Axis, parallel: ParallelConfig, ranks: int, node: int) -> Route:
    """Tensor ranks are neighbours, then context ranks, shards, replicas. A group with g ranks in
    each node runs g rings, and each leaves the node through another GPU's adapter."""
    t = parallel.tensor
    size = degrees(parallel, ranks)[axis]
    stride = {"context": t, "shards": t, "replicas": ranks // parallel.replicate}.get(axis, 1)
    inside = max(1, min(size, node // stride))
    nodes = -(-size // inside)
    return Route(size - nodes, nodes - 1, 1 / inside if nodes > 1 else 0.0)


def cost(
    sent: Sent, parallel: ParallelConfig, ranks: int, links: Links
) -> tuple[float, float, float]:
    """Seconds, by the latency of each collective's ring and the bytes over the slower of its links;
    bytes that a rank sends over NVLink, and over InfiniBand."""
    way = route(sent.axis, parallel, ranks, links.node)
    far = sent.bytes * way.infiniband_share
    near = sent.bytes - far
    hops = way.nvlink_steps * links.nvlink_hop + way.infiniband_steps * links.infiniband_hop
    latency = links.launch + hops * (2 if sent.operator == "all-reduce" else 1)
    moving = max(near / links.nvlink, far / links.infiniband) / links.achieved
    return sent.collectives * latency + moving, near, far


@dataclass(frozen=True)
class Prediction:
    """A step's seconds and a rank's bytes under one layout."""

    ranks: int
    parallel: ParallelConfig
    seconds: float
    compute: float
    overlapped: float
    """FSDP2's gathers and reductions, as if they ran alone."""
    exposed: float
    """Tensor and context ranks', which compute waits for."""
    memory: int
    nvlink: float
    infiniband: float
    tokens_per_second: float
    """Tokens of both passes per GPU and second, shared ones counted wherever they belong."""

    @property
    def apart(self) -> float:
        """Seconds if nothing overlapped: the other bound."""
        return self.compute + self.overlapped + self.exposed

    @property
    def layout(self) -> str:
        """For people."""
        p = self.parallel
        sizes = dict(replicate=p.replicate, shard=p.shards(self.ranks))
        sizes |= dict(context=p.context, tensor=p.tensor)
        return " x ".join(f"{name} {n}" for name, n in sizes.items() if n > 1)


def predict(
    shape: ModelShape,
    each: Interactions,
    parallel: ParallelConfig,
    ranks: int,
    gpu: GPU,
    links: Links,
) -> Prediction:
    """Raises:
    ValueError: the layout does not fit the number of ranks or the model.
    """
    work = work_of(each, parallel, ranks)
    memory = estimate(
        shape,
        parallel,
        LoraConfig(),
        Live(),
        ranks=ranks,
        load=Load(
            tokens=math.ceil(work.policy_slots),
            hindsight_tokens=math.ceil(work.hindsight_slots),
            sharing="none" if each.read(parallel) == (1.0, 1.0) else "keys",
            response_tokens=math.ceil(work.responses),
            row_tokens=min(8192, math.ceil(work.policy_slots)),
            max_tokens=max(each.lengths),
            chunk_bytes=work.chunk_bytes,
        ),
    )["total"]
    compute = compute_seconds(shape, each, work, parallel, gpu)
    hidden = exposed = nvlink = infiniband = 0.0
    for sent in traffic(shape, work, parallel, ranks):
        spent, near, far = cost(sent, parallel, ranks, links)
        nvlink, infiniband = nvlink + near, infiniband + far
        if sent.axis in OVERLAPPED:
            hidden += spent
        else:
            exposed += spent
    seconds = max(compute, hidden) + exposed
    rate = each.of_step(ranks) * sum(each.lengths) / ranks / seconds
    return Prediction(
        ranks, parallel, seconds, compute, hidden, exposed, memory, nvlink, infiniband, rate
    )


def compute_seconds(
    shape: ModelShape, each: Interactions, work: Work, parallel: ParallelConfig, gpu: GPU
) -> float:
    """Seconds of one rank's layers and lm_head in a step."""
    n = work.micro_batches * work.responses / each.response
    flops = model_flops(shape, *each.lengths, each.response, each.read(parallel))
    split, rate = parallel.tensor * parallel.context, gpu.peak * gpu.efficiency
    layers, head = (n * f / split / rate for f in flops)
    if gpu.head is not None:
        sizes = work.responses / parallel.context, shape.vocabulary / parallel.tensor, shape.hidden
        head = work.micro_batches * gpu.head.at(objective_terms(*sizes))
    return layers + head


def layouts(ranks: int, checkpoint: Literal["none", "selective", "full"]) -> list[ParallelConfig]:
    """Tensor and context ranks within a node of 8; one copy of the model on all GPUs, 8 or 64."""
    copies = (ranks, *(c for c in COPIES if c < ranks and ranks % c == 0))
    return [
        ParallelConfig(
            replicate=ranks // copy, tensor=t, context=c, activation_checkpoint=checkpoint
        )
        for copy, t, c in product(copies, DEGREES, DEGREES)
        if t * c <= DEGREES[-1] and copy % (t * c) == 0
    ]
