"""The two passes: a micro-batch and a model -> loss and metric sums. For any training loop.

    from sdpo.step import two_pass_loss
    out = two_pass_loss(model, batch, ReverseKL())
    out.loss.backward()

``model`` is a `CausalModel`: ``TransformersModel`` wraps any causal LM of transformers,
``TorchtitanModel`` a sharded torchtitan model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_kernels import TokenStats
from sdpo_parallel.model import CausalModel
from sdpo_parallel.rows import Kept, Rows, Sharing

from .batching import Batch
from .errors import SdpoError
from .hindsight import ALONE, Reading, Truncated
from .objective import DPO, Layout, Objective, SampledToken, Streams, total_loss

NEAR_ZERO = 0.01
"""Nats; a token with a smaller advantage counts as teaching nothing."""

SUMS = (
    "loss",
    "tokens",
    "interactions",
    "ended",
    "advantage_abs",
    "advantage_near_zero",
    "advantage_at_end",
    "entropy_policy",
    "entropy_hindsight",
    "logp_policy",
    "logp_hindsight",
    *(f"truncated_{kind}" for kind in Truncated._fields),
    "clipped",
    "gap",
    "gap_tokens",
    "preferred",
    "margin",
)
"""What ``StepOutput.sums`` holds, in order. They add over micro-batches and ranks."""


OF_HINDSIGHT = ("entropy/hindsight", "logp/hindsight")
"""Metrics, beside ``advantage/*``, that runs without a hindsight pass do not have."""


@dataclass(frozen=True)
class StepOutput:
    """``loss``: this micro-batch's share, to be summed. ``sums``: (len(SUMS),) float64."""

    loss: Tensor
    sums: Tensor
    stats: TokenStats


def two_pass_loss(
    policy: CausalModel, batch: Batch, objective: Objective, teacher: CausalModel | None = None
) -> StepOutput:
    """Read the responses with and without the follow-up; distil the one into the other.

    The hindsight pass runs second and without gradient. Where prefixes are shared and the policy
    is its own teacher, it reads on the keys and values of the policy's pass. Of an objective that
    reads no follow-up there is no second pass (SFT), or it reads what the first does (DPO).

    Args:
        policy: the model in training.
        batch: on the model's device.
        teacher: reads the hindsight prompt; None: the policy itself, as it is now. One that is
            sharded by FSDP2 holds on to its gathered weights: ``reshard`` it before changing them.

    Raises:
        SdpoError: policy and teacher do not make logits alike of their lm_heads' products, or the
            batch's rows share what they cannot read, or were not collated for the objective.
    """
    teacher = teacher or policy
    if objective.reading in ALONE:
        teacher, hidden_ND = policy, policy.hidden_states(batch.policy)
        hindsight_ND = hidden_ND.detach()
    else:
        _check_reading(objective, batch, other_teacher=teacher is not policy)
        hidden_ND, hindsight_ND = two_passes(
            policy, batch.policy, batch.hindsight, teacher, batch.sharing
        )
    with torch.no_grad():
        other = teacher.lm_head() if teacher is not policy else None
    if (kept := own_share(policy, batch)) is not None:
        batch, kept_N = kept
        hidden_ND, hindsight_ND = hidden_ND[kept_N], hindsight_ND[kept_N]
    head = policy.lm_head()
    if other is not None and other[2:] != head[2:]:
        raise SdpoError(
            f"policy and teacher differ in (softcap, temperature) of their logits, {head[2:]} and "
            f"{other[2:]}: choose a teacher of the policy's family"
        )
    streams = Streams(
        hidden_ND,
        head.weight,
        hindsight_ND,
        None if other is None else other.weight,
        batch.targets_N,
        **head.options,
    )
    loss, stats = total_loss(objective, streams, _layout(batch))
    return StepOutput(loss, _sums(objective, loss, stats, batch), stats)


def _layout(batch: Batch) -> Layout:
    return Layout(batch.sequence_N, batch.offset_N, batch.weight_S, batch.old_logp_N)


def _check_reading(objective: Objective, batch: Batch, other_teacher: bool) -> None:
    if objective.reading == "pair" and not other_teacher:
        raise SdpoError("DPO needs a reference that is not the policy: give a frozen teacher")
    if batch.pairs != (objective.reading == "pair") or not batch.hindsight.tokens_BT.numel():
        raise SdpoError(
            f"the batch was not collated for {type(objective).__name__}: encode and collate with "
            f"reading={objective.reading!r}"
        )


def two_passes(
    policy: CausalModel, rows: Rows, hindsight: Rows, teacher: CausalModel, sharing: Sharing
) -> tuple[Tensor, Tensor]:
    """(N, D) of the policy's rows, and without gradient those of hindsight's.

    Raises:
        SdpoError: the rows share what these models cannot read.
    """
    if sharing == "keys" and teacher is not policy:
        raise SdpoError(
            "the batch's hindsight rows read the policy's keys (sharing 'keys'), which another "
            "teacher's differ from: collate with sharing 'tries'"
        )
    if sharing != "none" and not (policy.reads_tries and teacher.reads_tries):
        raise SdpoError(
            f"the batch's rows share prefixes (sharing {sharing!r}), which the model cannot read: "
            "collate with sharing 'none'"
        )
    kept = Kept(rows) if sharing == "keys" else None
    hidden_ND = policy.hidden_states(rows, keep=kept)
    with torch.no_grad():
        hindsight_ND = teacher.hidden_states(hindsight, behind=kept)
    if kept is not None:
        kept.drop()
    return hidden_ND, hindsight_ND


def own_share(policy: CausalModel, batch: Batch) -> tuple[Batch, Tensor] | None:
    """The part of a micro-batch whose loss this rank computes, where several ranks read the same
    one, and the indices of its tokens among the N; None: all of it."""
    each = 2 if batch.pairs else 1
    lengths = [sum(batch.lengths[i : i + each]) for i in range(0, len(batch.lengths), each)]
    mine = policy.own_responses(lengths)
    return None if mine is None else batch.only([i * each + k for i in mine for k in range(each)])


@torch.no_grad()
def score(policy: CausalModel, batch: Batch, teacher: CausalModel | None = None) -> TokenStats:
    """Both log-probabilities and entropies of every response token, without gradient."""
    return two_pass_loss(policy, batch, SampledToken(), teacher).stats


def metrics(sums: Tensor, reading: Reading = "hindsight") -> dict[str, float]:
    """Sums over a step -> what is logged. Means are over response tokens; lengths in tokens.

    ``sampler/gap``, the mean |log p - log p as sampled|, is there where responses came with it.
    What compares with hindsight is there where hindsight is read, ``preference/*`` where pairs are.
    """
    s = dict(zip(SUMS, sums.tolist(), strict=True))
    tokens, n = max(s["tokens"], 1.0), max(s["interactions"], 1.0)
    found = {
        "loss": s["loss"],
        "advantage/mean_abs": s["advantage_abs"] / tokens,
        "advantage/near_zero": s["advantage_near_zero"] / tokens,
        "advantage/at_end": s["advantage_at_end"] / max(s["ended"], 1.0),
        "entropy/policy": s["entropy_policy"] / tokens,
        "entropy/hindsight": s["entropy_hindsight"] / tokens,
        "logp/policy": s["logp_policy"] / tokens,
        "logp/hindsight": s["logp_hindsight"] / tokens,
        "response/tokens": s["tokens"],
        "response/length": s["tokens"] / n,
        **{f"truncated/{kind}": s[f"truncated_{kind}"] for kind in Truncated._fields},
        "advantage/clipped": s["clipped"] / tokens,
        **({"sampler/gap": s["gap"] / s["gap_tokens"]} if s["gap_tokens"] else {}),
    }
    if reading == "hindsight":
        return found
    of_pairs = {
        "logp/reference": found["logp/hindsight"],
        "preference/accuracy": 2 * s["preferred"] / n,
        "preference/margin": 2 * s["margin"] / n,
    }
    kept = {
        name: value
        for name, value in found.items()
        if not name.startswith("advantage/") and name not in OF_HINDSIGHT
    }
    return kept | of_pairs if reading == "pair" else kept


@torch.no_grad()
def _sums(objective: Objective, loss: Tensor, stats: TokenStats, batch: Batch) -> Tensor:
    advantage_N = stats.logp_teacher - stats.logp_student
    values = [
        loss.detach(),
        torch.full_like(loss, batch.targets_N.numel()),
        torch.full_like(loss, batch.weight_S.numel()),
        batch.end_N.sum(),
        advantage_N.abs().sum(),
        (advantage_N.abs() < NEAR_ZERO).sum(),
        (advantage_N * batch.end_N).sum(),
        stats.entropy_student.sum(),
        stats.entropy_teacher.sum(),
        stats.logp_student.sum(),
        stats.logp_teacher.sum(),
        *batch.truncated_SK.sum(0),
        _clipped(objective, stats, batch),
        *_gap(stats, batch),
        *_preferred(objective, stats, batch),
    ]
    return torch.stack([v.to(loss.device, torch.float64) for v in values])


def _gap(stats: TokenStats, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum of |log p here - log p as sampled|, and of how many tokens."""
    none = stats.logp_student.new_zeros(())
    if batch.old_logp_N is None:
        return none, none
    return (stats.logp_student - batch.old_logp_N).abs().sum(), none + batch.old_logp_N.numel()


def _preferred(objective: Objective, stats: TokenStats, batch: Batch) -> tuple[Tensor, Tensor]:
    """How many pairs' margins are positive, and the margins' sum."""
    none = stats.logp_student.new_zeros(())
    if not isinstance(objective, DPO):
        return none, none
    margin_P = objective.margins(stats.logp_student - stats.logp_teacher, _layout(batch))
    return (margin_P > 0).sum(), margin_P.sum()


def _clipped(objective: Objective, stats: TokenStats, batch: Batch) -> Tensor:
    """Tokens whose ratio to the sampling policy lies beyond the objective's clip."""
    none = stats.logp_student.new_zeros(())
    if not isinstance(objective, SampledToken) or batch.old_logp_N is None:
        return none
    ratio_N = (stats.logp_student - batch.old_logp_N).exp()
    if (c := objective.ppo_clip) is not None:
        return ((ratio_N - 1).abs() > c).sum()
    if (c := objective.importance_clip) is not None:
        return (ratio_N > c).sum()
    return none
