"""The torchtitan engine on real gloo process groups."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import runs, tiny
from sdpo_parallel.rounding import cast
from sdpo_parallel.torchtitan.models import spec_from_hf


def test_a_sharded_checkpoint_folder_is_read_and_written(models, tmp_path):
    """Several safetensors files with an index, as every larger model has."""
    sharded = tmp_path / "sharded"
    tiny.make_model(sharded, "qwen3")
    AutoModelForCausalLM.from_pretrained(sharded).save_pretrained(sharded, max_shard_size="200KB")
    (sharded / "model.safetensors").unlink()
    assert len(list(sharded.glob("*.safetensors"))) > 1
    data = tiny.make_interactions(tmp_path / "i.jsonl", 12)
    rows = runs.train("reverse-kl", str(sharded), data, tmp_path / "a", ranks=2)
    plain = runs.train("reverse-kl", models("qwen3"), data, tmp_path / "b", ranks=2)
    runs.assert_same_trajectory(rows, plain)
    a, b = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "export").state_dict()
        for name in "ab"
    )
    assert all((a[name] - b[name]).abs().max() < 1e-5 for name in b)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"model_type": "no_such_model"}, "no_such_model"),
    ],
)
def test_what_torchtitan_would_compute_differently_is_refused(change, names, models, tmp_path):
    source = Path(models("qwen3"))
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=names):
        spec_from_hf(str(tmp_path))


@pytest.mark.parametrize("engine", ["torchtitan", "transformers"])
def test_an_export_has_the_dtype_of_its_source_or_the_one_asked_for(engine, models, tmp_path):
    source = tmp_path / "bf16"
    shutil.copytree(models("qwen3-tied"), source)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    data = tiny.make_interactions(tmp_path / "i.jsonl", 6)
    weights = {}
    for asked, expected in (("source", torch.bfloat16), ("float32", torch.float32)):
        out = tmp_path / asked
        options = ["--engine", engine, "--checkpoint.export-dtype", asked]
        runs.train("reverse-kl", str(source), data, out, *options)
        model = AutoModelForCausalLM.from_pretrained(out / "export")
        assert {p.dtype for p in model.parameters()} == {expected}
        files = [load_file(f) for f in (out / "export").glob("*.safetensors")]
        assert {t.dtype for f in files for t in f.values()} == {expected}
        weights[asked] = {name: t for f in files for name, t in f.items()}
    stochastic = {n: cast(t, torch.bfloat16, "stochastic") for n, t in weights["float32"].items()}
    assert all(torch.equal(t, stochastic[name]) for name, t in weights["source"].items())
    assert any(not torch.equal(t, weights["float32"][n].bfloat16()) for n, t in stochastic.items())
