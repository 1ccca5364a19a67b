"""What real conversations share, and that a real model reads the same either way."""

import pytest
import torch

from benchmarks.prefixes import examples_of, first_conversations
from benchmarks.slots import count
from real.conftest import prepared
from sdpo.batching import Example, collate
from sdpo.hindsight import HindsightConfig, encode
from sdpo.interactions import Interaction, conversation_of, read_interactions
from sdpo.objective import ReverseKL
from sdpo.step import two_pass_loss
from sdpo_parallel.huggingface import load_tokenizer
from sdpo_parallel.transformers.engine import load_model

ROWS, CONVERSATIONS = 700, 400
"""Rows of the log that are prepared, and conversations of them whose slots are counted."""


@pytest.fixture(scope="module")
def data(sharegpt, tmp_path_factory) -> str:
    return prepared(sharegpt, tmp_path_factory.mktemp("sharegpt"), "strict", ROWS)


def test_slots_fall_as_sharing_promises(data, smollm2):
    """By cost, 3 policy slots and one of hindsight's."""
    items = first_conversations(read_interactions(data), CONVERSATIONS)
    found = count(examples_of(items, load_tokenizer(smollm2)), most=8192)
    whole, *shared = (slots.cost for slots in found)
    times = {(slots.sharing, slots.unit): whole / slots.cost for slots in found}
    print(times)
    assert len(shared) == 3
    assert 1.14 < times["keys", "interaction"] < 1.25
    assert 1.25 < times["tries", "conversation"] < times["keys", "conversation"]
    assert 1.5 < times["keys", "conversation"] < 1.8


@pytest.fixture(scope="module")
def conversations(data) -> list[list[Interaction]]:
    """Short ones of two turns or more, as this is to end in minutes."""
    found: dict[str, list[Interaction]] = {}
    for i in read_interactions(data):
        found.setdefault(conversation_of(i), []).append(i)
    several = (turns for turns in found.values() if 2 <= len(turns) <= 3)
    return [turns for turns in several if _characters(turns[-1]) < 1200][:3]


def _characters(i: Interaction) -> int:
    return sum(map(len, (*(m.content for m in i.prompt), i.response, i.followup)))


def test_smollm2_learns_the_same_from_shared_prefixes(conversations, smollm2):
    tokenizer, model = load_tokenizer(smollm2), load_model(smollm2)
    assert model.reads_tries and len(conversations) == 3
    encoded = [encode(i, tokenizer, HindsightConfig()) for turns in conversations for i in turns]
    examples: list[Example] = [(e, 1 / len(encoded)) for e in encoded]
    read, parameters = [], list(model.module.parameters())
    for sharing in ("none", "tries", "keys"):
        batch = collate(examples, 2048, sharing=sharing)
        out = two_pass_loss(model, batch, ReverseKL())
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(out.loss, parameters)])
        read.append((batch.tokens, out.loss.detach(), out.stats, gradient))
    (whole, loss, stats, gradient), *others = read
    for tokens, other_loss, other_stats, other_gradient in others:
        assert tokens < 0.9 * whole
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
        for name in ("logp_student", "logp_teacher", "entropy_student", "entropy_teacher"):
            pair = getattr(other_stats, name), getattr(stats, name)
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
        assert (other_gradient - gradient).norm() < 1e-5 * gradient.norm()
