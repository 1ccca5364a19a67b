"""Peak memory, measured: the whole process's on a CPU, in a process of its own."""

import subprocess
import sys

from helpers.environment import ENV

SIZES = "N, V, D, CHUNK = 1024, 50257, 256, 64 * 2**20"
WIDE = "N, V, D, CHUNK = 64, 50257, 512, 8 * 2**20"
"""A head's gradient that is far larger than the logits."""
SCRIPT = """
import sys, torch
from pathlib import Path
from sdpo_kernels import linear_reverse_kl

def resident(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024

{sizes}
dtype, plain, known = getattr(torch, sys.argv[1]), "plain" in sys.argv, "known" in sys.argv
torch.manual_seed(0)

def inputs(n):
    hidden = torch.randn(n, D).to(dtype).requires_grad_()
    return hidden, torch.randn(V, D).mul_(0.05).to(dtype).requires_grad_(), hidden.detach() * 1.01

def step(hidden, weight, teacher):
    weights = torch.full((len(hidden),), 1 / len(hidden))
    if plain:
        logp = (hidden @ weight.T).float().log_softmax(-1)
        logq = (teacher @ weight.detach().T).float().log_softmax(-1)
        loss = ((logp.exp() * (logp - logq)).sum(-1) * weights).sum()
    elif known:
        loss = linear_reverse_kl(
            hidden, weight, teacher, token_weights=weights, chunk_bytes=CHUNK
        ).loss
    else:
        value = linear_reverse_kl(hidden, weight, teacher, chunk_bytes=CHUNK).value
        loss = (value * weights).sum()
    loss.backward()

step(*inputs(2))  # libraries, threads and their buffers
tensors = inputs(N)
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = resident("VmRSS")
step(*tensors)
gradients = sum(t.numel() * t.element_size() for t in tensors[:2])
print(resident("VmHWM") - before - gradients, CHUNK)
"""


def measure(*options: str, sizes: str = SIZES) -> tuple[int, int]:
    """(peak beyond inputs and gradients, chunk budget), in bytes."""
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(sizes=sizes), *options],
        env=ENV,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    extra, chunk = map(int, out.split())
    return extra, chunk


def test_peak_memory_stays_under_twice_the_chunk_budget_beyond_inputs_and_gradients():
    for mode in ("known", "upstream"):
        extra, chunk = measure("float32", mode)
        assert chunk // 2 < extra < 2 * chunk, (mode, extra / chunk)


def test_half_precision_costs_no_float32_copy_of_the_head_beyond_its_gradient():
    extra, chunk = measure("bfloat16", "known")
    assert extra < 2 * chunk + 4 * 50257 * 256, extra / chunk


def test_the_backward_holds_one_copy_of_the_heads_gradient_beside_the_gradient_itself():
    extra, chunk = measure("float32", "known", sizes=WIDE)
    kept = 4 * 50257 * 512
    assert extra < kept + 2 * chunk, (extra / kept, chunk)


def test_plain_torch_needs_many_times_as_much():
    extra, chunk = measure("float32", "plain")
    assert extra > 8 * chunk, extra
