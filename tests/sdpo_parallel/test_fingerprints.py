"""Digests of a model's files tell changed ones, of large weights by samples."""

import pytest
import torch
from safetensors.torch import save_file

from sdpo_parallel import fingerprints as module
from sdpo_parallel.fingerprints import fingerprints


@pytest.mark.parametrize("whole", [module.WHOLE, 1000])
def test_weights_that_changed_are_told(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WHOLE", whole)
    weights = {"a": torch.randn(300, 64), "b": torch.randn(3), "c": torch.randn(700, 64)}

    def digest(**changes) -> str:
        save_file(weights | changes, tmp_path / "model.safetensors")
        return fingerprints(str(tmp_path))["model.safetensors"]

    before = digest()
    assert digest() == before
    assert digest(a=weights["a"] * 1.001) != before
    assert digest(b=weights["b"] + 1) != before
    assert digest(c=weights["c"].half()) != before
    one_row = weights["c"].clone()
    one_row[100] += 1
    assert (digest(c=one_row) == before) == (whole == 1000), "as documented"


def test_each_file_of_the_tokenizer_has_its_digest(models):
    names = fingerprints(models("qwen3")).keys()
    assert names >= {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
