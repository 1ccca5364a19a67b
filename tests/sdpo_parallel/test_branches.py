"""Attention branch by branch, against a dense mask in float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from sdpo.batching import pack_passes
from sdpo_parallel.branches import attend, plan
from sdpo_parallel.rows import Rows, Sharing

ids = st.lists(st.integers(1, 2), min_size=1, max_size=9)
pairs = st.lists(st.tuples(ids, ids), max_size=5)


@given(pairs, pairs, st.sampled_from(["none", "tries", "keys"]), st.sampled_from([1, 2]), st.data())
def test_branches_are_the_dense_masks_attention(policy, hindsight, sharing: Sharing, groups, data):
    (first, second), _ = pack_passes(policy, hindsight, 20, 4, sharing)
    sight = second.sight.behind(first) if sharing == "keys" else second.sight
    rows, queries = second.tokens_BT.shape
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def random(heads: int, slots: int) -> torch.Tensor:
        shape = rows, heads, slots, 8
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    keys = sight.key_BK.shape[1]
    q, k, v = random(4, queries), random(4 // groups, keys), random(4 // groups, keys)
    options = {"scale": 0.3, "enable_gqa": groups > 1}
    expected = scaled_dot_product_attention(q, k, v, attn_mask=sight.dense(), **options)
    found = attend(q, k, v, plan(sight, q.dtype), 0.3)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), cotangent),
        torch.autograd.grad(expected, (q, k, v), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_whole_sequences_are_causal_and_need_no_mask():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]])
    rows = Rows.of(positions, positions, positions)
    plans = plan(rows.sight, torch.float32)
    spans = [[(b.start, b.stop) for b in p.branches] for p in plans]
    assert spans == [[(0, 3), (3, 5), (5, 8)], [(0, 8)]]
    assert all(b.mask is None for p in plans for b in p.branches)


def test_masks_are_no_larger_than_what_branches_see():
    """16 branches of 8 slots behind 256 shared ones: not (384, 384)."""
    shared = list(range(256))
    pairs = [(shared + [1000 + n], [7] * 7) for n in range(16)]
    (rows, _), _ = pack_passes(pairs, [], 512, 128, "tries")
    (found,) = plan(rows.sight, torch.float32)
    masks = [b.mask.numel() for b in found.branches if b.mask is not None]
    assert len(masks) == 15 and sum(masks) == 15 * 8 * (256 + 8)
    assert found.branches[0].stop == 256 + 8, "the first branch goes on from what is shared"
