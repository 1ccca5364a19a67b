"""Context parallelism: every rank of a group holds a part of each row's slots, in both passes.

A response's slots differ between the passes, so its hidden states may lie on one rank in the
policy's rows and on another in the hindsight's. ``gather_rows`` brings the few rows that the
lm_head reads to all ranks of the group; the lm_head's work is then assigned by whole responses
(``TorchtitanModel.own_responses``). Nothing has to be aligned, and nothing is padded for it.

Slots are assigned head and tail: rank r of R takes slices r and 2R-1-r of 2R.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh

from ..rows import Rows, Sight


class Share(NamedTuple):
    """The slots of a row that this rank of a group holds."""

    order_T: Tensor
    """All slots, in the order in which the ranks hold them, and keys are gathered."""
    mine_L: Tensor
    """This rank's slots."""


def share(width: int, mesh: DeviceMesh, device: torch.device) -> Share:
    """Assign slots head and tail, as torch's load balancer does."""
    ranks = mesh.size()
    slices = torch.arange(width, device=device).view(2 * ranks, -1)
    pairs = [torch.cat([slices[r], slices[2 * ranks - 1 - r]]) for r in range(ranks)]
    return Share(torch.cat(pairs), pairs[mesh.get_local_rank()])


def sight_of(rows: Rows, part: Share) -> Sight:
    """What this rank's slots see, of all keys in the order in which they are gathered."""
    place_BT, end_BT = rows.place_BT, rows.end_BT
    return Sight(place_BT[:, part.mine_L], place_BT[:, part.order_T], end_BT[:, part.order_T])


def gather_rows(
    h_BLD: Tensor, slots_BL: Tensor, slots: int, index_N: Tensor, group: ProcessGroup
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
    out_ND = rows_MD.new_zeros(index_N.numel(), rows_MD.shape[1]).index_copy(0, where_M, rows_MD)
    return all_reduce(out_ND, "sum", group)  # exact: all but one of the addends are zero
