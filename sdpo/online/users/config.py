"""Which user a run talks to: one config for each kind, and `build_user`, which makes it."""

from dataclasses import dataclass
from pathlib import Path

from ...errors import SdpoError
from .base import User
from .by_rule import RuledUser
from .personas import Persona


@dataclass(frozen=True, kw_only=True)
class RuleUser:
    """A user who says the persona's own sentences, by the persona's rule; costs nothing."""

    praise: float = 1.0
    """Probability of praise for an answer as the user wants it; otherwise they are silent."""
    irrelevant: float = 0.0
    """Probability that the user says something that has nothing to do with the answer."""

    def __post_init__(self):
        for name in ("praise", "irrelevant"):
            if not 0 <= getattr(self, name) <= 1:
                raise SdpoError(f"{name} is a probability, got {getattr(self, name)}")


AnyUser = RuleUser
"""The users that a configuration may name."""


def build_user(config: AnyUser, persona: Persona, *, folder: Path) -> User:
    """The user of a config, with a persona.

    Args:
        folder: the run's, where what was said may be kept.

    Raises:
        SdpoError: the persona cannot be played so, or what the user needs is missing.
    """
    return RuledUser(config, persona)
