"""Broken runs resume on the same trajectory; ranks that stall are named."""

import os
import random
import re
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from helpers import forked, kill, runs, tiny
from sdpo.train.watchdog import PHASES, Watchdog


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return kill.prepare(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    return kill.prepare(tmp_path_factory.mktemp("kill"), "conversation")


@pytest.mark.parametrize("way", ["SIGTERM", "flip a bit", "full disk"])  # kill.py does them all
def test_a_broken_run_goes_on_as_if_undisturbed(way, undisturbed, tmp_path, seed):
    model, data, trajectory = undisturbed
    run = kill.Run(model, data, tmp_path / "run")
    kill.check(run, trajectory, [way], random.Random(seed))


def test_a_broken_run_goes_on_with_the_conversation_it_had_come_to(conversations, tmp_path, seed):
    model, data, trajectory = conversations
    run = kill.Run(model, data, tmp_path / "run", *kill.UNITS["conversation"])
    kill.check(run, trajectory, ["kill one"], random.Random(seed))


def test_a_killed_run_goes_on_on_one_device(undisturbed, tmp_path):
    model, data, _ = undisturbed
    options = ["--engine", "transformers", "--batch.epochs", "2"]
    whole = runs.train("reverse-kl", model, data, tmp_path / "whole", *kill.OPTIONS, *options)
    run = kill.Run(model, data, tmp_path / "run", *options, ranks=0)
    process = run.start()
    run.until(process, step=5, delay=0)
    kill.kill([process.pid])
    process.communicate()
    assert 5 <= len(run.metrics) < len(whole), "it was killed too late to show anything"
    run.finish()
    runs.assert_same_trajectory(whole, run.metrics)


def test_a_stalled_rank_is_named(undisturbed, tmp_path, monkeypatch):
    """One of two ranks stops answering: the other says so, and the job ends."""
    model, data, _ = undisturbed
    monkeypatch.setitem(runs.ENV, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3")
    options = ["--safeguard.stall-seconds", "6", "--batch.epochs", "3"]
    run = kill.Run(model, data, tmp_path / "run", *options)
    process = run.start()
    run.until(process, step=3, delay=0)
    ranks = {_rank(pid): pid for pid in kill.workers(process)}
    os.kill(ranks["1"], signal.SIGSTOP)
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0
    named = re.search(r"rank 0: no progress for 6 s in step \d+; ranks that .*: rank (\d) on", told)
    assert named and named.group(1) == "1", told[:3000]


def _rank(pid: int) -> str:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(e.decode()[5:] for e in environment if e.startswith(b"RANK="))


def test_the_ranks_behind_are_those_that_others_wait_for(monkeypatch):
    """Four ranks answer: one still gathers data while three wait in their passes."""
    store, watchdogs = dist.HashStore(), []
    for rank in range(4):
        watchdog = Watchdog(0, rank, 4)
        watchdog.seconds, watchdog._store = 60.0, store
        watchdog.beat(7, PHASES[0] if rank == 2 else PHASES[1])
        watchdog._report()
        watchdogs.append(watchdog)
    answering = list(watchdogs)
    monkeypatch.setattr("time.sleep", lambda _: [w._report() for w in answering])
    told = watchdogs[0].message()
    assert re.search(
        r"in step 8; ranks behind: rank 2 on .* \(step 8, data, 0 s before it\)$", told
    )
    watchdogs[2].beat(7, PHASES[1])
    assert "all ranks hang in its passes phase" in watchdogs[0].message()
    answering.remove(watchdogs[3])
    assert "no longer answer: rank 3 on" in watchdogs[0].message()
    store.delete_key("sdpo/watch/3")
    assert "no longer answer: rank 3 (never heard of)" in watchdogs[0].message()


def broken_model(folder: Path) -> str:
    """Everything but weights that can be read."""
    model = tiny.make_model(folder)
    Path(model, "model.safetensors").write_bytes(b"loading this fails in another way")
    return model


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--parallel.pipeline 2", "and SDPO needs two"),
        ("--parallel.tensor 2", "does not divide 1 ranks"),
        ("--parallel.attention varlen", "varlen"),
        ("--engine transformers --parallel.tensor 2", "one device"),
        ("--engine transformers --lora.rank 2", "lora"),
        ("--lora.rank 2 --lora.targets q_proj", "wkv"),
        ("--teacher ema:1.5", "decay"),
        ("--teacher best", "live"),
        ("--teacher frozen:nowhere", "nowhere"),
    ],
)
def test_impossible_combinations_are_refused_before_any_weights_load(
    options, names, tmp_path, capsys
):
    model = broken_model(tmp_path / "model")
    data = tiny.make_interactions(tmp_path / "i.jsonl", 6)
    run = runs.arguments("reverse-kl", model, data, tmp_path / "run", *options.split())
    told = runs.refused(capsys, "train", *run)
    assert names in " ".join(told.replace("\u2502", " ").split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "ranks", "names"),
    [
        ("--parallel.tensor 4", 4, "num_key_value_heads=2"),
        ("--parallel.context 2 --parallel.attention varlen", 2, "varlen"),
        ("--engine transformers", 2, "2 ranks"),
    ],
)
def test_impossible_combinations_of_ranks(options, ranks, names, tmp_path):
    model = broken_model(tmp_path / "model")
    data = tiny.make_interactions(tmp_path / "i.jsonl", 6)
    run = runs.arguments("reverse-kl", model, data, tmp_path / "run", *options.split())
    result = forked.run(ranks, "-m", "sdpo.train", *run)
    assert result.returncode != 0 and "Traceback" not in runs.cause(result.stderr)
    told = " ".join((result.stdout + result.stderr).split())
    assert re.search(r"rank \d: ", told) and names in told, told[-3000:]
    assert not (tmp_path / "run").exists()
