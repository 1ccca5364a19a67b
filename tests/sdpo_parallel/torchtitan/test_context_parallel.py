"""The masks of context ranks, for flex attention and dense, against the whole batch's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from sdpo_parallel.rows import Rows
from sdpo_parallel.torchtitan import context_parallel


def positions(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Packed documents of random lengths."""
    starts = torch.rand(rows, width, generator=generator) < 0.02
    starts[:, 0] = True
    slots = torch.arange(width).expand(rows, -1)
    return slots - torch.where(starts, slots, 0).cummax(-1).values


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ranks_mask_is_its_part_of_the_whole_in_many_shapes(ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    for n in range(1, 11):
        positions_BT = positions(1 + n % 3, 128 * ranks * n, generator)
        rows = Rows.of(positions_BT, positions_BT, positions_BT)
        whole, held = rows.sight.dense(), []
        document_BT = (positions_BT == 0).cumsum(-1)
        same = document_BT[:, :, None] == document_BT[:, None]
        assert torch.equal(whole[:, 0], same.tril())
        for rank in range(ranks):
            mesh: Any = SimpleNamespace(size=lambda: ranks, get_local_rank=lambda r=rank: r)
            part = context_parallel.share(positions_BT.shape[1], mesh, torch.device("cpu"))
            sight = context_parallel.sight_of(rows, part)
            expected = whole[:, :, part.mine_L][..., part.order_T]
            assert torch.equal(sight.dense(), expected)
            if n < 4:
                mask = sight.block_mask(128)
                count, (queries, keys) = positions_BT.shape[0], mask.seq_lengths
                dense = create_mask(mask.mask_mod, count, 1, queries, keys, device="cpu")
                assert torch.equal(dense, expected)
                covers = mask.to_dense().repeat_interleave(128, 2).repeat_interleave(128, 3).bool()
                assert not (expected & ~covers).any(), "a block that holds pairs is left out"
            held += part.mine_L.tolist()
        assert sorted(held) == list(range(positions_BT.shape[1]))
        assert held == part.order_T.tolist(), "keys are gathered in the order of the ranks"
