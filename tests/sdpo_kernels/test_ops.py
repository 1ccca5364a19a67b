"""The custom operators: opcheck, torch.compile, activation checkpointing, and imports."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers.cases import FUNCTIONS, problem
from helpers.environment import ENV
from sdpo_kernels._impl.options import Inputs, Spec

COMPILED = ["logprob", "reverse_kl", "jsd", "sampled_token", "sampled_token, centred", "topk"]
SPEC = Spec(kind="reverse_kl", impl="torch", chunk_bytes=2 * 3 * 21 * 4, total=21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["reverse_kl", "logprob", "topk"])
def test_opcheck(kind, dtype):
    p = problem(7, 21, 8, 1.0, dtype)
    hidden, weight = (t.requires_grad_() for t in (p.hidden, p.weight))
    bias = torch.randn(21, dtype=dtype, requires_grad=True)
    x = Inputs(
        hidden, weight, None if kind == "logprob" else p.teacher, bias=bias, targets=p.targets
    )
    spec = dict(reverse_kl=SPEC, logprob=SPEC._replace(kind="logprob"), topk=SPEC._replace(k=4))
    settings = spec[kind]._asdict()
    torch.library.opcheck(torch.ops.sdpo_kernels.values, x, settings)
    for wanted in ([True, True, True], [True, False, False]):
        arguments = (*x, p.upstream, wanted)
        torch.library.opcheck(torch.ops.sdpo_kernels.gradients, arguments, settings)


def step(name: str, known: bool, p) -> Tensor:
    """A loss behind a layer, with the function used twice in one graph."""
    hidden = torch.tanh(p.hidden)
    total = hidden.new_zeros(())
    for scale in (1.0, 0.5):
        out = FUNCTIONS[name](p._replace(hidden=hidden * scale), p.upstream if known else None)
        total = total + (out.loss if known else (out[0] * p.upstream).sum())
    return total


def gradients(loss: Tensor, leaves) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_fullgraph_with_double_use(name, known):
    torch.compiler.reset()
    p = problem(7, 21, 8, 1.0)
    leaves = [t.requires_grad_() for t in (p.hidden, p.weight)]
    eager = gradients(step(name, known, p), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled(name, known, p), leaves), eager, strict=True):
        torch.testing.assert_close(a, b)
    q = problem(5, 21, 8, 1.0)  # other shapes, the same graph or another
    leaves = [t.requires_grad_() for t in (q.hidden, q.weight)]
    eager = gradients(step(name, known, q), leaves)
    for a, b in zip(gradients(compiled(name, known, q), leaves), eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_activation_checkpointing(name, known, reentrant):
    p = problem(7, 21, 8, 1.0)
    leaves = [t.requires_grad_() for t in (p.hidden, p.weight)]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return step(name, known, p._replace(hidden=hidden, weight=weight))

    plain = gradients(loss(*leaves), leaves)
    again = checkpoint(loss, *leaves, use_reentrant=reentrant)
    assert isinstance(again, Tensor)
    again.backward()
    for leaf, b in zip(leaves, plain[1:], strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, b)


@pytest.mark.parametrize("known", [False, True])
def test_a_second_derivative_is_refused_not_wrong(known):
    p = problem(5, 21, 8, 1.0)
    p.hidden.requires_grad_()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(step("reverse_kl", known, p), p.hidden, create_graph=True)


def test_inference_mode():
    p = problem(5, 21, 8, 1.0)
    with torch.inference_mode():
        inside = FUNCTIONS["reverse_kl"](p, p.upstream)
    torch.testing.assert_close(inside, FUNCTIONS["reverse_kl"](p, p.upstream))


def test_nothing_but_torch_is_imported_and_no_triton_is_needed():
    script = """
import sys, importlib.abc
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("triton", "transformers", "sdpo", "sdpo_parallel"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
from sdpo_kernels import linear_reverse_kl
h, w = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
linear_reverse_kl(h, w, h.detach() + 1).value.sum().backward()
assert h.grad.isfinite().all()
try:
    linear_reverse_kl(h, w, h, impl="triton")
except ValueError as e:
    assert "not installed" in str(e)
else:
    raise SystemExit("triton was there")
"""
    env = {**ENV, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
