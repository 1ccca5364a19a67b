"""What a step sends: counted on real process groups."""

import json

import pytest

from benchmarks.collectives import Collective
from benchmarks.counting import STEP
from benchmarks.models import TINY
from benchmarks.traffic import shape_of
from helpers import runs

SIZES = TINY["count"]
MICRO_BATCHES = 3


def collectives(sizes: dict, **parallel) -> list[Collective]:
    job = dict(STEP, micro_batches=MICRO_BATCHES, sizes=sizes, parallel=parallel)
    printed = runs.worker("comm_worker.py", 2, json.dumps(job))
    return [Collective(*c) for c in json.loads(printed.splitlines()[-1])]


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_gathered_once_per_step(tied):
    """Not once per chunk, pass or micro-batch. Norm and head (and, tied, the embeddings) are one
    group of FSDP2; other layers are gathered for each pass."""
    sizes = {**SIZES, "tie_word_embeddings": tied}
    shape = shape_of(sizes)
    gathers = [c.bytes // 4 for c in collectives(sizes) if c.operator == "all-gather"]
    embeddings, layer = shape.head(), shape.layer()
    head = embeddings + shape.hidden
    assert gathers.count(head) == 1, sorted(gathers)
    assert gathers.count(embeddings) == (0 if tied else 3 * MICRO_BATCHES), (
        "embeddings are gathered in each pass and the backward, or with the head"
    )
    assert max(gathers) == max(head, layer), "nothing larger is gathered"
    # in the policy's forward, the backward and the hindsight pass
    assert gathers.count(layer) >= shape.layers * 2 * MICRO_BATCHES


def test_bytes_under_tensor_parallelism_do_not_depend_on_the_vocabulary():
    larger = {**SIZES, "vocab_size": 8 * SIZES["vocab_size"]}
    a, b = (collectives(sizes, tensor=2) for sizes in (SIZES, larger))
    # more chunks of the same bytes: the same numbers of every token, in more messages
    for kernels in (True, False):
        sent = [sum(c.bytes for c in seen if c.kernels == kernels) for seen in (a, b)]
        assert sent[0] > 0 and abs(sent[1] - sent[0]) <= 0.001 * sent[0], sent
    messages = [sum(c.kernels for c in seen) for seen in (a, b)]
    assert messages[1] > messages[0] > 0, "the larger head takes more chunks"
