"""`sdpo demo`: the whole method on a real model, through the commands that a cluster runs.

SmolLM2-135M-Instruct talks to users who want one thing and say so only in their next message. Their
log is prepared, validated and inspected, and the signal of their follow-ups is read. Then the model
learns while it talks, online, on two gloo ranks under torchrun; after some updates the users change
their mind, and it goes on learning. What became of it is measured on questions of no training.
Writes report.json and report.html.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from threading import Thread
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from sdpo_parallel.huggingface import resolve_model

from ..analysis.signal import Signal
from ..conversations import Message
from ..errors import SdpoError
from ..interactions import read_interactions, write_interactions
from ..io.files import write_text
from ..online import recipes
from ..online.users.base import Exchange
from ..online.users.by_rule import REMARKS
from ..online.users.config import build_user
from ..online.users.personas import load_persona
from . import report as reports
from .folder import make_room
from .measure import Measured, as_json, measure
from .phases import Phases
from .prompts import HELD_OUT, held_out_prompts, training_prompts
from .run import curve
from .smollm2 import NAME, smollm2
from .talk import Answer, Talker

SIGNALS = 6
"""Interactions whose signal is read."""
SHOWN, SHOWN_SIGNALS = 8, 3
"""Questions, and follow-ups of each kind, in the report."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of a demo."""

    out: str = "runs/demo"
    """Folder of the demo; an earlier demo there is replaced."""
    seed: int = 0
    """Random seed of the users and of all that is sampled."""
    model: str | None = None
    """Hugging Face folder, or name on the hub; None: SmolLM2-135M-Instruct."""
    updates: int | None = None
    """Updates with users of either kind; None: as many as the recipe says."""
    answers: int | None = None
    """Answers to learn from in an update; None: as many as the recipe says."""
    max_tokens: int | None = None
    """Longest answer in tokens; None: as the recipe says."""
    questions: int = HELD_OUT
    """Held-out questions to measure with, at most 64."""
    conversations: int = 12
    """Conversations in the users' log, before any training."""

    def __post_init__(self):
        if not 1 <= self.questions <= HELD_OUT or self.conversations < 1:
            raise SdpoError(f"questions must be 1 to {HELD_OUT}, and conversations at least 1")
        if any(n is not None and n < 1 for n in (self.updates, self.answers, self.max_tokens)):
            raise SdpoError("updates, answers and max_tokens must be at least 1")


class Demo(Phases):
    """One run of the demo in its folder."""

    def __init__(self, config: DemoConfig):
        self.config, self.folder = config, Path(config.out)
        self.questions = held_out_prompts()[: config.questions]
        self.recipe = recipes.demo(model="", prompts="")
        self.max_tokens = config.max_tokens or self.recipe.sampling.max_new_tokens
        first, second = self.recipe.schedule
        self.personas = first.persona, second.persona
        self.updates = tuple(config.updates or phase.updates for phase in (first, second))
        super().__init__()

    def run(self) -> dict[str, Any]:
        """Run all parts; returns the report."""
        with self.phase("model"):
            base = resolve_model(self.config.model) if self.config.model else smollm2()
        with self.phase("users' log"):
            interactions = self._log(base)
        with self.phase("signal"), ThreadPoolExecutor(1) as aside:
            page = aside.submit(self._inspect, base, interactions)
            means, signals = self._signal(base, interactions)
            page.result()
        with self.phase("training"):
            models = {"before": base, **self._train(base)}
        with self.phase("measuring"):
            measured = measure(
                models,
                self.questions,
                self.personas,
                seed=self.config.seed,
                max_tokens=self.max_tokens,
                temperature=self.recipe.sampling.temperature,
                hindsight=self.recipe.hindsight,
            )
        report = self._report(base, measured, means)
        reports.write(self.folder, report, curve(self.folder / "run", self.personas), signals)
        reports.print_report(report, self.console)
        self.console.print(f"{self.folder}/report.html", soft_wrap=True)
        return report

    def _log(self, model: str) -> Path:
        """Users of the first kind talk to the model; returns the interactions of their log."""
        questions = training_prompts()[: self.config.conversations]
        how = {"max_tokens": self.max_tokens, "temperature": self.recipe.sampling.temperature}
        answers = Talker(model).answer(questions, seed=self.config.seed, **how)
        rows = []
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            said = [("user", question), ("assistant", answer.text)]
            if reply := self._reply(self.personas[0], f"talk-{i}", question, answer):
                said.append(("user", reply))
            messages = [{"role": role, "content": content} for role, content in said]
            rows.append({"id": f"talk-{i}", "messages": messages})
        log, out = self.folder / "log.parquet", self.folder / "interactions.jsonl"
        pq.write_table(pa.Table.from_pylist(rows), log)
        sdpo("data", "prepare", log, "--out", out)
        sdpo("data", "validate", out, "--model", model)
        return out

    def _inspect(self, model: str, interactions: Path) -> None:
        """Make a page of the interactions, and print nothing."""
        page = self.folder / "interactions.html"
        argv = ["data", "inspect", interactions, "--tokenizer", model, "--html", page]
        python("sdpo", *argv, stdout=subprocess.DEVNULL)

    def _reply(self, persona: str, id: str, question: str, answer: Answer) -> str | None:
        """What a user says to an answer, if anything."""
        user = build_user(self.recipe.user, load_persona(persona), folder=self.folder)
        prompt = (Message("user", question),)
        seen = Exchange(id=id, prompt=prompt, answer=answer.text, finished=answer.finished)
        (reply,) = user.reply([seen], seed=self.config.seed)
        return reply.text

    def _signal(
        self, model: str, data: Path
    ) -> tuple[dict[str, float], dict[str, list[tuple[str, Signal]]]]:
        """Mean |advantage| under what users said and under remarks about something else in its
        place; and some follow-ups of each kind with their signals."""
        said = read_interactions(data)[:SIGNALS]
        rng = random.Random(self.config.seed)
        others = [replace(i, id=f"{i.id}-other", followup=rng.choice(REMARKS)) for i in said]
        file, out = self.folder / "followups.jsonl", self.folder / "signal.jsonl"
        write_interactions(file, [*said, *others])
        limits = ["--template", self.recipe.hindsight.template, "--show", 2]
        sdpo("signal", "--model", model, "--interactions", file, "--out", out, *limits)
        rows: list[Signal] = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        kinds = {"what users said": rows[: len(said)], "other remarks": rows[len(said) :]}
        means = {k: fmean(abs(a) for row in r for a in row["advantage"]) for k, r in kinds.items()}
        followups = {i.id: i.followup for i in (*said, *others)}
        shown = {
            kind: [(followups[row["id"]], row) for row in rows[:SHOWN_SIGNALS]]
            for kind, rows in kinds.items()
        }
        return means, shown

    def _train(self, model: str) -> dict[str, str]:
        """Learn online on two gloo ranks; returns the folders of the trained models."""
        prompts, run = self.folder / "prompts.txt", self.folder / "run"
        write_text(prompts, "".join(f"{prompt}\n" for prompt in training_prompts()))
        launch = ["--standalone", "--nproc_per_node=2", "-m", "sdpo.online", "demo"]
        names = ["--model", model, "--prompts", prompts, "--out", run]
        phases = [f"{p}:{n}" for p, n in zip(self.personas, self.updates, strict=True)]
        per_step = self.config.answers or self.recipe.batch.interactions_per_step
        batch = ["--batch.seed", self.config.seed, "--batch.interactions-per-step", per_step]
        # whole weights on each rank: over gloo, gathering shards would take longer than computing
        batch += ["--parallel.replicate", 2]
        # what is measured afterwards is measured on more questions
        batch += ["--sampling.max-new-tokens", self.max_tokens]
        quickly = ["--evaluate.prompts", 0, "--checkpoint.interval", sum(self.updates)]
        quickly += ["--checkpoint.export-dtype", "float32"]
        python("torch.distributed.run", *launch, *names, "--phases", *phases, *batch, *quickly)
        after = self.folder / "after"
        sdpo("export", run, "--out", after, "--step", self.updates[0], "--dtype", "float32")
        # gigabytes, which the exports stand for; a disk takes its time to forget them
        Thread(target=shutil.rmtree, args=[run / "checkpoints"]).start()
        return {"after": str(after), "changed": str(run / "export")}

    def _report(
        self, model: str, measured: dict[str, Measured], signal: dict[str, float]
    ) -> dict[str, Any]:
        values = {when: as_json(m) for when, m in measured.items()}
        return {
            "seed": self.config.seed,
            "model": {
                "name": Path(self.config.model or NAME).name,
                "folder": model,
                "parameters": parameters(model),
            },
            "personas": list(self.personas),
            "updates": dict(zip(self.personas, self.updates, strict=True)),
            "answers": self.config.answers or self.recipe.batch.interactions_per_step,
            "questions": len(self.questions),
            "temperature": self.recipe.sampling.temperature,
            "max_tokens": self.max_tokens,
            **reports.summary(values, self.personas[0]),
            "measured": values,
            "table": reports.table(values, self.personas),
            "signal": signal,
            "samples": self._samples(measured),
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
        }

    def _samples(self, measured: dict[str, Measured]) -> list[dict[str, Any]]:
        """Questions with each model's answers, and what the user of that time says to them."""
        first, second = self.personas
        there = {"before": first, "after": first, "changed": second}

        def said(when: str, decoding: str, i: int) -> dict[str, Any]:
            answer: Answer = getattr(measured[when], decoding).answers[i]
            id, question = f"{when}-{decoding}-{i}", self.questions[i]
            return {
                "answer": answer.text,
                "finished": answer.finished,
                "pleased": load_persona(there[when]).satisfied(answer.text, answer.finished),
                "reply": self._reply(there[when], id, question, answer),
            }

        return [
            {"question": question}
            | {d: {when: said(when, d, i) for when in measured} for d in reports.DECODINGS}
            for i, question in enumerate(self.questions[:SHOWN])
        ]


def command(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Let a real model learn from its users while it talks to them, on any machine, in minutes.

    With ``--world toy`` it is a tiny chat world instead, whose flags are its own: ``sdpo demo
    --world toy --help``. The exit status is 1 if a target of the table is missed.
    """
    disable_progress_bar()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same demo everywhere: two gloo ranks, float32
    torch.set_num_threads(1)
    make_room(Path(config.out))
    raise SystemExit(0 if reports.all_met(Demo(config).run()) else 1)


def sdpo(*args: object) -> None:
    """Run a command of ours in a process of its own."""
    python("sdpo", *args)


def python(module: str, *args: object, stdout: int | None = None) -> None:
    """Run a module in a process of its own, with one thread.

    Args:
        stdout: `subprocess.DEVNULL`: what it prints is not shown.

    Raises:
        SystemExit: it fails, with its status.
    """
    argv = [sys.executable, "-m", module, *map(str, args)]
    result = subprocess.run(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=stdout)
    if result.returncode:
        raise SystemExit(result.returncode)


def parameters(folder: str) -> int:
    """Number of a model's weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(weight.numel() for weight in model.parameters())
