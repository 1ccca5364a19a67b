"""`sdpo check-hindsight`: does this model make use of hindsight, under this template?

A pre-flight check on a sample of interactions, before anyone spends GPU hours. Each response is
read without a hindsight context, and with one that holds

  own        the follow-up that it got;
  shuffled   the follow-up of another conversation;
  neutral    a follow-up that says nothing: the effect of the template's wording alone;
  revealed   "You should have answered: ..." and the response itself;
  misled     the same with another conversation's response.

A is log q(y_t) - log p(y_t), with and without the hindsight context, in nats. An interaction counts
with the mean over its response tokens. No two interactions are of one conversation, and pairs of
them exchange follow-ups. Intervals are 95%, by paired bootstrap.

The verdict. Own must move the response more than neutral does. That alone proves little: a longer
text moves any model more, even one of random weights. So one of two controls, in which only *whose*
text the hindsight context holds differs, must confirm that its content matters:

  specific   |A| under own is above that under shuffled, by a share of it; or
  reads      A under revealed is above that under misled, by a share of what there is to gain, the
             response's surprisal -log p(y_t).

Reads without specific is no failure: users may all want the same thing. Specific without reads is
none either: tiny models may never have learned such a sentence.
"""

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import DataError
from ..interactions import Interaction, conversation_of, iter_interactions
from ..io.files import sha256, written_whole
from .journal import Journal
from .options import ReaderOptions
from .score import interval, partners

if TYPE_CHECKING:
    from .advantages import Reader, Reading

CONTEXTS = ("own", "shuffled", "neutral", "revealed", "misled")
NEUTRAL = "Okay."
REVEALED = "You should have answered: {}"
FLOOR = 0.005
"""Nats per token by which own must exceed neutral."""
SHARE = 0.05
"""Share that a control's difference must reach: of |A| under own, or of the surprisal."""
FEWEST = 16
"""Fewest conversations from which an interval says anything."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean of paired differences in nats per token, and its 95% interval."""

    mean: float
    low: float
    high: float

    def exceeds(self, floor: float) -> bool:
        """At least ``floor``, with an interval above 0."""
        return self.mean >= floor and self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f}  [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Means over a sample in nats per token, by hindsight context, and the verdict from them."""

    interactions: int
    surprisal: float
    """-log p(y_t) without a hindsight context."""
    size: dict[str, float]
    """Mean |A|."""
    advantage: dict[str, float]
    """Mean A."""
    own_over_neutral: Difference
    own_over_shuffled: Difference
    revealed: Difference
    revealed_over_misled: Difference

    @property
    def moved(self) -> bool:
        """Follow-ups do more than the template's wording."""
        return self.own_over_neutral.exceeds(FLOOR)

    @property
    def specific(self) -> bool:
        """It matters whose follow-up it is."""
        return self.own_over_shuffled.exceeds(SHARE * self.size["own"])

    @property
    def reads(self) -> bool:
        """It matters which response the hindsight context gives away."""
        return self.revealed_over_misled.exceeds(SHARE * self.surprisal)

    @property
    def uses_hindsight(self) -> bool:
        """Whether the model makes use of hindsight."""
        return self.moved and (self.specific or self.reads)

    def reasons(self) -> list[str]:
        """Sentences that explain the verdict."""
        moved, specific, reads = (
            "" if so else "not " for so in (self.moved, self.specific, self.reads)
        )
        told = [
            f"own follow-ups do {moved}move responses more than {NEUTRAL!r} does: "
            f"{self.own_over_neutral}",
            f"they do {specific}move them more than other conversations' follow-ups: "
            f"{self.own_over_shuffled}",
            f"responses do {reads}become likelier when the hindsight context gives them away than "
            f"when it gives away others: {self.revealed_over_misled}",
        ]
        if self.uses_hindsight and not self.specific:
            told.append("so it reads its hindsight context, and users may say much the same here")
        if self.moved and not self.uses_hindsight:
            told.append("so it may be no more than the length of the context that moves the model")
        return told


def sample(path: str, count: int, seed: int) -> list[Interaction]:
    """An even number of interactions, at most ``count``, each from a different conversation, in the
    file's order. Only these are held in memory.

    Raises:
        DataError: the file has fewer than ``FEWEST`` conversations.
    """
    turns: dict[str, list[int]] = {}
    for place, i in enumerate(iter_interactions(path)):
        turns.setdefault(conversation_of(i), []).append(place)
    if len(turns) < FEWEST:
        raise DataError(
            f"interactions of {len(turns)} conversations are too few to tell",
            hint=f"Give those of {FEWEST} or more",
            file=path,
        )
    rng = random.Random(seed)
    even = min(count, len(turns)) // 2 * 2
    drawn = {rng.choice(places) for places in rng.sample(list(turns.values()), even)}
    return [i for place, i in enumerate(iter_interactions(path)) if place in drawn]


def check(
    reader: "Reader",
    interactions: Sequence[Interaction],
    *,
    seed: int = 0,
    journal: Journal | None = None,
    header: Mapping[str, Any] = MappingProxyType({}),
) -> Findings:
    """Read every response six times.

    Args:
        interactions: as ``sample`` draws them.
        journal: keeps what was read, should the process be killed.
        header: what decides which interactions these are.
    """
    from .advantages import read_into  # torch: seconds, which --help need not pay

    conversations = [conversation_of(i) for i in interactions]
    partner = partners(conversations, seed, "the sample")
    asked = [(i, _others(i, interactions[j])) for i, j in zip(interactions, partner, strict=True)]
    with Journal(None) if journal is None else nullcontext(journal) as kept:
        read_into(
            kept,
            reader,
            asked,
            _means,
            header={"command": "check-hindsight", "seed": seed, **header},
            total=len(asked),
            says="reading six times",
        )

        def found() -> Findings:
            surprisal, mean, size = map(np.array, zip(*kept.rows(), strict=True))
            return _findings(mean, size, float(surprisal.mean()), partner, seed)

        return reader.inference.on_main(found)


def _means(reading: "Reading") -> tuple[float, list[float], list[float]]:
    """Surprisal; A and |A| by hindsight context."""
    advantages = reading.advantages
    mean = [float(a.mean()) for a in advantages]
    size = [float(a.abs().mean()) for a in advantages]
    return -float(reading.policy.mean()), mean, size


def _others(interaction: Interaction, other: Interaction) -> tuple[str, ...]:
    """The follow-ups of `CONTEXTS` after an interaction's own."""
    revealed, misled = (REVEALED.format(i.response) for i in (interaction, other))
    return other.followup, NEUTRAL, revealed, misled


def _findings(
    advantage: NDArray, size: NDArray, surprisal: float, partner: NDArray, seed: int
) -> Findings:
    """Findings from the means by interaction and hindsight context.

    Args:
        advantage, size: (n, len(CONTEXTS)).
        partner: (n,), with whom each interaction exchanged follow-ups.
    """
    a, s = (dict(zip(CONTEXTS, x.T, strict=True)) for x in (advantage, size))
    alone = np.arange(len(partner))
    # What a follow-up does to any response, and what moves a response whatever the follow-up says,
    # cancels within a pair that exchanged them: pairs drawn together give narrower intervals.
    swapped = np.minimum(alone, partner)

    def difference(values: NDArray, groups: NDArray = alone) -> Difference:
        low, high = interval([values], groups, lambda means: means[0], seed)
        return Difference(mean=float(values.mean()), low=low, high=high)

    return Findings(
        interactions=len(size),
        surprisal=surprisal,
        size={context: float(x.mean()) for context, x in s.items()},
        advantage={context: float(x.mean()) for context, x in a.items()},
        own_over_neutral=difference(s["own"] - s["neutral"]),
        own_over_shuffled=difference(s["own"] - s["shuffled"], swapped),
        revealed=difference(a["revealed"]),
        revealed_over_misled=difference(a["revealed"] - a["misled"], swapped),
    )


def command(
    *,
    model: str,
    interactions: str,
    options: Annotated[ReaderOptions, tyro.conf.arg(name="")],
    sample_size: Annotated[int, tyro.conf.arg(name="sample")] = 256,
    seed: int = 0,
    json_out: Annotated[str | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Whether a model makes use of hindsight under a template; exit status 0 if it does, else 1.

    With --json, a run that was killed goes on where it was when the same command is started again.

    Args:
        model: any causal LM: a local Hugging Face folder, or a name on the hub.
        interactions: file that `sdpo data prepare` wrote.
        sample_size: number of interactions to read, drawn at random, one per conversation.
        seed: decides which interactions are drawn, and which exchange follow-ups.
        json_out: JSON file to write the findings to.
    """
    from .advantages import Reader  # torch: seconds, which --help need not pay

    drawn = sample(interactions, sample_size, seed)
    header = {"interactions": sha256(interactions), "sample": sample_size}
    with Journal(json_out) as journal, Reader.load(model, options) as reader:
        found = check(reader, drawn, seed=seed, journal=journal, header=header)

        def tell() -> None:
            template = options.hindsight.template
            _show(found, model, template)
            if json_out is not None:
                row = {"uses_hindsight": found.uses_hindsight, "reasons": found.reasons()}
                row |= {"model": model, "interactions": interactions, "template": template}
                with written_whole(json_out) as file:
                    json.dump(row | asdict(found), file, indent=2, allow_nan=False)
            journal.discard()

        reader.inference.on_main(tell)
    raise SystemExit(0 if found.uses_hindsight else 1)


def _show(found: Findings, model: str, template: str) -> None:
    console = Console()
    title = f"{found.interactions} interactions, nats per token"
    table = Table("hindsight context", "mean |A|", "mean A", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for context in CONTEXTS:
        table.add_row(context, f"{found.size[context]:.4f}", f"{found.advantage[context]:+.4f}")
    console.print(table)
    table = Table("comparison", "difference, 95%", title_justify="left")
    table.add_row("|A|: own - neutral", escape(str(found.own_over_neutral)))
    table.add_row("|A|: own - shuffled", escape(str(found.own_over_shuffled)))
    table.add_row("A: revealed", escape(str(found.revealed)))
    table.add_row("A: revealed - misled", escape(str(found.revealed_over_misled)))
    table.add_row("surprisal, without any", f"{found.surprisal:.4f}")
    console.print(table)
    for reason in found.reasons():
        console.print(f"- {reason}", markup=False, highlight=False)
    verdict = "makes use of hindsight" if found.uses_hindsight else "does not make use of hindsight"
    console.print(f"{model} {verdict} under template {template!r}", markup=False, soft_wrap=True)
