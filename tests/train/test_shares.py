"""What a run's sequences share, by hand-counted conversations."""

from dataclasses import replace

import pytest

from sdpo.batching import BatchConfig
from sdpo.hindsight import Encoded, Truncated
from sdpo.train.config import TrainConfig
from sdpo.train.dry_run import load_of
from sdpo.train.shares import Read, sharing_of, slots_read, why_not
from sdpo_parallel.config import EMA, ParallelConfig

CONFIG = TrainConfig(model="m", data="d", out="o")


def turn(conversation: str, n: int, policy: range, note: int, response: range) -> Encoded:
    """``note`` ids that nothing else has stand between a hindsight prompt and its response."""
    own = tuple(range(1000 * (n + 1), 1000 * (n + 1) + note))
    return Encoded(
        id=f"{conversation}_{n}",
        conversation=conversation,
        policy=tuple(policy),
        hindsight=(*policy, *own),
        response=tuple(response),
        old_logprobs=None,
        ends=True,
        truncated=Truncated(),
    )


# the second turn's prompt holds the first turn and ten tokens more
SAMPLE = [
    turn("a", 0, range(0, 100), 20, range(100, 150)),
    turn("b", 0, range(500, 530), 7, range(530, 540)),
    turn("a", 1, range(0, 160), 30, range(160, 200)),
]
WHOLE = Read(150 + 40 + 200, 170 + 47 + 230)


@pytest.mark.parametrize(
    ("sharing", "alone", "together"),
    [
        ("none", WHOLE, WHOLE),
        ("tries", WHOLE, Read(200 + 40, 170 + 47 + 130)),  # hindsights part at token 100
        ("keys", Read(390, 70 + 17 + 70), Read(200 + 40, 70 + 17 + 70)),
    ],
)
def test_slots_of_interactions_and_of_conversations(sharing, alone, together):
    assert slots_read(SAMPLE, CONFIG, sharing, conversations=False) == alone
    assert slots_read(SAMPLE, CONFIG, sharing, conversations=True) == together
    assert WHOLE.cost == 3 * 390 + 447


def test_a_conversation_beyond_a_micro_batch_is_cut():
    small = replace(CONFIG, batch=BatchConfig(micro_batch_tokens=199))
    assert slots_read(SAMPLE, small, "keys", conversations=True).policy == WHOLE.policy


def test_what_keeps_a_run_from_sharing():
    assert sharing_of(CONFIG) == "keys" and not why_not(CONFIG)
    assert sharing_of(replace(CONFIG, teacher=EMA())) == "tries"
    for change, why in (
        (dict(batch=BatchConfig(share_prefix="none")), "share_prefix"),
        (dict(parallel=ParallelConfig(context=2)), "context"),
        (dict(parallel=ParallelConfig(attention="varlen")), "varlen"),
    ):
        config = replace(CONFIG, **change)
        assert sharing_of(config) == "none" and why in why_not(config)


def test_a_micro_batch_of_shared_prefixes_holds_more_responses():
    def load(**batch):
        return load_of(replace(CONFIG, batch=BatchConfig(**batch)), SAMPLE)

    none, alone = load(share_prefix="none"), load()
    assert none.tokens == alone.tokens == none.hindsight_tokens == 16384
    assert none.response_tokens == round(16384 * 100 / 447)
    assert alone.response_tokens == round(16384 * 100 / 390)
    assert alone.hindsight_tokens == round(16384 * 157 / 390)
    together = load(unit="conversation")
    assert together.response_tokens == round(16384 * 100 / 240)
    assert (none.sharing, alone.sharing) == ("none", "keys")
