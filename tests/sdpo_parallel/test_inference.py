"""A model that is read and not trained: what its ranks agree on, and its dtypes."""

import json

import pytest
import torch

from helpers import runs
from sdpo_parallel.build import build_inference
from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.inference import InferenceConfig
from sdpo_parallel.rows import Rows


def test_ranks_share_results_and_errors(models, tmp_path):
    runs.worker("inference_worker.py", 2, models("qwen3"), str(tmp_path))
    for rank in (0, 1):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["gathered"] == [0, 1] and told["main"] == "from rank 0"
        assert told["refused"] == "refused by rank 0" and told["called"] == [0][rank:]
        assert "the seed differs between ranks: rank 1 has 1, rank 0 0" in told["differs"]
        assert told["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("dtype", "passes", "on_gpu", "on_cpu"),
    [
        ("auto", "auto", ("bfloat16", "bfloat16"), ("float32", "float32")),
        ("float32", "auto", ("float32", "float32"), ("float32", "float32")),
        ("bfloat16", "auto", ("bfloat16", "bfloat16"), ("bfloat16", "bfloat16")),
        ("float32", "bfloat16", ("float32", "bfloat16"), ("float32", "bfloat16")),
        ("auto", "float32", ("bfloat16", "float32"), ("float32", "float32")),
    ],
)
def test_passes_compute_in_the_weights_dtype_unless_told(dtype, passes, on_gpu, on_cpu):
    parallel = ParallelConfig(compute_dtype=passes)
    config = InferenceConfig(model="", max_tokens=1, dtype=dtype, parallel=parallel)
    assert (config.dtypes("cuda"), config.dtypes("cpu")) == (on_gpu, on_cpu)


@pytest.mark.parametrize("engine", ["transformers", "torchtitan"])
def test_weights_and_passes_have_the_dtypes_asked_for(engine, models):
    tokens = torch.arange(5, 133)[None]
    config = InferenceConfig(model=models("qwen3"), max_tokens=128, dtype="bfloat16")
    with runs.as_alone(), torch.no_grad():
        inference = build_inference(engine, config)
        inference.load()
        with inference.context():
            rows = Rows.of(tokens, torch.arange(128)[None], torch.arange(128))
            hidden_ND = inference.model.hidden_states(rows)
        module = inference.model.module
        assert hidden_ND.dtype == inference.model.lm_head().weight.dtype == torch.bfloat16
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert not module.training
        inference.close()
