"""Whole runs through the command line: layouts and engines agree, a killed run goes on."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
import tiny
from sdpo.interactions import read_interactions, write_interactions

N = 31
"""The last step of an epoch has one interaction, and a second rank none."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_interactions(tmp_path_factory.mktemp("data") / "i.jsonl", N)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("qwen3", "reverse-kl"),
        ("qwen3-tied", "paper-offline"),
        ("llama", "jsd"),
        ("llama-tied", "forward-kl"),
    ],
)
def test_one_process_two_ranks_and_transformers_take_the_same_course(
    kind, recipe, data, models, tmp_path
):
    model = models(kind)
    alone = runs.train(recipe, model, data, tmp_path / "1")
    sharded = runs.train(recipe, model, data, tmp_path / "2", ranks=2)
    transformers = runs.train(recipe, model, data, tmp_path / "t", "--engine", "transformers")
    epochs = 2 if recipe == "paper-offline" else 1
    assert len(alone) == -(-N * epochs // 6)
    runs.assert_same_course(alone, sharded)
    runs.assert_same_course(alone, transformers, tolerance=1e-4)


@pytest.mark.parametrize(("engine", "ranks"), [("torchtitan", 2), ("transformers", 0)])
def test_a_killed_run_resumes_on_the_same_course(engine, ranks, data, models, tmp_path):
    options = ["--engine", engine, "--checkpoint.interval", "2", "--batch.epochs", "3"]
    model = models("qwen3")
    undisturbed = runs.train("reverse-kl", model, data, tmp_path / "a", *options, ranks=ranks)

    out = tmp_path / "b"
    argv = runs.command("reverse-kl", model, data, out, *options, ranks=ranks)
    process = subprocess.Popen(argv, env=runs.ENV, start_new_session=True, stderr=subprocess.PIPE)
    metrics = out / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = len(metrics.read_text().splitlines())
    assert 5 <= before < len(undisturbed), "it was killed too late to show anything"
    assert not (out / "export").exists()

    resumed = runs.train("reverse-kl", model, data, out, *options, "--resume", ranks=ranks)
    runs.assert_same_course(undisturbed, resumed)
    assert (out / "export" / "config.json").is_file()


def test_a_run_resumes_on_another_number_of_ranks(data, models, tmp_path):
    options = ["--checkpoint.interval", "2"]
    model = models("llama")
    whole = runs.train("reverse-kl", model, data, tmp_path / "a", *options)
    # as if it had stopped after four of its six steps
    out = tmp_path / "a"
    shutil.rmtree(out / "checkpoints" / "step-6")
    resumed = runs.train("reverse-kl", model, data, out, *options, "--resume", ranks=2)
    runs.assert_same_course(whole, resumed)


def test_the_run_folder_and_the_export(data, models, tmp_path):
    model = models("qwen3")
    out = tmp_path / "run"
    rows = runs.train("reverse-kl", model, data, out, ranks=2)
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "export"} <= {
        p.name for p in out.iterdir()
    }
    assert not list(out.rglob("*.partial"))
    assert json.loads((out / "config.json").read_text())["objective"]["kind"] == "ReverseKL"
    expected = {
        "loss",
        "advantage/mean_abs",
        "advantage/near_zero",
        "advantage/at_end",
        "entropy/policy",
        "entropy/hindsight",
        "logp/policy",
        "logp/hindsight",
        "response/length",
        "truncated/policy",
        "truncated/hindsight",
        "truncated/response",
        "grad_norm",
        "lr",
        "response_tokens_per_second",
        "peak_memory_gib",
    }
    assert expected <= rows[0].keys()
    interactions = read_interactions(data)
    tokenizer = AutoTokenizer.from_pretrained(out / "export")
    tokens = sum(
        len(tokenizer(i.completion, add_special_tokens=False)["input_ids"]) + 1
        for i in interactions
    )
    assert sum(r["response/tokens"] for r in rows) == tokens
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out / "export").state_dict()
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model).chat_template


def test_weights_of_interactions_are_a_weighted_mean(data, models, tmp_path):
    """A weight of zero is as good as the row's absence; all weights doubled change nothing."""
    rows = read_interactions(data)[:12]
    from dataclasses import replace

    kept, lost = rows[:6], rows[6:]
    model = models("qwen3")

    def loss(name, interactions):
        path = tmp_path / f"{name}.jsonl"
        write_interactions(path, interactions)
        options = ["--engine", "transformers", "--batch.interactions-per-step", "12"]
        return runs.train("reverse-kl", model, str(path), tmp_path / name, *options)[0]["loss"]

    plain = loss("plain", kept)
    zeros = loss("zeros", kept + [replace(i, weight=0.0) for i in lost])
    doubled = loss("doubled", [replace(i, weight=2.0) for i in kept])
    assert zeros == pytest.approx(plain, rel=1e-5) and doubled == pytest.approx(plain, rel=1e-5)


def test_truncation_is_counted_for_each_pass(data, models, tmp_path):
    options = ["--hindsight.max-prompt-tokens", "40", "--hindsight.max-response-tokens", "20"]
    rows = runs.train(
        "reverse-kl", models("qwen3"), data, tmp_path / "r", "--engine", "transformers", *options
    )
    cut = {
        part: sum(r[f"truncated/{part}"] for r in rows)
        for part in ("policy", "hindsight", "response")
    }
    assert 0 < cut["policy"] < N and cut["hindsight"] == 0 and 0 < cut["response"] < N
    assert max(r["response/length"] for r in rows) <= 20


def test_online_rollouts_with_their_logprobs_train_the_papers_online_objective(
    models, data, tmp_path
):
    """At the sampling policy itself the ratio is 1: the first loss is the unclipped one, minus
    the mean advantage's share, which centring removes: zero."""
    from dataclasses import replace

    from sdpo.hindsight import HindsightConfig, encode, load_tokenizer
    from sdpo.signal import signals
    from sdpo.transformers_engine import load_model

    folder = models("qwen3")
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    config = HindsightConfig(template="paper-online")
    interactions = read_interactions(data)[:6]
    rows = signals(model, tokenizer, [encode(i, tokenizer, config) for i in interactions])
    online = [
        replace(
            i,
            completion_token_ids=tuple(r["token_ids"]),
            completion_logprobs=tuple(r["logp_policy"]),
        )
        for i, r in zip(interactions, rows, strict=True)
    ]
    path = tmp_path / "online.jsonl"
    write_interactions(path, online)
    out = tmp_path / "r"
    (row,) = runs.train("paper-online", folder, str(path), out, "--engine", "transformers")
    assert abs(row["loss"]) < 1e-5 and row["grad_norm"] > 1e-2
    assert torch.isfinite(torch.tensor(row["grad_norm"]))
