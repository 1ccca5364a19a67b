"""The Triton kernels compile for GPUs that are not here, without spills, within shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_no_kernel_spills_or_asks_for_too_much_shared_memory(sm, tmp_path):
    out = tmp_path / "resources.jsonl"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.resources", "--sm", str(sm), "--out", str(out)],
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["kernel"] for r in found} == {
        "stats_kernel",
        "divergence_kernel",
        "softmax_grad_kernel",
        "fused_stats_kernel",
    }
    assert all(r["sm"] == sm and r["registers"] > 0 and not r["spill_bytes"] for r in found)
