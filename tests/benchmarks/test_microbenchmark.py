"""Side by side on a CPU: who is right, who is wrong, who is not there; and what is written."""

import ast
import importlib
import inspect
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks import microbenchmark, peers
from benchmarks.measure import Spread, interleaved, peak_bytes, relative_error
from benchmarks.microbenchmark import LIMIT, Settings, errors
from benchmarks.peers import CONTENDERS, DIVERGENCES, Contender
from benchmarks.problems import entropy, head, problem, truth
from benchmarks.report import plot, read
from sdpo_kernels import reference

CPU = torch.device("cpu")
FEW = dict(heads=("300x32",), tokens=(48,), dtype=("float32",), seconds=0.001, distances=(0.1,))
SMALL = Settings(**FEW, device="cpu")


def here(kind: str) -> list[Contender]:
    return [c for c in CONTENDERS if c.missing(kind, CPU) is None and c.name != "torch.compile"]


@pytest.mark.parametrize("distance", [0.01, 1.0])
@pytest.mark.parametrize("kind", [*DIVERGENCES, "logprob"])
def test_every_contender_computes_the_same_mean_and_its_gradients(kind, distance):
    x = problem(48, 300, 32, distance, torch.float32, CPU)
    oracle = truth(kind, x)
    names = [c.name for c in here(kind)]
    assert {"sdpo", "torch"} < set(names) and any("TRL" in n for n in names)
    for c in here(kind):
        found = errors(c.make(kind), x, oracle)
        assert max(found.values()) < (0.03 if distance < 0.1 else LIMIT[torch.float32]), (c, found)


def test_a_loss_that_is_another_one_is_wrong():
    x = problem(48, 300, 32, 0.5, torch.float32, CPU)
    for kind, other in (("reverse_kl", "forward_kl"), ("jsd", "reverse_kl")):
        found = errors(peers._plain(other, upcast=False), x, truth(kind, x))
        assert max(found.values()) > LIMIT[torch.float32]


def test_logits_rounded_to_bfloat16_are_wrong_where_the_passes_almost_agree():
    x = problem(64, 2000, 64, 0.1, torch.bfloat16, CPU)
    oracle = truth("reverse_kl", x)
    limit = LIMIT[torch.bfloat16]
    assert max(errors(peers._plain("reverse_kl", upcast=False), x, oracle).values()) > limit
    assert max(errors(peers._plain("reverse_kl", upcast=True), x, oracle).values()) < limit
    assert max(errors(peers.ours("reverse_kl"), x, oracle).values()) < limit


def test_wrong_failed_and_absent_contenders_are_named_and_have_no_speed(
    monkeypatch, tmp_path, capsys
):
    def broken(kind):
        raise RuntimeError("no kernel\nfor this")

    contenders = (
        Contender("sdpo", DIVERGENCES, peers.ours),
        Contender("half of it", DIVERGENCES, lambda kind: lambda x: peers.ours(kind)(x) / 2),
        Contender("broken", DIVERGENCES, broken),
        Contender("elsewhere", DIVERGENCES, peers.ours, gpu=True),
        Contender("nowhere", DIVERGENCES, peers.ours, ("no_such_package",)),
        Contender("one-sided", ("forward_kl",), peers.ours),
    )
    monkeypatch.setattr(peers, "CONTENDERS", contenders)
    out = tmp_path / "results.jsonl"
    microbenchmark.run("divergence", ("reverse_kl",), replace(SMALL, out=out))
    rows = {r["contender"]: r for r in read(out) if "sweep" not in r}
    assert {n: r["verdict"] for n, r in rows.items()} == {
        "floor": "floor",
        "floor, fastest products": "floor",
        "sdpo": "right",
        "half of it": "wrong",
        "broken": "failed",
        "elsewhere": "unavailable",
        "nowhere": "unavailable",
        "one-sided": "unavailable",
    }
    assert {n for n, r in rows.items() if "seconds" in r} == {
        "floor",
        "floor, fastest products",
        "sdpo",
    }
    assert {n for n, r in rows.items() if "seconds_of_wrong" in r} == {"half of it"}
    assert rows["sdpo"]["over_floor"] == pytest.approx(
        rows["sdpo"]["seconds"]["both"]["median"] / rows["floor"]["seconds"]["both"]["median"]
    )
    printed = capsys.readouterr().out
    for text in ("wrong", "broken RuntimeError: no kernel", "elsewhere needs a GPU"):
        assert text in printed
    assert "pip install no-such-package" in printed and "has no reverse_kl" in printed
    about = rows["sdpo"]["machine"]
    assert about["commit"] != "unknown" and about["versions"]["torch"] == torch.__version__


def test_a_gpus_half_precision_has_a_second_floor_whose_logits_are_float32(monkeypatch):
    """With a double of a GPU's matmul, as a CPU has none with a float32 result."""
    calls, mm = [], torch.mm

    def double(a, b, *, out, out_dtype=None):
        assert out.dtype == (out_dtype or a.dtype)
        calls.append((out.shape, out.dtype))
        return out.copy_(mm(a, b))

    x = problem(4, 30, 8, 0.1, torch.bfloat16, CPU)
    monkeypatch.setattr(peers, "_wide", lambda h: True)
    floors = peers.floors("jsd", x)
    monkeypatch.setattr(torch, "mm", double)
    floors["floor, float32 logits"]()
    half, full = torch.bfloat16, torch.float32
    logits, gradients = [((4, 30), full)] * 2, [((4, 8), half), ((30, 8), half)]
    assert calls == logits + gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpus_second_floor_has_the_same_products_by_their_fastest_ways(dtype, monkeypatch):
    x = problem(4, 30, 8, 0.1, dtype, CPU)
    assert list(peers.floors("jsd", x)) == ["floor", "floor, fastest products"]
    z = torch.mm(x.hidden, x.weight.T).detach()
    h, w, u = x.hidden.detach(), x.weight.detach(), x.teacher
    truth = {"u": u.double() @ w.double().T, "z": h.double() @ w.double().T}
    truth |= {"dh": z.double() @ w.double(), "dw": z.double().T @ h.double()}
    ways = peers._ways(u, h, w, z)
    assert ways.keys() == truth.keys() and min(map(len, ways.values())) == 2
    for name, products in ways.items():
        for multiply in products:
            error = relative_error(multiply(), truth[name])
            assert error < (1e-6 if dtype == torch.float32 or name in "uz" else 5e-3)
    slow, fast = (lambda: time.sleep(0.01)), (lambda: None)
    assert peers._fastest([slow, fast, slow]) is fast


def test_plots_are_made_from_what_was_written(tmp_path):
    out = tmp_path / "results.jsonl"
    settings = replace(SMALL, out=out, only=("sdpo torch", "TRL"))
    microbenchmark.run("divergence", ("jsd",), settings)
    (path,) = plot(read(out), tmp_path / "plots")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert read(out)[-1]["sweep"] == "distance"


def test_peak_memory_of_a_call_is_what_it_allocates():
    def allocate(mib: int) -> None:
        torch.ones(mib * 2**18).add_(1)

    allocate(1)
    for mib in (40, 160):
        assert peak_bytes(lambda n=mib: allocate(n), CPU) == pytest.approx(mib * 2**20, rel=0.1)


def test_rounds_are_interleaved_and_every_first_call_is_discarded():
    calls = []
    found = interleaved({n: lambda _, n=n: calls.append(n) for n in "ab"}, CPU, 0.0, least=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(v) for v in found.values()] == [3, 3]
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (spread.median, spread.low, spread.high, spread.rounds) == (3.0, 2.0, 4.0, 5)


def signature_in(path: Path, name: str) -> inspect.Signature:
    """Of a function or of a class's ``forward`` in a file that cannot be imported here."""
    (found,) = (n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == name)
    if isinstance(found, ast.ClassDef):
        (found,) = (n for n in found.body if getattr(n, "name", "") == "forward")
    assert isinstance(found, ast.FunctionDef)
    named = [*found.args.posonlyargs, *found.args.args]
    last = len(named) - len(found.args.defaults)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        inspect.Parameter(a.arg, kind, default=inspect.Parameter.empty if i < last else None)
        for i, a in enumerate(named)
    )


@pytest.mark.parametrize(
    ("module", "name", "adapter", "kind"),
    [
        ("liger_kernel.transformers", "LigerFusedLinearJSD", peers._liger_fused, "jsd"),
        (
            *("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"),
            *(peers._liger_cross_entropy, "logprob"),
        ),
        (
            *("liger_kernel.transformers.fused_linear_kl_div", "LigerFusedLinearKLDivLoss"),
            *(peers._liger_kl, "forward_kl"),
        ),
        (
            *(peers.LIGER_SM90, "LigerFusedLinearCrossEntropySM90Function"),
            *(peers._liger_sm90, "logprob"),
        ),
        (
            *("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
            *(peers._quack, "logprob"),
        ),
    ],
)
def test_peers_without_a_cpu_path_are_called_with_arguments_that_they_take(
    module, name, adapter, kind, monkeypatch
):
    package, _, rest = module.partition(".")
    if (spec := find_spec(package)) is None:
        pytest.skip(f"{package} is not installed")
    paths = [Path(p, *rest.split(".")) for p in spec.submodule_search_locations or ()]
    files = [f for p in paths for f in (p.with_suffix(".py"), p / "__init__.py") if f.is_file()]
    double = mock.MagicMock()
    monkeypatch.setitem(sys.modules, module, double)
    adapter(kind)(problem(4, 30, 8, 0.1, torch.float32, CPU))
    made = getattr(double, name)
    if name[0].islower():
        signature, first, (call,) = signature_in(files[0], name), (), made.call_args_list
    elif made.apply.called:  # an autograd function, whose forward takes a context
        signature, first = signature_in(files[0], name), ("context",)
        (call,) = made.apply.call_args_list
    else:
        monkeypatch.undo()
        signature = inspect.signature(getattr(importlib.import_module(module), name).forward)
        first, (call,) = ("self",), made.return_value.call_args_list
        init = inspect.signature(getattr(importlib.import_module(module), name).__init__)
        init.bind("self", **made.call_args.kwargs)
    signature.bind(*first, *call.args, **call.kwargs)  # raises where they do not fit


class ReverseKLToFixedLogits(torch.autograd.Function):
    """What NeMo-RL's class of that name takes and returns, by plain torch."""

    @staticmethod
    def forward(ctx, student_BSV, teacher_BSV, chunk_size, tp_group, inference_only=False):
        assert isinstance(chunk_size, int) and dist.get_world_size(tp_group) == 1
        p, q = student_BSV.float().log_softmax(-1), teacher_BSV.float().log_softmax(-1)
        value_BS = (p.exp() * (p - q)).sum(-1)
        ctx.save_for_backward(p, q, value_BS)
        return value_BS

    @staticmethod
    def backward(ctx, grad_BS):  # pyright: ignore
        p, q, value_BS = ctx.saved_tensors
        inner = p.exp() * (p - q - value_BS[..., None])
        return grad_BS[..., None] * inner, None, None, None, None


def test_nemo_rl_is_given_both_logits_and_a_group_of_its_own(monkeypatch):
    """NeMo-RL is not on PyPI; its class's arguments as of its pull request 3978."""
    double = SimpleNamespace(ChunkedDistributedReverseKLToFixedLogits=ReverseKLToFixedLogits)
    monkeypatch.setitem(sys.modules, "nemo_rl.distributed.model_utils", double)
    x = problem(48, 300, 32, 0.1, torch.float32, CPU)
    try:
        found = errors(peers._nemo("reverse_kl"), x, truth("reverse_kl", x))
    finally:
        dist.destroy_process_group()
    assert max(found.values()) < LIMIT[torch.float32]


def test_a_package_that_is_not_on_pypi_is_named_by_its_source():
    if find_spec("nemo_rl") is None:
        (nemo,) = (c for c in CONTENDERS if c.name.startswith("NeMo"))
        assert "pip install git+https://github.com/NVIDIA-NeMo/RL" in str(
            nemo.missing("reverse_kl", CPU)
        )
    assert peers.lacking("no_such_package.within") == "no-such-package.within"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, v, d", [(32, 300, 32), (48, 1000, 64), (128, 8000, 256)])
def test_the_peaked_problem_has_between_one_and_two_nats(n, v, d, dtype):
    peaked, gaussian = (problem(n, v, d, 0.1, dtype, CPU, s) for s in ("peaked", "gaussian"))
    assert 1 < entropy(peaked) < 2 < entropy(gaussian)
    logp = reference.log_softmax(peaked.hidden.detach().double(), peaked.weight.detach().double())
    assert entropy(peaked) == pytest.approx(float(reference.entropy(logp).mean()), rel=1e-3)
    nats = reference.entropy(logp)
    assert nats.std() > 0.3, "some tokens are surer than others"
    logq = reference.log_softmax(peaked.teacher.double(), peaked.weight.detach().double())
    assert 1e-4 < float(reference.reverse_kl(logp, logq).mean()) < 0.1


def test_both_problems_are_measured_and_told_apart(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    settings = replace(SMALL, out=out, only=("sdpo torch",), problem=("gaussian", "peaked"))
    microbenchmark.run("divergence", ("reverse_kl",), settings)
    rows = [r for r in read(out) if "sweep" not in r and r["contender"] == "sdpo torch"]
    assert [r["problem"] for r in rows] == ["gaussian", "peaked"]
    assert 1 < rows[1]["entropy"] < 2 < rows[0]["entropy"]
    assert "peaked (1.5 nats)" in capsys.readouterr().out
    assert len(plot(read(out), tmp_path)) == 2


def test_heads_are_names_or_sizes():
    assert head("qwen3-8b") == (151_936, 4096) and head("300x32") == (300, 32)
    for bad in ("qwen9", "300", "x32", "300x"):
        with pytest.raises(ValueError, match=f"--heads: '{bad}' is neither"):
            head(bad)
