"""What tests/gpu/test_training.py does with every attention, with those of a CPU."""

import pytest

from helpers import attentions, runs


@pytest.mark.slow
def test_five_steps_learn_and_attentions_of_a_cpu_agree(models, tmp_path, monkeypatch):
    here = [pair for pair in attentions.BOTH if attentions.obstacle(*pair) is None]
    assert ("transformers", "sdpa") in here
    found = []
    for i, (engine, attention) in enumerate(here):
        folder = tmp_path / str(i)
        folder.mkdir()
        found.append(
            attentions.assert_learns(engine, attention, models("qwen3"), folder, monkeypatch)
        )
    for rows in found[1:]:
        runs.assert_same_trajectory(found[0], rows, tolerance=1e-4)


def test_an_attention_that_cannot_train_here_is_skipped_and_why(models, tmp_path, monkeypatch):
    with pytest.raises(pytest.skip.Exception, match="needs a GPU and flash-attn"):
        pair = "transformers", "flash_attention_2"
        attentions.assert_learns(*pair, models("qwen3"), tmp_path, monkeypatch)
