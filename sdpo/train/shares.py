"""How much of what a run reads its sequences share: for the dry run."""

from collections.abc import Sequence
from dataclasses import dataclass

from sdpo_parallel.config import Live
from sdpo_parallel.rows import Sharing

from ..batching import Example, bundles, by_conversation
from ..hindsight import ALONE, Encoded
from .config import RunConfig


@dataclass(frozen=True)
class Read:
    """Slots of both passes over some interactions."""

    policy: int
    hindsight: int

    @property
    def cost(self) -> int:
        """Work in forward passes of one token: the policy's backward counts two."""
        return 3 * self.policy + self.hindsight


def sharing_of(config: RunConfig) -> Sharing:
    """What rows share in a run of this config, of a model that can read shared prefixes."""
    if why_not(config):
        return "none"
    reads_keys = isinstance(config.teacher, Live) and config.objective.reading not in ALONE
    return "keys" if reads_keys else "tries"


def why_not(config: RunConfig) -> str:
    """The setting that keeps a run from sharing prefixes; empty where none does."""
    if config.batch.share_prefix == "none":
        return "batch.share_prefix none"
    if config.parallel.context > 1:
        return "context parallelism splits rows"
    if config.parallel.attention == "varlen":
        return "attention varlen reads whole sequences"
    return ""


def slots_read(
    sample: Sequence[Encoded], config: RunConfig, sharing: Sharing, *, conversations: bool
) -> Read:
    """What is read of ``sample``, padding not counted.

    Args:
        conversations: the turns of one are read together; else each interaction is by itself.
    """
    examples: list[Example] = [(e, 1.0) for e in sample]
    alone = [[example] for example in examples]
    groups = [by_conversation(examples)] if conversations else alone
    most = config.batch.micro_batch_tokens
    found = [bundle for group in groups for bundle in bundles(group, most, sharing)]
    return Read(sum(b.policy for b in found), sum(b.hindsight for b in found))
