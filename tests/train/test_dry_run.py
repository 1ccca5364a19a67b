"""The dry run's memory tables, from config.json alone."""

import json
import re

import pytest
from transformers import GPT2Config

from sdpo.cli import main
from sdpo_parallel.config import ParallelConfig

QWEN3_8B = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36)
QWEN3_32B = dict(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64)


@pytest.fixture
def qwen3(tmp_path):
    """A folder with nothing but the config.json of a Qwen3 of 8 or 32 billion parameters."""

    def make(heads: int, **sizes: int) -> str:
        config = dict(
            **sizes,
            model_type="qwen3",
            vocab_size=151936,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
        )
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


def run(model: str, *options: object) -> None:
    names = ["--model", model, "--data", "none.jsonl", "--dry-run"]
    main(["train", "reverse-kl", *names, *map(str, options)])


def total(shown: str) -> float:
    found = re.search(r"total\s*│\s*([\d.,]+)", shown)
    assert found, shown
    return float(found[1].replace(",", ""))


def test_qwen3_8b_on_8_ranks_of_80_gb(qwen3, capsys):
    run(qwen3(32, **QWEN3_8B), "--ranks", 8, "--gpu-memory-gib", 80)
    shown = capsys.readouterr().out
    assert "8,190,735,360" in shown and "memory alone" in shown
    for part in ("parameters (float32)", "gradients", "AdamW state", "gathered", "head chunk"):
        assert part in shown
    assert re.search(r"parameters \(float32\)\s*│\s*3\.81", shown)  # 4 P / 8
    assert 40 < total(shown) < 72
    assert "(this run)" in shown and "too much" in shown


def test_qwen3_32b_on_64_ranks(qwen3, capsys):
    model = qwen3(64, **QWEN3_32B)
    full = ("--parallel.activation-checkpoint", "full")
    run(model, "--ranks", 64, "--gpu-memory-gib", 80, *full)
    shown = capsys.readouterr().out
    assert "32,762,123,264" in shown
    assert total(shown) < 72
    run(model, "--ranks", 64, *full, "--parallel.tensor", 4, "--parallel.context", 2)
    assert total(capsys.readouterr().out) < total(shown)


def test_what_does_not_fit_is_refused_with_a_way_out(qwen3, capsys):
    model = qwen3(32, **QWEN3_8B)
    with pytest.raises(SystemExit) as stop:
        run(model, "--ranks", 8, "--gpu-memory-gib", 80, "--parallel.activation-checkpoint", "none")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("sdpo: error: ") and "Traceback" not in err
    assert total(out) > 72  # the tables come first
    for word in ("activations", "--ranks", "tensor", "context", "micro_batch_tokens below 16384"):
        assert word in err
    assert "activation_checkpoint full" in err and "cpu_offload" in err and "would fit" in err


def test_without_a_limit_nothing_is_refused(qwen3, capsys):
    run(qwen3(32, **QWEN3_8B), "--parallel.activation-checkpoint", "none")
    assert total(capsys.readouterr().out) > 80


def test_offloading_is_told(qwen3, capsys):
    run(qwen3(32, **QWEN3_8B), "--ranks", 8, "--parallel.cpu-offload")
    shown = capsys.readouterr().out
    assert "in host memory, per rank: 15.3 GiB" in shown


def test_ranks_that_the_layout_does_not_divide(qwen3, capsys):
    with pytest.raises(SystemExit) as stop:
        run(qwen3(32, **QWEN3_8B), "--ranks", 6, "--parallel.tensor", 4)
    assert stop.value.code == 2 and "does not divide 6 ranks" in capsys.readouterr().err


def test_other_models_with_the_transformers_engine(tmp_path, capsys):
    GPT2Config().save_pretrained(tmp_path)
    run(str(tmp_path), "--engine", "transformers")
    shown = capsys.readouterr().out
    assert "124,439,808" in shown and "autocast's copies" in shown


def test_a_folder_without_a_config(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(str(tmp_path))
    assert stop.value.code == 2 and str(tmp_path) in capsys.readouterr().err


def test_alternatives_keep_the_rest_of_the_layout(qwen3):
    from sdpo.train.config import TrainConfig
    from sdpo.train.dry_run import layouts

    config = TrainConfig(
        model=qwen3(32, **QWEN3_8B),
        data="",
        out="",
        parallel=ParallelConfig(replicate=2, sequence_parallel=False),
    )
    found = layouts(config, 8)
    assert {(p.tensor, p.context) for p in found} == {
        (t, c) for t in (1, 2, 4) for c in (1, 2, 4) if t * c <= 4
    }
    assert all(p.replicate == 2 and not p.sequence_parallel for p in found)
