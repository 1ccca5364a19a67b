"""Run under torchrun: one step of several micro-batches, every collective counted.

argv: model folder, interactions, tensor-parallel degree. The last line of stdout is JSON; ``seen``
is a list of ``Collective``s.
"""

import json
import sys
import tempfile

import pytest

from benchmarks.collectives import Collectives
from sdpo.batching import BatchConfig, Cursor, micro_batches
from sdpo.hindsight import HindsightConfig, encode
from sdpo.interactions import read_interactions
from sdpo.objective import ReverseKL
from sdpo.step import two_pass_loss
from sdpo.train.trainer import RunState
from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.engine import EngineConfig
from sdpo_parallel.huggingface import load_tokenizer
from sdpo_parallel.torchtitan.engine import TorchtitanEngine

model, data, tensor = sys.argv[1:]
config = EngineConfig(
    model=model,
    run_folder=tempfile.mkdtemp(),
    total_steps=3,
    max_tokens=512,
    parallel=ParallelConfig(tensor=int(tensor)),
)
engine = TorchtitanEngine(config, RunState(Cursor(1, 0), ""))
engine.load()
tokenizer = load_tokenizer(model)
examples = [(encode(i, tokenizer, HindsightConfig()), 0.1) for i in read_interactions(data)]
batches = list(micro_batches(examples, BatchConfig(row_tokens=512, micro_batch_tokens=1024)))
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
    engine.check_agreement("data", str(engine.ranks.rank))
step()  # the first sets up what later ones reuse
collectives = Collectives()
with collectives:
    step()
collectives.restore()
if engine.ranks.is_main:
    print(json.dumps({"micro_batches": len(batches), "seen": collectives.seen}))
engine.close()
