"""Settings of online runs, and what is refused before anything is loaded."""

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
from sdpo.train.config import to_json, with_settings
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


def test_brakes_are_on_where_one_is():
    assert not BrakeConfig().any
    assert BrakeConfig(max_leaks=0.0).any


def test_a_config_comes_back_from_its_file():
    settings = to_json(CONFIG)
    assert with_settings(None, settings, "config.json", type(CONFIG)) == CONFIG
