"""Run under torchrun: two steps of several micro-batches, every collective of the second counted.

argv: JSON as ``benchmarks.counting_worker`` takes it. The last line of stdout is JSON:
``collectives``, a list of ``Collective``s, and ``weights``, what FSDP2 gathered in both steps, by
its names of groups, "<" before those that a backward gathered ahead of need.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile

from benchmarks.counting_worker import batch_of, engine_of, second_step

job = json.loads(sys.argv[1])
engine = engine_of(job, Path(tempfile.mkdtemp()))
batch = batch_of(job, engine.row_multiple)
engine.check_agreement("data", "the same")
with pytest.raises(ValueError, match="data differs between ranks: rank 1 has '1', rank 0 '0'"):
    engine.check_agreement("data", str(engine.ranks.rank))
with profile(activities=[ProfilerActivity.CPU]) as trace:
    seen = second_step(engine, job, batch)
if engine.ranks.is_main:
    weights, ahead = [], ""
    for event in sorted(trace.events(), key=lambda e: e.time_range.start):
        what, _, group = event.name.partition(" (")
        if what == "FSDP::all_gather":
            name = group.removesuffix(")")
            weights.append(f"<{name}" if ahead == name else name)
        elif event.name.startswith("FSDP::"):
            ahead = event.name.partition("backward_prefetch for ")[2]
    print(json.dumps({"collectives": seen, "weights": weights}))
engine.close()
