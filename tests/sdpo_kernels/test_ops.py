"""The custom operators: opcheck, torch.compile, activation checkpointing, and imports."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from helpers.cases import FUNCTIONS, Problem, evaluate, loss_of, problem
from helpers.environment import ENV
from sdpo_kernels._impl import op
from sdpo_kernels._impl.options import Inputs, Spec

COMPILED = ["logprob", "reverse_kl", "jsd", "sampled_token", "sampled_token, centred", "topk"]
SPEC = Spec(kind="reverse_kl", impl="torch", chunk_bytes=2 * 3 * 21 * 4, total=21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["reverse_kl", "logprob", "topk"])
def test_opcheck(kind, dtype):
    p = problem(7, 21, 8, 1.0, dtype)
    hidden, weight = (t.requires_grad_() for t in (p.hidden, p.weight))
    bias = torch.randn(21, dtype=dtype, requires_grad=True)
    teacher = None if kind == "logprob" else p.teacher
    x = Inputs(hidden, weight, teacher, bias=bias, targets=p.targets)
    spec = dict(reverse_kl=SPEC, logprob=SPEC._replace(kind="logprob"), topk=SPEC._replace(k=4))
    settings, ops = spec[kind]._asdict(), torch.ops.sdpo_kernels
    torch.library.opcheck(ops.values, x, settings)
    for wanted in ([True, True, True], [True, False, False]):
        torch.library.opcheck(ops.gradients, (*x, p.upstream, wanted), settings)
        kept = (torch.randn(7, 32, dtype=dtype), hidden.detach(), weight.detach(), p.upstream)
        torch.library.opcheck(ops.products, (*kept, wanted))
    torch.library.opcheck(ops.kept, x, settings)


def step(name: str, known: bool, p: Problem) -> Tensor:
    """A loss behind a layer, with the function used twice in one graph."""
    hidden = torch.tanh(p.hidden)
    whole = loss_of(name, p._replace(hidden=hidden), known=known)
    return whole + loss_of(name, p._replace(hidden=0.5 * hidden), known=known)


def gradients(loss: Tensor, p: Problem) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, (p.hidden, p.weight))]


def trainable_problem(n: int) -> Problem:
    p = problem(n, 21, 8, 1.0)
    return p._replace(hidden=p.hidden.requires_grad_(), weight=p.weight.requires_grad_())


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_fullgraph_with_double_use(name, known):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (7, 5):  # other shapes, the same graph or another
        p = trainable_problem(n)
        eager = gradients(step(name, known, p), p)
        torch.testing.assert_close(gradients(compiled(name, known, p), p), eager)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_activation_checkpointing(name, known, reentrant):
    p = trainable_problem(7)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return step(name, known, p._replace(hidden=hidden, weight=weight))

    plain = gradients(step(name, known, p), p)
    again = checkpoint(loss, p.hidden, p.weight, use_reentrant=reentrant)
    again.backward()
    torch.testing.assert_close([again.detach(), p.hidden.grad, p.weight.grad], plain)


@pytest.mark.parametrize("known", [False, True])
def test_a_second_derivative_is_refused_not_wrong(known):
    p = trainable_problem(5)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(step("reverse_kl", known, p), p.hidden, create_graph=True)


MATMULS = {
    "kept, known": (3, 4, 4, 4),
    "kept, upstream": (3, 4, 4, 4),
    "not kept, known": (3, 4, 4, 5),
    "not kept, upstream": (4, 6, 5, 5),
}
"""Of N V D, forward and backward: log p(y), divergences, sampled token, centred sampled token."""


class CountedMatmuls(TorchDispatchMode):
    """Counts the multiplications of matmuls, also inside of operators where it is entered there."""

    multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        if name in ("mm", "addmm", "matmul"):
            a, b = args[-2:]
            self.multiplications += a.numel() * b.shape[1]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("case", MATMULS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_matmuls_are_as_few_as_they_can_be(name, case, monkeypatch):
    n, v, d, counter = 32, 96, 16, CountedMatmuls()

    def counting(function):
        def call(*args, **kwargs):
            with counter:
                return function(*args, **kwargs)

        return call

    for inside in ("run", "run_kept", "products"):
        monkeypatch.setattr(op, inside, counting(getattr(op, inside)))
    kept, known = case.split(", ")
    row = 8 * v
    # two blocks of two chunks, if not kept
    room = n * row if kept == "kept" else n * row // 2
    p = problem(n, v, d, 1.0, torch.float64)
    evaluate(name, p, known=known == "known", chunk_bytes=2 * 8 * row, grad_bytes=room)
    kind = 0 if name == "logprob" else 3 if "centred" in name else 2 if "sampled" in name else 1
    assert counter.multiplications == MATMULS[case][kind] * n * v * d


def test_inference_mode():
    p = problem(5, 21, 8, 1.0)
    with torch.inference_mode():
        inside = FUNCTIONS["reverse_kl"](p, p.upstream)
    torch.testing.assert_close(inside, FUNCTIONS["reverse_kl"](p, p.upstream))


def test_nothing_but_torch_is_imported_and_no_triton_is_needed():
    script = """
import sys
for name in ("triton", "transformers", "sdpo", "sdpo_parallel"):
    sys.modules[name] = None  # as if it were not there
import pytest, torch
from sdpo_kernels import linear_reverse_kl
h, w = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
linear_reverse_kl(h, w, h.detach() + 1).value.sum().backward()
assert h.grad.isfinite().all()
with pytest.raises(ValueError, match="not installed"):
    linear_reverse_kl(h, w, h, impl="triton")
"""
    env = {**ENV, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
