"""A user who goes by a rule: complains where it fails; where it holds, praises or is silent."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import SdpoError
from .base import Exchange, Reply
from .personas import Persona

if TYPE_CHECKING:
    from .config import RuleUser

CUT = (
    "Your answer stops in the middle of a sentence.",
    "It breaks off at the end, the rest is missing.",
    "You got cut off before you finished.",
)
"""What is said of an answer whose one fault is that it was cut at a limit."""
REMARKS = (
    "By the way, is it going to rain tomorrow?",
    "Hold on, somebody is at the door.",
    "My sister's birthday is next week.",
    "I'm on the train right now, the connection is bad.",
    "Different topic: how long do eggs keep in the fridge?",
    "I should really go to bed earlier.",
    "Oh, my coffee is getting cold.",
    "Do you also think that Mondays are long?",
)
"""What is said that has nothing to do with the answer."""


class RuledUser:
    """Says one of the persona's own sentences. Each reply is drawn from the seed, the persona and
    the exchange's id alone: order and batching change nothing.

    A blank answer gets no reply.

    Raises:
        SdpoError: the persona has no rule.
    """

    def __init__(self, config: "RuleUser", persona: Persona):
        if persona.rule is None:
            raise SdpoError(
                f"persona {persona.name} has no rule, and a rule-based user is nothing else: give "
                "its file [[rules]], or let a model play it (a server or a local folder)"
            )
        self.config, self.persona, self._rule = config, persona, persona.rule

    def reply(self, exchanges: Sequence[Exchange], *, seed: int) -> list[Reply]:
        """What the user says to each exchange; source "rule", or "rule:irrelevant", "rule:cut",
        "rule:blank" where it is not about the preference."""
        return [self._reply(exchange, seed) for exchange in exchanges]

    def _reply(self, exchange: Exchange, seed: int) -> Reply:
        rng = random.Random(f"{seed}/{self.persona.name}/{exchange.id}")
        # always drawn, so that a changed probability changes no other choice
        strays, thanks = rng.random(), rng.random()
        answer = exchange.answer
        if not answer.strip():
            return Reply(text=None, source="rule:blank")
        if strays < self.config.irrelevant:
            return Reply(text=rng.choice(REMARKS), source="rule:irrelevant")
        if self._rule.satisfied(answer, exchange.finished):
            praise = rng.choice(self.persona.praise) if thanks < self.config.praise else None
            return Reply(text=praise, source="rule")
        if self._rule.satisfied(answer, True):
            return Reply(text=rng.choice(CUT), source="rule:cut")
        return Reply(text=rng.choice(self.persona.complaints), source="rule")

    def close(self) -> None:
        """Nothing to let go of."""
