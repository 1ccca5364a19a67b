"""What is minimised: per-token values of both passes -> one loss. Pure functions.

Shapes: N response tokens, S interactions, V vocabulary, D hidden size.
  p = policy, q = hindsight distribution; A_t = sg[log q(y_t) - log p(y_t)], the advantage.

  sampled token  -A_t log p(y_t)      the paper's (arXiv:2603.12273), PPO or importance clip
  reverse KL     KL(p || q)           forward KL     KL(q || p)           JSD

Every loss is the mean over an interaction's tokens, then the weighted mean over the step's
interactions; weights come normalised over all ranks, so local losses add up to the step's.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from sdpo_kernels import (
    Divergence,
    TokenStats,
    VocabShard,
    linear_forward_kl,
    linear_jsd,
    linear_reverse_kl,
    linear_sampled_token,
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of the objectives."""

    ignore_first: int = 0
    """Response tokens left out of the loss at the start of each response."""
    chunk_bytes: int | None = None
    """Logits of both passes that may be alive at once, in bytes; None: by device."""

    def __post_init__(self):
        if self.ignore_first < 0:
            raise ValueError(f"ignore_first must not be negative, got {self.ignore_first}")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be positive, got {self.chunk_bytes}")


@dataclass(frozen=True, kw_only=True)
class SampledToken(Objective):
    """The paper's objective: a policy gradient with the hindsight advantage of each token."""

    centre: bool = False
    """Subtract each interaction's mean advantage (the paper's online runs)."""
    ppo_clip: float | None = None
    """Clip the ratio to the sampling policy to [1 - c, 1 + c] (online: 0.2)."""
    importance_clip: float | None = None
    """Weight each token by min(ratio to the sampling policy, c), as a constant."""

    def __post_init__(self):
        super().__post_init__()
        if self.ppo_clip is not None and self.importance_clip is not None:
            raise ValueError(
                "ppo_clip and importance_clip both correct for the sampling policy: set one of them"
            )
        for name in ("ppo_clip", "importance_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    @property
    def needs_old_logprobs(self) -> bool:
        """The responses must come with the log-probabilities they were sampled with."""
        return self.ppo_clip is not None or self.importance_clip is not None


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Objective):
    """KL(policy || hindsight): seeks the hindsight's modes; the stable choice in continual runs."""


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Objective):
    """KL(hindsight || policy): covers all that hindsight would say."""


@dataclass(frozen=True, kw_only=True)
class JSD(Objective):
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""

    beta: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta must lie strictly between 0 and 1, got {self.beta}: its limits are the "
                "recipes forward-kl (0) and reverse-kl (1)"
            )


class Streams(NamedTuple):
    """What both passes yield: hidden states (N, D) at the response, heads (V, D), and y (N,).

    A ``hindsight_weight`` of None is the policy's own head. With a ``shard`` both are this rank's
    rows of the vocabulary, and the gradient of ``hidden`` is partial.
    """

    hidden: Tensor
    weight: Tensor
    hindsight_hidden: Tensor
    hindsight_weight: Tensor | None
    targets: Tensor
    shard: VocabShard | None = None


class Layout(NamedTuple):
    """Where each response token belongs; see ``batching.Batch``."""

    sequence_N: Tensor
    offset_N: Tensor
    weight_S: Tensor
    old_logp_N: Tensor | None = None


class Common(TypedDict):
    """What every objective passes on to its kernel."""

    targets: Tensor
    weights: Tensor
    chunk_bytes: int | None
    shard: VocabShard | None


def token_weights(layout: Layout, ignore_first: int = 0) -> Tensor:
    """(N,): weight of a token, w_s / (counted tokens of its interaction s), 0 where ignored.

    An interaction with no counted token adds nothing, and still counts in the mean over
    interactions, as in the paper's code.
    """
    counted_N = (layout.offset_N >= ignore_first).to(layout.weight_S.dtype)
    length_S = torch.zeros_like(layout.weight_S).index_add_(0, layout.sequence_N, counted_N)
    return counted_N * (layout.weight_S / length_S.clamp(min=1))[layout.sequence_N]


def total_loss(objective: Objective, streams: Streams, layout: Layout) -> tuple[Tensor, TokenStats]:
    """The micro-batch's share of the step's loss (a scalar) and per-token statistics.

    The weights of all tokens are known before any value is, so that the kernels form gradients
    while the logits are there: four products of N V D, not six.

    Raises:
        ValueError: a clip needs the sampling policy's log-probabilities and they are not there.
        TypeError: the objective is none of this module's.
    """
    weights = token_weights(layout, objective.ignore_first)
    common = Common(
        targets=streams.targets,
        weights=weights,
        chunk_bytes=objective.chunk_bytes,
        shard=streams.shard,
    )
    match objective:
        case SampledToken():
            out = _sampled_token(objective, streams, layout, common)
        case ReverseKL():
            out = linear_reverse_kl(*streams[:4], **common)
        case ForwardKL():
            out = linear_forward_kl(*streams[:4], **common)
        case JSD(beta=beta):
            out = linear_jsd(*streams[:4], beta=beta, **common)
        case _:
            raise TypeError(f"unknown objective {type(objective).__name__}")
    assert out.loss is not None
    return out.loss, out.stats


def _sampled_token(
    objective: SampledToken, streams: Streams, layout: Layout, common: Common
) -> Divergence:
    if objective.needs_old_logprobs and layout.old_logp_N is None:
        raise ValueError(
            "ppo_clip and importance_clip need the log-probabilities that the responses were "
            "sampled with: give every interaction completion_token_ids and completion_logprobs, "
            "or leave the clips unset"
        )
    return linear_sampled_token(
        *streams[:4],
        old_logp=layout.old_logp_N if objective.needs_old_logprobs else None,
        ppo_clip=objective.ppo_clip,
        importance_clip=objective.importance_clip,
        centre=layout.sequence_N if objective.centre else None,
        counted=layout.offset_N >= objective.ignore_first,
        **common,
    )
