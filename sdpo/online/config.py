"""Settings of a run that learns while it talks."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sdpo_parallel.config import EMA

from ..errors import SdpoError
from ..objective import SampledToken
from ..train.config import RunConfig
from .sampler import SamplingConfig
from .serving.config import VLLM, AnySampler, InProcess
from .users.config import AnyUser, RuleUser


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of a run during which one persona answers."""

    persona: str
    updates: int


def parse_phase(text: str) -> Phase:
    """``PERSONA:UPDATES``, such as ``concise:12``; the persona is a name or a file.

    Raises:
        SdpoError: it is not of that form.
    """
    persona, _, updates = text.rpartition(":")
    if not persona or not updates.isdecimal() or not int(updates):
        raise SdpoError(f"phase {text!r}: expected PERSONA:UPDATES, such as concise:12")
    return Phase(persona=persona, updates=int(updates))


def parse_user(text: str) -> tuple[str, tuple[str, ...]]:
    """``NAME=PERSONA:UPDATES,…``: the name and the phases.

    Raises:
        SdpoError: it is not of that form, or the name is none for a folder.
    """
    name, _, phases = text.partition("=")
    if not re.fullmatch(r"\w[\w.@-]{0,63}", name):
        raise SdpoError(f"user {text!r}: expected NAME=PERSONA:UPDATES, such as alice=concise:12")
    found = tuple(phases.split(","))
    for phase in found:
        parse_phase(phase)
    return name, found


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which follow-ups are not trained on. They are counted, and stay in the records."""

    injections: Literal["drop", "keep"] = "drop"
    """Follow-ups that try to close or imitate the hindsight context, or give the model orders."""
    max_followup_chars: int = 4000
    """Longer follow-ups are not trained on; 0: no limit."""
    cut_answers: Literal["train", "mask"] = "train"
    """Answers that were cut at max_new_tokens: train on what there is, without an end; or mask
    them, so that they are shown to the user but not trained on."""

    def __post_init__(self):
        if self.max_followup_chars < 0:
            raise SdpoError(f"max_followup_chars must be >= 0, got {self.max_followup_chars}")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Tasks that a policy is asked while it trains."""

    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness (extra ``eval``), such as ifeval. The main rank answers."""
    limit: int | None = 100
    """Ask so many prompts of each task, from its beginning; None: all."""
    data: tuple[str, ...] = ()
    """TASK=FILE, for tasks whose data is not to come from the hub: JSON lines as the hub has
    them."""
    regression: Literal["stop", "report"] = "report"
    """Whether the run goes back and ends where a task's score is below the first evaluation's, with
    an interval of its change that excludes zero. The level, 0.95, is each comparison's own: of many
    some are beyond it by chance."""

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise SdpoError(f"evaluate.limit must be at least 1, got {self.limit}")
        if not self.tasks and (self.data or self.regression == "stop"):
            raise SdpoError("evaluate.data and evaluate.regression need evaluate.tasks")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TasksConfig):
    """Prompts that are held out of training, and tasks, on which the policy is looked at between
    updates. Where vLLM servers answer, they answer tasks, too."""

    prompts: int = 64
    """How many, drawn from the prompts' file with the run's seed; 0: none."""
    every: int = 4
    """Updates between evaluations; there is one before the first update and at each phase's end,
    too."""
    decoding: Literal["greedy", "sampled"] = "greedy"
    """The likeliest answer, or one drawn as in training."""

    def __post_init__(self):
        super().__post_init__()
        if self.prompts < 0 or self.every < 1:
            raise SdpoError("evaluate.prompts must be >= 0 and evaluate.every at least 1")


@dataclass(frozen=True, kw_only=True)
class BrakeConfig:
    """When a run goes back to its last good snapshot and ends. None: that brake is off.

    Needs held-out prompts; "at first" is before the run's first update.
    """

    preference_drop: float | None = None
    """The phase's preference rate falls so far below the best that the phase has had."""
    max_words: float | None = None
    """Mean words of an answer."""
    min_words: float | None = None
    """Mean words of an answer."""
    entropy_change: float | None = None
    """The policy's entropy differs from that at first by more than this share of it."""
    max_drift: float | None = None
    """Nats per token: KL(policy || first policy) on its answers at first."""
    max_leaks: float | None = None
    """Share of answers that apologise or speak of feedback that nobody gave."""

    @property
    def any(self) -> bool:
        """Some brake is on."""
        return any(limit is not None for limit in vars(self).values())


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(RunConfig):
    """Everything that decides what a run computes that learns from its own conversations."""

    prompts: str
    """Prompts: ``.txt`` with one in each line, or JSONL or parquet with a ``prompt`` in each
    row."""
    phases: tuple[str, ...] = ()
    """Who answers, and for how many updates: PERSONA:UPDATES, one after the other."""
    users: tuple[str, ...] = ()
    """In place of ``phases``, users who share the model, each with adapters of their own that are
    trained in turn: NAME=PERSONA:UPDATES, several phases separated by commas."""
    system: str | None = None
    """System message put before each prompt; "" is an empty one."""
    user: AnyUser = field(default_factory=RuleUser)
    """How personas come to answer: by a rule, played by a model, or from a recording."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sampler: AnySampler = field(default_factory=InProcess)
    """Where answers come from: the model in this process, or vLLM servers."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    brakes: BrakeConfig = field(default_factory=BrakeConfig)
    phase_optimizer: Literal["keep", "restart"] = "keep"
    """Whether the optimizer forgets past gradients where a phase begins."""
    phase_prompts: Literal["fresh", "repeat"] = "fresh"
    """A phase goes on in the prompts where the last one ended, or sees the same ones again."""
    replay: str | None = None
    """Folder of a run whose recorded interactions are trained on, update by update; nothing is
    sampled, nobody is asked and nothing is evaluated."""

    def __post_init__(self):
        if self.objective.reading != "hindsight":
            name = type(self.objective).__name__
            raise SdpoError(f"{name} reads no follow-ups, and online runs learn from them alone")
        super().__post_init__()
        for text in self.phases:
            parse_phase(text)
        if self.users:
            self._check_users()
        if self.batch.epochs != 1 or self.batch.unit != "interaction":
            raise SdpoError("batch.epochs and batch.unit are for recorded data; use phases")
        if self.brakes.any and not self.evaluate.prompts:
            raise SdpoError("brakes need held-out prompts: set evaluate.prompts")
        if self.brakes.max_drift is not None and self.evaluate.every % self.safeguard.probe_every:
            raise SdpoError("brakes.max_drift: safeguard.probe_every must divide evaluate.every")
        clips = isinstance(self.objective, SampledToken) and self.objective.needs_old_logprobs
        if clips and self.sampling.truncates and self.replay is None:
            raise SdpoError(
                "ppo_clip and importance_clip take the ratio to the sampling distribution, which "
                "top_p or top_k cut off: use sampling.top-p 1 and sampling.top-k 0, or no clip"
            )
        sampler, trained = self.sampler, self.lora.rank > 0
        if isinstance(sampler, VLLM) and sampler.sync == "adapters" and not trained:
            raise SdpoError(
                'sampler.sync = "adapters" is for runs that train adapters: set lora.rank beside '
                'it, or use "weights"'
            )
        if self.hindsight.max_response_tokens < self.sampling.max_new_tokens:
            raise SdpoError(
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens}) exceeds "
                f"hindsight.max_response_tokens ({self.hindsight.max_response_tokens}): answers "
                "would lose their ends"
            )

    def _check_users(self) -> None:
        names = [parse_user(text)[0] for text in self.users]
        if self.replay is not None:
            raise SdpoError("replay is of one run: replay a user's by itself")
        if len(set(names)) < len(names):
            raise SdpoError("users: a name is given twice")
        if not self.lora.rank or self.engine != "torchtitan":
            raise SdpoError("users have adapters of their own: set lora.rank, engine torchtitan")
        if isinstance(self.teacher, EMA):
            raise SdpoError("users share a teacher, which no average of one's weights can be")
        if isinstance(self.sampler, VLLM) and self.sampler.sync != "adapters":
            raise SdpoError('users have adapters of their own: sampler.sync = "adapters"')

    def of_user(self, text: str) -> "OnlineConfig":
        """The run of one of the users."""
        name, phases = parse_user(text)
        out = Path(self.out) / "users" / name
        checkpoint = replace(self.checkpoint, interval=1)  # their turns leave nothing else behind
        return replace(self, out=str(out), users=(), phases=phases, checkpoint=checkpoint)

    @property
    def schedule(self) -> list[Phase]:
        """The phases, in order.

        Raises:
            SdpoError: there is none.
        """
        if not self.phases:
            raise SdpoError("phases: name at least one, such as --phases concise:12")
        return [parse_phase(text) for text in self.phases]

    @property
    def updates(self) -> int:
        """Length of the whole run."""
        return sum(phase.updates for phase in self.schedule)
