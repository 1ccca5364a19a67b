"""What is minimised: per-token values of both passes -> one loss. Pure functions.

Shapes: N response tokens, S interactions, V vocabulary, D hidden size.
  p = policy, q = hindsight distribution; A_t = sg[log q(y_t) - log p(y_t)], the advantage.

  sampled token  -A_t log p(y_t)      the paper's (arXiv:2603.12273), PPO or importance clip
  reverse KL     KL(p || q)           forward KL     KL(q || p)           JSD
  top-K          KL(p || q) where each of p's k likeliest tokens is by itself, the others are one

and what these are compared with, which reads no follow-up:

  SFT            -log p(y)            DPO    -log sigmoid(beta (log ratio of y' - that of y))

Every loss is the mean over an interaction's tokens, then the weighted mean over the step's
interactions; weights are normalised over all ranks, so that local losses add up to the step's.
docs/adding-an-objective.md adds one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sdpo_kernels import (
    Divergence,
    LogProb,
    TokenStats,
    VocabShard,
    linear_forward_kl,
    linear_jsd,
    linear_logprob,
    linear_reverse_kl,
    linear_sampled_token,
    linear_topk_divergence,
)

from .errors import SdpoError

if TYPE_CHECKING:
    from .hindsight import Reading


class Streams(NamedTuple):
    """Hidden states (N, D) of both passes at the response, their lm_heads (V, D), and y (N,).

    A ``hindsight_lm_head_weight`` of None is the policy's own. Where no second pass is read, its
    hidden states are the policy's, detached. With a ``shard`` both are this
    rank's rows of the vocabulary, and the gradient of ``hidden`` is partial. ``softcap`` and
    ``temperature`` are those of `LMHead`, for both passes.
    """

    hidden: Tensor
    lm_head_weight: Tensor
    hindsight_hidden: Tensor
    hindsight_lm_head_weight: Tensor | None
    targets: Tensor
    shard: VocabShard | None = None
    softcap: float | None = None
    temperature: float = 1.0


class Layout(NamedTuple):
    """Where each response token belongs; see ``batching.Batch``."""

    sequence_N: Tensor
    offset_N: Tensor
    weight_S: Tensor
    old_logp_N: Tensor | None = None


class Common(TypedDict):
    """Keyword arguments that every objective passes on to its kernel."""

    targets: Tensor
    token_weights: Tensor | None
    chunk_bytes: int | None
    shard: VocabShard | None
    softcap: float | None
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of the objectives."""

    ignore_first: int = 0
    """Response tokens left out of the loss at the start of each response."""
    chunk_bytes: int | None = None
    """Logits of both passes that may be alive at once, in bytes; None: by device."""
    hindsight_temperature: float = 1.0
    """Hindsight's logits are divided by it: below 1 hindsight is surer of what it says. A small
    model's hindsight is less sure than its policy, which then learns to be less sure, too."""

    def __post_init__(self):
        if not self.hindsight_temperature > 0:
            raise SdpoError(
                f"hindsight_temperature must be positive, got {self.hindsight_temperature}"
            )
        if self.ignore_first < 0:
            raise SdpoError(f"ignore_first must not be negative, got {self.ignore_first}")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise SdpoError(f"chunk_bytes must be positive, got {self.chunk_bytes}")
        if self.reading != "hindsight" and self.hindsight_temperature != 1:
            raise SdpoError(f"{type(self).__name__} reads no hindsight: no hindsight_temperature")

    @property
    def reading(self) -> "Reading":
        """What it needs to be read of an interaction."""
        return "hindsight"

    def per_token(self, streams: Streams, layout: Layout, common: Common) -> Divergence:
        """The kernel's call: its ``loss`` is the micro-batch's."""
        raise NotImplementedError


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
            raise SdpoError(
                "ppo_clip and importance_clip both correct for the sampling policy: set one of them"
            )
        for name in ("ppo_clip", "importance_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SdpoError(f"{name} must be positive, got {value}")

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether responses must come with the log-probabilities they were sampled with."""
        return self.ppo_clip is not None or self.importance_clip is not None

    def per_token(self, streams: Streams, layout: Layout, common: Common) -> Divergence:
        if self.needs_old_logprobs and layout.old_logp_N is None:
            raise SdpoError(
                "ppo_clip and importance_clip need the log-probabilities that the responses were "
                "sampled with: give every interaction completion_token_ids and "
                "completion_logprobs, or leave the clips unset"
            )
        return linear_sampled_token(
            *streams[:4],
            old_logp=layout.old_logp_N if self.needs_old_logprobs else None,
            ppo_clip=self.ppo_clip,
            importance_clip=self.importance_clip,
            centre=layout.sequence_N if self.centre else None,
            counted=layout.offset_N >= self.ignore_first,
            **common,
        )


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Objective):
    """KL(policy || hindsight): seeks the hindsight's modes; the stable choice in continual runs."""

    def per_token(self, streams: Streams, layout: Layout, common: Common) -> Divergence:
        return linear_reverse_kl(*streams[:4], **common)


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Objective):
    """KL(hindsight || policy): covers everything that hindsight would say."""

    def per_token(self, streams: Streams, layout: Layout, common: Common) -> Divergence:
        return linear_forward_kl(*streams[:4], **common)


@dataclass(frozen=True, kw_only=True)
class JSD(Objective):
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""

    beta: float = 0.5
    """Weight of the hindsight distribution in the mixture m; strictly between 0 and 1."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise SdpoError(
                f"beta must lie strictly between 0 and 1, got {self.beta}: its limits are the "
                "recipes forward-kl (0) and reverse-kl (1)"
            )

    def per_token(self, streams: Streams, layout: Layout, common: Common) -> Divergence:
        return linear_jsd(*streams[:4], beta=self.beta, **common)


@dataclass(frozen=True, kw_only=True)
class TopKReverseKL(Objective):
    """KL(policy || hindsight) over the policy's k likeliest tokens and one bucket for all others.

    sum over S of p (log p - log q) + p_rest (log p_rest - log q_rest), where S are the tokens that
    the policy finds likeliest, a constant of the gradient, and p_rest and q_rest what both leave to
    all other tokens. It is at most the reverse KL, and equal to it where k is the vocabulary's size
    or more. With k = 20 it is the ``full_distillation`` loss of the paper's later online code.
    """

    k: int = 20
    """Tokens that are told apart at each position; at least 1."""

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1:
            raise SdpoError(f"k must be at least 1, got {self.k}")

    def per_token(self, streams: Streams, layout: Layout, common: Common) -> Divergence:
        shard = streams.shard
        vocabulary = shard.total if shard else streams.lm_head_weight.shape[0]
        return linear_topk_divergence(*streams[:4], k=min(self.k, vocabulary), **common)


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """-log p(y): imitates a response as it was logged. There is no hindsight pass."""

    target: Literal["response", "next"] = "response"
    """What is imitated: the response, or the one behind its follow-up (``next_completion``)."""

    @property
    def reading(self) -> "Reading":
        return self.target

    def per_token(self, streams: Streams, layout: Layout, common: Common) -> Divergence:
        out = linear_logprob(streams.hidden, streams.lm_head_weight, **common)
        assert out.loss is not None
        return Divergence(-out.logp, _stats(out, out), -out.loss)


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """Prefers the response behind the follow-up to the one before it (arXiv:2305.18290).

    -log sigmoid(beta (log ratio of y' - log ratio of y)), where a response's log ratio is
    log p - log p_reference, summed over its tokens; the reference is the frozen teacher.
    """

    beta: float = 0.1
    """How strongly the policy is held to the reference; positive."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be the wrong way round; below 0.5."""

    def __post_init__(self):
        super().__post_init__()
        if not self.beta > 0:
            raise SdpoError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise SdpoError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")

    @property
    def reading(self) -> "Reading":
        return "pair"

    def per_token(self, streams: Streams, layout: Layout, common: Common) -> Divergence:
        options = Common({**common, "token_weights": None})  # they depend on both of a pair
        ours = linear_logprob(streams.hidden, streams.lm_head_weight, **options)
        head = streams.hindsight_lm_head_weight
        head = streams.lm_head_weight if head is None else head
        with torch.no_grad():
            reference = linear_logprob(streams.hindsight_hidden, head, **options)
        ratio_N = ours.logp - reference.logp
        margin_P = self.margins(ratio_N, layout)
        wrong = self.label_smoothing
        loss_P = -(1 - wrong) * logsigmoid(margin_P) - wrong * logsigmoid(-margin_P)
        loss = (layout.weight_S[::2] * loss_P).sum()
        return Divergence(ratio_N, _stats(ours, reference), loss)

    def margins(self, ratio_N: Tensor, layout: Layout) -> Tensor:
        """(P,): beta (log ratio of the preferred response - that of the rejected) of each pair."""
        ratio_N = torch.where(layout.offset_N >= self.ignore_first, ratio_N, 0)
        ratio_S = ratio_N.new_zeros(len(layout.weight_S))
        ratio_S = ratio_S.index_add(0, layout.sequence_N, ratio_N)
        return self.beta * (ratio_S[::2] - ratio_S[1::2])


def _stats(ours: LogProb, others: LogProb) -> TokenStats:
    logps = ours.logp.detach(), others.logp.detach()
    return TokenStats(*logps, ours.entropy, others.entropy, ours.lse, others.lse)


AnyObjective = SampledToken | ReverseKL | ForwardKL | JSD | TopKReverseKL | SFT | DPO
"""The objectives that a training configuration may name."""


def token_weights(layout: Layout, ignore_first: int = 0) -> Tensor:
    """(N,): the weight of each token, w_s / (counted tokens of its interaction s), 0 if ignored.

    An interaction with no counted token adds nothing, and still counts in the mean over
    interactions, as in the paper's code.
    """
    counted_N = (layout.offset_N >= ignore_first).to(layout.weight_S.dtype)
    length_S = torch.zeros_like(layout.weight_S).index_add_(0, layout.sequence_N, counted_N)
    return counted_N * (layout.weight_S / length_S.clamp(min=1))[layout.sequence_N]


def total_loss(objective: Objective, streams: Streams, layout: Layout) -> tuple[Tensor, TokenStats]:
    """The micro-batch's share of the step's loss (a scalar) and per-token statistics.

    The weights of all tokens are known before any value, so that four matmuls of N V D suffice
    however many tokens there are.

    Raises:
        SdpoError: a clip needs the sampling policy's log-probabilities, which are missing; or
            hindsight's temperature is to be changed under a softcap.
    """
    if (temperature := objective.hindsight_temperature) != 1:
        if streams.softcap is not None:
            raise SdpoError("hindsight_temperature: this model's logits are capped; leave it at 1")
        streams = streams._replace(hindsight_hidden=streams.hindsight_hidden / temperature)
    common = Common(
        targets=streams.targets,
        token_weights=token_weights(layout, objective.ignore_first),
        chunk_bytes=objective.chunk_bytes,
        shard=streams.shard,
        softcap=streams.softcap,
        temperature=streams.temperature,
    )
    out = objective.per_token(streams, layout, common)
    assert out.loss is not None
    return out.loss, out.stats
