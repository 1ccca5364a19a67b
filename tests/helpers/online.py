"""Small runs of `sdpo online`, as users start them: alone, or under torchrun with gloo."""

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path

from helpers import forked, runs, tiny
from sdpo.cli import main
from sdpo.online.record import Record, read_update

SMALL = {
    "hindsight.max-prompt-tokens": 150,
    "hindsight.max-hindsight-prompt-tokens": 250,
    "hindsight.max-response-tokens": 60,
    "sampling.max-new-tokens": 10,
    "batch.interactions-per-step": 4,
    "batch.row-tokens": 256,
    "batch.micro-batch-tokens": 768,
    "optimizer.lr": 3e-4,
    "optimizer.eps": 1e-6,
    "evaluate.prompts": 4,
    "evaluate.every": 2,
    "safeguard.probe-every": 2,
}
TASK = "commonsense_qa"
"""Of lm-evaluation-harness; `tiny.make_questions` makes its rows."""
PHASES = ("no_lists:2", "no_emojis:2")
BRAKES = "preference-drop entropy-change max-leaks"
OFF = [word for name in BRAKES.split() for word in (f"--brakes.{name}", "None")]


def make_prompts(path: Path, n: int = 20, seed: int = 0) -> str:
    """``n`` prompts of very mixed lengths, one in each line."""
    rng = random.Random(seed)
    lines = (f"{i} {tiny.text(rng, 1, 20)}" for i in range(n))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def arguments(
    model: str,
    prompts: str,
    out: Path,
    *options: str,
    phases: tuple[str, ...] = PHASES,
    recipe: str = "online",
) -> list[str]:
    """What follows `sdpo online` for a small run without brakes; options override."""
    names = ["--model", model, "--prompts", prompts, "--out", str(out), "--phases", *phases]
    small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return [recipe, *names, *small, *OFF, *options]


def evaluated(flags: Mapping[str, object]) -> list[str]:
    """The flags of ``--evaluate``."""
    return [word for name, value in flags.items() for word in (f"--evaluate.{name}", str(value))]


def scores(out: Path, step: int) -> dict:
    """What a run's tasks scored after a step."""
    return json.loads((out / "evaluations" / f"step-{step}.json").read_text())["scores"]


def command(*args: str | Path, ranks: int = 0, **how) -> list[str]:
    """argv of a process of `arguments`, or with ``ranks`` of torchrun."""
    launch = ["-m", "sdpo", "online"]
    if ranks:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launch += ["-m", "sdpo.online"]
    return [sys.executable, *launch, *arguments(*args, **how)]  # pyright: ignore


def online(model: str, prompts: str, out: Path, *options: str, ranks: int = 0, **how) -> list:
    """Run to the end; the rows of metrics.jsonl. ``ranks`` = 0: in this process."""
    argv = arguments(model, prompts, out, *options, **how)
    if ranks:
        runs.succeeded(forked.run(ranks, "-m", "sdpo.online", *argv))
    else:
        with runs.as_alone():
            main(["online", *argv])
    return runs.read_metrics(out)


def records(out: Path) -> list[Record]:
    """All of a run, in order."""
    updates = sorted(int(p.stem[len("update-") :]) for p in (out / "rollouts").iterdir())
    found = [read_update(out, update) for update in updates]
    assert None not in found and updates == list(range(1, len(updates) + 1))
    return [record for some in found for record in some or ()]


def evaluations(out: Path) -> list[dict]:
    """Rows of evaluations.jsonl."""
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
