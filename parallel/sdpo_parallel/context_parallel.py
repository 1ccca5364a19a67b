"""Context parallelism: every rank of a group holds a part of each row's slots, in both passes.

A response's slots differ between the passes, so its hidden states may lie on one rank in the
policy's rows and on another in the hindsight's. ``gather_rows`` brings the few rows that the head
reads to all ranks of the group; the head's work is then dealt out by whole responses
(``TitanModel.own_responses``). Nothing has to be aligned, and nothing is padded for it.

Slots are dealt head and tail (torch's load balancer): rank r of R takes slices r and 2R-1-r.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed.context_parallel import cp_shard


def head_tail_order(width: int, ranks: int) -> Tensor:
    """(width,): original slots in the order in which the ranks hold them."""
    slices = torch.arange(width).view(2 * ranks, -1)
    pairs = [torch.cat([slices[r], slices[2 * ranks - 1 - r]]) for r in range(ranks)]
    return torch.cat(pairs)


def shard_rows(mesh: DeviceMesh, tensors_BT: tuple[Tensor, ...], masks: Any) -> tuple[Any, Any]:
    """This rank's slots of (B, T) tensors and of an attention mask.

    A dense mask (B, 1, T, T) loses the queries of others; keys stand in the order in which
    torchtitan gathers them.
    """
    dense = isinstance(masks, Tensor)
    tensors, sharded = cp_shard(mesh, tensors_BT, None if dense else masks)
    if dense:
        order = head_tail_order(masks.shape[-1], mesh.size()).to(masks.device)
        mine = order.chunk(mesh.size())[mesh.get_local_rank()]
        sharded = masks[:, :, mine][..., order]
    return tensors, sharded


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MD: Tensor, where_M: Tensor, n: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(where_M)
        out_ND = rows_MD.new_zeros(n, rows_MD.shape[1])
        out_ND[where_M] = rows_MD
        dist.all_reduce(out_ND, group=group)  # one addend is not zero: exact
        return out_ND

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (where_M,) = ctx.saved_tensors
        grad_ND = grads[0].contiguous().clone()
        dist.all_reduce(grad_ND, group=ctx.group)
        return grad_ND[where_M], None, None, None


def gather_rows(
    h_BLD: Tensor, slots_BL: Tensor, slots: int, index_N: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """(N, D) on every rank of the group: the rows at the slots ``index_N`` of the whole batch.

    Args:
        h_BLD: this rank's part of the hidden states.
        slots_BL: which of the ``slots`` slots of the whole batch they belong to.
    """
    place = torch.full((slots,), -1, device=h_BLD.device)
    place[slots_BL.flatten()] = torch.arange(slots_BL.numel(), device=h_BLD.device)
    local_N = place[index_N]
    where_M = (local_N >= 0).nonzero()[:, 0]
    rows_MD = h_BLD.flatten(0, 1)[local_N[where_M]]
    out: Any = _GatherRows.apply(rows_MD, where_M, index_N.numel(), group)
    return out
