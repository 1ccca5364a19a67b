"""Settings of online runs, and what is refused before anything is loaded."""

import json
from dataclasses import replace

import pytest

from sdpo.batching import BatchConfig
from sdpo.errors import SdpoError
from sdpo.objective import SampledToken
from sdpo.online.config import (
    BrakeConfig,
    EvaluateConfig,
    GuardConfig,
    Phase,
    parse_phase,
)
from sdpo.online.recipes import recommended
from sdpo.online.sampler import SamplingConfig
from sdpo.online.serving.config import VLLM
from sdpo.train.config import read_run_config, to_json, with_settings
from sdpo.train.run_folder import RunFolder
from sdpo.train.safeguards import SafeguardConfig

CONFIG = recommended("m", "p.txt", ("concise:3", "detailed:2"), "o")


def test_a_schedule_is_its_phases():
    assert CONFIG.schedule == [
        Phase(persona="concise", updates=3),
        Phase(persona="detailed", updates=2),
    ]
    assert CONFIG.updates == 5
    assert parse_phase("a:b.toml:7") == Phase(persona="a:b.toml", updates=7)
    with pytest.raises(SdpoError, match="phases: name at least one"):
        _ = replace(CONFIG, phases=()).schedule


@pytest.mark.parametrize("text", ["concise", "concise:", ":3", "concise:0", "concise:-1", "a:1.5"])
def test_a_phase_that_is_none_is_refused(text):
    with pytest.raises(SdpoError, match="expected PERSONA:UPDATES, such as concise:12"):
        replace(CONFIG, phases=(text,))


@pytest.mark.parametrize("clip", [{"ppo_clip": 0.2}, {"importance_clip": 2.0}], ids=str)
@pytest.mark.parametrize("cut", [{"top_p": 0.95}, {"top_k": 20}], ids=str)
def test_a_ratio_to_a_distribution_that_is_cut_off_is_refused(clip, cut):
    objective, sampling = SampledToken(**clip), SamplingConfig(**cut)
    with pytest.raises(SdpoError, match="take the ratio to the sampling distribution"):
        replace(CONFIG, objective=objective, sampling=sampling)
    replace(CONFIG, objective=objective, sampling=SamplingConfig(temperature=0.6))
    replace(CONFIG, objective=SampledToken(), sampling=sampling)
    replace(CONFIG, objective=objective, sampling=sampling, replay="run")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch": BatchConfig(epochs=2)}, "batch.epochs and batch.unit are for recorded data"),
        ({"batch": BatchConfig(unit="conversation")}, "batch.epochs and batch.unit are"),
        ({"evaluate": EvaluateConfig(prompts=0)}, "brakes need held-out prompts"),
        (
            {"brakes": BrakeConfig(max_drift=1.0), "safeguard": SafeguardConfig(probe_every=3)},
            "safeguard.probe_every must divide evaluate.every",
        ),
        (
            {"sampling": SamplingConfig(max_new_tokens=100_000)},
            r"sampling.max_new_tokens \(100000\) exceeds",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(change, says):
    with pytest.raises(SdpoError, match=says):
        replace(CONFIG, **change)


def test_single_settings_that_cannot_be_are_refused():
    with pytest.raises(SdpoError, match="max_followup_chars must be >= 0"):
        GuardConfig(max_followup_chars=-1)
    for wrong in ({"prompts": -1}, {"every": 0}):
        with pytest.raises(SdpoError, match="evaluate.prompts must be >= 0 and evaluate.every"):
            EvaluateConfig(**wrong)
    with pytest.raises(SdpoError, match="evaluate.limit must be at least 1"):
        EvaluateConfig(limit=0)
    for alone in ({"data": ("a=b",)}, {"regression": "stop"}):
        with pytest.raises(SdpoError, match="need evaluate.tasks"):
            EvaluateConfig(**alone)


def test_brakes_are_on_where_one_is():
    assert not BrakeConfig().any
    assert BrakeConfig(max_leaks=0.0).any


def test_a_config_comes_back_from_its_file():
    settings = to_json(CONFIG)
    assert with_settings(None, settings, "config.json", type(CONFIG)) == CONFIG


def before_tasks(settings, *, before_servers=False):
    """The same run's settings, as earlier versions wrote them."""
    old = json.loads(json.dumps(settings))
    for name in ("tasks", "limit", "data", "regression"):
        del old["evaluate"][name]
    if before_servers:
        del old["sampler"], old["users"], old["objective"]["hindsight_temperature"]
        del old["checkpoint"]["export_rounding"]
    return old


@pytest.mark.parametrize("before_servers", [False, True])
def test_a_run_of_an_earlier_version_goes_on(before_servers, tmp_path):
    objective = replace(CONFIG.objective, hindsight_temperature=1.0)
    config = replace(CONFIG, objective=objective, out=str(tmp_path))
    old = before_tasks(to_json(config), before_servers=before_servers)
    (tmp_path / "config.json").write_text(json.dumps(old))
    RunFolder(str(tmp_path), config, resume=True)
    read = with_settings(None, old, "config.json", type(CONFIG))
    assert read.evaluate == CONFIG.evaluate and read.sampler == CONFIG.sampler
    assert read_run_config(tmp_path).objective == objective
    asked = replace(config, evaluate=replace(CONFIG.evaluate, tasks=("ifeval",)))
    with pytest.raises(SdpoError, match=r"evaluate.tasks: \[\] -> \['ifeval'\]"):
        RunFolder(str(tmp_path), asked, resume=True)
    servers = replace(config, sampler=VLLM())
    with pytest.raises(SdpoError, match="sampler.kind: 'InProcess' -> 'VLLM'"):
        RunFolder(str(tmp_path), servers, resume=True)


def test_what_a_resumed_run_may_change_of_its_tasks(tmp_path):
    def config(**changes):
        evaluate = replace(CONFIG.evaluate, tasks=("ifeval",), **changes)
        return replace(CONFIG, evaluate=evaluate, out=str(tmp_path))

    (tmp_path / "config.json").write_text(json.dumps(to_json(config())))
    RunFolder(str(tmp_path), config(regression="stop", data=("ifeval=x",)), resume=True)
    for changes in ({"limit": 7}, {"every": 7}, {"prompts": 7}):
        with pytest.raises(SdpoError, match=f"evaluate.{min(changes)}: "):
            RunFolder(str(tmp_path), config(**changes), resume=True)
