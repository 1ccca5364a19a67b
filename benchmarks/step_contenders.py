"""The contenders of ``benchmarks.step``: each computes the same loss of the same interactions.

Shapes: B interactions of a micro-batch, T tokens, R the longest response, V vocabulary.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from sdpo.batching import Batch, BatchConfig, Example, micro_batches
from sdpo.hindsight import Encoded
from sdpo.objective import ReverseKL, SampledToken
from sdpo.step import two_pass_loss
from sdpo_parallel.transformers.engine import TransformersModel

ObjectiveName = Literal["sampled_token", "reverse_kl"]
DENSE_ROW = 2048
"""Tokens of a packed row without flash-attn."""
IGNORE_FIRST = 2
"""Response tokens without loss, as in the paper's offline runs."""


class Padded(NamedTuple):
    """One micro-batch as it is without packing: rows of one interaction, padded on the right."""

    policy_BT: Tensor
    hindsight_BT: Tensor
    starts_B2: Tensor
    """Where the response begins in either pass."""
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
    """Module that must be importable."""
    liger: bool = False
    """On a model with Liger's norms, MLPs and rotary embeddings."""

    def missing(self, device: str) -> str | None:
        """Why it cannot run; None: it can."""
        if self.liger and torch.device(device).type != "cuda":
            return "needs a GPU"
        absent = [name for name in self.packages if find_spec(name) is None]
        if absent:
            return f"lacks a package: pip install {' '.join(absent).replace('_', '-')}"
        return None


def contenders(objective: ObjectiveName) -> list[Contender]:
    """Everyone, each also with Liger's model kernels."""
    plain = [
        Contender("sdpo", _ours(objective, packed=True), _packed),
        Contender("sdpo, not packed", _ours(objective, packed=False), _packed),
        Contender("full logits (the paper's)", full_logits(objective), padded),
        Contender("TRL's SDPO loss", _trl(objective), padded, packages=("trl", "datasets")),
    ]
    return plain + [
        replace(c, name=f"{c.name}, Liger", packages=(*c.packages, "liger_kernel"), liger=True)
        for c in plain
    ]


def _ours(name: ObjectiveName, packed: bool) -> Loss:
    kind = {"sampled_token": SampledToken, "reverse_kl": ReverseKL}[name]
    objective = kind(ignore_first=IGNORE_FIRST)
    policies: dict[int, TransformersModel] = {}

    def loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        policy = policies.get(id(model))
        if policy is None:
            policies.clear()
            policy = policies[id(model)] = TransformersModel(model)
            policy.packs = packed
        return two_pass_loss(policy, batch, objective).loss

    return loss


def full_logits(objective: ObjectiveName) -> Loss:
    """Both passes as the paper describes them, with nothing fused: every position's logits, their
    log-softmax in float32, and then what the objective needs of it."""

    def loss(model: PreTrainedModel, x: Padded) -> Tensor:
        with torch.no_grad():
            logq = _log_softmax(model, x.hindsight_BT)
        logp = _log_softmax(model, x.policy_BT)
        at_p, at_q = (_response_slots(x, pass_) for pass_ in (0, 1))
        if objective == "reverse_kl":
            p, q = _take(logp, at_p), _take(logq, at_q)
            value_BR = (p.exp() * (p - q)).sum(-1)
        else:
            p, q = (
                _take(t, at).gather(-1, x.response_BR[..., None])[..., 0]
                for t, at in ((logp, at_p), (logq, at_q))
            )
            value_BR = -(q - p).detach() * p
        return _mean_of_means(value_BR, x)

    return loss


def _trl(objective: ObjectiveName) -> Loss:
    """TRL's SDPO trainer: logits of the last slots only, and its own loss functions on them."""

    def loss(model: PreTrainedModel, x: Padded) -> Tensor:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from trl.experimental.sdpo import loss_utils

        with torch.no_grad():
            theirs = _last_logits(model, x, x.hindsight_BT, 1)
        ours = _last_logits(model, x, x.policy_BT, 0)
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


def _log_softmax(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    return model(input_ids=tokens_BT, use_cache=False).logits.float().log_softmax(-1)


def _response_slots(x: Padded, pass_: int) -> Tensor:
    """(B, R): the slots whose logits predict the response."""
    r = torch.arange(x.response_BR.shape[1], device=x.response_BR.device)
    limit = (x.policy_BT, x.hindsight_BT)[pass_].shape[1] - 1
    return (x.starts_B2[:, pass_, None] - 1 + r).clamp(max=limit)


def _take(x_BTV: Tensor, index_BR: Tensor) -> Tensor:
    rows_B1 = torch.arange(len(index_BR), device=index_BR.device)[:, None]
    return x_BTV[rows_B1, index_BR]


def _last_logits(model: PreTrainedModel, x: Padded, tokens_BT: Tensor, pass_: int) -> Tensor:
    """(B, R, V). TRL pads prompts on the left, so that its responses are the last slots; these
    rows are laid out like that before they are read."""
    width, r = tokens_BT.shape[1], x.response_BR.shape[1]
    prompt = int(x.starts_B2[:, pass_].max())
    shift_B1 = (prompt - x.starts_B2[:, pass_])[:, None]
    slots_1T = torch.arange(prompt + r, device=tokens_BT.device)[None]
    source_BT = slots_1T - shift_B1
    mask_BT = (source_BT >= 0) & (source_BT < width)
    rows = tokens_BT.gather(1, source_BT.clamp(0, width - 1))
    out = model(input_ids=rows, attention_mask=mask_BT, use_cache=False, logits_to_keep=r + 1)
    return out.logits[:, :-1]


def _mean_of_means(value_BR: Tensor, x: Padded) -> Tensor:
    """The mean over counted tokens, then this micro-batch's share of the mean over interactions."""
    length_B = x.counted_BR.sum(-1).clamp(min=1)
    return ((value_BR * x.counted_BR).sum(-1) / length_B).mean() * x.share


def _packed(items: Sequence[Encoded], slots: int, device: str) -> list[Batch]:
    # a dense mask lets a token look at all of its row: there, rows of many documents cost more
    flash = torch.device(device).type == "cuda" and is_flash_attn_2_available()
    row_tokens = slots // 2 if flash else min(slots // 2, DENSE_ROW)
    config = BatchConfig(row_tokens=row_tokens, micro_batch_tokens=slots)
    weighted: list[Example] = [(e, 1 / len(items)) for e in items]
    return [b.to(device) for b in micro_batches(weighted, config)]


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
    def rows(sequences: Iterator[tuple[int, ...]]) -> Tensor:
        return pad_sequence([torch.tensor(s) for s in sequences], batch_first=True).to(device)

    counted = [[float(i >= IGNORE_FIRST) for i in range(len(e.response))] for e in group]
    starts = torch.tensor([[len(e.policy), len(e.hindsight)] for e in group], device=device)
    return Padded(
        policy_BT=rows(e.policy + e.response for e in group),
        hindsight_BT=rows(e.hindsight + e.response for e in group),
        starts_B2=starts,
        response_BR=rows(e.response for e in group),
        counted_BR=rows(tuple(c) for c in counted),
        share=len(group) / total,
    )
