"""Side by side on a CPU: who is right, who is wrong, who is not there; and what is written."""

import inspect
from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks import microbenchmark, peers
from benchmarks.measure import Spread, interleaved, peak_bytes
from benchmarks.microbenchmark import LIMIT, Settings, errors
from benchmarks.peers import CONTENDERS, DIVERGENCES, Contender
from benchmarks.problems import head, problem, truth
from benchmarks.report import plot, read

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
        Contender("nowhere", DIVERGENCES, peers.ours, "no_such_package"),
        Contender("one-sided", ("forward_kl",), peers.ours),
    )
    monkeypatch.setattr(peers, "CONTENDERS", contenders)
    out = tmp_path / "results.jsonl"
    microbenchmark.run("divergence", ("reverse_kl",), replace(SMALL, out=out))
    rows = {r["contender"]: r for r in read(out) if "sweep" not in r}
    assert {n: r["verdict"] for n, r in rows.items()} == {
        "floor": "floor",
        "sdpo": "right",
        "half of it": "wrong",
        "broken": "failed",
        "elsewhere": "unavailable",
        "nowhere": "unavailable",
        "one-sided": "unavailable",
    }
    assert {n for n, r in rows.items() if "seconds" in r} == {"floor", "sdpo"}
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


def test_peers_without_a_cpu_path_are_called_with_arguments_that_they_take(monkeypatch):
    liger = pytest.importorskip("liger_kernel.transformers")
    x = problem(4, 30, 8, 0.1, torch.float32, CPU)
    for name, kind, adapter in (
        ("LigerFusedLinearJSD", "reverse_kl", peers._liger_fused),
        ("LigerFusedLinearCrossEntropyLoss", "logprob", peers._liger_cross_entropy),
    ):
        forward = getattr(liger, name).forward
        double = mock.MagicMock()
        monkeypatch.setattr(liger, name, double)
        adapter(kind)(x)
        (call,) = double.return_value.call_args_list  # a call that does not fit raises
        inspect.signature(forward).bind(None, *call.args, **call.kwargs)


def test_heads_are_names_or_sizes():
    assert head("qwen3-8b") == (151_936, 4096) and head("300x32") == (300, 32)
    for bad in ("qwen9", "300", "x32", "300x"):
        with pytest.raises(ValueError, match=f"--heads: '{bad}' is neither"):
            head(bad)
