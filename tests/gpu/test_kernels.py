"""The kernels on a GPU: the oracle rule, real sizes, no waiting, capture, compilation, memory.

CUDA_VISIBLE_DEVICES=0 python -m pytest -m gpu tests/gpu   (torch >= 2.11, triton >= 3.6)
"""

import pytest
import torch
from torch import Tensor

from helpers.cases import (
    FUNCTIONS,
    Problem,
    assert_matches_the_oracle,
    assert_statistics_match_the_oracle,
    evaluate,
    loss_of,
    problem,
    statistics,
)
from helpers.oracle import assert_as_good_as
from sdpo_kernels import reference
from sdpo_kernels._impl import tuning

pytestmark = pytest.mark.gpu

HALF = [torch.bfloat16, torch.float16]
KEEP, BLOCKS = 2**40, 2**21
"""Memory for the gradients of any logits; of some of the chunks in the first test."""
TRANSFORM = dict(temperature=0.8, softcap=20.0)
"""A lower softcap would leave float32 too few digits to be a baseline over so many words."""


def on_gpu(*args, **kwargs) -> Problem:
    return Problem(*(t.cuda() for t in problem(*args, **kwargs)))


class TensorCores(torch.autograd.Function):
    """h W^T of half-precision operands that were cast to float32: the matmul that all have who use
    the tensor cores, whose sums are a little less than float32. Plain gradients."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden.to(dtype), weight.to(dtype).T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore
        hidden, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ hidden, None


@pytest.fixture
def baseline_by_tensor_cores(monkeypatch: pytest.MonkeyPatch):
    """What float32 definitions multiply with, once a half-precision dtype is named."""

    def use(dtype: torch.dtype) -> None:
        if dtype not in HALF:
            return
        plain = reference.logits

        def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **transform):
            if hidden.dtype != torch.float32:
                return plain(hidden, weight, bias, **transform)
            z = TensorCores.apply(hidden, weight, dtype)
            none = z.new_zeros(len(weight), 0)
            z = z if bias is None else z + bias
            return plain(z.new_zeros(len(z), 0), none, z, **transform)

        monkeypatch.setattr(reference, "logits", logits)

    return use


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch: pytest.MonkeyPatch):
    """The oracle rule for float32 is about float32, not TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("options", [{}, TRANSFORM], ids=["plain", "transformed"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("impl", ["triton", "fused", "torch", "auto"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_match_the_oracle(
    name, impl, dtype, options, baseline_by_tensor_cores
):
    baseline_by_tensor_cores(dtype)
    p = on_gpu(300, 5003, 256, 0.1, dtype=dtype)
    bias = torch.randn(5003, device="cuda", dtype=dtype)
    options = dict(bias=bias, **options) if options else {}
    call = dict(impl=impl, chunk_bytes=2 * 77 * 5003 * 4, **options)
    rooms = (0, BLOCKS, KEEP)
    modes = [(known, room) for known in (False, True) for room in rooms if known or room != BLOCKS]
    found = [evaluate(name, p, known=known, grad_bytes=room, **call) for known, room in modes]
    k = 2.5 if "softcap" in options else 2.0
    assert_matches_the_oracle(name, p, *found, k=k, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("d", [256, 250, 24])
def test_fused_statistics_by_descriptors_and_by_pointers(d, dtype, baseline_by_tensor_cores):
    """Rows of 250 half-precision numbers do not begin at 16-byte boundaries, which TMA needs."""
    baseline_by_tensor_cores(dtype)
    p = on_gpu(300, 5003, d, 1.0, dtype=dtype)
    assert_statistics_match_the_oracle("logprob", p, impl="fused", k=3.0, **TRANSFORM)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "logprob", "sampled_token"])
def test_real_sizes(name, baseline_by_tensor_cores):
    """N=8192, V=151,936, D=4096 in bfloat16, against float64 a few hundred tokens at a time."""
    baseline_by_tensor_cores(torch.bfloat16)
    p = on_gpu(8192, 151_936, 4096, 0.1, dtype=torch.bfloat16)
    got = evaluate(name, p, known=True)
    errors = {}
    for dtype in (torch.float64, torch.float32):
        weight = p.weight.to(dtype)
        total = torch.zeros_like(weight)
        parts: dict[str, list[Tensor]] = {"value": [], "hidden": []}
        for c in torch.arange(8192, device="cuda").split(256):
            part = p.rows(c)._replace(weight=weight)
            found = evaluate(name, part.to(dtype), known=False, impl="reference")
            total += found.pop("weight")
            for k in parts:
                parts[k].append(found[k])
        errors[dtype] = {k: torch.cat(v) for k, v in parts.items()} | {"weight": total}
    for k, ours in got.items():
        assert_as_good_as(ours, errors[torch.float64][k], errors[torch.float32][k])


def test_offsets_beyond_two_to_the_31():
    p = on_gpu(16_384, 151_936, 64, 0.1, dtype=torch.bfloat16)
    assert p.hidden.shape[0] * p.weight.shape[0] > 2**31
    for name in ("logprob", "reverse_kl"):
        whole = evaluate(name, p, known=True, impl="triton", chunk_bytes=2**40)
        chunked = evaluate(name, p, known=True, impl="triton", chunk_bytes=2**31)
        for k in whole:
            torch.testing.assert_close(whole[k], chunked[k], rtol=2e-2, atol=1e-3)
        torch.cuda.empty_cache()
    fused = statistics("logprob", p, impl="fused")
    for k, t in statistics("logprob", p, impl="triton").items():
        torch.testing.assert_close(fused[k], t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_waits_for_the_device(name, known, masked):
    p = on_gpu(200, 3001, 64, 0.1, dtype=torch.bfloat16)
    options = dict(mask=torch.rand(200, device="cuda") < 0.7) if masked else {}
    evaluate(name, p, known=known, **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    evaluate(name, p, known=known, **options)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_masked_rows_on_either_side_give_nothing(where):
    p = on_gpu(200, 3001, 64, 0.1, dtype=torch.bfloat16)
    mask = torch.rand(200) < 0.7
    p.hidden[~mask] = torch.nan
    got = evaluate("reverse_kl", p, known=True, mask=mask.to(where))
    part = evaluate("reverse_kl", p.rows(mask.cuda()), known=True)
    assert not got["value"][~mask].any() and not got["hidden"][~mask].any()
    torch.testing.assert_close(got["weight"], part["weight"], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["logprob", "reverse_kl", "jsd", "sampled_token", "topk"])
def test_cuda_graph_capture(name):
    p = on_gpu(200, 3001, 64, 0.1, dtype=torch.bfloat16)
    hidden, weight = (t.clone().requires_grad_() for t in (p.hidden, p.weight))
    at = p._replace(hidden=hidden, weight=weight)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss_of(name, at, known=True).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        hidden.copy_(p.hidden.flip(0))
    graph.replay()
    replayed = dict(hidden=hidden.grad.clone(), weight=weight.grad.clone())
    eager = evaluate(name, p._replace(hidden=p.hidden.flip(0)), known=True)
    for k, t in replayed.items():
        torch.testing.assert_close(t, eager[k], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("known", [False, True])
def test_compile_fullgraph(known):
    p = on_gpu(200, 3001, 64, 0.1, dtype=torch.bfloat16)
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True)
    hidden = p.hidden.clone().requires_grad_()
    compiled("reverse_kl", p._replace(hidden=hidden), known=known).backward()
    torch.testing.assert_close(hidden.grad, evaluate("reverse_kl", p, known=known)["hidden"])


@pytest.mark.parametrize("room", [0, KEEP])
@pytest.mark.parametrize("known", [False, True])
def test_peak_memory_is_logits_and_what_is_kept(known, room):
    n, v, d, chunk = 4096, 50_257, 256, 64 * 2**20
    p = on_gpu(n, v, d, 0.1, dtype=torch.bfloat16)
    hidden, weight = (t.requires_grad_() for t in (p.hidden, p.weight))
    for _ in range(2):  # the first compiles, and opens cuBLAS's workspace
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of("reverse_kl", p, known=known, chunk_bytes=chunk, grad_bytes=room).backward()
    extra = torch.cuda.max_memory_allocated() - before
    kept = 2 * n * v if room else 4 * v * d  # G, or the sum of dW
    assert kept < extra < kept + chunk + 4 * (n * d + v * d) + 8 * 2**20


def test_scoring_takes_the_fused_kernel_and_little_memory():
    p = on_gpu(2048, 151_936, 256, 0.1, dtype=torch.bfloat16)
    assert tuning.choose_impl(p.hidden.device, torch.bfloat16, 2048, [256], True) == "fused"
    statistics("logprob", p)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    statistics("logprob", p)
    logits = 4 * 2048 * 151_936
    assert torch.cuda.max_memory_allocated() - before < logits / 4


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("impl", ["triton", "fused", "torch"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_target_of_minus_100_is_as_masked_and_nothing_waits(name, impl, known):
    p, kept = on_gpu(300, 5003, 256, 0.1, dtype=torch.bfloat16), torch.arange(300) % 3 > 0
    ignored = p._replace(targets=p.targets.masked_fill(~kept.cuda(), -100))
    evaluate(name, ignored, known=known, impl=impl)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    found = evaluate(name, ignored, known=known, impl=impl)
    torch.cuda.set_sync_debug_mode("default")
    assert not found["value"][~kept].any() and not found["hidden"][~kept].any()
    torch.testing.assert_close(found, evaluate(name, p, known=known, impl=impl, mask=kept.cuda()))
