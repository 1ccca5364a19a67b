"""The dry run's memory tables, from config.json alone."""

import json
import re
from pathlib import Path

import pytest
from transformers import GPT2Config

from helpers import runs, tiny
from sdpo.cli import main
from sdpo.train.config import TrainConfig
from sdpo.train.dry_run import layouts
from sdpo_parallel.config import ParallelConfig

LIMITS = ["--hindsight.max-prompt-tokens", "400", "--hindsight.max-hindsight-prompt-tokens", "500"]
LIMITS += ["--hindsight.max-response-tokens", "400"]
"""Of sequences, so that they fit the tiny models."""


@pytest.fixture
def qwen3_8b(tmp_path):
    return tiny.make_shape(tmp_path, "qwen3-8b")


def dry(model: str, *options: object) -> list[str]:
    names = ["--model", model, "--data", "none.jsonl", "--dry-run"]
    return ["train", "reverse-kl", *names, *map(str, options)]


@pytest.fixture
def run(capsys):
    """What the command prints."""

    def call(model: str, *options: object) -> str:
        main(dry(model, *options))
        return capsys.readouterr().out

    return call


def total(shown: str) -> float:
    found = re.search(r"total\s*│\s*([\d.,]+)", shown)
    assert found, shown
    return float(found[1].replace(",", ""))


def test_qwen3_8b_on_8_ranks_of_80_gb(qwen3_8b, run):
    shown = run(qwen3_8b, "--ranks", 8, "--gpu-memory-gib", 80)
    assert "8,190,735,360" in shown and "memory alone" in shown
    for part in ("parameters (float32)", "gradients", "AdamW state", "gathered", "head chunk"):
        assert part in shown
    assert re.search(r"parameters \(float32\)\s*│\s*3\.81", shown)  # 4 P / 8
    assert 40 < total(shown) < 72
    assert "(this run)" in shown and "too much" in shown


def test_a_step_of_one_interaction_or_of_one_conversation(models, tmp_path, capsys):
    data = tiny.make_conversations(tmp_path / "i.jsonl", 40)
    n = len(Path(data).read_text().splitlines())
    steps = {}
    for unit in ("interaction", "conversation"):
        options = ["--data", data, "--batch.unit", unit, "--batch.interactions-per-step", "1"]
        main([*dry(models("qwen3")), *LIMITS, *options])
        shown = capsys.readouterr().out
        found = re.search(r"steps\s*│\s*(\d+)", shown)
        assert found, shown
        steps[unit] = int(found[1])
    assert steps == {"interaction": n, "conversation": 40}
    assert re.search(rf"of a conversation: mean, max\s*│\s*{n / 40:.1f}, 5", shown)


def test_qwen3_32b_on_64_ranks(tmp_path, run):
    model = tiny.make_shape(tmp_path, "qwen3-32b")
    full = ("--ranks", 64, "--parallel.activation-checkpoint", "full")
    shown = run(model, "--gpu-memory-gib", 80, *full)
    assert "32,762,123,264" in shown
    assert total(shown) < 72
    assert total(run(model, *full, "--parallel.tensor", 4, "--parallel.context", 2)) < total(shown)


def test_what_does_not_fit_is_refused_with_a_way_out_where_there_is_a_limit(qwen3_8b, run, capsys):
    none = ("--parallel.activation-checkpoint", "none")
    assert total(run(qwen3_8b, *none)) > 80
    with pytest.raises(SystemExit) as stop:
        run(qwen3_8b, "--ranks", 8, "--gpu-memory-gib", 80, *none)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("sdpo: error: ") and "Traceback" not in err
    assert total(out) > 72  # the tables come first
    for word in ("activations", "--ranks", "tensor", "context", "micro_batch_tokens below 16384"):
        assert word in err
    assert "activation_checkpoint full" in err and "cpu_offload" in err and "would fit" in err


def test_offloading_is_told(qwen3_8b, run):
    shown = run(qwen3_8b, "--ranks", 8, "--parallel.cpu-offload")
    assert "in host memory, per rank: 15.3 GiB" in shown


def test_ranks_that_the_layout_does_not_divide(qwen3_8b, capsys):
    layout = dry(qwen3_8b, "--ranks", 6, "--parallel.tensor", 4)
    assert "does not divide 6 ranks" in runs.refused(capsys, *layout)


def test_other_models_with_the_transformers_engine(tmp_path, run):
    GPT2Config().save_pretrained(tmp_path)
    shown = run(str(tmp_path), "--engine", "transformers")
    assert "124,439,808" in shown and "autocast's copies" in shown


def test_a_folder_without_a_config(tmp_path, capsys):
    assert str(tmp_path) in runs.refused(capsys, *dry(str(tmp_path)))


def test_alternatives_keep_the_rest_of_the_layout(qwen3_8b):
    kept = ParallelConfig(replicate=2, sequence_parallel=False)
    config = TrainConfig(model=qwen3_8b, data="", out="", parallel=kept)
    found = layouts(config, 8)
    assert {(p.tensor, p.context) for p in found} == {
        (t, c) for t in (1, 2, 4) for c in (1, 2, 4) if t * c <= 4
    }
    assert all(p.replicate == 2 and not p.sequence_parallel for p in found)


def conversations(path) -> str:
    """Two of three turns, each of which holds the turns before."""
    rows = []
    for c, first in (("a", "a story please"), ("b", "five things")):
        messages = [{"role": "user", "content": f"{first} {tiny.TEXT}"}]
        for n in range(3):
            answer = {"role": "assistant", "content": f"the {n} {tiny.TEXT}"}
            follow_up = {"role": "user", "content": f"no {n} longer"}
            row = {"id": f"{c}_{n}", "turn_id": n, "prompt": messages}
            rows.append(row | {"completion": answer, "user_response": follow_up})
            messages = [*messages, answer, follow_up]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_what_the_data_shares(models, tmp_path, capsys):
    data = conversations(tmp_path / "data.jsonl")

    def shown(*options: str) -> str:
        main(["train", "reverse-kl", *arguments, *options])
        return capsys.readouterr().out

    def reads(text: str) -> list[list[int]]:
        """Policy, hindsight, saved and cost: without sharing, by interaction, by conversation."""
        rows = re.findall(r"(?:no prefixes|by interaction|by conversation) *│(.*)│.*x │", text)
        return [[int(n.replace(",", "")) for n in row.split("│")] for row in rows]

    arguments = ["--model", models("qwen3"), "--data", data, "--dry-run", *LIMITS]
    text = shown()
    whole, alone, together = reads(text)
    for policy, hindsight, saved, cost in (whole, alone, together):
        assert cost == 3 * policy + hindsight
        assert saved == whole[0] + whole[1] - policy - hindsight
    assert whole[0] == alone[0] > 1.5 * together[0] and whole[1] > alone[1]
    assert f"{together[3]:,} │ {whole[3] / together[3]:.2f}x" in text
    assert "kept keys and values" in text and "--batch.share-prefix none does without" in text
    tries = reads(shown("--teacher", "ema:0.9"))
    assert tries[0] == tries[1] == whole and tries[2][0] == together[0]
    none = shown("--batch.share-prefix", "none")
    assert "prefixes are not shared: batch.share_prefix none" in none and not reads(none)


def test_keys_that_do_not_fit_are_told_how_to_do_without(qwen3_8b, run, capsys):
    full = ("--ranks", 64, "--parallel.activation-checkpoint", "full")
    options = (*full, "--gpu-memory-gib", 40, "--batch.micro-batch-tokens", 65536)
    with pytest.raises(SystemExit):
        run(qwen3_8b, *options)
    out, err = capsys.readouterr()
    assert "9.00 GiB between the policy's pass" in out  # 147,456 bytes of each of 65,536 tokens
    assert "kept keys and values 9.0" in err and "batch.share_prefix none" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "model_type 'gpt2' has no torchtitan model here (qwen3 and llama have)"),
        (("--engine", "transformers", "--ranks", 8), "runs on one device, and here are 8 ranks"),
        (("--engine", "transformers", "--parallel.tensor", 2), "parallel.tensor=2"),
    ],
)
def test_what_the_engine_would_refuse_is_refused(options, says, tmp_path, run, capsys):
    GPT2Config(bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        run(str(tmp_path), *options)
    assert says in capsys.readouterr().err


def test_sequences_longer_than_the_model_are_refused(qwen3_8b, run, capsys):
    longer = ("--hindsight.max-prompt-tokens", 40_000)
    for engine in ("torchtitan", "transformers"):
        with pytest.raises(SystemExit):
            run(qwen3_8b, *longer, "--engine", engine)
        assert "max_position_embeddings=40960: lower the limits" in capsys.readouterr().err
