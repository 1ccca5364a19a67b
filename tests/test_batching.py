"""Packing, alignment of y in both passes, what a step draws, and the data cursor."""

import random
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo.batching import (
    BatchConfig,
    Cursor,
    Stream,
    assign,
    bundles,
    collate,
    micro_batches,
    unit_of,
)
from sdpo.conversations import Message
from sdpo.hindsight import Encoded, Truncated
from sdpo.interactions import Interaction
from sdpo_parallel.engine import ROW_MULTIPLE
from sdpo_parallel.rows import Rows

EXAMPLE = Encoded(
    id="a",
    policy=(1,),
    hindsight=(1,),
    response=(2, 3),
    old_logprobs=None,
    ends=True,
    truncated=Truncated(),
)
ids = st.lists(st.integers(1, 99), min_size=1, max_size=12).map(tuple)


@st.composite
def encoded(draw):
    return replace(
        EXAMPLE,
        policy=draw(ids),
        hindsight=draw(ids),
        response=draw(ids),
        ends=draw(st.booleans()),
        truncated=Truncated(policy=draw(st.booleans()), question=draw(st.booleans())),
    )


def documents(rows: Rows) -> list[tuple[int, ...]]:
    """The token sequences between restarts of the positions, padding left out."""
    out = []
    for tokens, positions in zip(rows.tokens_BT, rows.positions_BT, strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(tokens)]
        spans = [tuple(tokens[a:b].tolist()) for a, b in zip(starts, starts[1:], strict=False)]
        out += [span for span in spans if span != (0,)]
    return out


@given(st.lists(encoded(), max_size=9), st.integers(1, 64))
def test_both_passes_hold_every_sequence_whole_and_predict_the_same_targets(items, row_tokens):
    batch = collate([(e, 1.0) for e in items], row_tokens)
    for rows, prompts in (
        (batch.policy, [e.policy for e in items]),
        (batch.hindsight, [e.hindsight for e in items]),
    ):
        whole = [p + e.response for p, e in zip(prompts, items, strict=True)]
        assert sorted(documents(rows)) == sorted(whole)
        # the slot after the one whose hidden state is read holds the target, in the same document
        read = rows.index_N
        assert torch.equal(rows.tokens_BT.flatten()[read + 1], batch.targets_N)
        positions = rows.positions_BT.flatten()
        assert torch.equal(positions[read + 1], positions[read] + 1)
    assert batch.targets_N.tolist() == [t for e in items for t in e.response]
    assert batch.offset_N.tolist() == [i for e in items for i in range(len(e.response))]
    assert batch.end_N.sum() == sum(e.ends for e in items)
    assert batch.truncated_SK.tolist() == [list(e.truncated) for e in items]


@given(st.lists(encoded(), max_size=40), st.integers(1, 1000))
def test_micro_batches_respect_the_budget_and_lose_nothing(items, budget):
    config = BatchConfig(row_tokens=16, micro_batch_tokens=budget)
    batches = list(micro_batches([(e, float(i)) for i, e in enumerate(items)], config))
    for b in batches:
        for rows in (b.policy, b.hindsight):
            assert rows.tokens_BT.numel() <= budget or len(b.weight_S) == 1
    weights = [w for b in batches for w in b.weight_S.tolist()]
    assert weights == [float(i) for i in range(len(items))]


@given(
    st.lists(encoded(), max_size=40),
    st.integers(1, 5),
    st.integers(1, 1000),
    st.sampled_from([128, 256]),
)
def test_a_deal_hands_out_everything_once_within_the_budget(items, ranks, budget, multiple):
    config = BatchConfig(row_tokens=16, micro_batch_tokens=budget)
    assigned = assign([(e, float(i)) for i, e in enumerate(items)], ranks, config, multiple)
    mine = [assigned.of(r) for r in range(ranks)]
    assert len({len(m) for m in mine}) == 1, "every rank has as many micro-batches"
    flat = [w for m in mine for b in m for _, w in b]
    assert sorted(flat) == [float(i) for i in range(len(items))]
    for m in mine:
        for b in m:
            batch = collate(b, config.row_tokens, multiple)
            slots = max(r.tokens_BT.numel() for r in (batch.policy, batch.hindsight))
            assert slots <= budget or len(b) <= 1
            assert batch.policy.tokens_BT.shape[1] % multiple == 0
    assert 0 <= assigned.idle < 1 and sum(assigned.tokens) == sum(
        len(e.policy) + len(e.hindsight) + 2 * len(e.response) for e in items
    )


def test_a_deal_of_wildly_different_lengths_is_balanced():
    """128 responses of log-normal length on 8 ranks: taking every 8th interaction would leave the
    average rank waiting for a good part of the step."""
    rng = random.Random(0)
    items = [
        replace(
            EXAMPLE,
            policy=(1,) * rng.randint(20, 800),
            hindsight=(1,) * rng.randint(50, 1000),
            response=(1,) * min(4000, int(rng.lognormvariate(5.5, 1.2)) + 1),
        )
        for _ in range(128)
    ]
    naive = [sum(b.cost for b in bundles([(e, 1.0) for e in items[r::8]], 1)) for r in range(8)]
    waiting = 1 - sum(naive) / (8 * max(naive))
    assigned = assign([(e, 1.0) for e in items], 8, BatchConfig(), ROW_MULTIPLE)
    assert waiting > 0.2 and assigned.idle < 0.02, (waiting, assigned.idle)


@given(st.lists(encoded(), min_size=1, max_size=12), st.data())
def test_part_of_a_batch_is_that_of_its_responses(items, data):
    batch = collate([(e, float(i)) for i, e in enumerate(items)], 64)
    keep = sorted(data.draw(st.sets(st.integers(0, len(items) - 1))))
    part, kept_N = batch.only(keep)
    alone = collate([(items[i], float(i)) for i in keep], 64)
    for name in ("targets_N", "sequence_N", "offset_N", "end_N", "weight_S", "truncated_SK"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    assert part.lengths == alone.lengths
    assert torch.equal(batch.targets_N[kept_N], part.targets_N)


def test_no_interactions_make_a_batch_of_no_tokens():
    batch = collate([], 16)
    assert batch.targets_N.numel() == 0 and batch.policy.index_N.numel() == 0
    assert batch.policy.tokens_BT.numel() > 0, "a rank without data still runs the model"


def test_old_logprobs_are_there_only_where_all_have_them():
    online = replace(EXAMPLE, old_logprobs=(-1.0, -2.0))
    known = collate([(online, 1.0)], 8).old_logp_N
    assert known is not None and known.tolist() == [-1.0, -2.0]
    assert collate([(online, 1.0), (EXAMPLE, 1.0)], 8).old_logp_N is None
    none = collate([], 8).old_logp_N
    assert none is not None and none.numel() == 0, "a rank without data clips as the others do"


conversations = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30)
"""The conversation of each interaction, in the data's order: of any size, side by side or not."""


def drawn(stream: Stream, start: int = 0) -> list[list[int]]:
    """The steps from a place in the stream to the end of the run."""
    steps = []
    while step := stream.step(start):
        steps.append(step)
        start += len(step)
    return steps


@given(conversations, st.integers(1, 12), st.integers(0, 5))
def test_each_epoch_shows_each_conversation_once_and_whole_in_one_step(names, per_step, seed):
    stream = Stream(names, BatchConfig(interactions_per_step=per_step, epochs=3, seed=seed))
    steps, n = drawn(stream), len(names)
    assert len(steps) == stream.steps and sum(map(len, steps)) == stream.total == 3 * n
    flat = [(i, step) for step, places in enumerate(steps) for i in places]
    for epoch in (flat[k * n : (k + 1) * n] for k in range(3)):
        assert sorted(i for i, _ in epoch) == list(range(n))
        whole = [[*found] for _, found in groupby(epoch, key=lambda pair: names[pair[0]])]
        assert len(whole) == len(set(names)), "its interactions are next to each other"
        for found in whole:
            assert found == sorted(found), "in the data's order"
            assert len({step for _, step in found}) == 1
    for places in steps[:-1]:
        last = names[places[-1]]
        assert len(places) >= per_step > len(places) - names.count(last)


def test_each_epoch_has_its_own_order():
    stream = Stream("abcdefghij", BatchConfig(epochs=2))
    assert (stream.places(0, 10) != stream.places(10, 20)).any()


@given(st.integers(1, 30), st.integers(1, 12), st.sampled_from([0.1, 0.5, 1.0, 1.4, 3.0]))
def test_single_interactions_are_drawn_as_by_earlier_versions(n, per_step, epochs):
    config = BatchConfig(interactions_per_step=per_step, epochs=epochs, seed=3)
    stream = Stream(map(str, range(n)), config)
    shuffles = [np.random.default_rng((3, epoch)).permutation(n) for epoch in range(3)]
    expected = np.concatenate(shuffles)[: max(1, round(n * epochs))].tolist()
    cut = range(0, len(expected), per_step)
    assert drawn(stream) == [expected[k : k + per_step] for k in cut]
    assert stream.steps == len(cut)


@given(conversations, st.integers(1, 12), st.integers(0, 40))
def test_it_goes_on_where_any_step_ended(names, per_step, after):
    config = BatchConfig(interactions_per_step=per_step, epochs=2.5)
    whole = drawn(Stream(names, config))
    after = min(after, len(whole))
    state = Cursor(len(names), 0, sum(map(len, whole[:after]))).state_dict()
    cursor = Cursor(len(names), 0)
    cursor.load_state_dict(state)
    assert drawn(Stream(names, config), cursor.consumed) == whole[after:]


@given(conversations, st.floats(0.01, 3.0))
def test_a_fraction_of_an_epoch_is_that_share_of_the_conversations(names, epochs):
    stream = Stream(names, BatchConfig(interactions_per_step=1, epochs=epochs))
    assert stream.steps == max(1, round(len(set(names)) * epochs))
    endless = Stream(names, BatchConfig(interactions_per_step=1, epochs=4))
    assert drawn(stream) == drawn(endless)[: stream.steps]


@pytest.mark.parametrize(("unit", "sizes"), [("interaction", [1] * 5), ("conversation", [2, 1, 2])])
def test_units_are_interactions_or_conversations(unit, sizes):
    prompt, ids = (Message("user", "?"),), ("a_0", "a_2", "b", "c~2", "c")
    config = BatchConfig(unit=unit)
    made = [Interaction(id=i, prompt=prompt, response="y", followup="o") for i in ids]
    assert Stream((unit_of(i, config) for i in made), config).sizes.tolist() == sizes


def test_a_cursor_refuses_other_data():
    with pytest.raises(ValueError, match="n=5"):
        Cursor(6, 0).load_state_dict(Cursor(5, 0).state_dict())


def test_a_cursor_of_an_earlier_version_goes_on():
    cursor = Cursor(6, 2)
    cursor.load_state_dict({"consumed": 4, "seed": 2, "n": 6})
    assert cursor.consumed == 4
