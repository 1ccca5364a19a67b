"""The contenders of ``benchmarks.step``: each computes the same loss of the same interactions.

Shapes: B interactions of a micro-batch, T tokens, R the longest response, V vocabulary.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from benchmarks.peers import lacking
from sdpo.batching import Batch, BatchConfig, micro_batches
from sdpo.hindsight import Encoded
from sdpo.objective import ReverseKL, SampledToken
from sdpo.step import two_pass_loss
from sdpo_parallel.rows import Sharing
from sdpo_parallel.transformers.engine import TransformersModel, choose_attention

ObjectiveName = Literal["sampled_token", "reverse_kl"]
OBJECTIVES = {"sampled_token": SampledToken, "reverse_kl": ReverseKL}
IGNORE_FIRST = 2
"""Response tokens without loss, as in the paper's offline runs."""


class Pass(NamedTuple):
    """What a model reads: rows of one interaction, padded on the right."""

    tokens_BT: Tensor
    starts_B: Tensor
    """Where the response begins."""


class Padded(NamedTuple):
    """One micro-batch as it is without packing."""

    policy: Pass
    hindsight: Pass
    response_BR: Tensor
    """Response tokens, padded."""
    counted_BR: Tensor
    """Response tokens with a loss, as 0 and 1."""
    share: float
    """Share of the step's interactions that this micro-batch holds."""


Loss = Callable[[PreTrainedModel, Any], Tensor]


@dataclass(frozen=True)
class Contender:
    """A way to compute the loss of a micro-batch, and the micro-batches it takes."""

    name: str
    loss: Loss
    batches: Callable[[Sequence[Encoded], int, str], list[Any]]
    """From a step's interactions, the slots of a micro-batch, and the device."""
    packages: tuple[str, ...] = ()
    """Modules that must be importable."""
    liger: bool = False
    """On a model with Liger's norms, MLPs and rotary embeddings."""
    reads_tries: bool = False
    """Its rows share prefixes."""

    def missing(self, device: str) -> str | None:
        """Why it cannot run; None: it can."""
        if self.liger and torch.device(device).type != "cuda":
            return "needs a GPU"
        if self.reads_tries and choose_attention(device, "bfloat16"):
            return "is not compared here: the model's attention is flash-attn, for whole sequences"
        absent = " ".join(filter(None, map(lacking, self.packages)))
        return f"lacks a package: pip install {absent}" if absent else None


def contenders(objective: ObjectiveName) -> list[Contender]:
    """Everyone, each also with Liger's model kernels."""
    plain = [
        Contender("sdpo", _ours(objective), _packed),
        Contender("sdpo, prefixes shared", _ours(objective), _tries, reads_tries=True),
        Contender("sdpo, not packed", _ours(objective, packed=False), _packed),
        Contender("full logits (the paper's)", full_logits(objective), padded),
        Contender("TRL's SDPO loss", _trl(objective), padded, packages=("trl", "datasets")),
    ]
    return plain + [
        replace(c, name=f"{c.name}, Liger", packages=(*c.packages, "liger_kernel"), liger=True)
        for c in plain
    ]


def _ours(name: ObjectiveName, packed: bool = True) -> Loss:
    objective = OBJECTIVES[name](ignore_first=IGNORE_FIRST)

    @lru_cache(maxsize=1)
    def policy(model: PreTrainedModel) -> TransformersModel:
        found = TransformersModel(model)
        if not packed:
            found.packs = found.reads_tries = False
        return found

    return lambda model, batch: two_pass_loss(policy(model), batch, objective).loss


def full_logits(objective: ObjectiveName) -> Loss:
    """Both passes as the paper describes them, with nothing fused: every position's logits, their
    log-softmax in float32, and then what the objective needs of it."""

    def loss(model: PreTrainedModel, x: Padded) -> Tensor:
        with torch.no_grad():
            logq_BTV = _log_softmax(model, x.hindsight)
        logp_BTV = _log_softmax(model, x.policy)
        p, q = _at_response(logp_BTV, x.policy, x), _at_response(logq_BTV, x.hindsight, x)
        if objective == "reverse_kl":
            value_BR = (p.exp() * (p - q)).sum(-1)
        else:
            p, q = (t.gather(-1, x.response_BR[..., None])[..., 0] for t in (p, q))
            value_BR = -(q - p).detach() * p
        return _mean_of_means(value_BR, x)

    return loss


def _trl(objective: ObjectiveName) -> Loss:
    """TRL's SDPO trainer: logits of the last slots only, and its own loss functions on them."""

    def loss(model: PreTrainedModel, x: Padded) -> Tensor:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from trl.experimental.sdpo import loss_utils

        with torch.no_grad():
            theirs = _last_logits(model, x.hindsight, x)
        ours = _last_logits(model, x.policy, x)
        if objective == "reverse_kl":
            value_BR = loss_utils.compute_full_logit_self_distillation_loss(
                ours, theirs, distillation_alpha=1.0
            )
        else:
            value_BR = loss_utils.compute_sampled_token_self_distillation_loss(
                ours, theirs, x.response_BR, distillation_alpha=1.0
            )
        return _mean_of_means(value_BR, x)

    return loss


def _log_softmax(model: PreTrainedModel, given: Pass) -> Tensor:
    return model(input_ids=given.tokens_BT, use_cache=False).logits.float().log_softmax(-1)


def _at_response(logp_BTV: Tensor, given: Pass, x: Padded) -> Tensor:
    """(B, R, V) at the slots that predict the response."""
    b, r = (torch.arange(n, device=logp_BTV.device) for n in x.response_BR.shape)
    slots_BR = (given.starts_B[:, None] - 1 + r).clamp(max=logp_BTV.shape[1] - 1)
    return logp_BTV[b[:, None], slots_BR]


def _last_logits(model: PreTrainedModel, given: Pass, x: Padded) -> Tensor:
    """(B, R, V). TRL pads prompts on the left, so that its responses are the last slots; these
    rows are laid out like that before they are read."""
    tokens_BT, starts_B = given
    width, r = tokens_BT.shape[1], x.response_BR.shape[1]
    prompt = int(starts_B.max())
    slots_T = torch.arange(prompt + r, device=tokens_BT.device)
    source_BT = slots_T - (prompt - starts_B)[:, None]
    mask_BT = (source_BT >= 0) & (source_BT < width)
    rows = tokens_BT.gather(1, source_BT.clamp(0, width - 1))
    out = model(input_ids=rows, attention_mask=mask_BT, use_cache=False, logits_to_keep=r + 1)
    return out.logits[:, :-1]


def _mean_of_means(value_BR: Tensor, x: Padded) -> Tensor:
    """The mean over counted tokens, then this micro-batch's share of the mean over interactions."""
    length_B = x.counted_BR.sum(-1).clamp(min=1)
    return ((value_BR * x.counted_BR).sum(-1) / length_B).mean() * x.share


def _packed(
    items: Sequence[Encoded], slots: int, device: str, sharing: Sharing = "none"
) -> list[Batch]:
    config = BatchConfig(row_tokens=max(1, slots // 2), micro_batch_tokens=slots)
    examples = [(e, 1 / len(items)) for e in items]
    return [b.to(device) for b in micro_batches(examples, config, sharing)]


def _tries(items: Sequence[Encoded], slots: int, device: str) -> list[Batch]:
    """Rows that share prefixes; hindsight reads on the policy's keys and values."""
    return _packed(items, slots, device, "keys")


def padded(items: Sequence[Encoded], slots: int, device: str) -> list[Padded]:
    """Micro-batches in the order of the data, as many rows as fit when padded to the longest."""
    groups: list[list[Encoded]] = [[]]
    for e in items:
        longest = max(len(x.hindsight) + len(x.response) for x in [*groups[-1], e])
        if groups[-1] and longest * (len(groups[-1]) + 1) > slots:
            groups.append([])
        groups[-1].append(e)
    return [_pad(group, len(items), device) for group in groups]


def _pad(group: Sequence[Encoded], total: int, device: str) -> Padded:
    def rows(sequences: Iterable[Sequence[float]]) -> Tensor:
        return pad_sequence([torch.tensor(s) for s in sequences], batch_first=True).to(device)

    def reading(prompts: Sequence[tuple[int, ...]]) -> Pass:
        tokens_BT = rows(p + e.response for p, e in zip(prompts, group, strict=True))
        return Pass(tokens_BT, torch.tensor([len(p) for p in prompts], device=device))

    return Padded(
        policy=reading([e.policy for e in group]),
        hindsight=reading([e.hindsight for e in group]),
        response_BR=rows(e.response for e in group),
        counted_BR=rows([float(i >= IGNORE_FIRST) for i in range(len(e.response))] for e in group),
        share=len(group) / total,
    )
