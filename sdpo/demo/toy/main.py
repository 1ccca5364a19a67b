"""`sdpo demo --world toy`: the method on a tiny chat world, through the commands of a cluster.

A tiny chat model is pre-trained, and users with a preference talk to it. Their log is prepared,
validated, inspected, scored and trained on with torchrun and FSDP2, and the export is evaluated.
Then the users change their mind, and the same happens again. Finally a conversation is traced to
the checkpoints that have read it. Writes report.json and report.html.
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from transformers.utils.logging import disable_progress_bar

from ...analysis.conditions import Case, write_cases
from ...cli import main as sdpo
from ...conversations import Message
from ...hindsight import hindsight_prompt
from ...interactions import iter_interactions, read_interactions
from ...train.run_folder import read_metrics
from ..folder import make_room
from ..phases import Phases
from . import report as reports
from . import world
from .evaluate import Chat, Scores, evaluate, sample_answers
from .pretrain import pretrain
from .users import simulate_logs

TEMPLATE = "paper-offline"
CONVERSATIONS = 1024
"""Conversations in each round of users."""
PROMPTS = 400
"""Held-out prompts sampled for each rate."""
SHOWN = 4
"""Interactions and answers shown in the report."""


def hindsight(messages: list[world.Message], followup: str) -> list[world.Message]:
    """Put a follow-up into a prompt as production does, on the world's own messages."""
    prompt = [Message(**m) for m in messages]
    return [asdict(m) for m in hindsight_prompt(prompt, followup, TEMPLATE)]


class Demo(Phases):
    """One run of the demo in its folder."""

    def __init__(self, folder: Path, seed: int, preference: str, objective: str):
        self.folder, self.seed, self.objective = folder, seed, objective
        self.likes = {"first": preference}
        self.likes["second"] = next(s for s in world.STYLES if s != preference)
        super().__init__()

    def run(self) -> dict:
        """Run all phases; returns the report."""
        base = self.folder / "base"
        with self.phase("pre-training"):
            pretrain(base, seed=self.seed, hindsight=hindsight)
        scores = {"before": self._evaluate(base)}
        with self.phase("logs"):
            data = self._logs(base, "first")
        with self.phase("signal"):
            signal, shown = self._signal(base, data)
        with self.phase("training"):
            first = self._train(base, data, "first")
        scores["after"] = self._evaluate(first)
        with self.phase("logs"):
            data = self._logs(first, "second")
        with self.phase("training"):
            second = self._train(first, data, "second")
        scores["after_change_of_mind"] = self._evaluate(second)
        with self.phase("trace"):
            self._trace("first")

        folders = {"before": base, "after": first, "after_change_of_mind": second}
        report = self._report(scores, signal, folders)
        trajectories = {
            f"likes {style}": read_metrics(self.folder / f"train-{which}")
            for which, style in self.likes.items()
        }
        reports.write(self.folder, report, trajectories, shown)
        reports.print_table(report, self.console)
        self.console.print(f"{self.folder}/report.html", soft_wrap=True)
        return report

    def _logs(self, model: Path, which: str) -> Path:
        """Users talk to ``model``; returns the interactions prepared from their log."""
        log = self.folder / f"log-{which}.parquet"
        likes = self.likes[which]
        simulate_logs(model, log, preference=likes, n_conversations=CONVERSATIONS, seed=self.seed)
        out = self.folder / f"interactions-{which}.jsonl"
        page = str(out.with_suffix(".html"))
        sdpo(["data", "prepare", str(log), "--preset", "paper-wildchat", "--out", str(out)])
        sdpo(["data", "validate", str(out), "--model", str(model)])
        sdpo(["data", "inspect", str(out), "--tokenizer", str(model), "--html", page])
        return out

    def _train(self, model: Path, data: Path, which: str) -> Path:
        """Train on two gloo ranks under FSDP2; returns the exported folder."""
        out = self.folder / f"train-{which}"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        recipe = {"reverse-kl": "demo", "sampled-token": "demo-sampled-token"}[self.objective]
        names = ["--model", str(model), "--data", str(data), "--out", str(out)]
        argv = [sys.executable, *launch, "-m", "sdpo.train", recipe, *names]
        subprocess.run(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return out / "export"

    def _signal(self, model: Path, data: Path) -> tuple[dict[str, float], dict]:
        """Mean |advantage| under users' corrections and under irrelevant follow-ups in their place;
        and the first follow-ups of both kinds with their signals."""
        judged = ["--model", str(model), "--interactions", str(data)]
        try:
            sdpo(["check-hindsight", *judged])
        except SystemExit as verdict:
            self.makes_use_of_hindsight = not verdict.code
        sdpo(["data", "score", *judged, "--out", str(self.folder / "scores.jsonl")])
        rng = random.Random(self.seed)
        relevant = [i for i in read_interactions(data) if world.is_correction(i.followup)]
        irrelevant = [world.draw_irrelevant(rng) for _ in relevant]
        pairs = zip(relevant, irrelevant, strict=True)
        file, out = self.folder / "followups.jsonl", self.folder / "signal.jsonl"
        write_cases(file, (Case(interaction=i, followups={"irrelevant": o}) for i, o in pairs))
        files = ["--model", str(model), "--interactions", str(file), "--out", str(out)]
        files += ["--json", str(out.with_suffix(".json")), "--figure", str(out.with_suffix(".svg"))]
        limits = ["--max-prompt-tokens", "256", "--max-hindsight-prompt-tokens", "256"]
        sdpo(["signal", *files, *limits, "--template", TEMPLATE, "--show", str(SHOWN)])
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        means, shown = {}, {}
        for kind, condition in (("relevant", "own"), ("irrelevant", "irrelevant")):
            under = [row["conditions"][condition] for row in rows]
            values = [abs(a) for one in under for a in one["advantage"]]
            means[kind] = sum(values) / len(values)
            pairs = zip(rows[:SHOWN], under, strict=False)
            shown[kind] = [(u["followup"], row | {"advantage": u["advantage"]}) for row, u in pairs]
        means["irrelevant_over_relevant"] = means["irrelevant"] / means["relevant"]
        return means, shown

    def _trace(self, which: str) -> None:
        """Show which checkpoints have read the first conversation of a log."""
        data = self.folder / f"interactions-{which}.jsonl"
        first = next(iter_interactions(data)).id
        sdpo(["data", "trace", first, "--data", str(data), "--runs", str(self.folder)])

    def _evaluate(self, folder: Path) -> Scores:
        with self.phase("evaluation"):
            likes = self.likes["first"]
            return evaluate(
                Chat(folder), style=likes, hindsight=hindsight, n=PROMPTS, seed=self.seed
            )

    def _report(self, scores: dict[str, Scores], signal: dict, folders: dict[str, Path]) -> dict:
        before = scores["before"]
        later = [scores["after"], scores["after_change_of_mind"]]
        drop = before.hindsight_following - min(s.hindsight_following for s in later)
        samples = {
            when: sample_answers(Chat(f), n=SHOWN, seed=self.seed) for when, f in folders.items()
        }
        return {
            "seed": self.seed,
            "objective": self.objective,
            "preference": self.likes["first"],
            "prompts_per_rate": PROMPTS,
            "makes_use_of_hindsight": self.makes_use_of_hindsight,
            "preference_rate": {when: s.preference for when, s in scores.items()},
            "signal": signal,
            "retention": {
                "hindsight_following": {w: s.hindsight_following for w, s in scores.items()},
                "other_tasks": {w: s.other_tasks for w, s in scores.items()},
                "hindsight_following_drop": drop,
                "other_tasks_drop": before.other_tasks - min(s.other_tasks for s in later),
            },
            "collapsed": drop > reports.COLLAPSE,
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
            "samples": [
                {"question": question, **{when: samples[when][i][1] for when in samples}}
                for i, (question, _) in enumerate(samples["before"])
            ],
        }


def command(
    *,
    out: str = "runs/demo-toy",
    seed: int = 0,
    preference: Literal["terse", "friendly"] = "terse",
    objective: Literal["reverse-kl", "sampled-token"] = "reverse-kl",
) -> None:
    """Align a tiny chat model from its users' conversations, on any machine, in minutes.

    The exit status is 1 if a target of the table is missed.

    Args:
        out: folder of the demo; an earlier demo there is replaced.
        seed: random seed of the world, its users and the model.
        preference: style that the users like before they change their mind.
        objective: sampled-token is the paper's; with a live teacher it may collapse here.
    """
    disable_progress_bar()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same demo everywhere: two gloo ranks, float32
    torch.set_num_threads(1)  # tensors this small gain little from more, and nothing when busy
    make_room(Path(out))
    report = Demo(Path(out), seed, preference, objective).run()
    raise SystemExit(0 if reports.all_met(report) else 1)
