"""A shared prefix is there once, and each slot sees its own sequence's slots before it."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdpo.batching import Pair, pack_passes
from sdpo.tries import ROOT, Prefixes, common, join, lay_out
from sdpo_parallel.rows import Rows, Sharing, Sight

ids = st.lists(st.integers(1, 2), min_size=1, max_size=6)  # two ids: much is shared
pairs = st.lists(st.tuples(ids, ids), max_size=6)


@st.composite
def two_passes(draw) -> tuple[list[Pair], list[Pair]]:
    """Both passes' prompts and responses; many hindsight prompts go on from a policy's, or end
    inside of one."""
    policy = draw(pairs)
    hindsight = draw(pairs)
    for prompt, response in draw(st.permutations(policy)):
        kept = prompt[: draw(st.integers(1, len(prompt)))]
        hindsight.append((kept + draw(st.lists(st.integers(1, 2), max_size=3)), response))
    return policy, hindsight


def arrays(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(s, np.int64) for s in sequences]


def prefixes(sequences) -> set[tuple[int, ...]]:
    return {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}


@given(st.lists(ids, max_size=8))
def test_a_layout_has_one_slot_for_every_distinct_prefix(sequences):
    made = lay_out(arrays(sequences))
    assert made.slots == len(prefixes(sequences))
    for path, sequence in zip(made.paths, sequences, strict=True):
        assert made.tokens_T[path].tolist() == sequence
        assert made.depth_T[path].tolist() == list(range(len(sequence)))
    for slot in range(made.slots):
        below = {int(s) for path in made.paths if slot in path for s in path[made.depth_T[slot] :]}
        assert below == set(range(slot, int(made.end_T[slot]))), "descendants follow their slot"


@given(two_passes())
def test_hindsight_has_only_what_the_policy_has_not(passes):
    policy, hindsight = (arrays([[*p, *r] for p, r in pairs]) for pairs in passes)
    most = [len(p) - 1 for p, _ in passes[1]]
    first, second = join(policy, hindsight, most)
    there = prefixes(s.tolist() for s in policy)
    new = set()
    for sequence, limit, path in zip(hindsight, most, second.paths, strict=True):
        kept = max((n for n in range(limit + 1) if tuple(sequence[:n]) in there), default=0)
        assert len(path) == len(sequence) - kept
        # what an interaction's own prompt must read again is apart from what the policy has
        new |= {(kept, tuple(sequence[:n])) for n in range(kept + 1, len(sequence) + 1)}
    assert first.slots == len(there) and second.slots == len(new)
    places = [*first.place_T.tolist(), *second.place_T.tolist()]
    assert sorted(places) == list(range(len(places))), "one order of both"


@given(st.lists(ids, min_size=1, max_size=8), ids)
def test_the_longest_prefix_is_found(sequences, other):
    given = arrays(sequences)
    length, slot = Prefixes(given, made := lay_out(given)).longest(np.array(other), len(other))
    assert length == max(common(s, np.array(other)) for s in given)
    assert slot == ROOT if not length else made.depth_T[slot] == length - 1


def assert_reads_itself(rows: Rows, pairs: list[Pair], sight: Sight, keys: Rows) -> None:
    """Each slot that predicts a token sees its sequence up to there, each position once."""
    seen_BQK = sight.dense()[:, 0]
    width, places = rows.tokens_BT.shape[1], iter(rows.index_N.tolist())
    for prompt, response in pairs:
        for n in range(len(response)):
            row, query = divmod(next(places), width)
            expected = [*prompt, *response][: len(prompt) + n]
            seen = seen_BQK[row, query].nonzero()[:, 0]
            depth = keys.positions_BT[row, seen]
            assert sorted(depth.tolist()) == list(range(len(expected)))
            assert keys.tokens_BT[row, seen][depth.argsort()].tolist() == expected
            assert rows.positions_BT[row, query] == len(expected) - 1
    assert next(places, None) is None


def joined(a: Rows, b: Rows) -> Rows:
    def both(name: str) -> Tensor:
        return torch.cat([getattr(a, name), getattr(b, name)], 1)

    return Rows(*map(both, ("tokens_BT", "positions_BT", "place_BT", "end_BT")), b.index_N)


@given(two_passes(), st.sampled_from(["none", "tries", "keys"]), st.integers(1, 40))
def test_every_response_is_read_behind_its_own_prompt(passes, sharing: Sharing, row_tokens):
    (policy, hindsight), tokens = pack_passes(*passes, row_tokens, 8, sharing)
    assert_reads_itself(policy, passes[0], policy.sight, policy)
    if sharing == "keys":
        sight, keys = hindsight.sight.behind(policy), joined(policy, hindsight)
        assert_reads_itself(hindsight, passes[1], sight, keys)
    else:
        assert_reads_itself(hindsight, passes[1], hindsight.sight, hindsight)
    whole = sum(len(p) + len(r) for pairs in passes for p, r in pairs)
    assert tokens == whole if sharing == "none" else tokens <= whole
    assert all(rows.tokens_BT.shape[1] % 8 == 0 for rows in (policy, hindsight))


@given(two_passes(), st.sampled_from(["none", "tries", "keys"]))
def test_block_masks_cover_what_is_seen_and_call_full_what_is(passes, sharing: Sharing):
    (policy, hindsight), _ = pack_passes(*passes, 24, 8, sharing)
    behind = hindsight.sight.behind(policy) if sharing == "keys" else hindsight.sight
    for sight in (policy.sight, behind):
        seen, mask = sight.dense()[:, 0], sight.block_mask((8, 4))
        batch, queries, keys = seen.shape
        blocks = seen.view(batch, queries // 8, 8, keys // 4, 4).transpose(2, 3).flatten(-2)

        def listed(number: Tensor | None, which: Tensor | None) -> Tensor:
            assert number is not None and which is not None
            first = torch.arange(which.shape[-1]) < number[..., None]
            return torch.zeros(which.shape).scatter(-1, which.long(), first.float())[:, 0].bool()

        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        partial = listed(mask.kv_num_blocks, mask.kv_indices)
        assert torch.equal(full, blocks.all(-1)) and not (full & partial).any()
        assert not (blocks.any(-1) & ~(full | partial)).any()
        index = [torch.arange(n) for n in (batch, 1, queries, keys)]
        grid = torch.meshgrid(*index, indexing="ij")
        assert torch.equal(mask.mask_mod(*grid)[:, 0], seen)  # pyright: ignore
