"""Attention that computes one branch of a row after the other, with SDPA: for a CPU.

A branch is a run of slots of which each sees the one before it: a whole sequence, or what follows
where sequences part. All its queries see the same earlier slots, and each other causally; nothing
invisible is computed, and no (T, T) mask is made.

Shapes: B rows, N heads, Q queries and K keys of a row, H head size.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .rows import Sight


@dataclass(frozen=True)
class Branch:
    """Queries ``start`` to ``stop`` of a row and the pieces of its keys that they see."""

    start: int
    stop: int
    pieces: list[int]
    mask: Tensor | None
    """(queries, keys) to add to the scores; None: causal, and there are no earlier keys."""


@dataclass(frozen=True)
class Plan:
    """The branches of one row; its keys are cut into pieces of ``sizes``."""

    sizes: list[int]
    branches: list[Branch]


def plan(sight: Sight, dtype: torch.dtype) -> list[Plan]:
    """How to compute what ``sight`` allows, for each row. The last Q keys are the queries' own.

    Args:
        dtype: of queries and keys.
    """
    query, key, end = (t.cpu().numpy() for t in sight)
    return [_plan(*row, dtype) for row in zip(query, key, end, strict=True)]


def _plan(query: NDArray, key: NDArray, end: NDArray, dtype: torch.dtype) -> Plan:
    before = len(key) - len(query)
    # a slot that does not see the one before it begins a branch
    parts = np.flatnonzero(end[before:-1] <= query[1:]) + 1
    starts, stops = [0, *parts.tolist()], [*parts.tolist(), len(query)]
    seen = [
        np.flatnonzero(
            (key[: before + start] <= query[start]) & (query[start] < end[: before + start])
        )
        for start in starts
    ]
    runs = [_runs(s) for s in seen]
    own = {before + start for start in starts}
    cuts = sorted({0, len(key)} | own | {x for run in runs for pair in run for x in pair})
    number = {cut: i for i, cut in enumerate(cuts)}
    branches = []
    for start, stop, run, earlier in zip(starts, stops, runs, seen, strict=True):
        spans = [*run, (before + start, before + stop)]
        pieces = [i for a, b in spans for i in range(number[a], number[b])]
        mask = _mask(stop - start, len(earlier), dtype) if len(earlier) else None
        branches.append(Branch(start, stop, pieces, mask))
    return Plan(np.diff(cuts).tolist(), branches)


def _runs(indices: NDArray) -> list[tuple[int, int]]:
    """Ascending indices as (first, last + 1) of each run of consecutive ones."""
    if not len(indices):
        return []
    gaps = np.flatnonzero(np.diff(indices) > 1)
    firsts, lasts = indices[[0, *(gaps + 1)]], indices[[*gaps, -1]]
    return [(int(a), int(b) + 1) for a, b in zip(firsts, lasts, strict=True)]


def _mask(queries: int, earlier: int, dtype: torch.dtype) -> Tensor:
    later = torch.ones(queries, earlier + queries, dtype=torch.bool).triu(earlier + 1)
    return torch.zeros(later.shape, dtype=dtype).masked_fill(later, -torch.inf)


def attend(
    q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, plans: list[Plan], scale: float | None = None
) -> Tensor:
    """(B, N, Q, H): attention of every query over the keys that its row's plan lets it see. There
    may be fewer heads of keys and values than of queries."""
    out = []
    for q, k, v, row in zip(q_BNQH, k_BNKH, v_BNKH, plans, strict=True):
        keys, values = k.split(row.sizes, dim=1), v.split(row.sizes, dim=1)
        for branch in row.branches:
            out.append(
                F.scaled_dot_product_attention(
                    q[None, :, branch.start : branch.stop],
                    _joined(keys, branch.pieces),
                    _joined(values, branch.pieces),
                    attn_mask=branch.mask,
                    is_causal=branch.mask is None,
                    scale=scale,
                    enable_gqa=q.shape[0] != k.shape[0],
                )
            )
    return (
        torch.cat(out, dim=2)
        .view(q_BNQH.shape[1], len(plans), -1, v_BNKH.shape[-1])
        .transpose(0, 1)
    )


def _joined(pieces: tuple[Tensor, ...], which: list[int]) -> Tensor:
    if len(which) == 1:
        return pieces[which[0]][None]
    return torch.cat([pieces[i] for i in which], dim=1)[None]
