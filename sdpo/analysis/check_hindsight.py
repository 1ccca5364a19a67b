"""`sdpo check-hindsight`: does this model make use of hindsight, under this template?

A pre-flight on a sample of interactions, before anyone spends GPU hours. Each response is read
without a note, and under notes that hold

  own        the follow-up that it got;
  shuffled   the follow-up of another conversation;
  neutral    a follow-up that says nothing: what the template's wording alone does;
  revealed   "You should have answered: ..." and the response itself;
  misled     the same with another conversation's response.

A is log q(y_t) - log p(y_t), with and without the note, in nats; an interaction counts with the
mean over its response's tokens. No two are of one conversation; two by two they swap follow-ups.
Intervals are 95%, by paired bootstrap.

The verdict. Own must move the response more than neutral does. That alone proves little: the
longer text moves any model more, one of random weights too. So one of two controls, in which
only *whose* text the note holds differs, must confirm that it is what the note says:

  specific   |A| under own is above that under shuffled, by a share of it; or
  reads      A under revealed is above that under misled, by a share of what there is to gain, the
             response's surprisal -log p(y_t).

Without the first and with the second, users may all want the same thing: a note, not a failure.
Without the second and with the first, the model has learned no such sentence, as tiny ones may not.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..conversations import DataError
from ..hindsight import HindsightConfig, encode, load_tokenizer
from ..interactions import Interaction, iter_interactions
from ..io.files import write_text
from .score import conversation_of, interval, strangers

NOTES = ("own", "shuffled", "neutral", "revealed", "misled")
NEUTRAL = "Okay."
REVEALED = "You should have answered: {}"
FLOOR = 0.005
"""Nats per token that own must exceed neutral by."""
SHARE = 0.05
"""Of |A| under own (specific), of the surprisal (reads), that a control's difference must reach."""
FEWEST = 16
"""Conversations under which an interval says nothing."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean of paired differences in nats per token, and its 95% interval."""

    mean: float
    low: float
    high: float

    def exceeds(self, floor: float) -> bool:
        """It is as large as ``floor``, and its interval lies above 0."""
        return self.mean >= floor and self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f}  [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Means over a sample, in nats per token, by note; and what the verdict is made of."""

    interactions: int
    surprisal: float
    """-log p(y_t) without a note."""
    size: dict[str, float]
    """|A|."""
    advantage: dict[str, float]
    """A."""
    own_over_neutral: Difference
    own_over_shuffled: Difference
    revealed: Difference
    revealed_over_misled: Difference

    @property
    def moved(self) -> bool:
        """The follow-up does more than the template's wording."""
        return self.own_over_neutral.exceeds(FLOOR)

    @property
    def specific(self) -> bool:
        """It matters whose follow-up it is."""
        return self.own_over_shuffled.exceeds(SHARE * self.size["own"])

    @property
    def reads(self) -> bool:
        """It matters which answer the note gives away."""
        return self.revealed_over_misled.exceeds(SHARE * self.surprisal)

    @property
    def uses_hindsight(self) -> bool:
        """The verdict."""
        return self.moved and (self.specific or self.reads)

    def reasons(self) -> list[str]:
        """Of the verdict, a sentence each."""
        moved, specific, reads = (
            "" if so else "not " for so in (self.moved, self.specific, self.reads)
        )
        told = [
            f"own follow-ups do {moved}move responses more than {NEUTRAL!r} does: "
            f"{self.own_over_neutral}",
            f"they do {specific}move them more than other conversations' follow-ups: "
            f"{self.own_over_shuffled}",
            f"an answer that the note gives away does {reads}become likelier than one it does not: "
            f"{self.revealed_over_misled}",
        ]
        if self.uses_hindsight and not self.specific:
            told.append("so it reads its notes, and users may say much the same as each other here")
        if self.moved and not self.uses_hindsight:
            told.append("so it may be no more than the length of the note that moves the model")
        return told


def sample(path: str, count: int, seed: int) -> list[Interaction]:
    """An even number of interactions, ``count`` at most, each of another conversation, in the
    file's order; the rest is not held in memory.

    Raises:
        DataError: the file has fewer than ``FEWEST`` conversations.
    """
    turns: dict[str, list[int]] = {}
    for place, i in enumerate(iter_interactions(path)):
        turns.setdefault(conversation_of(i.id, i.turn_id), []).append(place)
    if len(turns) < FEWEST:
        raise DataError(
            f"{path}: interactions of {len(turns)} conversations are too few to tell; give "
            f"those of {FEWEST} or more"
        )
    rng = random.Random(seed)
    even = min(count, len(turns)) // 2 * 2
    drawn = {rng.choice(places) for places in rng.sample(list(turns.values()), even)}
    return [i for place, i in enumerate(iter_interactions(path)) if place in drawn]


def check(
    model,
    tokenizer,
    interactions: Sequence[Interaction],
    config: HindsightConfig,
    *,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> Findings:
    """Reads every response six times.

    Args:
        interactions: as ``sample`` draws them.
    """
    from .signal import read

    conversations = [conversation_of(i.id, i.turn_id) for i in interactions]
    partner = strangers(conversations, seed, "the sample")
    others = [interactions[j] for j in partner]
    encoded = [encode(i, tokenizer, config) for i in interactions]
    prompts = [
        tuple(encode(replace(i, followup=o), tokenizer, config).hindsight for o in _notes(i, j))
        for i, j in zip(interactions, others, strict=True)
    ]
    device = str(model.module.device)
    passes = read(model, encoded, prompts, device=device, batch_tokens=batch_tokens)
    rows = [[logp.double() for logp in row] for row in passes]
    advantage = np.array([[float((q - p).mean()) for q in qs] for p, *qs in rows])
    size = np.array([[float((q - p).abs().mean()) for q in qs] for p, *qs in rows])
    surprisal = float(np.mean([-float(p.mean()) for p, *_ in rows]))
    return _findings(advantage, size, surprisal, partner, seed)


def _notes(interaction: Interaction, other: Interaction) -> tuple[str, ...]:
    """What the notes hold after the first, in the order of ``NOTES``."""
    revealed, misled = (REVEALED.format(i.response) for i in (interaction, other))
    return other.followup, NEUTRAL, revealed, misled


def _findings(
    advantage: NDArray, size: NDArray, surprisal: float, partner: NDArray, seed: int
) -> Findings:
    """From means by interaction and note, (n, len(NOTES)); who swapped with whom, (n,)."""
    a, s = (dict(zip(NOTES, x.T, strict=True)) for x in (advantage, size))
    alone = np.arange(len(partner))
    # What a follow-up does to any response, and what moves a response whatever it is told, cancels
    # within the two who swapped: drawn together, they tell more from as many.
    swapped = np.minimum(alone, partner)

    def difference(values: NDArray, groups: NDArray = alone) -> Difference:
        low, high = interval([values], groups, lambda means: means[0], seed)
        return Difference(mean=float(values.mean()), low=low, high=high)

    return Findings(
        interactions=len(size),
        surprisal=surprisal,
        size={note: float(x.mean()) for note, x in s.items()},
        advantage={note: float(x.mean()) for note, x in a.items()},
        own_over_neutral=difference(s["own"] - s["neutral"]),
        own_over_shuffled=difference(s["own"] - s["shuffled"], swapped),
        revealed=difference(a["revealed"]),
        revealed_over_misled=difference(a["revealed"] - a["misled"], swapped),
    )


def command(
    *,
    model: str,
    interactions: str,
    template: str = "paper-offline",
    sample_size: Annotated[int, tyro.conf.arg(name="sample")] = 256,
    seed: int = 0,
    json_out: Annotated[str | None, tyro.conf.arg(name="json")] = None,
    max_prompt_tokens: int = 2048,
    max_hindsight_prompt_tokens: int = 4096,
    max_response_tokens: int = 2048,
    batch_tokens: int = 8192,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
) -> bool:
    """Whether a model makes use of hindsight under a template; exit status 0 if it does, else 1.

    Args:
        model: local Hugging Face folder of any causal LM.
        interactions: as `sdpo data prepare` writes them.
        template: hindsight template, a preset or a text with {followup}.
        sample_size: interactions to read, drawn at random, one of a conversation.
        seed: of the draw, and of who gets whose follow-up.
        json_out: file to write the findings to, as JSON.
        max_prompt_tokens: longer prompts lose their left end.
        max_hindsight_prompt_tokens: the same for prompts with a note.
        max_response_tokens: longer responses lose their right end.
        batch_tokens: tokens of one pass computed at a time.
        dtype: of the weights; auto is bfloat16 on a GPU, float32 on a CPU.
    """
    from sdpo_parallel.transformers.engine import load_model

    config = HindsightConfig(
        template=template,
        max_prompt_tokens=max_prompt_tokens,
        max_hindsight_prompt_tokens=max_hindsight_prompt_tokens,
        max_response_tokens=max_response_tokens,
    )
    drawn = sample(interactions, sample_size, seed)
    tokenizer, policy = load_tokenizer(model), load_model(model, dtype=dtype)
    found = check(policy, tokenizer, drawn, config, seed=seed, batch_tokens=batch_tokens)
    _show(found, model, template)
    if json_out is not None:
        _write(json_out, found, model=model, interactions=interactions, template=template)
    return found.uses_hindsight


def _show(found: Findings, model: str, template: str) -> None:
    console = Console()
    title = f"{found.interactions} interactions, nats per token"
    table = Table("note", "mean |A|", "mean A", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for note in NOTES:
        table.add_row(note, f"{found.size[note]:.4f}", f"{found.advantage[note]:+.4f}")
    console.print(table)
    table = Table("comparison", "difference, 95%", title_justify="left")
    table.add_row("|A|: own - neutral", escape(str(found.own_over_neutral)))
    table.add_row("|A|: own - shuffled", escape(str(found.own_over_shuffled)))
    table.add_row("A: revealed", escape(str(found.revealed)))
    table.add_row("A: revealed - misled", escape(str(found.revealed_over_misled)))
    table.add_row("surprisal, without a note", f"{found.surprisal:.4f}")
    console.print(table)
    for reason in found.reasons():
        console.print(f"- {reason}", markup=False, highlight=False)
    verdict = "makes use of hindsight" if found.uses_hindsight else "does not make use of hindsight"
    console.print(f"{model} {verdict} under template {template!r}", markup=False, soft_wrap=True)


def _write(path: str, found: Findings, **asked: str) -> None:
    row = {"uses_hindsight": found.uses_hindsight, "reasons": found.reasons(), **asked}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(row | asdict(found), indent=2, allow_nan=False))


def main(args: Sequence[str] | None = None) -> None:
    """Parse and run."""
    if not tyro.cli(command, prog="sdpo check-hindsight", args=args):
        raise SystemExit(1)
