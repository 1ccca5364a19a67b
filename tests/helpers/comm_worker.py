"""Run under torchrun: one step of several micro-batches, every collective counted.

argv: JSON as ``benchmarks.counting_worker`` takes it. The last line of stdout is JSON: a list of
``Collective``s.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.counting_worker import batch_of, engine_of, second_step

job = json.loads(sys.argv[1])
engine = engine_of(job, Path(tempfile.mkdtemp()))
batch = batch_of(job, engine.row_multiple)
engine.check_agreement("data", "the same")
with pytest.raises(ValueError, match="data differs between ranks: rank 1 has '1', rank 0 '0'"):
    engine.check_agreement("data", str(engine.ranks.rank))
seen = second_step(engine, job, batch)
if engine.ranks.is_main:
    print(json.dumps(seen))
engine.close()
