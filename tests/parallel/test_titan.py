"""The torchtitan engine on real gloo process groups."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import runs
import tiny


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied", "llama", "llama-tied"])
def test_import_and_export_keep_the_logits(kind, models, tmp_path):
    data = tiny.make_interactions(tmp_path / "i.jsonl", 10)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = str(Path(__file__).with_name("export_worker.py"))
    result = subprocess.run(
        [sys.executable, *launch, worker, models(kind), data, str(tmp_path)],
        env=runs.ENV,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "were exported" in result.stdout


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
    runs.assert_same_course(rows, plain)
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
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ],
)
def test_what_torchtitan_would_compute_differently_is_refused(change, names, models, tmp_path):
    from sdpo_parallel.titan import spec_from_hf

    source = Path(models("qwen3"))
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=names):
        spec_from_hf(str(tmp_path))
