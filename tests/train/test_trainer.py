"""Whole runs through the command line: layouts and engines agree, a killed run goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import runs, tiny
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
def test_one_process_two_ranks_and_transformers_follow_the_same_trajectory(
    kind, recipe, data, models, tmp_path
):
    model = models(kind)
    alone = runs.train(recipe, model, data, tmp_path / "1")
    sharded = runs.train(recipe, model, data, tmp_path / "2", ranks=2)
    transformers = runs.train(recipe, model, data, tmp_path / "t", "--engine", "transformers")
    epochs = 2 if recipe == "paper-offline" else 1
    assert len(alone) == -(-N * epochs // 6)
    runs.assert_same_trajectory(alone, sharded)
    runs.assert_same_trajectory(alone, transformers, tolerance=1e-4)


@pytest.mark.parametrize("teacher", ["frozen:another", "trust-region:0.3", "ema:0.5"])
def test_teachers_are_the_same_in_both_engines(teacher, data, models, tmp_path):
    """Also one of another architecture and width, with the policy's tokenizer."""
    if teacher == "frozen:another":
        folder = tmp_path / "another"
        tiny.make_model(folder, "llama")
        narrow = LlamaConfig.from_pretrained(
            folder, hidden_size=32, head_dim=8, num_hidden_layers=1
        )
        LlamaForCausalLM(narrow).save_pretrained(folder)
        teacher = f"frozen:{folder}"
    options, model = ["--teacher", teacher], models("qwen3-tied")
    titan = runs.train("reverse-kl", model, data, tmp_path / "a", *options, ranks=2)
    options += ["--engine", "transformers"]
    transformers = runs.train("reverse-kl", model, data, tmp_path / "b", *options)
    runs.assert_same_trajectory(titan, transformers, tolerance=1e-4)
    live = runs.train("reverse-kl", model, data, tmp_path / "c", "--engine", "transformers")
    assert abs(live[3]["loss"] - titan[3]["loss"]) > 1e-3, "the teacher changes nothing"


@pytest.mark.parametrize(("engine", "ranks"), [("torchtitan", 2), ("transformers", 0)])
def test_a_killed_run_resumes_on_the_same_trajectory(engine, ranks, data, models, tmp_path):
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
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    children = [int(pid) for pid in listed.stdout.split()]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in children:  # torchrun's workers have groups of their own
        os.kill(pid, signal.SIGKILL)
    before = len(metrics.read_text().splitlines())
    assert 5 <= before < len(undisturbed), "it was killed too late to show anything"
    assert not (out / "export").exists()

    resumed = runs.train("reverse-kl", model, data, out, *options, "--resume", ranks=ranks)
    runs.assert_same_trajectory(undisturbed, resumed)
    assert (out / "export" / "config.json").is_file()


def test_a_run_resumes_on_another_number_of_ranks(data, models, tmp_path):
    options = ["--checkpoint.interval", "2"]
    model = models("llama")
    whole = runs.train("reverse-kl", model, data, tmp_path / "a", *options)
    # as if it had stopped after four of its six steps
    out = tmp_path / "a"
    shutil.rmtree(out / "checkpoints" / "step-6")
    resumed = runs.train("reverse-kl", model, data, out, *options, "--resume", ranks=2)
    runs.assert_same_trajectory(whole, resumed)


def test_a_run_goes_on_in_other_layouts(data, models, tmp_path):
    """FSDP2 on two ranks -> tensor parallel -> context parallel -> one process, with a teacher."""
    model, out = models("qwen3-tied"), tmp_path / "run"
    options = ["--checkpoint.interval", "1", "--checkpoint.keep", "0", "--batch.epochs", "1.5"]
    options += ["--teacher", "ema:0.6", "--safeguard.probe-every", "2"]
    whole = runs.train("reverse-kl", model, data, tmp_path / "whole", *options)
    assert len(whole) == 8
    layouts = [
        (2, []),
        (2, ["--parallel.tensor", "2"]),
        (2, ["--parallel.context", "2"]),
        (0, []),
    ]
    for i, (ranks, layout) in enumerate(layouts):
        runs.train("reverse-kl", model, data, out, *options, *layout, "--resume", ranks=ranks)
        if i < len(layouts) - 1:  # as if it had stopped after two steps
            for step in range(2 * i + 3, len(whole) + 1):
                shutil.rmtree(out / "checkpoints" / f"step-{step}")
    rows = runs.read_metrics(out)
    runs.assert_same_trajectory(whole, rows, tolerance=1e-4)
    for a, b in zip(whole, rows, strict=True):
        assert a.get("drift/kl", 0) == pytest.approx(b.get("drift/kl", 0), abs=1e-5)
    assert [("drift/kl" in r) for r in rows] == [False, True] * 4
    assert 0 < rows[1]["drift/kl"] < rows[7]["drift/kl"]
    manifest = json.loads((out / "checkpoints" / "step-8" / "manifest.json").read_text())
    assert manifest["interactions_seen"] == round(N * 1.5)
    assert manifest["layout"] == {"replicate": 1, "shard": 1, "context": 1, "tensor": 1}


@pytest.mark.parametrize("engine", ["torchtitan", "transformers"])
def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(
    engine, data, models, tmp_path
):
    """A weight of an interaction that overflows spoils its step, and nothing else."""
    from dataclasses import replace

    model, options = models("qwen3"), ["--engine", engine]
    options += ["--batch.interactions-per-step", "1", "--safeguard.probe-interactions", "0"]
    rows = [replace(i, response_logprobs=None) for i in read_interactions(data)[:6]]

    def run(name, spoiled):
        broken = [
            replace(
                i,
                response_token_ids=(7, 8, 9),
                response_logprobs=(-1e30, -1e30, -1e30) if n in spoiled else (-3.0, -3.0, -3.0),
            )
            for n, i in enumerate(rows)
        ]
        path = tmp_path / f"{name}.jsonl"
        write_interactions(path, broken)
        argv = runs.command("paper-online", model, str(path), tmp_path / name, *options)
        argv += ["--objective.no-centre"]
        return subprocess.run(argv, env=runs.ENV, capture_output=True, text=True)

    assert run("one", {2}).returncode == 0
    trajectory = runs.read_metrics(tmp_path / "one")
    assert [r["skipped"] for r in trajectory][-1] == 1
    assert sum(r["grad_norm"] is None for r in trajectory) == 1
    assert (tmp_path / "one" / "export").is_dir()

    ended = run("all", {0, 1, 2, 3, 4, 5})
    assert ended.returncode == 2 and "3 steps in a row" in ended.stderr, ended.stderr[-2000:]
    assert len(runs.read_metrics(tmp_path / "all")) == 3
    assert (tmp_path / "all" / "checkpoints" / "step-3").is_dir()


def test_a_collapse_stops_the_run_where_asked(data, models, tmp_path):
    options = ["--engine", "transformers", "--optimizer.lr", "1e-2"]
    options += ["--safeguard.probe-every", "1", "--safeguard.stop-kl", "0.01"]
    argv = runs.command("reverse-kl", models("qwen3"), data, tmp_path / "r", *options)
    result = subprocess.run(argv, env=runs.ENV, capture_output=True, text=True)
    assert result.returncode == 2 and "beyond stop_kl=0.01" in result.stderr
    last = runs.read_metrics(tmp_path / "r")[-1]
    assert last["drift/kl"] > 0.01
    assert (tmp_path / "r" / "checkpoints" / f"step-{last['step']}" / "manifest.json").is_file()


def test_export_writes_any_checkpoint(data, models, tmp_path):
    model, out = models("qwen3"), tmp_path / "run"
    options = ["--checkpoint.interval", "2", "--checkpoint.keep", "0", "--parallel.tensor", "2"]
    runs.train("reverse-kl", model, data, out, *options, ranks=2)

    def export(name, *args, code=0):
        argv = [sys.executable, "-m", "sdpo", "export", str(out), "--out", str(tmp_path / name)]
        result = subprocess.run([*argv, *args], env=runs.ENV, capture_output=True, text=True)
        assert result.returncode == code, result.stderr[-3000:]
        return result.stderr

    def weights(folder):
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()

    export("newest")
    export("second", "--step", "2")
    last, newest, second = (
        weights(f) for f in (out / "export", tmp_path / "newest", tmp_path / "second")
    )
    assert all(torch.equal(last[name], newest[name]) for name in last)
    assert any(not torch.equal(last[name], second[name]) for name in last)
    assert "no checkpoint of step 3; there are: 2, 4, 6" in export("x", "--step", "3", code=2)
    assert "lora.rank is 0" in export("x", "--adapters", code=2)
    (next((out / "checkpoints" / "step-4").glob("*.distcp"))).write_bytes(b"spoiled")
    assert "step-4 is damaged" in export("x", "--step", "4", code=2)
    assert not (tmp_path / "x").exists()


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
        len(tokenizer(i.response, add_special_tokens=False)["input_ids"]) + 1 for i in interactions
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

    from sdpo.analysis.advantages import Reader
    from sdpo.analysis.options import ReaderOptions
    from sdpo.hindsight import HindsightConfig

    folder = models("qwen3")
    reader = Reader.load(folder, ReaderOptions(hindsight=HindsightConfig(template="paper-online")))
    interactions = read_interactions(data)[:6]
    readings = reader.read((i, ()) for i in interactions)
    online = [
        replace(
            i, response_token_ids=r.encoded.response, response_logprobs=tuple(r.policy.tolist())
        )
        for i, r in zip(interactions, readings, strict=True)
    ]
    path = tmp_path / "online.jsonl"
    write_interactions(path, online)
    out = tmp_path / "r"
    (row,) = runs.train("paper-online", folder, str(path), out, "--engine", "transformers")
    assert abs(row["loss"]) < 1e-5 and row["grad_norm"] > 1e-2

    # on ranks of which one has no interaction of the last step, split by context, and at a low clip
    options = ["--batch.interactions-per-step", "5", "--objective.ppo-clip", "0.01"]
    alone = runs.train("paper-online", folder, str(path), tmp_path / "1", *options)
    assert alone[-1]["response/tokens"] and alone[1]["advantage/clipped"] > 0
    for name, layout in {"dp": [], "cp": ["--parallel.context", "2"]}.items():
        other = runs.train(
            "paper-online", folder, str(path), tmp_path / name, *options, *layout, ranks=2
        )
        runs.assert_same_trajectory(alone, other)
        for a, b in zip(alone, other, strict=True):
            assert a["advantage/clipped"] == pytest.approx(b["advantage/clipped"], abs=1e-6)
    assert torch.isfinite(torch.tensor(row["grad_norm"]))
