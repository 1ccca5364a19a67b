"""Run under torchrun: train a little, export, and compare logits with transformers.

argv: model folder, interactions, empty folder.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from sdpo.batching import BatchConfig, Cursor, micro_batches
from sdpo.hindsight import HindsightConfig, encode, load_tokenizer
from sdpo.interactions import read_interactions
from sdpo.objective import ReverseKL
from sdpo.step import two_pass_loss
from sdpo.trainer import RunState
from sdpo_parallel.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from sdpo_parallel.titan import TitanEngine, reshard

model, data, out = sys.argv[1:]
engine = TitanEngine(
    model,
    run_folder=out,
    total_steps=3,
    max_tokens=512,
    state=RunState(Cursor(1, 0), ""),
    optimizer=OptimizerConfig(lr=1e-2, warmup_fraction=0.0, max_grad_norm=1.0),
    parallel=ParallelConfig(),
    checkpoint=CheckpointConfig(),
)
engine.load()
tokenizer = load_tokenizer(model)
items = [(encode(i, tokenizer, HindsightConfig()), 0.1) for i in read_interactions(data)]
tokens = torch.randint(5, 400, (3, 128), generator=torch.Generator().manual_seed(1))
positions = torch.arange(128).expand(3, -1)
index = torch.arange(3 * 128)


def titan_logits():
    with torch.no_grad(), engine.context():
        logits = engine.policy.hidden_states(tokens, positions, index) @ engine.policy.lm_head().T
    reshard(engine.policy.module)
    return logits.view(3, 128, -1)


def transformers_logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


untrained = titan_logits()
assert (untrained - transformers_logits(model)).abs().max() < 1e-4, "import"
for _ in range(3):
    for batch in micro_batches(items, BatchConfig(micro_batch_tokens=4096)):
        with engine.context():
            two_pass_loss(engine.policy, batch, ReverseKL()).loss.backward()
    engine.clip_gradients()
    engine.update()
trained = titan_logits()
engine.export(str(Path(out) / "export"))
if dist.get_rank() == 0:
    exported = transformers_logits(Path(out) / "export")
    assert (trained - exported).abs().max() < 1e-4, "export"
    moved = (trained - untrained).abs().max()
    assert moved > 0.1, moved
    print(f"logits moved by {moved:.2f} and were exported")
engine.close()
