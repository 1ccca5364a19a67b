"""Run under torchrun: train two steps of two micro-batches, with every allocation counted;
rank 0 prints bytes as JSON.

argv: JSON with folder, out, parallel (fields of ParallelConfig), lora_rank, rows, prompt,
hindsight, response, chunk_bytes, and perhaps sharing.
"""

import json
import os
import sys
from collections.abc import Iterator

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.counting_worker import batch_of
from sdpo.batching import Cursor
from sdpo.objective import ReverseKL
from sdpo.step import two_pass_loss
from sdpo.train.trainer import RunState
from sdpo_parallel.config import LoraConfig, ParallelConfig
from sdpo_parallel.engine import EngineConfig
from sdpo_parallel.model import local
from sdpo_parallel.torchtitan.engine import TorchtitanEngine


def local_bytes(tensors) -> int:
    """This rank's bytes; storages that several tensors share count once."""
    storages = {}
    for t in tensors:
        if t is not None:
            t = local(t)
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


def train(a: dict) -> dict[str, int]:
    """The last step is the measured one: gradients and optimizer state are there."""
    config = EngineConfig(
        model=a["folder"],
        run_folder=a["out"],
        total_steps=2,
        max_tokens=a["hindsight"] + a["response"],
        parallel=ParallelConfig(**a["parallel"]),
        lora=LoraConfig(rank=a["lora_rank"]),
    )
    engine = TorchtitanEngine(config, RunState(Cursor(1, 0), ""))
    batch = batch_of(a | {"interactions": a["rows"]}, engine.row_multiple)
    weights, sizes = list(engine.policy.module.parameters()), {}
    for step in range(2):
        with record_function(f"step {step}"):
            for micro_batch in range(2):
                with engine.context():
                    out = two_pass_loss(
                        engine.policy, batch, ReverseKL(chunk_bytes=a["chunk_bytes"])
                    )
                    engine.backward(out.loss, last=micro_batch == 1)
                del out
            sizes = {"gradients": local_bytes(p.grad for p in weights)}
            engine.clip_gradients()
            engine.update(step)
    states = engine.optimizer.state.values()
    moments = (v for s in states for name, v in s.items() if name.startswith("exp_avg"))
    sizes |= {"parameters": local_bytes(weights), "optimizer": local_bytes(moments)}
    engine.close()
    return sizes


def events(roots) -> Iterator:
    """Depth first."""
    for e in roots:
        yield e
        yield from events(e.children)


def peak(found: list, span: str) -> int:
    """Most bytes alive at once within the span of this name. An address that is given out again
    was free: gloo's threads free unseen."""
    inside = next(e for e in found if e.name == span)
    alive: dict[int, int] = {}
    total = most = 0
    changes = (e for e in found if e.tag == _EventType.Allocation)
    for e in sorted(changes, key=lambda e: e.start_time_ns):
        if e.start_time_ns > inside.end_time_ns:
            break
        change = e.extra_fields
        total -= alive.pop(change.ptr, 0)
        if change.alloc_size > 0:
            alive[change.ptr] = change.alloc_size
            total += change.alloc_size
        if e.start_time_ns >= inside.start_time_ns:
            most = max(most, total)
    return most


with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
    sizes = train(json.loads(sys.argv[1]))
if os.environ.get("RANK", "0") == "0":
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    found = list(events(trace.profiler.kineto_results.experimental_event_tree()))
    print(json.dumps(sizes | {"total": peak(found, "step 1")}))
