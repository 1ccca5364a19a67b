"""Run under torchrun on gloo: bytes of every collective of a tiny Qwen3's step; timed all-gathers.

argv: JSON of ``counting.STEP``, ``parallel`` (fields of ParallelConfig), ``sizes`` (fields of
config.json) and perhaps ``sharing``. The last line of rank 0's stdout is JSON: ``sent``, one
[axis, operator, bytes that a rank sends, collectives] for each axis and operator, and ``gathers``,
[bytes that a rank sends, seconds] for each size.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import Qwen3Config

from benchmarks.collectives import Collectives
from benchmarks.traffic import ring
from sdpo.batching import Batch, Cursor, collate
from sdpo.hindsight import Encoded, Truncated
from sdpo.objective import ReverseKL
from sdpo.step import two_pass_loss
from sdpo.train.trainer import RunState
from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.engine import EngineConfig
from sdpo_parallel.torchtitan.engine import TorchtitanEngine

GATHER_BYTES = tuple(2**k for k in range(12, 25, 2))
"""Sent by a rank in the timed all-gathers."""


def engine_of(job: dict[str, Any], folder: Path) -> TorchtitanEngine:
    """Weights as torchtitan initialises them: bytes do not depend on them."""
    Qwen3Config(**job["sizes"]).save_pretrained(folder)
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # what an engine looks for
    config = EngineConfig(
        model=str(folder),
        run_folder=str(folder),
        total_steps=2,
        max_tokens=job["hindsight"] + job["response"],
        parallel=ParallelConfig(**job["parallel"]),
    )
    return TorchtitanEngine(config, RunState(Cursor(1, 0), ""))


def batch_of(job: dict[str, Any], row_multiple: int) -> Batch:
    """A micro-batch of interactions of one prompt, equally long, of token ids that mean nothing."""
    prompt = tuple(range(job["prompt"]))

    def item(n: int) -> Encoded:
        follow_up, response = range(len(prompt), job["hindsight"]), range(job["response"])
        return Encoded(
            id=f"{n}",
            policy=prompt,
            hindsight=(*prompt, *follow_up[n:], *follow_up[:n]),
            response=(*response[n:], *response[:n]),
            old_logprobs=None,
            ends=True,
            truncated=Truncated(),
        )

    examples = [(item(n), 1.0) for n in range(job["interactions"])]
    width = job["hindsight"] + job["response"]
    return collate(examples, width, row_multiple, job.get("sharing", "none"))


def step(engine: TorchtitanEngine, job: dict[str, Any], batch: Batch) -> None:
    for m in range(job["micro_batches"]):
        with engine.context():
            out = two_pass_loss(engine.policy, batch, ReverseKL(chunk_bytes=job["chunk_bytes"]))
            engine.backward(out.loss, last=m == job["micro_batches"] - 1)
    engine.clip_gradients()
    engine.update(0)


def second_step(engine: TorchtitanEngine, job: dict[str, Any], batch: Batch) -> list[tuple]:
    """The collectives of a step after the first, which sets up what later ones reuse."""
    step(engine, job, batch)
    collectives = Collectives()
    with collectives:
        step(engine, job, batch)
    collectives.restore()
    return collectives.seen


def axis_of(engine: TorchtitanEngine, ranks: tuple[int, ...], dimensions: int, nested: bool) -> str:
    """The mesh's axis that a collective belongs to. A group may serve two: FSDP2's buffers are
    flat, activations are not."""

    def is_group(name: str) -> bool:
        mesh = engine.mesh.dims.get_optional_mesh(name)
        return mesh is not None and ranks == tuple(mesh.mesh.flatten().tolist())

    if nested:
        return "head"
    if is_group("tp"):
        return "tensor"
    if is_group("dp_replicate"):
        return "replicas"
    return "context" if dimensions > 1 and is_group("cp") else "shards"


def counted(engine: TorchtitanEngine, seen: list[tuple]) -> list[list[Any]]:
    """[axis, operator, bytes that a rank sends, collectives]"""
    total: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for operator, ranks, size, dimensions, nested in seen:
        sums = total[axis_of(engine, ranks, dimensions, nested), operator]
        sums[0] += ring(operator, size, len(ranks))
        sums[1] += 1
    return [[*key, *sums] for key, sums in total.items()]


def gathers(rounds: int = 7) -> list[tuple[float, float]]:
    """(bytes that a rank sends, median seconds) of all-gathers over all ranks."""
    ranks, found = dist.get_world_size(), []
    for sent in GATHER_BYTES:
        part = torch.zeros(sent // (ranks - 1) // 4)
        whole = torch.empty(ranks * part.numel())
        seconds = []
        for _ in range(rounds + 1):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_gather_into_tensor(whole, part)
            seconds.append(time.perf_counter() - begin)
        found.append((4 * part.numel() * (ranks - 1), median(seconds[1:])))
    return found


def main(job: dict[str, Any]) -> None:
    """Count a step, and time all-gathers."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(job, Path(folder))
    batch = batch_of(job, engine.row_multiple)
    assert batch.policy.tokens_BT.numel() == job["interactions"] * (job["prompt"] + job["response"])
    found = {"sent": counted(engine, second_step(engine, job, batch)), "gathers": gathers()}
    if engine.ranks.is_main:
        print(json.dumps(found))
    engine.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
