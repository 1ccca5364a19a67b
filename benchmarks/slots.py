"""How many slots both passes read, by what rows share; for ``prefixes``, ``step``, ``scaling``."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sdpo.batching import Bundle, Example, bundles
from sdpo_parallel.rows import Sharing

UnitName = Literal["interaction", "conversation"]
"""What a step draws: interactions one by one, or conversations with all their turns."""


@dataclass(frozen=True)
class Slots:
    """What both passes read of some examples, padding not included."""

    sharing: Sharing
    unit: UnitName
    policy: int
    hindsight: int

    @property
    def cost(self) -> int:
        """In forward passes of one token."""
        return 3 * self.policy + self.hindsight

    def shares_of(self, whole: "Slots") -> tuple[float, float]:
        """Of ``whole``'s policy pass and hindsight pass, how much is read."""
        return self.policy / whole.policy, self.hindsight / whole.hindsight


def slots(examples: Sequence[Example], most: int, sharing: Sharing, unit: UnitName) -> Slots:
    """What is read of examples, of which turns of a conversation follow each other.

    Args:
        most: slots of a pass; a conversation that needs more is cut between its turns.
        unit: conversation: turns share; interaction: only the two passes of each do.
    """
    if unit == "interaction":
        examples = [(replace(e, conversation=""), weight) for e, weight in examples]
    return summed(bundles(examples, most, sharing), sharing, unit)


def summed(found: Iterable[Bundle], sharing: Sharing, unit: UnitName) -> Slots:
    """The slots of units, without what one shares with another."""
    found = list(found)
    policy, hindsight = sum(u.policy for u in found), sum(u.hindsight for u in found)
    return Slots(sharing, unit, policy, hindsight)


def count(examples: Sequence[Example], most: int) -> list[Slots]:
    """Whole sequences first, then every way to share; arguments as in `slots`."""
    ways: list[tuple[Sharing, UnitName]] = [
        ("none", "interaction"),
        ("keys", "interaction"),
        ("tries", "conversation"),
        ("keys", "conversation"),
    ]
    return [slots(examples, most, *way) for way in ways]
