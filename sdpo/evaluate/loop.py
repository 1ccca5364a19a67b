"""`sdpo train RECIPE …`: a run, and what it is evaluated on meanwhile.

    sdpo train reverse-kl … --evaluate.prompts held_out.txt --evaluate.personas concise \\
        --evaluate.tasks ifeval commonsense_qa --evaluate.every 100

The policy answers held-out prompts and tasks of lm-evaluation-harness before the first step, every
so many steps, and after the last one. A run's losses are the same with and without.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdpo_parallel.huggingface import load_tokenizer

from ..chat import chat_format
from ..errors import SdpoError
from ..hindsight import policy_ids
from ..io.files import sha256, write_text
from ..online.config import BrakeConfig, TasksConfig
from ..online.evaluate import Evaluation, Evaluations, answered, evaluation, tripped
from ..online.prompts import read_prompts
from ..online.run import gone_back
from ..online.sampler import InProcessSampler, SamplingConfig
from ..online.snapshots import GOOD, Snapshot, read_snapshots, remember
from ..online.talk import Brake, first_entropy
from ..online.tasks import asked, data_files
from ..online.users.personas import load_persona
from ..train.command import TrainCommand, parse
from ..train.config import TrainConfig, to_json
from ..train.dry_run import dry_run
from ..train.recipes import RECIPES
from ..train.run_folder import RunFolder
from ..train.trainer import Looked, Trainer, checkpoint_manifest, prepare, to_the_end
from .tasks import Tasks

FREE = ("kind", "brakes", "every", "regression", "batch")
"""Settings that do not change what a policy scores."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig(TasksConfig):
    """What a run is evaluated on while it trains. It needs a copy of the model on each rank."""

    prompts: str | None = None
    """Held-out prompts to answer: ``.txt`` with one in each line, or JSONL or parquet with a
    ``prompt`` in each row."""
    first: int | None = None
    """Take so many of them, from the file's beginning; None: all."""
    personas: tuple[str, ...] = ()
    """Whose rules the answers are held against; the brake on preference goes by the first one."""
    decoding: Literal["greedy", "sampled"] = "greedy"
    """The likeliest answer, or one drawn at temperature 1."""
    max_new_tokens: int = 256
    """Longer answers to prompts are cut; those to tasks are as long as the task says."""
    every: int = 50
    """Steps between evaluations; there is one before the first and after the last step, too. One
    must take less time than safeguard.stall-seconds."""
    batch: int = 16
    """Prompts that a rank answers at a time."""
    brakes: BrakeConfig = field(default_factory=BrakeConfig)

    def __post_init__(self):
        super().__post_init__()
        for name in ("first", "every", "batch", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SdpoError(f"evaluate.{name} must be at least 1, got {value}")
        if self.prompts is None and (self.personas or self.brakes.any):
            raise SdpoError("evaluate.personas and evaluate.brakes need evaluate.prompts")
        if self.brakes.preference_drop is not None and not self.personas:
            raise SdpoError("evaluate.brakes.preference_drop needs evaluate.personas")

    @property
    def any(self) -> bool:
        """Something is evaluated."""
        return self.prompts is not None or bool(self.tasks)

    @property
    def stops(self) -> bool:
        """An evaluation may end the run."""
        return self.brakes.any or self.regression == "stop"


@dataclass(frozen=True)
class Command(TrainCommand):
    """Train a model on interactions."""

    evaluate: LoopConfig = field(default_factory=LoopConfig)


def main(args: Sequence[str] | None = None) -> None:
    """Parse and run."""
    command = parse(args, RECIPES, TrainConfig, Command, "train", evaluate=LoopConfig())
    if command.dry_run:
        if command.evaluate.any:
            print(told(command.evaluate))
        dry_run(command.config, ranks=command.ranks, gpu_memory_gib=command.gpu_memory_gib)
        return
    train(command.config, command.evaluate, resume=command.resume)


def told(config: LoopConfig) -> str:
    """What a run will be evaluated on, and how often, for a dry run.

    Raises:
        SdpoError: the prompts or a task's data cannot be read.
    """
    parts = [asked(config)] if config.tasks else []
    if config.prompts is not None:
        count = len(read_prompts(config.prompts)[: config.first])
        personas = f" ({', '.join(config.personas)})" if config.personas else ""
        parts.insert(0, f"{count:,} prompts of {config.prompts}{personas}")
    when = f"before the first step, every {config.every} steps and after the last"
    return f"evaluated {when}: {'; '.join(parts)}"


def train(config: TrainConfig, evaluate: LoopConfig, *, resume: bool = False) -> Path | None:
    """`sdpo.train.trainer.train`, with evaluations.

    Raises:
        SdpoError: as there; and what is to be evaluated on cannot be used, before the first step;
            or a brake or a regression, after which the export is the last good checkpoint's.
    """
    with RunFolder(config.out, config, resume=resume) as run:
        loop = Loop(evaluate, config) if evaluate.any else None
        trainer = prepare(run)
        if loop is None:
            return to_the_end(trainer)
        loop.begin(trainer)
        try:
            return to_the_end(trainer)
        except Brake as brake:
            export = Path(config.out) / "export"
            resuming = "--resume and other --evaluate.brakes or --evaluate.regression report"
            error = gone_back(trainer.engine, run.path, export, brake, resuming=resuming)
            trainer.engine.close()
        raise error


class Loop:
    """A run's evaluations.

    Raises:
        SdpoError: prompts, personas or tasks cannot be used, or not with this run.
    """

    def __init__(self, config: LoopConfig, run: TrainConfig):
        self.config, self.folder = config, Path(run.out)
        probed = run.safeguard.probe_interactions and config.every % run.safeguard.probe_every == 0
        if config.brakes.max_drift is not None and not probed:
            raise SdpoError(
                "evaluate.brakes.max_drift: safeguard.probe_every must divide evaluate.every"
            )
        self.prompts = read_prompts(config.prompts)[: config.first] if config.prompts else []
        self.personas = [load_persona(name) for name in config.personas]
        if ruleless := [p.name for p in self.personas if p.rule is None]:
            raise SdpoError(
                f"evaluate.personas: {ruleless[0]} has no rule, so that a judge is needed"
            )
        answers = self.folder / "evaluations"
        self.tasks = Tasks(config, answers, config.batch) if config.tasks else None
        self.evaluations = Evaluations(self.folder)
        self.seen: list[Evaluation] = []

    def begin(self, trainer: Trainer) -> None:
        """Look at the policy as it is, where nothing was written down up to here, and from now on
        between the trainer's steps."""
        self.trainer, engine, config = trainer, trainer.engine, self.config
        folder, step = engine.config.model, trainer.state.step
        engine.on_main(self._agree)
        self.tokenizer = load_tokenizer(folder)
        chat = chat_format(self.tokenizer, trainer.config.hindsight.date)
        hindsight = trainer.config.hindsight
        self.ids = [policy_ids(chat, p.messages, hindsight).ids for p in self.prompts]
        sampling = SamplingConfig(max_new_tokens=config.max_new_tokens, batch=config.batch)
        parallel = trainer.config.parallel
        self.sampler = InProcessSampler(sampling, engine, folder, chat, parallel)
        self.seen = engine.on_main(lambda: self.evaluations.read(step))
        tasks = self.tasks
        known = tasks is None or engine.on_main(lambda: tasks.known(step))
        if not known or (self.prompts and not self.seen):
            self._evaluate(step)
        if config.stops:
            self._mind(step)
        trainer.look = self.look

    def look(self, step: int, row: Mapping[str, float]) -> Looked:
        """After a step: evaluate where it is time to, and say whether the run may go on."""
        if step % self.config.every and step != self.trainer.loader.steps:
            return Looked({})
        began = time.perf_counter()
        metrics, why = self._evaluate(step)
        metrics["seconds/evaluate"] = time.perf_counter() - began
        if self.seen:
            first = self.trainer.engine.on_main(lambda: first_entropy(self.folder))
            why = tripped(self.config.brakes, self.seen, row, first) or why
        if why:
            return Looked(metrics, keep=True, why_end=Brake(f"step {step}: {why}"))
        if self.config.stops:
            remember(self.folder, self.trainer.engine, [_good(step)])
        return Looked(metrics, keep=self.config.stops)

    def _agree(self) -> None:
        """Refuse to go on with evaluations of something else. On the main rank."""
        settings = {k: v for k, v in to_json(self.config).items() if k not in FREE}
        prompts, files = self.config.prompts, data_files(self.config.data)
        settings["prompts"] = sha256(prompts) if prompts else None
        settings["data"] = {task: sha256(file) for task, file in files.items()}
        path = self.folder / "evaluations" / "settings.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
        if changed := [name for name in settings if old.get(name) != settings[name]]:
            raise SdpoError(
                f"{path}: the run was evaluated with other {' and '.join(changed)}: use the same, "
                f"or remove {path.parent} and {self.evaluations.path.name} to begin anew"
            )
        write_text(path, json.dumps(settings, indent=2) + "\n")

    def _mind(self, step: int) -> None:
        """See to it that there is a checkpoint to go back to."""
        t, engine = self.trainer, self.trainer.engine
        known = engine.on_main(lambda: read_snapshots(self.folder))
        remember(self.folder, engine, [s for s in known if s.step <= step] or [_good(step)])
        if step == 0 and 0 not in engine.gather(engine.checkpoints.steps())[0]:
            engine.save(0, checkpoint_manifest(t, {}), wait=True)
            engine.restart_optimizer()  # which saving had take an empty step

    def _evaluate(self, step: int) -> tuple[dict[str, float], str | None]:
        """The step's metrics, and which task's score has fallen, where that is to end the run."""
        engine, metrics, why = self.trainer.engine, dict[str, float](), None
        self.sampler.update(engine, step)
        if self.prompts:
            metrics |= self._answer(step).metrics()
        if (tasks := self.tasks) is not None:
            folder = engine.config.model
            scores, why = engine.on_main(lambda: tasks.look(self.sampler, folder, step))
            metrics |= scores
        return metrics, why

    def _answer(self, step: int) -> Evaluation:
        greedy, seeds = self.config.decoding == "greedy", range(len(self.prompts))
        rollouts = self.sampler.sample(self.ids, seeds, greedy=greedy)
        answers = answered(self.prompts, rollouts, self.tokenizer)
        persona = self.personas[0].name if self.personas else ""
        where = {"step": step, "phase": 1, "persona": persona, "decoding": self.config.decoding}
        before = [e for e in self.seen if e.step < step]  # a killed run may have answered already
        self.seen = [*before, evaluation(answers, self.personas, **where)]
        if self.trainer.engine.ranks.is_main:
            self.evaluations.write(self.seen, answers)
        return self.seen[-1]


def _good(step: int) -> Snapshot:
    return Snapshot(name=GOOD, step=step, phase=1, persona="")
