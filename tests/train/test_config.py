"""Config files: what is written comes back, flags override, and mistakes are named."""

import json

import pytest

from helpers import runs
from sdpo.cli import main
from sdpo.errors import SdpoError
from sdpo.evaluate import loop
from sdpo.objective import JSD, ReverseKL, SampledToken, TopKReverseKL
from sdpo.train.config import TrainConfig, read_config, read_settings, to_json, with_settings
from sdpo.train.recipes import RECIPES
from sdpo_parallel.config import EMA, Frozen, Live, LoraConfig, TrustRegion

ONLY = {"sft": Live, "paper-sft": Live, "dpo": Frozen}
"""The teachers of recipes that do not take any."""
CONFIG = TrainConfig(model="m", data="d.jsonl", out="runs/a")


def stored(tmp_path, config: TrainConfig) -> str:
    """A run's folder with this config."""
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    return str(tmp_path)


@pytest.fixture
def sdpo_train(monkeypatch):
    """`sdpo train` with these arguments: the config it would run with."""
    ran = []
    monkeypatch.setattr(loop, "train", lambda config, evaluate, resume: ran.append(config))

    def run(*args: object) -> TrainConfig:
        main(["train", *map(str, args)])
        return ran.pop()

    return run


@pytest.mark.parametrize("teacher", [Live(), EMA(decay=0.5), Frozen(folder="t"), TrustRegion()])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_comes_back(recipe, teacher, tmp_path):
    made = RECIPES[recipe]("m", "d.jsonl")
    if not isinstance(teacher, ONLY.get(recipe, object)):
        with pytest.raises(SdpoError, match="no teacher|set teacher to frozen"):
            with_settings(made, {"teacher": to_json(teacher)}, "")
        return
    config = with_settings(made, {"teacher": to_json(teacher)}, "")
    assert config.teacher == teacher
    assert read_config(stored(tmp_path, config)) == config


def test_the_format_of_earlier_versions(tmp_path):
    """Every object names its class, and what was added since may be missing."""
    stored(tmp_path, CONFIG)
    old = read_settings(tmp_path / "config.json")
    assert old["kind"] == "TrainConfig" and old["batch"]["kind"] == "BatchConfig"
    del old["objective"]["hindsight_temperature"]
    assert old["objective"] == {"kind": "ReverseKL", "ignore_first": 0, "chunk_bytes": None}
    assert old["teacher"] == {"kind": "Live"} and old["optimizer"]["betas"] == [0.9, 0.999]
    del old["select"], old["batch"]["unit"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_config(tmp_path) == CONFIG


def test_a_field_that_is_missing_is_named(tmp_path):
    old = read_settings(stored(tmp_path, CONFIG) + "/config.json")
    del old["batch"]["seed"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(SdpoError, match="config.json, field batch.seed: missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "field, settings",
    [
        ("sede", {"sede": 1}),
        ("batch.sede", {"batch": {"sede": 1}}),
        ("batch.epochs", {"batch": {"epochs": "two"}}),
        ("batch.seed", {"batch": {"seed": 1.5}}),
        ("batch.seed", {"batch": {"seed": True}}),
        ("batch", {"batch": 3}),
        ("engine", {"engine": "titan"}),
        ("objective", {"objective": {"kind": "TopK"}}),
        ("objective.beta", {"objective": {"beta": 0.5}}),
        ("teacher", {"teacher": "student"}),
        ("optimizer.betas", {"optimizer": {"betas": [0.9]}}),
        ("lora.targets", {"lora": {"targets": "wq"}}),
        ("checkpoint", {"checkpoint": {"keep": 1}}),
        ("model", {"model": None}),
    ],
)
def test_a_wrong_field_is_named(field, settings):
    with pytest.raises(SdpoError, match=f"^run.toml, field {field}: "):
        with_settings(CONFIG, settings, "run.toml")


def test_settings_replace_a_kind_or_change_it():
    base = RECIPES["paper-offline"]("m", "d.jsonl")
    changed = with_settings(base, {"objective": {"ppo_clip": 0.2}}, "")
    assert changed.objective == SampledToken(ignore_first=2, ppo_clip=0.2)
    changed = with_settings(base, {"objective": {"kind": "JSD", "beta": 0.3}}, "")
    assert changed.objective == JSD(beta=0.3)
    changed = with_settings(base, {"objective": {"kind": "TopKReverseKL"}}, "")
    assert changed.objective == TopKReverseKL(k=20)
    assert with_settings(base, {"teacher": "ema:0.9"}, "").teacher == EMA(decay=0.9)


def test_a_toml_file_names_the_recipe_and_flags_override_it(tmp_path, sdpo_train):
    file = tmp_path / "run.toml"
    file.write_text(
        'recipe = "paper-offline"\nmodel = "m"\ndata = "d.jsonl"\nteacher = "ema:0.9"\n'
        '[batch]\nepochs = 3\nseed = 7\n[lora]\nrank = 4\ntargets = ["wq", "wo"]\n'
    )
    config = sdpo_train("--config", file, "--batch.seed", 8, "--objective.ignore-first", 0)
    assert (config.model, config.data, config.teacher) == ("m", "d.jsonl", EMA(decay=0.9))
    assert (config.batch.epochs, config.batch.seed) == (3, 8)
    assert config.lora == LoraConfig(rank=4, targets=("wq", "wo"))
    assert config.objective == SampledToken(ignore_first=0), "the rest is the recipe's"
    other = sdpo_train("reverse-kl", "--model", "n", "--config", file)
    assert other.objective == ReverseKL() and other.model == "n" and other.batch.epochs == 3


def test_a_runs_own_config_starts_the_same_run(tmp_path, sdpo_train):
    config = RECIPES["paper-online"]("m", "d.jsonl", "runs/b")
    file = f"{stored(tmp_path, config)}/config.json"
    assert sdpo_train("--config", file) == config
    assert sdpo_train(f"--config={file}", "--out", "runs/c").out == "runs/c"


@pytest.mark.parametrize(
    "text, said",
    [
        ('model = "m"', "no recipe; write recipe ="),
        ('recipe = "papr"', "recipe 'papr' unknown"),
        ("recipe = ", "not valid TOML"),
        ('recipe = "jsd"\n[batch]\nepochs = "two"', "field batch.epochs: expected float"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used(text, said, tmp_path, capsys):
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    err = runs.refused(capsys, "train", "--config", file)
    assert str(file) in err and said in err
