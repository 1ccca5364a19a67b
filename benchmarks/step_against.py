"""A whole training step of this checkout against the same step of another one, by turns.

    git worktree add ../before COMMIT
    python -m benchmarks.step_against ../before [--model check] [--out results.jsonl]
    python -m benchmarks.step_against ../before --model FOLDER --data interactions.jsonl

Each version runs in a process of its own (``step_worker.py``), which has the same weights, reads
the same token ids and waits while the other one works. Both passes, backward and AdamW of our step
are timed, and the ratio is that of the processes' CPU times within a round, which neighbours on a
machine move less than the clock on the wall. Nothing is timed before losses and gradients agree.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from benchmarks.measure import ROOT, Spread, machine
from benchmarks.report import Output, grid, milliseconds
from benchmarks.step import MODELS
from benchmarks.step import Settings as Random
from benchmarks.step import interactions as random_interactions
from benchmarks.step_contenders import ObjectiveName
from sdpo.hindsight import Encoded, HindsightConfig, encode
from sdpo.interactions import read_interactions
from sdpo_parallel.huggingface import load_tokenizer

WORKER = Path(__file__).with_name("step_worker.py")
LIMIT = 1e-4
"""Relative difference of loss or gradient norm beyond which the two do not compute the same."""


@dataclass(frozen=True, kw_only=True)
class Settings(Output):
    """A step, and how long it is repeated."""

    against: Annotated[Path, tyro.conf.Positional]
    """A checkout of another version of this project."""
    model: str = "check"
    """A name in ``models.py``, with random weights, or a Hugging Face folder."""
    data: Path | None = None
    """Interactions as `sdpo data prepare` writes them. Default: random tokens."""
    interactions: int = 16
    characters: int = 500
    """The longest of the interactions that are taken from ``data``."""
    objective: tuple[ObjectiveName, ...] = ("reverse_kl", "sampled_token")
    rounds: int = 5
    """At least so many."""
    seconds: float = 20.0
    """Of both, by objective, after their first steps."""


class Worker:
    """A process with one version's packages. It steps when it is told to."""

    def __init__(self, checkout: Path, job: Mapping[str, Any]):
        self.checkout = checkout
        paths = [str(checkout.resolve() / p) for p in (".", "kernels", "parallel")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        # -P: this folder's modules are not the other version's
        command = [sys.executable, "-P", str(WORKER)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=checkout
        )
        self._say(json.dumps(job))

    def step(self) -> dict[str, float]:
        """Loss and gradient norm, and seconds of the process and on the wall.

        Raises:
            RuntimeError: the worker ended; what it said is on stderr.
        """
        self._say("step")
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.checkout}: this version's step failed; see above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


def run(settings: Settings) -> list[dict[str, Any]]:
    """Check, measure, print and write; one row per objective."""
    items = examples(settings)
    about = machine(torch.device("cpu"))
    at = dict(benchmark="step against", model=settings.model, interactions=len(items))
    at |= dict(against=_commit(settings.against), machine=about, verdict="right")
    console = Console(width=150)
    rows = []
    for objective in settings.objective:
        found = compare(settings, items, objective)
        rows.append(at | dict(objective=objective, contender="sdpo") | found)
    settings.keep(rows)
    title = f"{settings.model}, {len(items)} interactions, against {at['against']}"
    title += f": {about['device']}, {about['threads']} threads"
    columns = "before, CPU ms", "now, CPU ms", "before, ms", "now, ms", "now / before", "quartiles"
    table = grid(title, "", *columns)
    for row in rows:
        times = (row["seconds"][name] for name in ("before", "now", "before wall", "now wall"))
        ratio = row["ratio"]
        quartiles = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        table.add_row(
            row["objective"], *map(milliseconds, times), f"{ratio['median']:.3f}", quartiles
        )
    console.print(table)
    return rows


def examples(settings: Settings) -> list[Encoded]:
    """What both versions read.

    Raises:
        ValueError: the data has too few interactions that are short enough.
    """
    if settings.data is None:
        drawn = Random(interactions=settings.interactions, prompt=48, device="cpu")
        sizes = MODELS.get(settings.model) or json.loads(
            Path(settings.model, "config.json").read_text(encoding="utf-8")
        )
        return random_interactions(drawn, sizes["vocab_size"])
    tokenizer = load_tokenizer(settings.model)
    items = []
    for i in read_interactions(str(settings.data)):
        texts = (*(m.content for m in i.prompt), i.response, i.followup)
        if sum(map(len, texts)) <= settings.characters:
            items.append(encode(i, tokenizer, HindsightConfig()))
        if len(items) == settings.interactions:
            return items
    raise ValueError(f"{settings.data}: only {len(items)} of {settings.characters} characters")


def compare(
    settings: Settings, items: list[Encoded], objective: ObjectiveName
) -> dict[str, dict[str, Any]]:
    """Seconds of both and the ratio of their CPU times, round by round."""
    config = MODELS.get(settings.model)
    job = dict(objective=objective, config=config, seed=0)
    job |= dict(model=None if config else str(Path(settings.model).resolve()))
    job |= dict(examples=[[e.policy, e.hindsight, e.response] for e in items])
    with ExitStack() as stack:
        workers = {}
        for name, checkout in (("before", settings.against), ("now", ROOT)):
            workers[name] = Worker(checkout, job)
            stack.callback(workers[name].close)
        _agree({name: worker.step() for name, worker in workers.items()})
        times: dict[str, list[float]] = {f"{n}{w}": [] for n in workers for w in ("", " wall")}
        order = list(workers)
        while len(times["now"]) < settings.rounds or _spent(times) < settings.seconds:
            for name in order:
                found = workers[name].step()
                times[name].append(found["process"])
                times[f"{name} wall"].append(found["wall"])
            order.reverse()
    ratios = [b / a for a, b in zip(times["before"], times["now"], strict=True)]
    seconds = {name: asdict(Spread.of(rounds)) for name, rounds in times.items()}
    return dict(seconds=seconds, ratio=asdict(Spread.of(ratios)))


def _agree(first: dict[str, dict[str, float]]) -> None:
    before, now = first["before"], first["now"]
    for name in ("loss", "gradient"):
        if not abs(now[name] - before[name]) <= LIMIT * abs(before[name]):
            raise ValueError(f"the two steps differ: {name} {before[name]}, now {now[name]}")


def _spent(times: dict[str, list[float]]) -> float:
    return sum(times["before wall"]) + sum(times["now wall"])


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or str(checkout)


if __name__ == "__main__":
    run(tyro.cli(Settings, description=__doc__))
