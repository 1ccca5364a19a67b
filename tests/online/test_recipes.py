"""What the recipes say is what was published."""

import re

import pytest

from helpers import online, runs, tiny
from sdpo.cli import main
from sdpo.online.recipes import RECIPES
from sdpo.train.config import to_json

PAPER = {
    "objective.kind": "SampledToken",
    "objective.centre": True,
    "objective.ppo_clip": 0.2,
    "objective.ignore_first": 0,
    "teacher.kind": "Live",
    "lora.rank": 0,
    "hindsight.template": "paper-online",
    "hindsight.max_prompt_tokens": 2048,
    "hindsight.max_hindsight_prompt_tokens": 2048,
    "hindsight.thinking": "strip",
    "sampling.temperature": 1.0,
    "sampling.top_p": 1.0,
    "sampling.top_k": 0,
    "sampling.max_new_tokens": 2048,
    "batch.seed": 42,
    "optimizer.lr": 5e-6,
    "optimizer.schedule": "constant",
    "optimizer.warmup_fraction": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.max_grad_norm": 1.0,
    "guard.injections": "keep",
    "guard.max_followup_chars": 0,
    "guard.cut_answers": "train",
    "evaluate.prompts": 256,
    "checkpoint.interval": 3,
}
"""What both experiments have alike."""
PUBLISHED = {
    "paper-online-tldr": PAPER | {"batch.interactions_per_step": 16},
    "paper-online-helpsteer": PAPER
    | {
        "batch.interactions_per_step": 32,
        "system": "",
        "phase_optimizer": "restart",
        "phase_prompts": "repeat",
    },
    "paper-online-lora": {
        "objective.kind": "TopKReverseKL",
        "objective.k": 20,
        "teacher.kind": "Live",
        "lora.rank": 256,
        "lora.alpha": 512,
        "batch.interactions_per_step": 1,
        "batch.seed": 1234,
        "optimizer.lr": 5e-6,
        "optimizer.eps": 1e-6,
        "optimizer.schedule": "constant",
        "optimizer.warmup_fraction": 0.0,
        "optimizer.weight_decay": 0.0,
        "optimizer.max_grad_norm": 1.0,
        "sampling.temperature": 1.0,
        "sampling.top_p": 1.0,
        "sampling.max_new_tokens": 2048,
        "evaluate.prompts": 100,
        "evaluate.every": 3,
        "system": None,
        "phases": ["no_emojis:15"],
    },
    "online": {
        "objective.kind": "ForwardKL",
        "teacher.kind": "Frozen",
        "optimizer.max_grad_norm": 1.0,
    },
}


def value(config, name):
    """What a config's JSON says under a dotted name."""
    found = to_json(config)
    for part in name.split("."):
        found = found[part]
    return found


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_hold_the_published_values(recipe):
    config = RECIPES[recipe]("m", "p.txt", *([("concise:1",)] if recipe == "online" else []))
    wrong = {n: value(config, n) for n, v in PUBLISHED[recipe].items() if value(config, n) != v}
    assert not wrong


def test_the_papers_runs_are_of_sixteen_updates_and_their_system_message_asks_for_tldr():
    tldr = RECIPES["paper-online-tldr"]("m", "p.txt")
    assert tldr.updates == 16 and tldr.updates * tldr.batch.interactions_per_step == 256
    assert tldr.system is not None and "TL;DR:" in tldr.system
    helpsteer = RECIPES["paper-online-helpsteer"]("m", "p.txt")
    assert [p.updates for p in helpsteer.schedule] == [16, 16, 16]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_shows_what_it_will_do(recipe, tmp_path, capsys):
    prompts = online.make_prompts(tmp_path / "p.txt", 300)
    options = ["--evaluate.prompts", "100", "--brakes.max-drift", "None", "--phases", "concise:3"]
    argv = ["--model", "m", "--prompts", prompts, "--out", str(tmp_path / "o"), *options]
    main(["online", recipe, *argv, "--dry-run"])
    said = " ".join(capsys.readouterr().out.split())
    assert "200 prompts to train on, 100 held out" in said
    assert f'"out": "{tmp_path}/o"' in said and "concise" in said
    assert not (tmp_path / "o").exists()


def test_the_dry_run_estimates_memory_with_the_samplers_copy(tmp_path, capsys):
    prompts = online.make_prompts(tmp_path / "p.txt", 300)
    model = tiny.make_shape(tmp_path / "m", "qwen3-8b")
    argv = ["online", "paper-online-helpsteer", "--model", model, "--prompts", prompts]
    argv += ["--out", str(tmp_path / "o"), "--dry-run", "--ranks", "8", "--gpu-memory-gib"]
    main([*argv, "80"])
    alone = re.search(r"copy of the model\s*│\s*([\d.]+)", capsys.readouterr().out)
    assert alone and float(alone[1]) == pytest.approx(2 * 8_190_735_360 / 2**30, abs=0.01)
    assert "sampler's copy of the model 15.3" in runs.refused(capsys, *argv, "60")
    served = tmp_path / "served.toml"
    served.write_text(
        'recipe = "paper-online-helpsteer"\n[sampler]\nkind = "VLLM"\nurls = ["http://h:1"]\n'
    )
    flags = [word for word in argv[2:] if word != "60"]
    main(["online", "--config", str(served), *flags, "80"])
    assert "copy of the model" not in capsys.readouterr().out


def test_the_dry_run_names_what_is_missing(tmp_path, capsys):
    prompts = online.make_prompts(tmp_path / "p.txt", 10)
    argv = ["online", "online", "--model", "m", "--prompts", prompts, "--out", "o", "--dry-run"]
    assert "none is left to train on" in runs.refused(capsys, *argv, "--phases", "concise:1")
    few = [*argv, "--evaluate.prompts", "2"]
    assert "phases: name at least one" in runs.refused(capsys, *few)
    assert "no persona is called nobody" in runs.refused(capsys, *few, "--phases", "nobody:1")
    none = ["online", "online", "--model", "m", "--out", "o", "--phases", "concise:1", "--dry-run"]
    told = runs.refused(capsys, *none, "--prompts", str(tmp_path / "none.txt"))
    assert "the prompts cannot be read" in told


def test_help_lists_the_recipes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["online", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(recipe in said for recipe in RECIPES)
