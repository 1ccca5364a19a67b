"""A file and a cursor become every rank's micro-batches, the same on any layout, from any place."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers import tiny
from sdpo.batching import Batch, BatchConfig
from sdpo.hindsight import HindsightConfig, encode
from sdpo.interactions import conversation_of, read_interactions
from sdpo.train.loader import Loader, Step
from sdpo_parallel.engine import Ranks
from sdpo_parallel.huggingface import load_tokenizer

N = 31
CONFIG = BatchConfig(interactions_per_step=6, row_tokens=256, micro_batch_tokens=512, epochs=1.4)
LIMITS = HindsightConfig(
    max_prompt_tokens=40, max_hindsight_prompt_tokens=250, max_response_tokens=20
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tiny.make_interactions(tmp_path_factory.mktemp("data") / "i.jsonl", N)
    return read_interactions(path)


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    """The interactions of ten conversations."""
    path = tiny.make_conversations(tmp_path_factory.mktemp("data") / "turns.jsonl", 10)
    return read_interactions(path)


@pytest.fixture
def tokenizer(models):
    return load_tokenizer(models("qwen3"))


def loader(data, tokenizer, dp_rank=0, dp_degree=1, consumed=0, batch=CONFIG, **options) -> Loader:
    made = Loader(data, tokenizer, LIMITS, batch)
    made.cursor.consumed = consumed
    ranks = Ranks(rank=dp_rank, world_size=dp_degree, dp_rank=dp_rank, dp_degree=dp_degree)
    engine = SimpleNamespace(ranks=ranks, row_multiple=128, sharing="keys")
    made.assign_to(engine, **options)  # pyright: ignore[reportArgumentType]
    return made


def responses(batch: Batch) -> list[tuple[float, tuple[int, ...]]]:
    """(weight, token ids) of each response of a micro-batch."""
    parts = torch.split(batch.targets_N, list(batch.lengths))
    pairs = zip(batch.weight_S.tolist(), parts, strict=True)
    return [(weight, tuple(part.tolist())) for weight, part in pairs]


def contents(steps: list[Step]) -> list[list]:
    return [sorted(r for b in step.micro_batches for r in responses(b)) for step in steps]


@pytest.mark.parametrize("dp_degree", [2, 3])
def test_ranks_together_read_what_one_rank_reads(dp_degree, data, tokenizer):
    alone = list(loader(data, tokenizer))
    shares = [list(loader(data, tokenizer, r, dp_degree)) for r in range(dp_degree)]
    assert len(alone) == -(-round(N * 1.4) // 6) == loader(data, tokenizer).steps
    for whole, *parts in zip(alone, *shares, strict=True):
        assert contents([whole]) == [sorted(r for p in contents(parts) for r in p)]
        assert len({len(p.micro_batches) for p in parts}) == 1, "all run the same collectives"
        assert len({(tuple(p.tokens), p.idle) for p in parts}) == 1
        assert sum(parts[0].tokens) == sum(whole.tokens) and 0 <= parts[0].idle < 1
        for batch in whole.micro_batches:
            for rows in (batch.policy, batch.hindsight):
                assert rows.tokens_BT.numel() <= CONFIG.micro_batch_tokens
    assert not shares[-1][-1].micro_batches[-1].lengths, "the last step has one interaction"


@pytest.mark.parametrize("steps", [1, 5, 7])
def test_it_goes_on_from_any_cursor_on_any_number_of_ranks(steps, data, tokenizer):
    whole = contents(list(loader(data, tokenizer)))
    first = loader(data, tokenizer)
    taken = [step for _, step in zip(range(steps), first, strict=False)]
    assert contents(taken) == whole[:steps]
    state = first.cursor.state_dict()  # what was read ahead is not in it
    assert state["consumed"] == min(6 * steps, round(N * 1.4))
    rest = [list(loader(data, tokenizer, r, 2, state["consumed"])) for r in range(2)]
    joined = [sorted(a + b) for a, b in zip(*(contents(part) for part in rest), strict=True)]
    assert joined == whole[steps:]


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_whole_conversations_are_drawn_on_any_number_of_ranks_from_any_cursor(
    steps, turns, tokenizer, monkeypatch
):
    batch = replace(CONFIG, unit="conversation")
    drawn: list[Sequence[int]] = []
    read = Loader.step
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "step", lambda made, at: drawn.append(at) or read(made, at))
        alone = list(loader(turns, tokenizer, batch=batch))
    times = Counter(i for places in drawn for i in places)
    of = {i: conversation_of(interaction) for i, interaction in enumerate(turns)}
    seen = dict.fromkeys((of[i], times[i]) for i in of)
    assert len(seen) == 10, "all of a conversation as often"
    assert sum(n for _, n in seen) == 14 and {n for _, n in seen} == {1, 2}, "1.4 of them"
    sizes = Counter(of.values())
    for places in drawn:
        assert all(n % sizes[name] == 0 for name, n in Counter(of[i] for i in places).items())
    assert all(len(places) >= 6 for places in drawn[:-1]) and steps < len(drawn)

    first = loader(turns, tokenizer, 1, 2, batch=batch)
    for _ in zip(range(steps), first, strict=False):
        pass
    consumed = first.cursor.state_dict()["consumed"]
    assert consumed == sum(map(len, drawn[:steps]))
    rest = [contents(list(loader(turns, tokenizer, r, 3, consumed, batch))) for r in range(3)]
    joined = [sorted(r for part in parts for r in part) for parts in zip(*rest, strict=True)]
    assert joined == contents(alone)[steps:]


def test_weights_are_normalised_over_the_step_and_truncation_is_counted(data, tokenizer):
    weighted = [replace(i, weight=float(n % 3)) for n, i in enumerate(data)]
    step = loader(weighted, tokenizer).step(range(N))
    weights = [weight for batch in step.micro_batches for weight, _ in responses(batch)]
    assert sorted(weights) == pytest.approx(sorted(n % 3 / (N - 1) for n in range(N)))
    cut = sum(batch.truncated_SK.sum(0) for batch in step.micro_batches)
    encoded = [encode(i, tokenizer, LIMITS) for i in data]
    expected = torch.tensor([e.truncated for e in encoded]).sum(0)
    assert cut.tolist() == expected.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    assert 0 < expected[0] < N and expected[1] == 0 and 0 < expected[2] < N
    assert max(max(batch.lengths) for batch in step.micro_batches) <= 20


def test_compiled_blocks_see_one_row_width(data, tokenizer):
    wide = loader(data, tokenizer, fixed_width=True).step(range(6))
    widths = {b.policy.tokens_BT.shape[1] for b in wide.micro_batches}
    assert widths == {CONFIG.row_tokens}
    narrow = loader(data, tokenizer).step([0])
    assert narrow.micro_batches[0].policy.tokens_BT.shape[1] == 128


def test_a_row_that_cannot_be_encoded_stops_the_step_that_needs_it(data, tokenizer):
    class Broken(list):
        def __getitem__(self, i):
            raise ValueError("interaction c9")

    made = loader(data, tokenizer)
    steps = iter(made)
    next(steps)
    made.interactions = Broken(data)  # the step read ahead may still be whole
    with pytest.raises(ValueError, match="interaction c9"):
        [next(steps) for _ in range(2)]
