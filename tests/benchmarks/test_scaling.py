"""The traffic model against counted bytes, the fits against known coefficients, and the command."""

from collections import Counter
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from benchmarks import counting, fits, prediction, scaling, traffic
from benchmarks.counting import Job
from benchmarks.models import QWEN3
from benchmarks.prediction import GPUS, Links
from benchmarks.report import Output, read
from benchmarks.scaling import Settings
from benchmarks.traffic import Interactions, Work, ring
from helpers import forked
from sdpo_parallel.config import ParallelConfig

TOLERANCE = 0.05
QWEN3_8B = traffic.shape_of(QWEN3["qwen3-8b"])
WORK = Work(2, 8192.0, 9216.0, 4096.0, 2560 * 2**20)


# ---- bytes ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def counted():
    """Jobs that together send everything but an all-reduce over replicas."""
    jobs = {name: counting.JOBS[name] for name in ("tensor 2", "context 2")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "torchrun", forked.run)
        return {name: (job, counting.count(job)) for name, job in jobs.items()}


def worst(job: Job, found: counting.Counted) -> float:
    """Relative error of the operator that is predicted worst."""
    return max(abs(c.ratio - 1) for c in counting.compare(job.predicted(), found))


@pytest.mark.slow
def test_predicted_bytes_are_what_ranks_count(counted):
    for name, (job, found) in counted.items():
        compared = counting.compare(job.predicted(), found)
        assert len(compared) >= 5 and all(c.predicted and c.counted for c in compared), name
        assert worst(job, found) < TOLERANCE, (name, compared)
        for c in compared:
            predicted, seen = c.collectives
            assert predicted == seen, (name, c)


@pytest.mark.slow
def test_a_model_that_forgets_something_is_noticed(counted, monkeypatch):
    def without(name):
        once = getattr(traffic, name)
        return lambda *a: list(once(*a))[1:]

    def half(name):
        once = getattr(traffic, name)
        return lambda *a: [f._replace(bytes=f.bytes / 2) for f in once(*a)]

    noticed = [
        ("context 2", "_weights", without),  # a pass that gathers nothing
        ("context 2", "_weights", half),  # float32 taken for bfloat16
        ("context 2", "_context", without),
        ("tensor 2", "_tensor", half),
        ("tensor 2", "_head", half),
    ]
    for job, name, mutate in noticed:
        with monkeypatch.context() as m:
            m.setattr(traffic, name, mutate(name))
            assert worst(*counted[job]) > TOLERANCE, (job, name, mutate)
    with monkeypatch.context() as m:
        m.setattr(traffic, "_passes", lambda p, w: (w.hindsight_slots + w.policy_slots, 0.0))
        assert worst(*counted["tensor 2"]) > TOLERANCE, "nothing is computed again"


def test_by_the_ring_convention():
    assert ring("all-gather", 800.0, 8) == ring("reduce-scatter", 800.0, 8) == 700
    assert ring("all-reduce", 800.0, 8) == 1400 and ring("all-reduce", 800.0, 1) == 0


def total(ranks: int, shape=QWEN3_8B, **layout) -> Counter[str]:
    """Bytes by axis."""
    found = Counter()
    for s in traffic.traffic(shape, WORK, ParallelConfig(**layout), ranks):
        found[s.axis] += s.bytes
    return found


def test_shards_send_more_the_more_there_are_and_never_twice_the_weights():
    sent = [total(n)["shards"] for n in (2, 8, 64, 1024)]
    assert sent == sorted(sent)
    assert sent[-1] < 2 * sent[0] * 1.0001
    weights = QWEN3_8B.parameters()
    # of two micro-batches: 3 gathers in bfloat16, the head's once; a reduction in float32
    head = QWEN3_8B.head() + QWEN3_8B.hidden
    whole = 2 * (3 * 2 * (weights - head) + 4 * weights) + 2 * head
    assert sent[-1] == pytest.approx(whole * 1023 / 1024, rel=1e-6)


def test_each_axis_appears_with_its_degree():
    assert total(1) == {}
    assert set(total(8)) == {"shards"}
    assert set(total(8, replicate=8)) == {"replicas"}
    assert set(total(16, replicate=2, tensor=2, context=2)) == set(get_args(traffic.Axis))
    assert total(8, tensor=2)["shards"] < 0.51 * total(8)["shards"]


def test_the_heads_traffic_is_40_bytes_a_token_whatever_the_vocabulary():
    for vocabulary in (QWEN3_8B.vocabulary, 2 * QWEN3_8B.vocabulary):
        shape = replace(QWEN3_8B, vocabulary=vocabulary)
        assert total(2, shape, tensor=2)["head"] == WORK.micro_batches * WORK.responses * (36 + 4)


def test_links_follow_from_the_layout():
    def near(axis, ranks, **layout):
        return prediction.route(axis, ParallelConfig(**layout), ranks, 8)

    assert near("shards", 8) == (7, 0, 0.0)
    assert near("shards", 64) == (56, 7, 1 / 8)  # eight rings, through eight adapters
    assert near("shards", 64, tensor=8) == (0, 7, 1.0)
    assert near("tensor", 64, tensor=8) == (7, 0, 0.0)
    assert near("context", 64, context=4, tensor=2) == (3, 0, 0.0)
    assert near("replicas", 64, replicate=8) == (0, 7, 1.0)


# ---- prediction ----------------------------------------------------------------------------------
EACH, LINKS = Interactions(), Links()


def predict(ranks: int, *, each=EACH, gpu=GPUS["h100"], links=LINKS, **layout):
    return prediction.predict(QWEN3_8B, each, ParallelConfig(**layout), ranks, gpu, links)


def test_a_step_is_never_faster_than_its_compute_nor_slower_than_all_of_it():
    for layout in (dict(), dict(replicate=8), dict(tensor=4), dict(context=2, tensor=2)):
        p = predict(64, **layout)
        assert p.compute + p.exposed <= p.seconds <= p.apart
        assert (p.exposed > 0) == (p.parallel.tensor * p.parallel.context > 1)


def test_slower_links_and_slower_gpus_never_help():
    p = predict(64)
    slow = predict(64, links=Links(infiniband=1e9, nvlink=10e9))
    assert slow.overlapped > 5 * p.overlapped and slow.seconds > p.seconds
    half = replace(GPUS["h100"], efficiency=0.2)
    assert predict(64, gpu=half).compute == pytest.approx(2 * p.compute)


def test_weak_scaling_keeps_a_gpus_work_and_strong_scaling_the_steps():
    assert predict(1024).compute == pytest.approx(predict(8).compute)
    strong = Interactions(scaling="strong")
    assert predict(64, each=strong).compute == pytest.approx(predict(8).compute / 8)
    assert predict(1024, each=strong).tokens_per_second < predict(8).tokens_per_second / 5, (
        "fewer interactions than GPUs"
    )


SHARED = Interactions(policy_read=0.7, hindsight_read=0.45)


def test_slots_that_are_not_read_again_take_no_time_and_context_ranks_share_none():
    whole, shared = (traffic.work_of(e, ParallelConfig(), 8) for e in (EACH, SHARED))
    slots = [w.micro_batches * t for w in (whole, shared) for t in w[1:4]]
    assert slots[3:] == pytest.approx([0.7 * slots[0], 0.45 * slots[1], slots[2]])
    assert shared.micro_batches < whole.micro_batches
    assert shared.policy_slots <= SHARED.micro_batch_tokens, "the larger pass, now"
    # the layers' cost is 3P + H, and attention's a little more: the last tokens see all others
    fewer = (3 * 0.7 * 1024 + 0.45 * 1152) / (3 * 1024 + 1152)
    flops = [
        traffic.model_flops(QWEN3_8B, 1024, 1152, 512, e.read(ParallelConfig()))
        for e in (EACH, SHARED)
    ]
    assert flops[0][1] == flops[1][1]
    assert fewer < flops[1][0] / flops[0][0] < 1.01 * fewer
    p = predict(8, each=SHARED)
    assert p.compute < 0.8 * predict(8).compute and p.overlapped < predict(8).overlapped
    assert p.tokens_per_second > predict(8).tokens_per_second
    assert predict(8, each=SHARED, context=2) == predict(8, context=2)


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match="hindsight_read must lie in"):
        Interactions(hindsight_read=share)


def test_all_layouts_use_all_gpus_once():
    found = prediction.layouts(256, "full")
    assert len(found) == len(set(found)) == 30
    for p in found:
        assert p.replicate * p.shards(256) * p.context * p.tensor == 256
        assert p.tensor * p.context <= 8


# ---- fits ----------------------------------------------------------------------------------------
SHAPES = [(n, v, d) for n in (64, 512) for v in (1000, 30_000) for d in (128, 1024)]


def points(coefficients, noise: float = 0.0):
    rng = np.random.default_rng(0)
    terms = [fits.objective_terms(*x) for x in SHAPES]
    return [(t, np.dot(coefficients, t) * (1 + noise * rng.standard_normal())) for t in terms]


def test_the_fit_recovers_coefficients():
    truth = (8e-12, 3e-10, 2e-10, 1e-4)
    found = fits.fit(points(truth))
    assert found.coefficients == pytest.approx(truth, rel=1e-6)
    assert found.worst < 1e-9
    noisy = fits.fit(points(truth, noise=0.02))
    assert noisy.coefficients[0] == pytest.approx(truth[0], rel=0.1)
    assert 0.001 < noisy.typical < 0.05


def test_no_coefficient_is_negative():
    found = fits.fit(points((8e-12, 3e-10, -1e-10, 1e-4)))
    assert min(found.coefficients) >= 0 and found.coefficients[2] == 0
    assert found.worst > 0.001, "what was dropped is seen in the errors"


# ---- results -------------------------------------------------------------------------------------
def measured(device: str, cuda: str | None, **other) -> dict:
    return dict(machine=dict(device=device, cuda=cuda), verdict="right", **other)


def step(device: str, cuda: str | None, mfu: float, contender: str = "sdpo") -> dict:
    seconds = dict(step=dict(median=989e12**-1 / mfu))
    at = dict(benchmark="step", contender=contender, flops=1.0, seconds=seconds)
    return measured(device, cuda, **at)


def objective_rows(device: str, cuda: str | None, dtype: str) -> list[dict]:
    truth = (8e-15, 0.0, 0.0, 1e-4)
    return [
        measured(device, cuda, benchmark="divergence", contender="sdpo", kind="reverse_kl")
        | dict(tokens=n, vocabulary=v, hidden=d, dtype=dtype)
        | dict(seconds=dict(both=dict(median=np.dot(truth, fits.objective_terms(n, v, d)))))
        for n, v, d in SHAPES
    ]


def test_only_a_gpu_measures_the_efficiency():
    gpu = scaling.chosen_gpu("h100", [step("some CPU", None, 0.9)])
    assert gpu.efficiency == 0.40 and "no GPU has been measured" in gpu.source
    rows = [step("NVIDIA H100", "13.0", x) for x in (0.3, 0.5, 0.31)]
    rows += [step("NVIDIA H100", "13.0", 0.7, "somebody else"), step("NVIDIA H200", "13.0", 0.6)]
    gpu = scaling.chosen_gpu("h100", rows)
    assert gpu.efficiency == pytest.approx(0.31) and "assumption" not in gpu.source
    other = scaling.chosen_gpu("h100", rows[-1:])
    assert other.efficiency == pytest.approx(0.6) and "assumption" in other.source


def test_the_objectives_time_is_taken_from_the_same_gpu():
    assert scaling.chosen_gpu("h100", objective_rows("some CPU", None, "bfloat16")).head is None
    assert scaling.chosen_gpu("h100", objective_rows("NVIDIA H100", "13", "float32")).head is None
    gpu = scaling.chosen_gpu("h100", objective_rows("NVIDIA H100", "13", "bfloat16"))
    assert gpu.head is not None
    assert gpu.head.at(fits.objective_terms(4096, 151_936, 4096)) == pytest.approx(
        8e-15 * 4096 * 151_936 * 4096 + 1e-4, rel=1e-3
    )
    slower = replace(gpu, head=replace(gpu.head, coefficients=(1e-11, 0, 0, 0)))
    assert predict(8, gpu=slower).compute > predict(8, gpu=gpu).compute


# ---- the command ---------------------------------------------------------------------------------
@pytest.fixture
def results(tmp_path):
    """A file of the objective's times on a CPU."""
    written = Output(out=tmp_path / "results.jsonl")
    written.keep(objective_rows("some CPU", None, "float32"))
    return written.out


def test_predictions_are_printed_with_what_they_assume(results, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    found = scaling.run(Settings(count=False, results=results, gpus=(8, 64), out=out))
    said = " ".join(capsys.readouterr().out.split())
    assert "PREDICTED, not measured: qwen3-8b on H100" in said
    assert "no GPU has been measured: efficiency 0.40 is an assumption" in said
    assert "weak scaling: 128 interactions a step for every 8 GPUs" in said
    written = read(out)
    assert len(written) == len(found) and {r["benchmark"] for r in written} == {"scaling"}
    predicted = [r for r in written if r["kind"] == "prediction"]
    assert {r["ranks"] for r in predicted if r["best"]} == {8, 64}
    assert all(r["assumptions"] and r["verdict"] == "predicted" for r in predicted)
    assert all(r["memory"] <= 0.9 * 80 * 2**30 for r in predicted)


def counts(**read: float) -> list[dict]:
    """Rows of benchmarks.prefixes; hindsight's share by unit."""
    at = dict(benchmark="prefixes", kind="count", data="i.jsonl", interactions=1353)
    return [
        at | dict(sharing=how, unit=unit, read=dict(policy=1.0, hindsight=share))
        for how, unit, share in [("none", "interaction", 1.0)]
        + [("keys", unit, share) for unit, share in read.items()]
    ]


def test_shares_are_those_counted_or_given_and_else_everything_is_read(results, capsys):
    rows = counts(interaction=0.5, conversation=0.25)
    settings = Settings(unit="conversation", interactions=Interactions(prompt=100))
    found, source = scaling.chosen_interactions(settings, rows)
    assert found == Interactions(prompt=100, hindsight_read=0.25) and "1,353" in source
    by_one, _ = scaling.chosen_interactions(Settings(), rows)
    assert by_one == Interactions(hindsight_read=0.5)
    assert scaling.chosen_interactions(Settings(), rows[:1]) == (Interactions(), "")
    given = replace(settings, interactions=SHARED)
    assert scaling.chosen_interactions(given, rows) == (SHARED, "as given")

    said = " ".join(scaling.assumptions(Settings(interactions=found), GPUS["h100"], source))
    assert "100% of the policy's and 25% of hindsight's tokens are read, as counted" in said
    assert "no prefix is shared" in " ".join(scaling.assumptions(Settings(), GPUS["h100"]))

    def seconds(*new) -> float:
        Output(out=results).keep(new)
        at = Settings(count=False, results=results, gpus=(8,), unit="conversation")
        return min(r["seconds"] for r in scaling.run(at) if r["kind"] == "prediction")

    assert seconds() > seconds(*rows)
    assert "25% of hindsight's" in " ".join(capsys.readouterr().out.split())


def test_what_does_not_fit_is_said(results, capsys):
    at = Settings(model="qwen3-32b", gpus=(8,), count=False, results=results)
    assert not [r for r in scaling.run(at) if r["kind"] == "prediction"]
    assert "8 GPUs: no layout fits 80 GiB" in capsys.readouterr().out


def test_the_objective_is_measured_where_there_are_no_results(capsys):
    found = scaling.run(Settings(count=False, gpus=(8,), seconds=0.2))
    (row,) = [r for r in found if r["kind"] == "objective"]
    assert len(row["errors"]) == len(fits.SHAPES)
    assert row["coefficients"][0] > 0, "the products are there"
    assert "Gflop/s" in capsys.readouterr().out
