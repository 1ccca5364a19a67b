"""Run under torchrun: one step of several micro-batches, every collective counted.

argv: model folder, interactions, tensor-parallel degree. The last line of stdout is JSON: a list
of [operator, elements sent or received].
"""

import json
import sys
import tempfile

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdpo.batching import BatchConfig, Cursor, micro_batches
from sdpo.hindsight import HindsightConfig, encode, load_tokenizer
from sdpo.interactions import read_interactions
from sdpo.objective import ReverseKL
from sdpo.step import two_pass_loss
from sdpo.trainer import RunState
from sdpo_parallel.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from sdpo_parallel.titan import TitanEngine


class Collectives(TorchDispatchMode):
    """Operator and largest tensor of every collective."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            sizes = [t.numel() for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.seen.append((str(func), max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


model, data, tensor = sys.argv[1:]
engine = TitanEngine(
    model,
    run_folder=tempfile.mkdtemp(),
    total_steps=3,
    max_tokens=512,
    state=RunState(Cursor(1, 0), ""),
    optimizer=OptimizerConfig(),
    parallel=ParallelConfig(tensor=int(tensor)),
    checkpoint=CheckpointConfig(),
)
engine.load()
tokenizer = load_tokenizer(model)
items = [(encode(i, tokenizer, HindsightConfig()), 0.1) for i in read_interactions(data)]
batches = list(micro_batches(items, BatchConfig(row_tokens=512, micro_batch_tokens=1024)))
assert len(batches) > 2


def step():
    for m, batch in enumerate(batches):
        with engine.context():
            out = two_pass_loss(engine.policy, batch, ReverseKL(chunk_bytes=1 << 18))
            engine.backward(out.loss, last=m == len(batches) - 1)
    engine.clip_gradients()
    engine.update(0)


engine.check_agreement("data", "the same")
with pytest.raises(ValueError, match="data differs between ranks: rank 1 has '1', rank 0 '0'"):
    engine.check_agreement("data", str(engine.world_rank))
step()  # the first sets up what later ones reuse
with Collectives() as collectives:
    step()
if engine.is_main:
    print(json.dumps({"micro_batches": len(batches), "seen": collectives.seen}))
engine.close()
