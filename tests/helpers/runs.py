"""Training runs as users start them: `sdpo train` alone, or under torchrun with gloo."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from helpers import forked
from helpers.environment import ENV as ENV
from sdpo.cli import main
from sdpo.train.run_folder import read_metrics

SMALL = {
    "hindsight.max-prompt-tokens": 150,
    "hindsight.max-hindsight-prompt-tokens": 250,
    "hindsight.max-response-tokens": 60,
    "batch.interactions-per-step": 6,
    "batch.row-tokens": 256,
    "batch.micro-batch-tokens": 768,
    "optimizer.lr": 3e-4,
    "optimizer.max-grad-norm": 1.0,
}


OWN = ("advantage/mean_abs", "preference/margin")
"""Metrics that some objectives have."""


def cause(stderr: str) -> str:
    """What went wrong, without what torchrun says of it."""
    return stderr.partition("torch/distributed/elastic/multiprocessing/api.py")[0][-9000:]


def worker(name: str, ranks: int, *arguments: str) -> str:
    """What a script beside this file prints under torchrun."""
    return succeeded(forked.run(ranks, str(Path(__file__).parent / name), *arguments))


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    """What it printed."""
    assert result.returncode == 0, cause(result.stderr)
    return result.stdout


def arguments(recipe: str, model: str, data: str, out: Path, *options: str) -> list[str]:
    """What follows `sdpo train` for a small run."""
    names = ["--model", model, "--data", data, "--out", str(out)]
    small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return [recipe, *names, *small, *options]


def command(*args: str | Path, ranks: int = 0) -> list[str]:
    """argv of a process of `arguments`, or with ``ranks`` of torchrun."""
    launch = ["-m", "sdpo", "train"]
    if ranks:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launch += ["-m", "sdpo.train"]
    return [sys.executable, *launch, *arguments(*args)]


def train(recipe: str, model: str, data: str, out: Path, *options: str, ranks: int = 0) -> list:
    """Run to the end; the rows of metrics.jsonl. ``ranks`` = 0: in this process."""
    argv = arguments(recipe, model, data, out, *options)
    if ranks:
        succeeded(forked.run(ranks, "-m", "sdpo.train", *argv))
    else:
        with as_alone():
            main(["train", *argv])
    return read_metrics(out)


def refused(capsys: pytest.CaptureFixture, *args: object) -> str:
    """What `sdpo`, in this process, says on stderr when it ends with status 2."""
    capsys.readouterr()
    with as_alone(), pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err, err
    return err


@contextlib.contextmanager
def as_alone() -> Iterator[None]:
    """A process that torchrun did not start, before and after."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ |= before


def assert_same_trajectory(rows: list[dict], others: list[dict], tolerance: float = 1e-5) -> None:
    """Losses and gradient norms of every step agree to ``tolerance``; above 1, relative."""
    assert [r["step"] for r in rows] == [r["step"] for r in others]
    for a, b in zip(rows, others, strict=True):
        names = ["loss", "grad_norm", "lr", "response/tokens"]
        names += [own for own in OWN if own in a or own in b]
        for name in names:
            assert abs(a[name] - b[name]) <= tolerance * max(abs(a[name]), 1.0), (name, a, b)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: w for file in files for name, w in load_file(file).items()}


def same_weights(a: Path, b: Path) -> bool:
    """Two folders hold the same tensors, bit for bit."""
    ours, theirs = weights(a), weights(b)
    assert ours
    return ours.keys() == theirs.keys() and all(torch.equal(w, theirs[n]) for n, w in ours.items())
