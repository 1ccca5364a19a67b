"""The lm_head that the objectives read: whole, or this rank's rows of it.

  FSDP2   [norm, lm_head] is one group of the sharded module (with the embeddings, where tied). Its
          gathered weight is a leaf: the gradient is reduce-scattered by FSDP2 itself.
  TP      the rank holds rows of the vocabulary, (V / tensor, D), and ``shard`` says which; the
          kernels exchange a handful of numbers per token, never logits.

``hold`` keeps the group gathered between the micro-batches of a step: one all-gather of the
lm_head per step, not one per micro-batch or pass.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sdpo_kernels import VocabShard

from ..model import LMHead


def gathered(lm_head: torch.nn.Module, vocabulary: int, group: ProcessGroup | None) -> LMHead:
    """The lm_head of a sharded model; ``group``: its tensor-parallel ranks."""
    if isinstance(lm_head, FSDPModule):
        lm_head.unshard()  # a no-op where the group is gathered already
    weight: Tensor = lm_head.weight  # pyright: ignore[reportAssignmentType]
    if isinstance(weight, DTensor):
        weight = weight.to_local(grad_placements=weight.placements)
    return LMHead(weight, VocabShard.of(group, vocabulary) if group is not None else None)


def hold(lm_head: torch.nn.Module, until_last: bool) -> None:
    """Before a micro-batch's backward: stay gathered after it, unless it is the step's last."""
    if isinstance(lm_head, FSDPModule):
        lm_head.set_reshard_after_backward(not until_last, recurse=False)


def end_prefetch(embeddings: torch.nn.Module) -> None:
    """Let the backward's prefetch end at the embeddings.

    FSDP2's backward prefetches what ran before a module the last time. With a live teacher that was
    the hindsight pass, which runs the policy's modules in the policy's order: every layer calls for
    the right one. Before its embeddings, however, the policy's lm_head ran: at the end of a step it
    would be gathered again, for nothing. Naming the embeddings, which are gathered already, costs
    nothing.
    """
    if isinstance(embeddings, FSDPModule):
        embeddings.set_modules_to_backward_prefetch([embeddings])
