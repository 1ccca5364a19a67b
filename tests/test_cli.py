"""Bad input, answered: the place and what to do, exit status 2, no traceback, no debris."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from sdpo.cli import main, run
from sdpo.errors import DataError


def answer(capsys: pytest.CaptureFixture, *args: object) -> str:
    """stderr of a command that must fail with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("sdpo: error: ") and "Traceback" not in err
    return err


def training(model, data, out, *more) -> list:
    limits = "--hindsight.max-prompt-tokens 100 --hindsight.max-hindsight-prompt-tokens 200 "
    limits += "--hindsight.max-response-tokens 60 --engine transformers"
    files = ["--model", model, "--data", data, "--out", out]
    return ["train", "reverse-kl", *files, *limits.split(), *more]


@pytest.fixture
def data(tmp_path):
    return tiny.make_interactions(tmp_path / "i.jsonl", 4)


def rewrite(path: str, line: int, **fields) -> None:
    rows = Path(path).read_text().splitlines()
    rows[line - 1] = json.dumps({**json.loads(rows[line - 1]), **fields})
    Path(path).write_text("\n".join(rows) + "\n")


def test_prepare_and_inspect(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    turns = [("user", "hi there"), ("assistant", "hello"), ("user", "longer please")]
    for i in (0, 1, 2, 0):
        row = {"messages": [{"role": role, "content": f"{text} {i}"} for role, text in turns]}
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
    out = tmp_path / "out" / "interactions.jsonl"
    main(["data", "prepare", str(log), "--preset", "all-turns", "--out", str(out)])
    assert len(out.read_text().splitlines()) == 3
    main(["data", "inspect", str(out)])
    shown = capsys.readouterr().out
    assert "dropped: duplicate" in shown
    assert "3 interactions" in shown and "longer please" in shown


def test_logs_that_cannot_be_prepared(tmp_path, capsys):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "columns.parquet")
    good = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    lines = [good] * 1233 + [good[:-3]] + [good] * 10
    (tmp_path / "line.jsonl").write_text("\n".join(lines) + "\n")
    for name, said in (
        ("no.parquet", "no such file"),
        ("columns.parquet", "its fields are `text`. Rows need one of `conversation`"),
        ("line.jsonl", "line 1234: broken JSON"),
    ):
        err = answer(capsys, "data", "prepare", tmp_path / name, "--out", tmp_path / "o.jsonl")
        assert name in err and said in err and not (tmp_path / "o.jsonl").exists()


def test_an_error_of_ours_is_a_line_and_a_bug_keeps_its_traceback(capsys, monkeypatch):
    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    error = DataError("not so", file="x.jsonl", row="line 3", field="id", hint="Do this")
    with pytest.raises(SystemExit) as stop:
        run(lambda: fail(pickle.loads(pickle.dumps(error))))
    assert stop.value.code == 2
    says = "sdpo: error: rank 3: x.jsonl, line 3, field `id`: not so. Do this.\n"
    assert capsys.readouterr().err == says
    with pytest.raises(ValueError, match="a bug"):
        run(lambda: fail(ValueError("a bug")))


def test_empty_conversations_give_no_interactions(tmp_path, capsys, models):
    log, out = tmp_path / "log.jsonl", tmp_path / "o.jsonl"
    log.write_text(json.dumps({"messages": []}) + "\n")
    main(["data", "prepare", str(log), "--out", str(out)])
    assert "too few messages" in capsys.readouterr().out
    err = answer(capsys, *training(models("qwen3"), out, tmp_path / "run"))
    assert "o.jsonl" in err and "empty" in err


def test_an_interaction_whose_response_is_empty(data, models, tmp_path, capsys):
    rewrite(data, 3, completion={"role": "assistant", "content": "  "})
    err = answer(capsys, *training(models("qwen3"), data, tmp_path / "run"))
    assert "line 3" in err and "completion" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("weight", [float("nan"), -1.0, float("inf")])
def test_a_weight_that_is_no_weight(weight, data, models, tmp_path, capsys):
    rewrite(data, 2, weight=weight)
    err = answer(capsys, *training(models("qwen3"), data, tmp_path / "run"))
    assert "line 2" in err and "weight" in err


def test_clips_need_the_sampling_logprobs(data, models, tmp_path, capsys):
    args = training(models("qwen3"), data, tmp_path / "run")
    args[1] = "paper-online"
    err = answer(capsys, *args)
    assert "c0" in err and "completion_logprobs" in err


def test_a_model_folder_without_tokenizer(data, models, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(models("qwen3")) / name, folder)
    err = answer(capsys, *training(folder, data, tmp_path / "run"))
    assert str(folder) in err and "tokenizer.json" in err


def test_a_model_folder_that_is_not_there(data, tmp_path, capsys):
    err = answer(capsys, *training(tmp_path / "no", data, tmp_path / "run"))
    assert "no such model folder" in err


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_model_folder_without_a_part(missing, data, models, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(models("qwen3"), folder)
    (folder / missing).unlink()
    err = answer(capsys, *training(folder, data, tmp_path / "run"))
    assert missing.rpartition(".")[2] in err


@pytest.mark.parametrize("engine", ["transformers", "torchtitan"])
def test_nan_in_a_models_weight(engine, data, models, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(models("qwen3"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    args = training(folder, data, tmp_path / "run", "--engine", engine)
    if engine == "torchtitan":  # a process group of its own
        result = subprocess.run(
            [sys.executable, "-m", "sdpo", *map(str, args)], capture_output=True, text=True
        )
        assert result.returncode == 2
        err = result.stderr
        assert "layers.1.feed_forward.w3.weight" in err
    else:
        err = answer(capsys, *args)
        assert "layers.1.mlp.up_proj.weight" in err
    assert "1 of" in err and str(folder) in err


def test_limits_beyond_the_models_positions(data, models, tmp_path, capsys):
    args = training(models("qwen3"), data, tmp_path / "run", "--hindsight.max-prompt-tokens", 5000)
    err = answer(capsys, *args)
    assert "max_position_embeddings=1024" in err


def test_a_run_is_not_overwritten_and_not_resumed_as_another(data, models, tmp_path, capsys):
    args = training(models("qwen3"), data, tmp_path / "run")
    main([str(a) for a in args])
    assert "--resume" in answer(capsys, *args)
    err = answer(capsys, *args, "--resume", "--optimizer.lr", "0.5")
    assert "optimizer.lr" in err and "0.5" in err
    tiny.make_interactions(Path(data), 4, seed=9)
    assert "has changed" in answer(capsys, *args, "--resume")


def test_a_dry_run_trains_nothing(data, models, tmp_path, capsys):
    main([str(a) for a in training(models("qwen3"), data, tmp_path / "run", "--dry-run")])
    shown = capsys.readouterr().out
    assert "ReverseKL" in shown and "AdamW state" in shown and "total" in shown
    parameters = sum(
        t.numel() for t in load_file(Path(models("qwen3")) / "model.safetensors").values()
    )
    assert f"{parameters:,}" in shown
    assert not (tmp_path / "run").exists()


def test_no_command_and_an_unknown_one(capsys):
    for args in ([], ["trian"]):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2 and "train" in capsys.readouterr().err
