"""The memory estimate against counted allocations of real steps: torchtitan, FSDP2, gloo, float32.

Sizes are chosen so that in turn layers' activations, weights and the head decide.
"""

import functools
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.counting_worker import batch_of
from benchmarks.models import QWEN3
from benchmarks.traffic import shape_of
from helpers import runs, tiny
from sdpo_parallel import memory
from sdpo_parallel.config import EMA, Frozen, Live, LoraConfig, ParallelConfig, TrustRegion
from sdpo_parallel.engine import ROW_MULTIPLE
from sdpo_parallel.memory import Load, ModelShape, estimate, host_bytes, kept_bytes

TOLERANCE = 0.15
SIZES = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    head_dim=32,
    max_position_embeddings=2048,
)
TASK = dict(lora_rank=0, rows=2, prompt=256, hindsight=512, response=512, chunk_bytes=2**23)


def case(ranks=1, checkpoint="selective", *, kind="qwen3", sizes=None, task=None, **layout) -> dict:
    """What a worker trains; ``layout``: fields of ParallelConfig."""
    parallel = {"activation_checkpoint": checkpoint, **layout}
    sizes, task = SIZES | (sizes or {}), TASK | (task or {})
    return dict(ranks=ranks, kind=kind, sizes=sizes, parallel=parallel, task=task)


HEAD = {"vocab_size": 16384, "num_hidden_layers": 2}
CASES = {
    "none": case(checkpoint="none"),
    "selective": case(),
    "full": case(checkpoint="full"),
    "2 shards": case(2),
    "2 shards, full": case(2, "full"),
    "tensor": case(2, "none", tensor=2),
    "context": case(2, "none", context=2),
    "head": case(sizes=HEAD),
    "tied": case(checkpoint="full", kind="qwen3-tied", sizes=HEAD),
    "weights": case(
        sizes={"num_hidden_layers": 8, "vocab_size": 1024},
        task={"rows": 1, "prompt": 128, "hindsight": 128, "response": 128},
    ),
    "adapters": case(task={"lora_rank": 16}),
    "llama": case(checkpoint="none", kind="llama"),
    "many keys": case(
        checkpoint="full",
        sizes={
            "vocab_size": 1024,
            "num_hidden_layers": 12,
            "num_key_value_heads": 8,
            "intermediate_size": 256,
        },
        task={"sharing": "keys", "rows": 5},
    ),
    **{
        f"{sharing}, {checkpoint}{', ' if name else ''}{name}": case(
            ranks, checkpoint, task={"sharing": sharing, "rows": 3}, **layout
        )
        for sharing in ("none", "tries", "keys")
        for checkpoint in ("none", "selective", "full")
        for name, ranks, layout in [("", 1, {}), ("2 shards", 2, {}), ("tensor", 2, {"tensor": 2})]
        if sharing == "keys" or not name
    },
}


def some(names: Iterable[str], *quick: str) -> list:
    """All of them; those that are not quick are for ``make test-all``."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.exhaustive) for n in names]


@functools.cache
def model_of(name: str) -> str:
    """A folder of config.json and of the mark of weights that the engine looks for."""
    folder = tempfile.mkdtemp()
    tiny.make_config(CASES[name]["kind"], **CASES[name]["sizes"]).save_pretrained(folder)
    save_file({"none": torch.zeros(1)}, Path(folder) / "model.safetensors")
    return folder


@functools.cache
def measured(name: str) -> dict[str, int]:
    """Bytes of rank 0 by part, and the peak, as the worker counts them."""
    c = CASES[name]
    args = {**c["task"], "parallel": c["parallel"], "folder": model_of(name)}
    args["out"] = tempfile.mkdtemp()
    printed = runs.worker("memory_worker.py", c["ranks"], json.dumps(args))
    return json.loads(printed.splitlines()[-1])


def estimated(name: str) -> dict[str, int]:
    c, task = CASES[name], CASES[name]["task"]
    batch = batch_of(task | {"interactions": task["rows"]}, ROW_MULTIPLE)
    load = Load(
        tokens=batch.policy.tokens_BT.numel(),
        hindsight_tokens=batch.hindsight.tokens_BT.numel(),
        unshared_tokens=task["rows"] * (task["prompt"] + task["response"]),
        sharing=batch.sharing,
        response_tokens=task["rows"] * task["response"],
        row_tokens=batch.policy.tokens_BT.shape[1],
        max_tokens=task["hindsight"] + task["response"],
        chunk_bytes=task["chunk_bytes"],
    )
    model, parallel = ModelShape.from_config(model_of(name)), ParallelConfig(**c["parallel"])
    lora = LoraConfig(rank=task["lora_rank"])
    return estimate(model, parallel, lora, Live(), ranks=c["ranks"], load=load, device_type="cpu")


def error(name: str) -> float:
    """Relative error of the total allowed next to the measured peak."""
    return estimated(name)["total"] / measured(name)["total"] - 1


@pytest.mark.parametrize("name", some(CASES, "selective", "2 shards", "tensor", "keys, selective"))
def test_the_estimate_is_what_is_measured(name):
    counted, estimate = measured(name), estimated(name)
    for part in ("parameters", "gradients", "optimizer"):
        assert estimate[part] == pytest.approx(counted[part], rel=0.01), part
    assert estimate["total"] == pytest.approx(counted["total"], rel=TOLERANCE)


@pytest.mark.parametrize("name", some(["none", "full", "2 shards"], "none"))
def test_twice_the_activations_are_noticed(name, monkeypatch):
    once = memory._Rank.saved
    monkeypatch.setattr(memory._Rank, "saved", lambda self: 2 * once(self))
    assert error(name) > TOLERANCE


def test_kept_keys_that_are_forgotten_are_noticed(monkeypatch):
    assert abs(error("many keys")) < TOLERANCE
    monkeypatch.setattr(memory._Rank, "kept_keys", lambda self: 0.0)
    assert error("many keys") < -TOLERANCE


@pytest.mark.exhaustive
def test_twice_the_vocabulary_is_noticed(monkeypatch):
    once = ModelShape.head
    monkeypatch.setattr(ModelShape, "head", lambda self, tensor=1: 2 * once(self, tensor))
    assert error("head") > TOLERANCE


QWEN3_8B = shape_of(QWEN3["qwen3-8b"])
LOAD = Load(
    tokens=16384, response_tokens=4096, row_tokens=8192, max_tokens=8192, chunk_bytes=2560 * 2**20
)


def on_gpus(teacher=None, lora=None, ranks: int = 8, load: Load = LOAD, **layout) -> dict[str, int]:
    parallel, lora = ParallelConfig(**layout), lora or LoraConfig()
    return estimate(QWEN3_8B, parallel, lora, teacher or Live(), ranks=ranks, load=load)


def test_master_weights_gradients_and_moments_take_16_bytes_a_parameter():
    parts = on_gpus()
    each = sum(parts[name] for name in ("parameters", "gradients", "optimizer"))
    assert QWEN3_8B.parameters() == 8_190_735_360
    assert each == pytest.approx(16 * QWEN3_8B.parameters() / 8, rel=1e-6)
    assert on_gpus(replicate=2)["optimizer"] == pytest.approx(2 * parts["optimizer"])


def test_gradients_of_logits_are_counted_that_there_is_room_for():
    """Of a chunk, 1104 tokens; of blocks of one and of two chunks; of all 4096 tokens."""
    load, row = replace(LOAD, chunk_bytes=1280 * 2**20), 2 * 151_936
    rows = load.chunk_bytes // (4 * row)
    rooms = [rows * row - 1, rows * row, 3 * rows * row - 1, 4096 * row]
    layout = (QWEN3_8B, ParallelConfig(), LoraConfig(), Live(), 8)
    sizes = [memory._Rank(*layout, replace(load, grad_bytes=r)).kernels() for r in rooms]
    one, two, kept = (size - sizes[0] for size in sizes[1:])
    assert one == pytest.approx(rows * (row + 6 * 4096))
    assert two == pytest.approx(2 * one)
    assert kept == pytest.approx(4096 * row - 4 * QWEN3_8B.head())


def test_kept_keys_take_147_kb_of_a_token_of_qwen3_8b():
    load = replace(LOAD, sharing="keys", hindsight_tokens=4096)
    assert kept_bytes(QWEN3_8B, ParallelConfig(), load=load) == 147_456 * load.tokens
    split = kept_bytes(QWEN3_8B, ParallelConfig(tensor=4), load=load)
    assert split == 147_456 * load.tokens / 4
    for sharing in ("none", "tries"):
        assert not kept_bytes(QWEN3_8B, ParallelConfig(), load=replace(load, sharing=sharing))
    # under full checkpointing the pass that reads them is the peak
    long = replace(load, tokens=65_536, hindsight_tokens=65_536, row_tokens=65_536)
    parts = on_gpus(load=long, activation_checkpoint="full")
    assert parts["kept keys and values"] == 147_456 * long.tokens
    assert on_gpus(EMA(), load=long)["kept keys and values"] == 0


def test_teachers_of_their_own_are_counted():
    head = QWEN3_8B.head()
    assert on_gpus()["teacher"] == 0
    shards = QWEN3_8B.parameters() / 8
    assert on_gpus(EMA())["teacher"] == pytest.approx(4 * shards + 2 * head)
    assert on_gpus(Frozen())["teacher"] == pytest.approx(2 * shards + 2 * head)
    mixed = on_gpus(TrustRegion())["teacher"]
    assert mixed == pytest.approx(2 * shards + 6 * head + 2 * 4096 * 4096)
    lora = LoraConfig(rank=16)
    assert on_gpus(Frozen(), lora)["teacher"] == 0  # the adapters are switched off


def test_adapters_need_few_gradients_and_no_gradient_of_the_head():
    full, adapters = on_gpus(), on_gpus(lora=LoraConfig(rank=16))
    assert adapters["gradients"] < full["gradients"] / 100
    assert adapters["head chunk and head gradient"] <= LOAD.chunk_bytes * 1.1
    assert adapters["optimizer"] == pytest.approx(2 * adapters["gradients"])
    named = replace(LoraConfig(rank=16), targets=("wq", "wkv", "wo", "w1", "w2", "w3"))
    one_by_one = replace(named, targets=("wq", "wk", "wv", "wo", "w1", "w2", "w3"))
    assert on_gpus(lora=named) == on_gpus(lora=one_by_one)


def test_each_remedy_needs_less():
    total = on_gpus()["total"]
    remedies = [
        dict(ranks=16),
        dict(tensor=2),
        dict(context=2),
        dict(activation_checkpoint="full"),
        dict(cpu_offload=True),
    ]
    assert all(on_gpus(**remedy)["total"] < total for remedy in remedies)
    split = on_gpus(tensor=2, activation_checkpoint="full")
    whole = on_gpus(tensor=2, activation_checkpoint="full", sequence_parallel=False)
    assert whole["total"] > split["total"]


def test_offloaded_parts_are_in_host_memory():
    parts = on_gpus(cpu_offload=True)
    assert parts["parameters"] == parts["gradients"] == parts["optimizer"] == 0
    host = host_bytes(
        QWEN3_8B, ParallelConfig(cpu_offload=True), LoraConfig(), Live(), ranks=8, load=LOAD
    )
    assert host == pytest.approx(2 * QWEN3_8B.parameters())


@pytest.mark.parametrize(
    ("layout", "names"), [(dict(tensor=3), "does not divide"), (dict(tensor=16), "kv_heads=8")]
)
def test_layouts_that_cannot_run_are_refused(layout, names):
    with pytest.raises(ValueError, match=names):
        on_gpus(ranks=16, **layout)
