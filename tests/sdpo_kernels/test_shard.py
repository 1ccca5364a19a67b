"""Tensor parallelism: shards of the vocabulary on real process groups, and the merge itself."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import forked
from sdpo_kernels._impl import partials, rows_torch
from sdpo_kernels._impl.options import Spec

WORKER = str(Path(__file__).parents[1] / "helpers" / "shard_worker.py")
PLAIN = Spec("reverse_kl")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_on_several_ranks_equal_the_whole_head(ranks):
    result = forked.run(ranks, WORKER)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "reverse_kl: 40 bytes per token" in result.stdout


@given(
    v=st.integers(1, 30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    regroup=st.booleans(),
    scale=st.sampled_from([1.0, 100.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_a_vocabulary_split_anywhere_merges_to_the_whole(v, cuts, regroup, scale, seed):
    torch.manual_seed(seed)
    z, u = torch.randn(2, 3, v, dtype=torch.float64) * scale
    z[0, : v // 2] = u[0, : v // 2] = -torch.inf
    targets = torch.randint(v, (3,))

    def of(columns: slice) -> torch.Tensor:
        local = targets - columns.start
        local = torch.where((local >= 0) & (targets < columns.stop), local, -1)
        return rows_torch.Rows().stats(PLAIN, z[:, columns].clone(), u[:, columns].clone(), local)

    borders = sorted({0, v, *(c for c in cuts if c < v)})
    parts = [of(slice(*ends)) for ends in itertools.pairwise(borders)]
    parts.append(of(slice(v, v)))  # an empty shard
    if regroup and len(parts) > 2:
        parts = [parts[0], partials.merge(torch.stack(parts[1:]))]
    merged = partials.finish(partials.merge(torch.stack(parts)))
    whole = partials.finish(of(slice(0, v)))
    torch.testing.assert_close(merged, whole, rtol=1e-9, atol=1e-9)
    stats = merged[2]
    logp = z.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)
    torch.testing.assert_close(stats.entropy_student, entropy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stats.logp_student, logp.gather(1, targets[:, None])[:, 0])
