"""The steps of a run that learns while it talks.

    prompts -> answers of the policy as it is -> the user's replies -> guardrails -> interactions

A step is asked for when the update before it has been made, so each one's answers come from the
newest weights; or, where the sampler is elsewhere and may lag behind, from weights that are so many
updates older, and the next ones are under way while this one trains. What was said is written down
before it is trained on; a run that goes on after a kill takes what it finds written instead of
asking again.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sdpo_parallel.engine import Engine
from sdpo_parallel.huggingface import read_config

from ..chat import ChatFormat
from ..data.filters.injections import injection
from ..errors import SdpoError
from ..hindsight import policy_ids
from ..train.loader import Packer, Step
from ..train.run_folder import read_metrics
from ..train.trainer import Looked, RunState
from .config import OnlineConfig, Phase
from .evaluate import (
    Answer,
    Evaluation,
    Evaluations,
    answered,
    evaluation,
    text_of,
    tripped,
)
from .measures import leaks
from .prompts import Order, Prompt
from .record import Record, read_update, write_update
from .sampler import RemoteSampler, Rollout, Sampler
from .snapshots import (
    END,
    GOOD,
    Snapshot,
    attempts,
    read_snapshots,
    remember,
    write_snapshots,
)
from .tasks import Tasks
from .users.base import Exchange, Reply, User
from .users.personas import Persona


class Brake(SdpoError):
    """An evaluation that a run must not go on from."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """An update's phase (from 1), and its number in it (from 0)."""

    phase: int
    number: int
    is_last: bool


def place_of(schedule: Sequence[Phase], update: int) -> Place:
    """Where an update (from 1) is."""
    before = 0
    for index, phase in enumerate(schedule, start=1):
        if update <= before + phase.updates:
            number = update - before - 1
            return Place(phase=index, number=number, is_last=number == phase.updates - 1)
        before += phase.updates
    raise ValueError(f"update {update} is beyond the schedule's {before}")


def due(config: OnlineConfig, update: int) -> bool:
    """The policy is evaluated after an update."""
    return update % config.evaluate.every == 0 or place_of(config.schedule, update).is_last


class Said(NamedTuple):
    """What was said in an update, and when: seconds of one clock."""

    records: list[Record]
    began: float
    sampled: float
    ended: float
    idle: float
    """Seconds that the sampler had nothing to do before."""


@dataclass
class Talk:
    """The steps of an online run: see the module's text.

    Args:
        folder: the run's.
        state: where the run is; the trainer moves it on.
        personas: one for each phase.
        users: one for each phase on the main rank, where nothing is replayed.
        sampler, held_out, tasks: None, empty and None where a recording is replayed.
    """

    config: OnlineConfig
    folder: Path
    engine: Engine
    state: RunState
    packer: Packer
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    sampler: Sampler | None
    personas: Sequence[Persona]
    users: Sequence[User]
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    tasks: Tasks | None = None

    def __post_init__(self):
        self.schedule, self.steps = self.config.schedule, self.config.updates
        self.order = Order(len(self.prompts), self.config.batch.seed)
        self.evaluations = Evaluations(self.folder)
        self.seen: list[Evaluation] = []
        self.first_entropy, self.attempt, self.sampled = 0.0, 0, 0.0
        self.asked: dict[int, Future[Said]] = {}
        self.pool = ThreadPoolExecutor(1)
        self.vocabulary: int = read_config(self.config.model)["vocab_size"]

    def __iter__(self) -> Iterator[Step]:
        while self.state.step < self.steps:
            yield self._step(self.state.step + 1)

    # One update

    def _step(self, update: int) -> Step:
        place = place_of(self.schedule, update)
        if place.number == 0 and update > 1 and self.config.phase_optimizer == "restart":
            self.engine.restart_optimizer()
        records, seconds = self._records(update, place)
        self.state.cursor.consumed = update * self.config.batch.interactions_per_step
        self._check_agreement(records)
        step = self.packer.pack([r.interaction() for r in records if r.dropped is None])
        metrics = told(records) | seconds | {"phase": place.phase}
        return replace(step, metrics=metrics)

    def _records(self, update: int, place: Place) -> tuple[list[Record], dict[str, float]]:
        """Those that are written down, or new ones."""
        source = Path(self.config.replay or self.folder)
        found = self.engine.on_main(
            lambda: None if update in self.asked else read_update(source, update)
        )
        if found is not None:
            return found, {}
        if self.sampler is None:
            raise SdpoError(f"{source}: no recorded update {update}; is the run whole?")
        began = time.perf_counter()
        if self.sampler.version != update - 1:
            self.sampler.update(self.engine, update - 1)
        synced = time.perf_counter()
        if isinstance(self.sampler, RemoteSampler):
            said = self.engine.on_main(lambda: self._ahead(update))
        else:
            said = self._said(update, self.sampler.sample, self.engine.on_main)
        now = time.perf_counter()
        seconds = {
            "seconds/sync": synced - began,
            "seconds/rollouts": said.sampled - said.began,
            "seconds/user": said.ended - said.sampled,
            "seconds/learner_idle": now - synced,
            "seconds/sampler_idle": said.idle,
        }
        return said.records, seconds

    def _ahead(self, update: int) -> "Said":
        """An update's records, asked for as early as the bound lets; so are later ones. On the main
        rank."""
        self._ask(update)
        return self.asked.pop(update).result()

    def _ask(self, update: int) -> None:
        sampler = self.sampler
        assert isinstance(sampler, RemoteSampler)
        for later in range(update, min(update + sampler.staleness, self.steps) + 1):
            if later not in self.asked and read_update(self.folder, later) is None:
                work = self.pool.submit(self._said, later, sampler.answers, lambda make: make())
                self.asked[later] = work

    def ask(self) -> None:
        """Have the next update's answers given while others train; the engine has its weights."""
        update = self.state.step + 1
        if isinstance(self.sampler, RemoteSampler) and update <= self.steps:
            if self.sampler.version != update - 1:
                self.sampler.update(self.engine, update - 1)
            self.engine.on_main(lambda: self._ask(update))

    def _said(self, update: int, answer: Any, on_main: Any) -> "Said":
        """Prompts, answers, replies, written down.

        Args:
            answer: the sampler's method.
            on_main: `Engine.on_main`, or on the main rank alone a call.
        """
        began = time.perf_counter()
        place = place_of(self.schedule, update)
        prompts = [self.prompts[i] for i in self._places(update, place)]
        seeds = [self._seed(update, slot) for slot in range(len(prompts))]
        rollouts = answer(self._ids(prompts), seeds)
        sampled, idle = time.perf_counter(), began - (self.sampled or began)
        records = on_main(lambda: self._answered(update, place, prompts, rollouts))
        self.sampled = sampled
        return Said(records, began, sampled, time.perf_counter(), idle)

    def _answered(
        self, update: int, place: Place, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]
    ) -> list[Record]:
        """What the user says to each answer, written down. On the main rank."""
        user = self.users[place.phase - 1]
        exchanges = [
            Exchange(
                id=f"{update:06d}.{slot:04d}",
                prompt=prompt.messages,
                answer=text_of(rollout, self.tokenizer),
                finished=rollout.finished,
            )
            for slot, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True))
        ]
        replies = user.reply(exchanges, seed=self._seed(update, -1) % 2**31)
        replies = [replace(r, text=None if r.text is None else as_utf8(r.text)) for r in replies]
        records = [
            self._record(update, place, *row)
            for row in zip(prompts, exchanges, rollouts, replies, strict=True)
        ]
        write_update(self.folder, update, records)
        return records

    def _record(
        self,
        update: int,
        place: Place,
        prompt: Prompt,
        exchange: Exchange,
        rollout: Rollout,
        reply: Reply,
    ) -> Record:
        persona = self.personas[place.phase - 1]
        judged = exchange.answer, exchange.finished
        known = persona.rule is not None
        return Record(
            id=exchange.id,
            update=update,
            phase=place.phase,
            persona=persona.name,
            prompt_id=prompt.id,
            prompt=prompt.messages,
            answer=exchange.answer,
            followup=reply.text,
            token_ids=rollout.token_ids,
            logprobs=rollout.logprobs,
            finished=rollout.finished,
            versions=rollout.versions,
            reply_source=reply.source,
            dropped=why_dropped(self.config, exchange, reply),
            satisfied=persona.satisfied(*judged) if known else None,
            score=persona.score(*judged) if known else None,
        )

    def _places(self, update: int, place: Place) -> list[int]:
        count = self.config.batch.interactions_per_step
        number = place.number if self.config.phase_prompts == "repeat" else update - 1
        return self.order.take(number * count, count)

    def _seed(self, update: int, slot: int) -> int:
        """Of everything random in an update; other ones after the run has gone back."""
        key = [self.config.batch.seed, self.attempt, update, slot + 1]
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])

    def _ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """As the policy will read them in training."""
        config, thought = self.packer.hindsight, bool(self.packer.sampled_thought)
        return [policy_ids(self.chat, p.messages, config, thought=thought).ids for p in prompts]

    def _check_agreement(self, records: Sequence[Record]) -> None:
        """A recording's answers are of a model with this vocabulary."""
        for record in records:
            if (largest := max(record.token_ids)) >= self.vocabulary:
                raise SdpoError(
                    f"{record.id}: token {largest} is beyond the model's vocabulary of "
                    f"{self.vocabulary}: the recording is of another model"
                )

    def close(self) -> None:
        """Let what is under way come to its end, and go."""
        self.pool.shutdown(cancel_futures=True)
        for user in self.users:
            user.close()
        if self.sampler is not None:
            self.sampler.close()

    # Between updates

    def first_answers(self) -> list[Answer]:
        """What the policy answers to the held-out prompts before its first update. To be called
        before the run goes on from a checkpoint."""
        if not self.engine.on_main(lambda: self.evaluations.read(0)):
            self._evaluate(0)
        return self.engine.on_main(lambda: self.evaluations.answers_at(0))

    def first_scores(self) -> None:
        """What the policy scores on tasks before its first update. To be called before the run goes
        on from a checkpoint."""
        if (tasks := self.tasks) is not None and not self.engine.on_main(lambda: tasks.known(0)):
            self._scores(tasks, 0)

    def resumed(self) -> None:
        """The run is where its newest checkpoint is."""
        step = self.state.step
        self.seen = self.engine.on_main(lambda: self.evaluations.read(step))
        self.attempt = self.engine.on_main(lambda: attempts(self.folder))
        self.first_entropy = (
            self.engine.on_main(lambda: first_entropy(self.folder)) if step else 0.0
        )
        snapshots = self.engine.on_main(lambda: read_snapshots(self.folder))
        ends = [s for s in snapshots if s.name == END and s.step == step < self.steps]
        if ends:  # phases were added: what was the end is where the next one begins
            snapshots = [s for s in snapshots if s.name != END]
            snapshots.append(self._begins(step, place_of(self.schedule, step + 1).phase))
            self.engine.on_main(lambda: write_snapshots(self.folder, snapshots))
        self.engine.checkpoints.pinned = {s.step for s in snapshots}

    def look(self, step: int, row: Mapping[str, float]) -> Looked:
        """After an update: evaluate where it is time to, keep snapshots, and see to the brakes."""
        self.first_entropy = self.first_entropy or _entropy(row)
        if why := self._apart(row):
            return Looked({}, why_end=why)
        place = place_of(self.schedule, step)
        metrics: dict[str, float] = {}
        if due(self.config, step) and (self.held_out or self.tasks is not None):
            began = time.perf_counter()
            metrics, why = self._all(step, row)
            metrics["seconds/evaluate"] = time.perf_counter() - began
            if why:
                return Looked(metrics, keep=True, why_end=Brake(f"update {step}: {why}"))
        elif not place.is_last:
            return Looked({})
        self._keep(step, place)
        return Looked(metrics, keep=True)

    def _all(self, step: int, row: Mapping[str, float]) -> tuple[dict[str, float], str | None]:
        """Metrics of all that is evaluated, and why the run must go back."""
        assert self.sampler is not None
        self.sampler.update(self.engine, step)
        metrics, why, fallen = dict[str, float](), None, None
        if self.held_out:
            metrics |= self._evaluate(step).metrics()
            why = tripped(self.config.brakes, self.seen, row, self.first_entropy)
        if self.tasks is not None:
            scores, fallen = self._scores(self.tasks, step)
            metrics |= scores
        return metrics, why or fallen

    def _scores(self, tasks: Tasks, step: int) -> tuple[dict[str, float], str | None]:
        sampler, folder = self.sampler, self.config.model
        assert sampler is not None
        return self.engine.on_main(lambda: tasks.look(sampler, folder, step))

    def _evaluate(self, step: int) -> Evaluation:
        assert self.sampler is not None
        place = place_of(self.schedule, max(step, 1))
        greedy = self.config.evaluate.decoding == "greedy"
        seeds = [self._seed(0, slot) for slot in range(len(self.held_out))]
        rollouts = self.sampler.sample(self._ids(self.held_out), seeds, greedy=greedy)
        answers = answered(self.held_out, rollouts, self.tokenizer)
        personas = {persona.name: persona for persona in self.personas}
        now = evaluation(
            answers,
            list(personas.values()),
            step=step,
            phase=place.phase,
            persona=self.personas[place.phase - 1].name,
            decoding=self.config.evaluate.decoding,
        )
        self.seen.append(now)
        if self.engine.ranks.is_main:
            self.evaluations.write(self.seen, answers)
        return now

    def _keep(self, step: int, place: Place) -> None:
        """Name the checkpoint that is about to be written."""
        phase, persona = place.phase, self.schedule[place.phase - 1].persona
        named = [Snapshot(name=GOOD, step=step, phase=phase, persona=persona)]
        if step == self.steps:
            named.append(Snapshot(name=END, step=step, phase=phase, persona=persona))
        elif place.is_last:
            named.append(self._begins(step, phase + 1))
        remember(self.folder, self.engine, named)

    def _begins(self, step: int, phase: int) -> Snapshot:
        """Of where a phase begins."""
        persona = self.schedule[phase - 1].persona
        return Snapshot(name=f"phase-{phase}", step=step, phase=phase, persona=persona)

    def _apart(self, row: Mapping[str, float]) -> SdpoError | None:
        """The sampler's log-probabilities are not the trainer's."""
        sampling = self.config.sampling
        gap, limit = row.get("sampler/gap"), sampling.max_gap
        if gap is None or limit is None or not sampling.from_policy or gap <= limit:
            return None
        if self.sampler is None or row["rollouts/staleness"]:  # another policy's answers
            return None
        return SdpoError(
            f"the sampler's log-probabilities are {gap:.3f} nats from the trainer's in the mean, "
            f"beyond sampling.max_gap {limit}: do both have the same weights, prompt and dtype?"
        )


def why_dropped(config: OnlineConfig, exchange: Exchange, reply: Reply) -> str | None:
    """Why an exchange is not trained on; None: it is."""
    guard, text = config.guard, reply.text
    if text is None or not text.strip():
        return "silence"
    if not exchange.answer:
        return "blank answer"
    if guard.cut_answers == "mask" and not exchange.finished:
        return "cut answer"
    if guard.max_followup_chars and len(text) > guard.max_followup_chars:
        return "long follow-up"
    if guard.injections == "drop" and (found := injection(text)):
        return f"injection: {found}"
    return None


def told(records: Sequence[Record]) -> dict[str, float]:
    """Metrics of what was said in an update."""
    reasons = Counter((r.dropped or "").partition(":")[0] for r in records)
    judged = [r.satisfied for r in records if r.satisfied is not None]
    metrics = {
        "rollouts/finished": fmean(r.finished for r in records),
        "rollouts/words": fmean(len(r.answer.split()) for r in records),
        "rollouts/leaks": fmean(leaks(r.answer) for r in records),
        "rollouts/staleness": fmean(r.update - 1 - r.version for r in records),
        "user/silent": reasons.pop("silence", 0) / len(records),
        "user/injections": reasons.pop("injection", 0) / len(records),
        "user/dropped": (sum(reasons.values()) - reasons[""]) / len(records),
    }
    return metrics | ({"user/satisfied": fmean(judged)} if judged else {})


def first_entropy(folder: Path) -> float:
    """The policy's entropy in the first update of a run that anything was said in; 0: in none."""
    return next(filter(None, map(_entropy, read_metrics(folder))), 0.0)


def _entropy(row: Mapping[str, float]) -> float:
    """Of the policy in an update; 0: nothing was trained on in it, or it was not finite."""
    entropy = row["entropy/policy"]  # null in a file where it was not finite
    return entropy if entropy and math.isfinite(entropy) else 0.0


def as_utf8(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON can bring in and neither
    files nor tokenizers take."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
