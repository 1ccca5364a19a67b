"""Engines by name, and exports that load weights alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import runs
from sdpo.batching import Cursor
from sdpo.train.trainer import RunState
from sdpo_parallel.build import EngineName, build_engine, export_checkpoint
from sdpo_parallel.engine import EngineConfig
from sdpo_parallel.errors import SdpoError
from sdpo_parallel.rows import Rows

ENGINES: list[EngineName] = ["torchtitan", "transformers"]


@pytest.mark.parametrize("name", ENGINES)
def test_an_export_needs_no_optimizer_and_no_teacher(name, models, tmp_path, monkeypatch):
    model = models("qwen3-tied")
    config = EngineConfig(model=model, run_folder=str(tmp_path), total_steps=2, max_tokens=256)
    with runs.as_alone():
        engine = build_engine(name, config, RunState(Cursor(1, 0), ""))
        engine.load()
        tokens, slots = torch.arange(128)[None], torch.arange(128)
        with engine.context():
            hidden = engine.policy.hidden_states(Rows.of(tokens, tokens, slots))
            logits = hidden @ engine.policy.lm_head().weight.T
            engine.backward(logits.logsumexp(-1).sum(), last=True)
        assert engine.clip_gradients() > 0 and engine.update(1) > 0
        engine.save(2, {}, wait=True)
        engine.export(str(tmp_path / "trained"))
        engine.close()

    def refuse(*args, **kwargs):
        raise AssertionError("an export builds no optimizer")

    monkeypatch.setattr("torch.optim.AdamW.__init__", refuse)
    with runs.as_alone():
        export_checkpoint(name, config, None, str(tmp_path / "exported"))
    trained, exported, before = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "trained", tmp_path / "exported", model)
    )
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[n], exported[n]) for n in trained)
    assert not torch.equal(trained["lm_head.weight"], before["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template
    with runs.as_alone(), pytest.raises(SdpoError, match="no checkpoint of step 3; there are: 2"):
        export_checkpoint(name, config, 3, str(tmp_path / "x"))
    assert not list(tmp_path.glob("x*"))


def test_the_transformers_engine_has_no_adapters_and_no_layouts(models, tmp_path):
    config = EngineConfig(
        model=models("qwen3"), run_folder=str(tmp_path), total_steps=1, max_tokens=64
    )
    engine = build_engine("transformers", config, RunState(Cursor(1, 0), ""))
    with pytest.raises(SdpoError, match="no adapters"):
        engine.export(str(tmp_path / "x"), adapters=True)


@pytest.mark.parametrize("name", ENGINES)
def test_a_tied_config_over_another_lm_head_is_refused_until_it_says_which(name, models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models("qwen3-tied"), folder)
    weights, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    config = EngineConfig(model=str(folder), run_folder=str(tmp_path), total_steps=2, max_tokens=64)

    def exported(lm_head: torch.Tensor) -> dict[str, torch.Tensor]:
        save_file({**weights, "lm_head.weight": lm_head}, file, metadata={"format": "pt"})
        with runs.as_alone():
            engine = build_engine(name, config, RunState(Cursor(1, 0), ""))
            engine.load()
            engine.export(str(tmp_path / "exported"))
            engine.close()
        return AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()

    embeddings = weights["model.embed_tokens.weight"]
    other = embeddings.clone()
    other[-1, -1] += 1
    assert torch.equal(exported(embeddings.clone())["lm_head.weight"], embeddings), "a copy is tied"
    with pytest.raises(SdpoError, match="holds a lm_head that differs from its embeddings"):
        exported(other)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": False}))
    found = exported(other)
    assert torch.equal(found["lm_head.weight"], other)
    assert torch.equal(found["model.embed_tokens.weight"], embeddings)
    assert (
        json.loads((tmp_path / "exported" / "config.json").read_text())["tie_word_embeddings"]
        is False
    )
