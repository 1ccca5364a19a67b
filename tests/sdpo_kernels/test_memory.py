"""Peak memory, measured: the whole process's on a CPU, in a process of its own."""

import subprocess
import sys

import pytest

from helpers.environment import ENV

SCRIPT = """
import sys, torch
from pathlib import Path
from sdpo_kernels import linear_reverse_kl

def resident(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024

dtype, how = getattr(torch, sys.argv[1]), sys.argv[2]
N, V, D, CHUNK = map(int, sys.argv[3:])
torch.manual_seed(0)

def inputs(n):
    hidden = torch.randn(n, D).to(dtype).requires_grad_()
    return hidden, torch.randn(V, D).mul_(0.05).to(dtype).requires_grad_(), hidden.detach() * 1.01

def step(hidden, weight, teacher):
    weights = torch.full((len(hidden),), 1 / len(hidden))
    if how == "plain":
        logp = (hidden @ weight.T).float().log_softmax(-1)
        logq = (teacher @ weight.detach().T).float().log_softmax(-1)
        loss = ((logp.exp() * (logp - logq)).sum(-1) * weights).sum()
    else:
        known = None if how == "upstream" else weights
        room = dict(chunk_bytes=CHUNK, grad_bytes=2 * CHUNK if how == "blocks" else 0)
        out = linear_reverse_kl(hidden, weight, teacher, token_weights=known, **room)
        loss = (out.value * weights).sum() if known is None else out.loss
    loss.backward()

step(*inputs(2))  # libraries, threads and their buffers
tensors = inputs(N)
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = resident("VmRSS")
step(*tensors)
gradients = sum(t.numel() * t.element_size() for t in tensors[:2])
print(resident("VmHWM") - before - gradients)
"""
# memory that is freed goes back at once, and does not come and go with malloc's own thresholds
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}
V, CHUNK, SMALL_CHUNK = 50257, 64 * 2**20, 8 * 2**20
SIZES = (1024, V, 256, CHUNK)
WIDE = (64, V, 512, SMALL_CHUNK)
"""A head's gradient that is far larger than the logits."""


@pytest.mark.parametrize(
    ("dtype", "how", "sizes", "least", "most"),
    [
        # twice the chunk budget
        ("float32", "known", SIZES, CHUNK // 2, 2 * CHUNK),
        ("float32", "upstream", SIZES, CHUNK // 2, 2 * CHUNK),
        # gradients with respect to the logits of half the tokens, and the head's beside them
        ("float32", "blocks", SIZES, 2 * CHUNK, 3 * CHUNK),
        # no float32 copy of the head, but a float32 gradient of it
        ("bfloat16", "known", SIZES, 0, 2 * CHUNK + 4 * V * 256),
        # the backward holds one copy of the head's gradient
        ("float32", "known", WIDE, 0, 2 * SMALL_CHUNK + 4 * V * 512),
        # full logits: what is measured is really there
        ("float32", "plain", SIZES, 8 * CHUNK, 10**12),
    ],
)
def test_peak_memory_beyond_inputs_and_gradients(dtype, how, sizes, least, most):
    argv = [sys.executable, "-c", SCRIPT, dtype, how, *map(str, sizes)]
    out = subprocess.run(argv, env=ENV | MALLOC, capture_output=True, text=True, check=True).stdout
    assert least < int(out) < most, int(out) / sizes[-1]
