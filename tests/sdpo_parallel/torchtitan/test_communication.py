"""What a step sends: counted on real process groups."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.collectives import Collective
from helpers import runs, tiny
from helpers.torchrun import torchrun

WORKER = str(Path(__file__).parents[2] / "helpers" / "comm_worker.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny.make_interactions(tmp_path_factory.mktemp("data") / "i.jsonl", 16)


def collectives(model: str, data: str, *, tensor: int = 1) -> dict:
    result = torchrun(WORKER, model, data, str(tensor), ranks=2)
    assert result.returncode == 0, runs.cause(result.stderr)
    found = json.loads(result.stdout.splitlines()[-1])
    return found | {"seen": [Collective(*c) for c in found["seen"]]}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied"])
def test_the_head_is_gathered_once_per_step(kind, models, data):
    """Not once per chunk, pass or micro-batch. Norm and head (and, tied, the embeddings) are one
    group of FSDP2; other layers are gathered for each pass."""
    model = models(kind)
    vocabulary, width = AutoModelForCausalLM.from_pretrained(model).lm_head.weight.shape
    counted = collectives(model, data)
    gathers = [c.bytes // 4 for c in counted["seen"] if c.operator == "all-gather"]
    assert counted["micro_batches"] > 2
    head = vocabulary * width + width
    assert gathers.count(head) == 1, sorted(gathers)
    assert sum(n == vocabulary * width for n in gathers) == (
        0 if "tied" in kind else 3 * counted["micro_batches"]
    ), "embeddings are gathered in each pass and the backward, or with the head"
    assert max(gathers) == max(head, *layers(model)), "nothing larger is gathered"
    # in the policy's forward, the backward and the hindsight pass
    assert sum(gathers.count(n) for n in set(layers(model))) >= 2 * 2 * counted["micro_batches"]


def layers(model: str) -> list[int]:
    """Parameters of each layer."""
    module = AutoModelForCausalLM.from_pretrained(model)
    return [sum(p.numel() for p in layer.parameters()) for layer in module.model.layers]


def test_bytes_under_tensor_parallelism_do_not_depend_on_the_vocabulary(models, data, tmp_path):
    small = models("qwen3")
    large = tmp_path / "large"
    tiny.make_model(large, "qwen3")
    model = AutoModelForCausalLM.from_pretrained(large)
    model.resize_token_embeddings(8 * 448)
    for p in model.parameters():
        assert torch.isfinite(p).all()
    model.save_pretrained(large)
    a, b = (collectives(str(m), data, tensor=2)["seen"] for m in (small, large))
    # more chunks of the same bytes: the same numbers of every token, in more messages
    for kernels in (True, False):
        sent = [sum(c.bytes for c in seen if c.kernels == kernels) for seen in (a, b)]
        assert sent[0] > 0 and abs(sent[1] - sent[0]) <= 0.001 * sent[0], sent
    messages = [sum(c.kernels for c in seen) for seen in (a, b)]
    assert messages[1] > messages[0] > 0, "the larger head takes more chunks"
