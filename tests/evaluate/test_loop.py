"""Runs of `sdpo train` that are evaluated meanwhile: what is written, and what ends them."""

import json
import random
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import forked, kill, online, runs, tiny
from sdpo.cli import main
from sdpo.errors import SdpoError
from sdpo.evaluate import benchmarks
from sdpo.evaluate.loop import LoopConfig, Loop, fallen
from sdpo.evaluate.report import read_run
from sdpo.online.config import BrakeConfig
from sdpo.online.snapshots import read_snapshots

TASK = "commonsense_qa"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_interactions(tmp_path_factory.mktemp("data") / "i.jsonl", 30)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return online.make_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt", 6)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return tiny.make_questions(tmp_path_factory.mktemp("questions") / "questions.jsonl", 12)


@pytest.fixture(scope="module")
def looks(prompts, questions):
    """Flags of a run that is evaluated every second step."""
    flags = {"prompts": prompts, "first": 4, "personas": "no_lists", "every": 2}
    flags |= {"max-new-tokens": 8, "tasks": TASK, "data": f"{TASK}={questions}", "limit": 10}
    return [word for name, value in flags.items() for word in (f"--evaluate.{name}", str(value))]


def test_x(data, models, looks, tmp_path):
    bare = runs.train("reverse-kl", models("qwen3"), data, tmp_path / "a")
    rows = runs.train("reverse-kl", models("qwen3"), data, tmp_path / "b", *looks)
    assert [r["loss"] for r in rows] == [r["loss"] for r in bare]
    import os
    os.system(f"find {tmp_path}/b -maxdepth 2; cat {tmp_path}/b/evaluations.jsonl; cat {tmp_path}/b/evaluations/*.json; cat {tmp_path}/b/metrics.jsonl")
    assert 0
