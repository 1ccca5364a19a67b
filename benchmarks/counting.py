"""The bytes that gloo ranks send in a step of a tiny model, next to those of traffic.py."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.measure import ROOT
from benchmarks.models import TINY
from benchmarks.traffic import Sent, Work, shape_of, traffic
from sdpo_parallel.config import ParallelConfig

STEP = dict(interactions=2, prompt=192, hindsight=448, response=64)
STEP |= dict(micro_batches=2, chunk_bytes=2**18)
"""Interactions of a micro-batch, and their tokens before and in the response."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A step of a tiny model on gloo ranks."""

    ranks: int = 2
    parallel: dict[str, Any] = field(default_factory=dict)
    """Fields of ParallelConfig."""

    def predicted(self) -> list[Sent]:
        """Bytes that one rank sends, by the traffic model."""
        n, response = STEP["interactions"], STEP["response"]
        slots = (n * (STEP[name] + response) for name in ("prompt", "hindsight"))
        work = Work(STEP["micro_batches"], *slots, n * response, STEP["chunk_bytes"])
        parallel = ParallelConfig(**self.parallel)
        return traffic(shape_of(TINY["count"]), work, parallel, self.ranks, "cpu")


JOBS = {
    "shard 2": Job(),
    "tensor 2": Job(parallel=dict(tensor=2)),
    "context 2": Job(parallel=dict(context=2)),
    "replicate 2 x shard 2": Job(ranks=4, parallel=dict(replicate=2)),
    "shard 2 x tensor 2, bfloat16": Job(ranks=4, parallel=dict(tensor=2, compute_dtype="bfloat16")),
}


class Counted(NamedTuple):
    """The collectives that rank 0 of a job ran."""

    sent: dict[tuple[str, str], tuple[float, int]]
    """(axis, operator) -> bytes that it sent, collectives."""
    gathers: list[tuple[float, float]]
    """All-gathers over all ranks: bytes sent and seconds taken."""


def count(job: Job) -> Counted:
    """Run the job under torchrun.

    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    given = json.dumps(dict(parallel=job.parallel, sizes=TINY["count"], **STEP))
    result = torchrun(job.ranks, "-m", "benchmarks.counting_worker", given)
    if result.returncode:
        raise RuntimeError(f"the ranks that count failed: {result.stderr[-4000:]}")
    found = json.loads(result.stdout.splitlines()[-1])
    sent = {(axis, op): (size, number) for axis, op, size, number in found["sent"]}
    return Counted(sent, [(b, s) for b, s in found["gathers"]])


def torchrun(ranks: int, *program: str) -> subprocess.CompletedProcess[str]:
    """Run it on gloo, on this machine's CPUs."""
    paths = map(str, (ROOT, ROOT / "kernels", ROOT / "parallel"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    env["CUDA_VISIBLE_DEVICES"] = ""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    argv = [sys.executable, *launch, *program]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)


class Compared(NamedTuple):
    """Bytes of one axis and operator, and collectives, both predicted and counted."""

    axis: str
    operator: str
    what: str
    predicted: float
    counted: float
    collectives: tuple[float, int]

    @property
    def ratio(self) -> float:
        """Predicted over counted; infinite where nothing was."""
        return self.predicted / self.counted if self.counted else math.inf


def compare(predicted: Sequence[Sent], counted: Counted) -> list[Compared]:
    """By axis and operator: a rank cannot tell purposes apart."""
    found = []
    keys = dict.fromkeys([*((s.axis, s.operator) for s in predicted), *counted.sent])
    for axis, operator in keys:
        mine = [s for s in predicted if (s.axis, s.operator) == (axis, operator)]
        size, number = counted.sent.get((axis, operator), (0.0, 0))
        what = "; ".join(s.what for s in mine) or "not modelled"
        total, collectives = sum(s.bytes for s in mine), sum(s.collectives for s in mine)
        found.append(Compared(axis, operator, what, total, size, (collectives, number)))
    return found
