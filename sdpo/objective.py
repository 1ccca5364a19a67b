"""What is minimised: per-token values of both passes -> one loss. Pure functions.

Shapes: N response tokens, S interactions, V vocabulary, D hidden size.
  p = policy, q = hindsight distribution; A_t = sg[log q(y_t) - log p(y_t)], the advantage.

  sampled token  -A_t log p(y_t)      the paper's (arXiv:2603.12273), PPO or importance clip
  reverse KL     KL(p || q)           forward KL     KL(q || p)           JSD

Every loss is the mean over an interaction's tokens, then the weighted mean over the step's
interactions; weights come normalised over all ranks, so local losses add up to the step's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sdpo_kernels import (
    DEFAULT_CHUNK_BYTES,
    TokenStats,
    linear_forward_kl,
    linear_jsd,
    linear_logprob,
    linear_reverse_kl,
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of the objectives."""

    ignore_first: int = 0
    """Response tokens left out of the loss at the start of each response."""
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    """Logits of one pass that may be alive at once, in bytes."""

    def __post_init__(self):
        if self.ignore_first < 0:
            raise ValueError(f"ignore_first must not be negative, got {self.ignore_first}")
        if self.chunk_bytes < 1:
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
    """What both passes yield: hidden states (N, D) at the response, heads (V, D), and y (N,)."""

    hidden: Tensor
    weight: Tensor
    hindsight_hidden: Tensor
    hindsight_weight: Tensor
    targets: Tensor


class Layout(NamedTuple):
    """Where each response token belongs; see ``batching.Batch``."""

    sequence_N: Tensor
    offset_N: Tensor
    weight_S: Tensor
    old_logp_N: Tensor | None = None


def token_weights(layout: Layout, ignore_first: int = 0) -> Tensor:
    """(N,): weight of a token, w_s / (counted tokens of its interaction s), 0 where ignored.

    An interaction with no counted token adds nothing, and still counts in the mean over
    interactions, as in the paper's code.
    """
    counted_N = (layout.offset_N >= ignore_first).to(layout.weight_S.dtype)
    length_S = torch.zeros_like(layout.weight_S).index_add_(0, layout.sequence_N, counted_N)
    return counted_N * (layout.weight_S / length_S.clamp(min=1))[layout.sequence_N]


def centred(advantage_N: Tensor, layout: Layout, ignore_first: int = 0) -> Tensor:
    """Advantages less the mean over the counted tokens of their interaction."""
    share_N = token_weights(
        layout._replace(weight_S=torch.ones_like(layout.weight_S)), ignore_first
    )
    zero_S = torch.zeros_like(layout.weight_S, dtype=advantage_N.dtype)
    mean_S = zero_S.index_add_(0, layout.sequence_N, share_N.to(advantage_N.dtype) * advantage_N)
    return advantage_N - mean_S[layout.sequence_N]


def sampled_token(
    logp_N: Tensor,
    advantage_N: Tensor,
    old_logp_N: Tensor | None = None,
    *,
    ppo_clip: float | None = None,
    importance_clip: float | None = None,
) -> Tensor:
    """(N,): -A log p, or its clipped forms. Differentiable in ``logp_N`` only.

    PPO clip: -min(r A, clip(r, 1 - c, 1 + c) A), r = p / p_old (arXiv:1707.06347, eq. 7).
    Importance clip: -sg[min(r, c)] A log p (truncated importance sampling).
    """
    advantage_N = advantage_N.detach()
    if ppo_clip is None and importance_clip is None:
        return -advantage_N * logp_N
    assert old_logp_N is not None
    if ppo_clip is not None:
        ratio_N = (logp_N - old_logp_N).exp()
        clipped_N = ratio_N.clamp(1 - ppo_clip, 1 + ppo_clip)
        return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    ratio_N = (logp_N.detach() - old_logp_N).exp().clamp(max=importance_clip)
    return -ratio_N * advantage_N * logp_N


def token_losses(
    objective: Objective, streams: Streams, layout: Layout
) -> tuple[Tensor, TokenStats]:
    """(N,) losses before weighting, differentiable in the policy stream, and detached statistics.

    Raises:
        ValueError: a clip needs the sampling policy's log-probabilities and they are not there.
        TypeError: the objective is none of this module's.
    """
    *pair, targets = streams
    match objective:
        case SampledToken():
            return _sampled_token(objective, streams, layout)
        case ReverseKL():
            out = linear_reverse_kl(*pair, targets=targets, chunk_bytes=objective.chunk_bytes)
        case ForwardKL():
            out = linear_forward_kl(*pair, targets=targets, chunk_bytes=objective.chunk_bytes)
        case JSD():
            out = linear_jsd(
                *pair, targets=targets, beta=objective.beta, chunk_bytes=objective.chunk_bytes
            )
        case _:
            raise TypeError(f"unknown objective {type(objective).__name__}")
    return out.value, out.stats


def _sampled_token(
    objective: SampledToken, streams: Streams, layout: Layout
) -> tuple[Tensor, TokenStats]:
    if objective.needs_old_logprobs and layout.old_logp_N is None:
        raise ValueError(
            "ppo_clip and importance_clip need the log-probabilities that the responses were "
            "sampled with: give every interaction completion_token_ids and completion_logprobs, "
            "or leave the clips unset"
        )
    nbytes = objective.chunk_bytes
    policy = linear_logprob(streams.hidden, streams.weight, streams.targets, chunk_bytes=nbytes)
    with torch.no_grad():
        hindsight = linear_logprob(
            streams.hindsight_hidden, streams.hindsight_weight, streams.targets, chunk_bytes=nbytes
        )
    advantage_N = hindsight.logp - policy.logp.detach()
    if objective.centre:
        advantage_N = centred(advantage_N, layout, objective.ignore_first)
    losses_N = sampled_token(
        policy.logp,
        advantage_N,
        layout.old_logp_N,
        ppo_clip=objective.ppo_clip,
        importance_clip=objective.importance_clip,
    )
    stats = TokenStats(policy.logp.detach(), hindsight.logp, policy.entropy, hindsight.entropy)
    return losses_N, stats


def total_loss(objective: Objective, streams: Streams, layout: Layout) -> tuple[Tensor, TokenStats]:
    """The micro-batch's share of the step's loss (a scalar) and per-token statistics."""
    losses_N, stats = token_losses(objective, streams, layout)
    weight_N = token_weights(layout, objective.ignore_first).to(losses_N.dtype)
    return (losses_N * weight_N).sum(), stats
