"""Bad input, answered: the place and what to do, exit status 2, no traceback, no debris."""

import json
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import runs, tiny
from sdpo.cli import main, run
from sdpo.errors import DataError


def answer(capsys: pytest.CaptureFixture, *args: object) -> str:
    """The last line of a command that must fail with status 2."""
    *_, last = runs.refused(capsys, *args).splitlines()
    assert last.startswith("sdpo: error: ")
    return last


def training(model, data, out, *more) -> list:
    small = runs.arguments("reverse-kl", model, data, out)
    return ["train", *small, "--engine", "transformers", *more]


@pytest.fixture
def data(tmp_path):
    return tiny.make_interactions(tmp_path / "i.jsonl", 4)


def test_prepare_and_inspect(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    turns = [("user", "hi there"), ("assistant", "hello"), ("user", "longer please")]
    talks = [[{"role": r, "content": f"{text} {i}"} for r, text in turns] for i in (0, 1, 2, 0)]
    log.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("completion", {"role": "assistant", "content": "  "}),
        ("weight", float("nan")),
        ("weight", -1.0),
        ("weight", float("inf")),
    ],
)
def test_a_row_that_is_no_interaction(field, value, data, models, tmp_path, capsys):
    rows = Path(data).read_text().splitlines()
    rows[2] = json.dumps({**json.loads(rows[2]), field: value})
    Path(data).write_text("\n".join(rows))
    err = answer(capsys, *training(models("qwen3"), data, tmp_path / "run"))
    assert "line 3" in err and field in err and not (tmp_path / "run").exists()


def test_clips_need_the_sampling_logprobs(data, models, tmp_path, capsys):
    args = training(models("qwen3"), data, tmp_path / "run")
    args[1] = "paper-online"
    err = answer(capsys, *args)
    assert "c0" in err and "completion_logprobs" in err


def test_a_model_folder_that_is_not_there(data, tmp_path, capsys):
    err = answer(capsys, *training(tmp_path / "no", data, tmp_path / "run"))
    assert "no such model folder" in err


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_without_a_part(part, data, models, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(models("qwen3"), folder)
    (folder / part).unlink()
    err = answer(capsys, *training(folder, data, tmp_path / "run"))
    assert str(folder) in err and part.removeprefix("model.") in err


@pytest.mark.parametrize(
    ("engine", "weight"), [("transformers", "mlp.up_proj"), ("torchtitan", "feed_forward.w3")]
)
def test_nan_in_a_models_weight(engine, weight, data, models, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(models("qwen3"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    err = answer(capsys, *training(folder, data, tmp_path / "run", "--engine", engine))
    assert f"layers.1.{weight}.weight" in err and "1 of" in err and str(folder) in err


def test_limits_beyond_the_models_positions(data, models, tmp_path, capsys):
    args = training(models("qwen3"), data, tmp_path / "run", "--hindsight.max-prompt-tokens", 5000)
    err = answer(capsys, *args)
    assert "max_position_embeddings=1024" in err


def test_a_dry_run_trains_nothing(data, models, tmp_path, capsys):
    main([str(a) for a in training(models("qwen3"), data, tmp_path / "run", "--dry-run")])
    shown = capsys.readouterr().out
    assert "ReverseKL" in shown and "AdamW state" in shown and "total" in shown
    parameters = sum(
        t.numel() for t in load_file(Path(models("qwen3")) / "model.safetensors").values()
    )
    assert f"{parameters:,}" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("args", [[], ["trian"]])
def test_no_command_and_an_unknown_one(args, capsys):
    assert "train" in runs.refused(capsys, *args)
