"""What a step sends: counted on real process groups."""

import functools
import json
from collections import Counter

import pytest

from benchmarks.collectives import Collective
from benchmarks.counting import STEP
from benchmarks.models import TINY
from benchmarks.traffic import shape_of
from helpers import runs

SIZES = TINY["count"]
MICRO_BATCHES = 3
SHARED = ("tries", "keys")


@functools.cache
def ran(sharing: str = "none", tensor: int = 1, **sizes: int) -> tuple[list[Collective], list[str]]:
    """The collectives of a step, and the groups of weights that FSDP2 gathered in two."""
    job = dict(STEP, micro_batches=MICRO_BATCHES, sizes=SIZES | sizes, sharing=sharing)
    job |= {"parallel": {"tensor": tensor}}
    printed = json.loads(runs.worker("comm_worker.py", 2, json.dumps(job)).splitlines()[-1])
    return [Collective(*c) for c in printed["collectives"]], printed["weights"]


@pytest.mark.parametrize(
    ("tied", "sharing"),
    [
        (False, "none"),
        (False, "keys"),
        *(pytest.param(*c, marks=pytest.mark.exhaustive) for c in [(True, "none"), (True, "keys")]),
        *(pytest.param(tied, "tries", marks=pytest.mark.exhaustive) for tied in (False, True)),
    ],
)
def test_every_weight_is_gathered_and_reduced_as_often_as_it_must_be(tied, sharing):
    """Norm and head (and, tied, the embeddings) are one group of FSDP2, gathered once per step, not
    once per chunk, pass or micro-batch. Others are gathered for each pass and for the backward, and
    each gradient is reduced once a micro-batch."""
    shape = shape_of({**SIZES, "tie_word_embeddings": tied})
    embeddings, head, layers = shape.head(), shape.head() + shape.hidden, shape.layers
    seen, _ = ran(sharing, tie_word_embeddings=tied)
    gathered = Counter({shape.layer(): 3 * MICRO_BATCHES * layers})
    reduced = Counter({shape.layer(): MICRO_BATCHES * layers, head: MICRO_BATCHES})
    gathered[head] += 1
    if not tied:
        gathered[embeddings] += 3 * MICRO_BATCHES
        reduced[embeddings] += MICRO_BATCHES

    def of(operator: str) -> Counter:
        return Counter(c.bytes // 4 for c in seen if c.operator == operator)

    assert of("all-gather") == gathered
    assert of("reduce-scatter") == reduced


@pytest.mark.parametrize("sharing", ["none", *SHARED])
def test_the_backward_gathers_ahead_what_it_needs_next(sharing):
    """And nothing else: the last forward before a backward is hindsight's."""
    _, weights = ran(sharing)
    layers = [f"layers.{i}" for i in range(SIZES["num_hidden_layers"])]
    each = ["tok_embeddings", *layers]
    backward = [f"<{name}" for name in reversed(each)]
    step = [*each, "norm, lm_head", *each, *backward]
    step += [*each, *each, *backward] * (MICRO_BATCHES - 1)
    assert weights == 2 * step


@pytest.mark.parametrize("tensor", [1, 2])
def test_sharing_prefixes_takes_the_same_collectives(tensor):
    """In the same order; only activations between tensor ranks are fewer bytes."""

    def calls(sharing: str) -> list[tuple]:
        return [(c.operator, c.ranks, c.dimensions, c.kernels) for c in ran(sharing, tensor)[0]]

    def sent(sharing: str, weights: bool) -> int:
        return sum(c.bytes for c in ran(sharing, tensor)[0] if (c.dimensions == 1) == weights)

    for sharing in SHARED:
        assert calls(sharing) == calls("none")
        assert sent(sharing, weights=True) == sent("none", weights=True)
        if tensor > 1:
            assert 0 < sent(sharing, weights=False) < 0.85 * sent("none", weights=False)


def test_bytes_under_tensor_parallelism_do_not_depend_on_the_vocabulary():
    a, b = (ran(tensor=2, vocab_size=n * SIZES["vocab_size"])[0] for n in (1, 8))
    # more chunks of the same bytes: the same numbers of every token, in more messages
    for kernels in (True, False):
        sent = [sum(c.bytes for c in seen if c.kernels == kernels) for seen in (a, b)]
        assert sent[0] > 0 and abs(sent[1] - sent[0]) <= 0.001 * sent[0], sent
    messages = [sum(c.kernels for c in seen) for seen in (a, b)]
    assert messages[1] > messages[0] > 0, "the larger head takes more chunks"
