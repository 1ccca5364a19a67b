"""How likely policy and hindsight are to open an answer with an apology or a word of the complaint.

A leak of the hindsight context shows here before any answer does: what hindsight likes to begin
with is what the policy learns to begin with.

Shapes: N tokens of all openings.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch

from sdpo_parallel.model import CausalModel

from ..batching import collate
from ..hindsight import Encoded, HindsightConfig, encode
from ..interactions import Interaction
from ..step import score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENINGS = (
    "I'm sorry",
    "I apologize",
    "I apologise",
    "I understand",
    "Sorry",
    "My apologies",
    "Apologies",
    "Thank you for",
    "Thanks for",
    "You're right",
)
"""None begins with another, so that their probabilities add up."""


class OpeningMass(NamedTuple):
    """Probability of an answer that begins with one of the openings, mean over interactions."""

    policy: float
    hindsight: float


def opening_mass(
    policy: CausalModel,
    tokenizer: "PreTrainedTokenizerBase",
    interactions: Sequence[Interaction],
    config: HindsightConfig,
    *,
    teacher: CausalModel | None = None,
    openings: Sequence[str] = OPENINGS,
) -> OpeningMass:
    """Read each opening, as the tokenizer spells it, in the place of each response.

    Args:
        policy: on one rank, whole.
        interactions: their prompts and follow-ups count, their responses do not.
        teacher: reads the hindsight prompt; None: the policy.
        openings: none begins with another.
    """
    spelt = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in openings]
    masses = [
        _mass(policy, encode(interaction, tokenizer, config), spelt, teacher)
        for interaction in interactions
    ]
    return OpeningMass(*(fmean(side) for side in zip(*masses, strict=True)))


def _mass(
    policy: CausalModel,
    encoded: Encoded,
    openings: Sequence[tuple[int, ...]],
    teacher: CausalModel | None,
) -> tuple[float, float]:
    """Of one interaction, (policy, hindsight)."""
    both = policy.reads_tries and (teacher is None or teacher.reads_tries)
    examples = [
        (replace(encoded, response=ids, old_logprobs=None, ends=False), 1.0) for ids in openings
    ]
    batch = collate(examples, row_tokens=1, sharing="tries" if both else "none")
    stats = score(policy, batch, teacher)

    def mass(logp_N: torch.Tensor) -> float:
        zero_S = logp_N.new_zeros(len(openings), dtype=torch.float64)
        return zero_S.index_add(0, batch.sequence_N, logp_N.double()).exp().sum().item()

    return mass(stats.logp_student), mass(stats.logp_teacher)
