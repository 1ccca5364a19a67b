"""Whole runs through the command line: engines, layouts and exports."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import runs, tiny
from sdpo.analysis.advantages import Reader
from sdpo.analysis.options import ReaderOptions
from sdpo.chat import today
from sdpo.cli import main
from sdpo.hindsight import HindsightConfig
from sdpo.interactions import conversation_of, read_interactions, write_interactions
from sdpo.train.loader import Loader

N = 31
"""The last step of an epoch has one interaction, and a second rank none."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_interactions(tmp_path_factory.mktemp("data") / "i.jsonl", N)


@pytest.mark.parametrize(
    ("kind", "recipe", "ranks"),
    [
        ("qwen3", "reverse-kl", 0),
        ("qwen3-tied", "paper-offline", 2),
        ("llama", "jsd", 0),
        ("llama-tied", "forward-kl", 2),
    ],
)
def test_both_engines_follow_the_same_trajectory(kind, recipe, ranks, data, models, tmp_path):
    model = models(kind)
    titan = runs.train(recipe, model, data, tmp_path / "a", ranks=ranks)
    transformers = runs.train(recipe, model, data, tmp_path / "b", "--engine", "transformers")
    epochs = 2 if recipe == "paper-offline" else 1
    assert len(titan) == -(-N * epochs // 6)
    runs.assert_same_trajectory(titan, transformers, tolerance=1e-4)


def test_the_top_k_objective_trains_on_both_engines_and_on_tensor_parallel_ranks(
    data, models, tmp_path
):
    model, file = models("qwen3-tied"), tmp_path / "top-k.toml"
    file.write_text('[objective]\nkind = "TopKReverseKL"\n')
    few = ["--config", str(file), "--objective.k", "5"]
    titan = runs.train("reverse-kl", model, data, tmp_path / "a", *few)
    options = [*few, "--parallel.tensor", "2"]
    tensor = runs.train("reverse-kl", model, data, tmp_path / "b", *options, ranks=2)
    options = [*few, "--engine", "transformers"]
    transformers = runs.train("reverse-kl", model, data, tmp_path / "c", *options)
    for rows in (tensor, transformers):
        runs.assert_same_trajectory(titan, rows, tolerance=1e-4)
    options = ["--config", str(file), "--objective.k", "1000000", "--engine", "transformers"]
    every = runs.train("reverse-kl", model, data, tmp_path / "d", *options)
    whole = runs.train("reverse-kl", model, data, tmp_path / "e", "--engine", "transformers")
    runs.assert_same_trajectory(every, whole, tolerance=1e-4)
    assert 0 < titan[0]["loss"] < 0.99 * whole[0]["loss"], "the top 5 tell no less than all"


@pytest.mark.parametrize(
    ("teacher", "ranks"), [("frozen:another", 2), ("trust-region:0.3", 0), ("ema:0.5", 0)]
)
def test_teachers_are_the_same_in_both_engines(teacher, ranks, data, models, tmp_path):
    """Also one of another architecture and width, with the policy's tokenizer."""
    if teacher == "frozen:another":
        folder = tmp_path / "another"
        tiny.make_model(folder, "llama")
        sizes = dict(hidden_size=32, head_dim=8, num_hidden_layers=1)
        LlamaForCausalLM(LlamaConfig.from_pretrained(folder, **sizes)).save_pretrained(folder)
        teacher = f"frozen:{folder}"
    options, model = ["--teacher", teacher], models("qwen3-tied")
    titan = runs.train("reverse-kl", model, data, tmp_path / "a", *options, ranks=ranks)
    options += ["--engine", "transformers"]
    transformers = runs.train("reverse-kl", model, data, tmp_path / "b", *options)
    runs.assert_same_trajectory(titan, transformers, tolerance=1e-4)
    live = runs.train("reverse-kl", model, data, tmp_path / "c", "--engine", "transformers")
    assert abs(live[3]["loss"] - titan[3]["loss"]) > 1e-3, "the teacher changes nothing"


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


def test_whole_conversations_go_on_in_other_layouts(models, tmp_path, monkeypatch):
    """FSDP2 on two ranks -> tensor parallel -> one process: each conversation as often as in the
    undisturbed run, which draws twice over all."""
    data = tiny.make_conversations(tmp_path / "i.jsonl", 12)
    interactions = read_interactions(data)
    drawn, read = [], Loader.step
    monkeypatch.setattr(Loader, "step", lambda made, at: drawn.append([*at]) or read(made, at))
    model, out = models("qwen3"), tmp_path / "run"
    options = ["--batch.unit", "conversation", "--batch.epochs", "2", "--checkpoint.interval", "1"]
    options += ["--checkpoint.keep", "0", "--safeguard.probe-interactions", "0"]
    whole = runs.train("reverse-kl", model, data, tmp_path / "whole", *options)
    steps, drawn[:] = [*drawn], []
    assert len(steps) == len(whole) > 7
    flat = [i for step in steps for i in step]
    n = len(interactions)
    assert sorted(flat[:n]) == sorted(flat[n:]) == list(range(n))
    sizes = Counter(map(conversation_of, interactions))
    assert {1, 5} <= set(sizes.values())
    for step in steps:
        found = Counter(conversation_of(interactions[i]) for i in step)
        assert all(count % sizes[name] == 0 for name, count in found.items()), "whole"

    for last, ranks, layout in [(3, 2, []), (5, 2, ["--parallel.tensor", "2"]), (0, 0, [])]:
        runs.train("reverse-kl", model, data, out, *options, *layout, "--resume", ranks=ranks)
        if last:  # as if it had stopped there
            for step in range(last + 1, len(whole) + 1):
                shutil.rmtree(out / "checkpoints" / f"step-{step}")
            seen = json.loads((out / "checkpoints" / f"step-{last}" / "manifest.json").read_text())
            assert seen["interactions_seen"] == sum(map(len, steps[:last]))
    assert drawn == steps[5:], "the last process, as the undisturbed run"
    runs.assert_same_trajectory(whole, runs.read_metrics(out))


@pytest.mark.parametrize("engine", ["torchtitan", "transformers"])
def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(
    engine, data, models, tmp_path, capsys
):
    """A weight of an interaction that overflows spoils its step, and nothing else."""
    options = ["--engine", engine, "--objective.no-centre"]
    options += ["--batch.interactions-per-step", "1", "--safeguard.probe-interactions", "0"]

    def rollouts(name, spoiled):
        logprobs = [(-1e30 if n in spoiled else -3.0,) * 3 for n in range(6)]
        rows = [
            replace(i, response_token_ids=(7, 8, 9), response_logprobs=p)
            for i, p in zip(read_interactions(data), logprobs, strict=False)
        ]
        path = tmp_path / f"{name}.jsonl"
        write_interactions(path, rows)
        return "paper-online", models("qwen3"), str(path), tmp_path / name, *options

    trajectory = runs.train(*rollouts("one", {2}))
    assert trajectory[-1]["skipped"] == 1
    assert sum(r["grad_norm"] is None for r in trajectory) == 1
    assert (tmp_path / "one" / "export").is_dir()

    told = runs.refused(capsys, "train", *runs.arguments(*rollouts("all", range(6))))
    assert "3 steps in a row" in told
    assert len(runs.read_metrics(tmp_path / "all")) == 3
    assert (tmp_path / "all" / "checkpoints" / "step-3").is_dir()


def test_a_collapse_stops_the_run_where_asked(data, models, tmp_path, capsys):
    options = ["--engine", "transformers", "--optimizer.lr", "1e-2"]
    options += ["--safeguard.probe-every", "1", "--safeguard.stop-kl", "0.01"]
    run = runs.arguments("reverse-kl", models("qwen3"), data, tmp_path / "r", *options)
    assert "beyond stop_kl=0.01" in runs.refused(capsys, "train", *run)
    last = runs.read_metrics(tmp_path / "r")[-1]
    assert last["drift/kl"] > 0.01
    assert (tmp_path / "r" / "checkpoints" / f"step-{last['step']}" / "manifest.json").is_file()


METRICS = (
    "loss advantage/mean_abs advantage/near_zero advantage/at_end entropy/policy entropy/hindsight "
    "logp/policy logp/hindsight response/length truncated/policy truncated/hindsight "
    "truncated/response grad_norm lr response_tokens_per_second peak_memory_gib"
)


def test_the_run_folder_and_exports_of_any_checkpoint(data, models, tmp_path, capsys):
    model, out = models("qwen3"), tmp_path / "run"
    options = ["--checkpoint.interval", "2", "--checkpoint.keep", "0", "--parallel.tensor", "2"]
    rows = runs.train("reverse-kl", model, data, out, *options, ranks=2)
    made = {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "export"}
    assert made <= {p.name for p in out.iterdir()} and not list(out.rglob("*.partial"))
    assert rows[0].keys() >= set(METRICS.split())
    tokenizer = AutoTokenizer.from_pretrained(out / "export")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model).chat_template
    responses = [i.response for i in read_interactions(data)]
    tokens = tokenizer(responses, add_special_tokens=False)["input_ids"]
    assert sum(r["response/tokens"] for r in rows) == sum(len(ids) + 1 for ids in tokens)

    def export(name, *args):
        return ["export", str(out), "--out", str(tmp_path / name), *args]

    def weights(folder):
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()

    for command in export("newest"), export("second", "--step", "2"):
        with runs.as_alone():
            main(command)
    folders = model, out / "export", tmp_path / "newest", tmp_path / "second"
    before, last, newest, second = map(weights, folders)
    assert before.keys() == last.keys() == newest.keys()
    assert all(torch.equal(last[name], newest[name]) for name in last)
    assert all((before[name] != last[name]).any() for name in last)
    assert any(not torch.equal(last[name], second[name]) for name in last)
    told = runs.refused(capsys, *export("x", "--step", "3"))
    assert "no checkpoint of step 3; there are: 2, 4, 6" in told
    assert "lora.rank is 0" in runs.refused(capsys, *export("x", "--adapters"))
    (next((out / "checkpoints" / "step-4").glob("*.distcp"))).write_bytes(b"spoiled")
    assert "step-4 is damaged" in runs.refused(capsys, *export("x", "--step", "4"))
    assert not (tmp_path / "x").exists()


def test_online_rollouts_with_their_logprobs_train_the_papers_online_objective(
    models, data, tmp_path
):
    """At the sampling policy itself the ratio is 1: the first loss is the unclipped one, minus
    the mean advantage's share, which centring removes: zero."""
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
    assert abs(row["loss"]) < 1e-5 and 1e-2 < row["grad_norm"] < float("inf")

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


def test_a_run_resumes_with_the_files_it_began_with_alone(data, models, tmp_path, capsys):
    model, out = tmp_path / "m", tmp_path / "run"
    shutil.copytree(models("qwen3"), model)
    clock = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + tiny.CHAT_TEMPLATE
    (model / "chat_template.jinja").write_text(clock)
    options = ["--engine", "transformers", "--checkpoint.interval", "2", "--checkpoint.keep", "0"]
    whole = runs.train("reverse-kl", str(model), data, out, *options)
    for step in range(3, len(whole) + 1):
        shutil.rmtree(out / "checkpoints" / f"step-{step}", ignore_errors=True)
    run = runs.arguments("reverse-kl", str(model), data, out, *options, "--resume")

    def refused_after(name: str, change) -> str:
        path = model / name
        before = path.read_bytes()
        change(path)
        told = runs.refused(capsys, "train", *run)
        path.write_bytes(before)
        return told

    told = refused_after("chat_template.jinja", lambda p: p.write_text("BE RUDE. " * 5 + clock))
    assert "changed since the run began: chat_template.jinja of model (" in told
    told = refused_after("tokenizer.json", lambda p: p.write_text(p.read_text() + "\n"))
    assert "tokenizer.json of model" in told

    def other_weight(path):
        tensors = load_file(path)
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name][3, 3] += 1
        save_file(tensors, path, {"format": "pt"})

    told = refused_after("model.safetensors", other_weight)
    assert "began: model.safetensors of model (" in told and "tokenizer" not in told

    config = json.loads((out / "config.json").read_text())
    assert config["hindsight"]["date"] == today()
    config["hindsight"]["date"] = "2026-02-03"  # as if it had begun then
    (out / "config.json").write_text(json.dumps(config))
    with runs.as_alone():
        main(["train", *run])
    rows = runs.read_metrics(out)
    assert [r["step"] for r in rows] == list(range(1, len(whole) + 1))
    assert [r["loss"] for r in rows[:2]] == [r["loss"] for r in whole[:2]]
    assert rows[2]["loss"] != whole[2]["loss"], "the prompts tell the day on which the run began"
    assert json.loads((out / "config.json").read_text())["hindsight"]["date"] == "2026-02-03"
    told = runs.refused(capsys, "train", *run, "--hindsight.date", "2026-02-04")
    assert "hindsight.date: '2026-02-03' -> '2026-02-04'" in told
