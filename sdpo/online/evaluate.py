"""What the policy does on prompts that it is not trained on, and when that stops a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from ..io.files import write_text
from .config import BrakeConfig
from .measures import leaks
from .prompts import Prompt
from .sampler import Rollout
from .users.personas import Persona


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A held-out prompt's answer."""

    prompt_id: str
    prompt: str
    answer: str
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the policy did on the held-out prompts after an update.

    Attributes:
        preference: persona -> share of answers that satisfy it; of those with a rule.
        words: mean per answer, separated by white space.
        finished, leaks: shares of answers.
    """

    step: int
    phase: int
    persona: str
    decoding: str
    prompts: int
    preference: dict[str, float]
    words: float
    finished: float
    leaks: float

    def metrics(self) -> dict[str, float]:
        """Under the names of metrics.jsonl."""
        shown = {f"evaluate/preference/{name}": rate for name, rate in self.preference.items()}
        names = "words", "finished", "leaks"
        return shown | {f"evaluate/{name}": getattr(self, name) for name in names}


def text_of(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> str:
    """What was answered, without control tokens."""
    return str(tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True)).strip()


def answered(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase
) -> list[Answer]:
    """Each prompt's answer."""
    return [
        Answer(
            prompt_id=prompt.id,
            prompt=prompt.messages[-1].content,
            answer=text_of(rollout, tokenizer),
            finished=rollout.finished,
        )
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]


def evaluation(
    answers: Sequence[Answer], personas: Sequence[Persona], **where: object
) -> Evaluation:
    """What the answers amount to.

    Args:
        where: the fields of `Evaluation` that say when and how they were given.
    """
    rates = {
        p.name: fmean(p.satisfied(a.answer, a.finished) for a in answers)
        for p in personas
        if p.rule is not None
    }
    return Evaluation(
        prompts=len(answers),
        preference=rates,
        words=fmean(len(a.answer.split()) for a in answers),
        finished=fmean(a.finished for a in answers),
        leaks=fmean(leaks(a.answer) for a in answers),
        **where,  # pyright: ignore
    )


def tripped(
    limits: BrakeConfig, seen: Sequence[Evaluation], row: Mapping[str, float], first_entropy: float
) -> str | None:
    """Why the run must go back, if it must.

    Args:
        seen: all evaluations up to now, the newest last.
        row: metrics of the last step.
        first_entropy: the policy's entropy in the first step.
    """
    now = seen[-1]
    rates = [e.preference.get(now.persona, 0.0) for e in seen if e.phase == now.phase]
    drop = max(rates) - rates[-1]
    entropy = row["entropy/policy"]  # 0 where nothing was trained on
    change = abs(entropy / first_entropy - 1) if first_entropy and entropy else 0.0
    measured = {
        "preference_drop": (drop, f"the preference rate of {now.persona} fell by {drop:.2f}"),
        "max_words": (now.words, f"answers have {now.words:.0f} words"),
        "entropy_change": (change, f"the policy's entropy changed by {change:.0%}"),
        "max_drift": (kl := row.get("drift/kl", 0.0), f"the policy drifted by {kl:.3f} nats"),
        "max_leaks": (now.leaks, f"{now.leaks:.0%} of answers speak of feedback nobody gave"),
    }
    for name, (value, says) in measured.items():
        limit = getattr(limits, name)
        if limit is not None and value > limit:
            return f"{says} (brakes.{name} {limit})"
    if limits.min_words is not None and now.words < limits.min_words:
        return f"answers have {now.words:.0f} words (brakes.min_words {limits.min_words})"
    return None


class Evaluations:
    """``evaluations.jsonl`` of a run's folder, and the answers in ``evaluations/``."""

    def __init__(self, folder: Path):
        self.path, self.answers = folder / "evaluations.jsonl", folder / "evaluations"

    def read(self, step: int) -> list[Evaluation]:
        """Those up to a step, in order."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        found = [Evaluation(**json.loads(line)) for line in lines]
        return [e for e in found if e.step <= step]

    def answers_at(self, step: int) -> list[Answer]:
        """What was answered after an update."""
        path = self.answers / f"step-{step}.jsonl"
        return [Answer(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]

    def write(self, seen: Sequence[Evaluation], answers: Sequence[Answer]) -> None:
        """All evaluations, and the answers of the newest."""
        rows = "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers)
        write_text(self.answers / f"step-{seen[-1].step}.jsonl", rows)
        write_text(self.path, "".join(json.dumps(asdict(e)) + "\n" for e in seen))
