"""Runs of `sdpo online` that are asked tasks meanwhile: what is written, and what ends them."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import forked, online, online_killed, runs, tiny
from helpers.online import TASK
from sdpo.chat import chat_format
from sdpo.cli import main
from sdpo.errors import SdpoError
from sdpo.evaluate.benchmarks import Harness
from sdpo.evaluate.tasks import Tasks
from sdpo.online import run as run_module
from sdpo.online.config import OnlineConfig, TasksConfig
from sdpo.online.recipes import recommended
from sdpo.online.run import online as run_online
from sdpo.online.sampler import InProcessSampler, RemoteSampler, SamplingConfig
from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.engine import Ranks
from sdpo_parallel.huggingface import load_tokenizer

LR = ["--optimizer.lr", "3e-3"]
EVERY = online.evaluated({"every": 3})
LOOKS = [0, 2, 3, 4]
"""Two phases of two updates, and an evaluation every three."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return online.make_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture(scope="module")
def tasks(questions):
    """Flags: a task, every third update and at the phases' ends."""
    flags = {"tasks": TASK, "data": f"{TASK}={questions}", "limit": 20}
    return [*online.evaluated(flags), *EVERY]


def numbers():
    """Where the process's random numbers are."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture
def looked(monkeypatch):
    """The steps at which tasks were asked, each of which left random numbers as they were."""
    look, steps = Tasks.look, []

    def watched(own, sampler, folder, step):
        random.seed(step)  # and not the harness's own seed, which a test before has left
        np.random.seed(step)
        before = numbers()
        found = look(own, sampler, folder, step)
        assert numbers() == before
        steps.append(step)
        return found

    monkeypatch.setattr(Tasks, "look", watched)
    return steps


@pytest.mark.parametrize("held_out", [4, 0])
@pytest.mark.parametrize("engine", ["torchtitan", "transformers"])
def test_a_run_is_the_same_and_shows_what_tasks_scored(
    engine, held_out, models, prompts, tasks, tmp_path, looked
):
    options = ["--engine", engine, *LR, *EVERY, "--evaluate.prompts", str(held_out)]
    bare = online.online(models("qwen3"), prompts, tmp_path / "bare", *options)
    assert not looked
    out = tmp_path / "r"
    rows = online.online(models("qwen3"), prompts, out, *options, *tasks)
    assert looked == LOOKS
    for name in ("loss", "grad_norm", "entropy/policy", "sampler/gap", "user/satisfied"):
        assert [r[name] for r in rows] == [r[name] for r in bare]
    assert online.records(out) == online.records(tmp_path / "bare")
    assert runs.same_weights(out / "export", tmp_path / "bare" / "export")
    if held_out:
        assert online.evaluations(out) == online.evaluations(tmp_path / "bare")
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    name = f"evaluate/benchmark/{TASK}/acc"
    for row in rows:
        assert (name in row) == (row["step"] in LOOKS) == ("seconds/evaluate" in row)
        assert ("evaluate/words" in row) == (bool(held_out) and name in row)
        if name in row:
            right = online.scores(out, row["step"])[TASK]["metrics"]["acc"]
            assert len(right) == 20 and row[name] == sum(right) / 20
    values = [(event.step, event.value) for event in board.Scalars(name)]
    assert values == [(r["step"], pytest.approx(r[name])) for r in rows if name in r]
    assert sum(online.scores(out, 0)[TASK]["metrics"]["acc"]) == 20 > sum(right), "it changes"


def test_a_task_scores_as_the_exported_model_does(models, prompts, questions, tasks, tmp_path):
    out = tmp_path / "r"
    online.online(models("qwen3"), prompts, out, "--engine", "transformers", *LR, *tasks)
    argv = ["evaluate", "benchmarks", str(out / "export"), "--out", str(tmp_path / "e")]
    main([*argv, "--tasks", TASK, "--data", f"{TASK}={questions}", "--limit", "20"])
    kept = json.loads((tmp_path / "e" / "benchmarks" / "export" / f"{TASK}.json").read_text())
    assert kept["scores"][TASK] == online.scores(out, 4)[TASK] != online.scores(out, 0)[TASK]


def test_a_killed_run_on_two_ranks_has_the_same_scores(models, prompts, tasks, tmp_path):
    out, options = tmp_path / "r", [*LR, *tasks]
    alone = online.online(models("qwen3"), prompts, tmp_path / "alone", *options)
    argv = online.arguments(models("qwen3"), prompts, out, *options)
    result = forked.run(2, str(online_killed.__file__), "3", "0.0", *argv)
    assert result.returncode and "SIGKILL" in result.stderr and not (out / "export").exists()
    first = (out / "evaluations" / "step-0.json").stat().st_mtime_ns
    rows = online.online(models("qwen3"), prompts, out, *options, "--resume", ranks=2)
    runs.assert_same_trajectory(alone, rows)
    assert (out / "evaluations" / "step-0.json").stat().st_mtime_ns == first, "asked again"
    for step in LOOKS:
        assert online.scores(out, step) == online.scores(tmp_path / "alone", step)


def test_a_run_that_ends_while_it_is_asked_goes_on(
    models, prompts, tasks, tmp_path, capsys, monkeypatch, looked
):
    def gone(*_):
        raise SdpoError("the hub is gone")

    argv = online.arguments(models("qwen3"), prompts, tmp_path / "r", *LR, *tasks)
    with monkeypatch.context() as patch:
        patch.setattr(Harness, "look", gone)
        assert "the hub is gone" in runs.refused(capsys, "online", *argv)
    assert len(online.evaluations(tmp_path / "r")) == 1 and not looked
    look = Tasks.look
    with monkeypatch.context() as patch:
        patch.setattr(Tasks, "look", lambda *args: look(*args) if args[-1] < 3 else gone())
        assert "the hub is gone" in runs.refused(capsys, "online", *argv, "--resume")
    assert looked == [0, 2]
    with runs.as_alone():
        main(["online", *argv, "--resume"])
    assert looked.count(0) == 1, "what was known is not asked again"
    # whether the second update's checkpoint was written before the run ended is chance
    assert list(dict.fromkeys(looked)) == LOOKS
    assert [e["step"] for e in online.evaluations(tmp_path / "r")] == LOOKS


def test_a_task_that_falls_ends_the_run_where_asked(models, prompts, tasks, tmp_path, capsys):
    model, out = models("qwen3"), tmp_path / "r"
    options = ["--engine", "transformers", "--optimizer.lr", "1e-2", *tasks]
    reported = online.online(model, prompts, tmp_path / "w", *options)
    assert reported[1][f"evaluate/benchmark/{TASK}/acc"] < 0.8
    argv = online.arguments(model, prompts, out, *options)
    stop = online.evaluated({"regression": "stop"})
    told = runs.refused(capsys, "online", *argv, *stop)
    assert f"update 2: {TASK}'s acc changed by -" in told and "back at update 0" in told
    assert runs.same_weights(out / "export", Path(model)), "what it started from"
    undone = out / "undone-1" / "evaluations"
    assert [p.name for p in undone.glob("step-*.json")] == ["step-2.json"]
    assert [p.name for p in (out / "evaluations").glob("step-*.json")] == ["step-0.json"]
    with runs.as_alone():
        main(["online", *argv, "--resume"])
    for step in LOOKS[1:]:
        assert online.scores(out, step), "in place of those that were undone"
    assert runs.read_metrics(out)[-1][f"evaluate/benchmark/{TASK}/acc"] < 0.8


def test_users_have_scores_of_their_own(models, prompts, tasks, tmp_path):
    lora = ["--lora.rank", "4", "--lora.alpha", "8", "--optimizer.lr", "3e-2", *tasks]
    store = tmp_path / "s"
    for name, phase in (("alice", "no_lists:3"), ("bob", "no_emojis:3")):
        main(["users", "add", str(store), name, phase])
    argv = online.arguments(models("qwen3"), prompts, store, *lora, phases=())
    at = argv.index("--phases")
    with runs.as_alone():
        main(["users", "train", str(store), *argv[:at], *argv[at + 1 :]])
    alone = tmp_path / "alone"
    lora += ["--checkpoint.interval", "1"]
    online.online(models("qwen3"), prompts, alone, *lora, phases=("no_emojis:3",))
    alice, bob = (store / "users" / name for name in ("alice", "bob"))
    for step in (0, 3):
        assert online.scores(bob, step) == online.scores(alone, step)
    assert online.scores(bob, 0) == online.scores(alice, 0)
    assert online.scores(bob, 3) != online.scores(bob, 0)


class Elsewhere(InProcessSampler):
    """Answers as servers do."""

    staleness = 0

    def answers(self, prompts, seeds, *, greedy=False, limits=()):
        found = []
        for i, prompt in enumerate(prompts):
            if limits:
                self.generation.max_new_tokens = limits[i]
            found += self.sample([prompt], [seeds[i]], greedy=greedy)
        self.generation.max_new_tokens = self.config.max_new_tokens
        return found


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A file of rows of gsm8k, whose answers are as long as the task says."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows = [{"question": tiny.text(random.Random(n), 3, 9), "answer": "#### 1"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_servers_answer_what_the_model_in_this_process_does(models, sums, tmp_path, monkeypatch):
    """All of a task's answers are the same texts, and as long as the task lets them be."""
    model = models("qwen3")
    chat = chat_format(load_tokenizer(model))
    parallel = ParallelConfig()
    place: Any = SimpleNamespace(
        ranks=Ranks(), device=torch.device("cpu"), gather=lambda value: [value]
    )
    asked, texts = Harness._ask, []

    def heard(harness, task, limit, **how):
        found = asked(harness, task, limit, **how)
        texts.append([sample["resps"] for sample in found["samples"][task]])
        return found

    monkeypatch.setattr(Harness, "_ask", heard)
    config = TasksConfig(tasks=("gsm8k",), data=(f"gsm8k={sums}",))
    for kind in (InProcessSampler, Elsewhere):
        sampler = kind(SamplingConfig(max_new_tokens=5), place, model, chat, parallel)
        assert isinstance(sampler, RemoteSampler) == (kind is Elsewhere)
        Tasks(config, tmp_path / kind.__name__, 1).look(sampler, model, 0)
    (here, there) = texts
    assert here == there and len(here) == 6 * 2, "under two filters"
    assert max(len(load_tokenizer(model)(text[0][0])["input_ids"]) for text in here) > 5


def test_tasks_that_servers_cannot_be_asked_end_the_run_before_it_begins(
    models, prompts, tasks, sums, tmp_path, capsys, monkeypatch
):
    def build(config, engine, chat):
        return Elsewhere(config.sampling, engine, config.model, chat, config.parallel)

    monkeypatch.setattr(run_module, "build_sampler", build)
    common = ["--engine", "transformers"]
    argv = online.arguments(models("qwen3"), prompts, tmp_path / "r", *common, *tasks)
    told = runs.refused(capsys, "online", *argv)
    assert "compares the log-probabilities of given answers" in told and "such as ifeval" in told
    assert not (tmp_path / "r" / "rollouts").exists()
    spoken = online.evaluated({"tasks": "gsm8k", "data": f"gsm8k={sums}", "limit": 2})
    rows = online.online(models("qwen3"), prompts, tmp_path / "s", *common, *spoken)
    assert "evaluate/benchmark/gsm8k/exact_match" in rows[-1]


@pytest.fixture
def config(models, prompts, questions, tmp_path) -> OnlineConfig:
    made = recommended(models("qwen3"), prompts, ("no_lists:1",), str(tmp_path / "r"))
    evaluate = replace(made.evaluate, tasks=(TASK,), data=(f"{TASK}={questions}",), prompts=4)
    return replace(made, evaluate=evaluate)


def test_a_program_hands_over_what_asks(config, tmp_path):
    for users in ((), ("alice=no_lists:1",)):
        lora = replace(config.lora, rank=4 if users else 0)
        phases = () if users else config.phases
        with pytest.raises(SdpoError, match=r"tasks=sdpo.evaluate.tasks.Tasks"):
            run_online(replace(config, users=users, phases=phases, lora=lora))
    assert not (tmp_path / "r" / "config.json").exists()


def test_what_cannot_be_asked_is_refused_before_the_run_begins(models, prompts, tmp_path, capsys):
    argv = online.arguments(models("qwen3"), prompts, tmp_path / "r")
    for flags, says in (
        ({"tasks": "helaswag"}, "no task helaswag; it has hellaswag"),
        ({"tasks": TASK, "data": f"{TASK}=gone"}, "no such file"),
    ):
        assert says in runs.refused(capsys, "online", *argv, *online.evaluated(flags))
        assert not (tmp_path / "r" / "config.json").exists()


def test_a_run_goes_on_with_the_same_tasks_and_data(
    models, prompts, questions, tasks, tmp_path, capsys
):
    model, out = models("qwen3"), tmp_path / "r"
    run = [model, prompts, out, "--engine", "transformers"]
    online.online(*run, *tasks, phases=("no_lists:1",))
    argv = ["online", *online.arguments(*run, "--resume", *tasks, phases=("no_lists:1",))]
    told = runs.refused(capsys, *argv, *online.evaluated({"limit": 3}))
    assert "evaluate.limit: 20 -> 3" in told
    told = runs.refused(capsys, *argv[: -len(tasks)])
    assert f"evaluate.tasks: ['{TASK}'] -> []" in told
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(questions.read_bytes())
    data = online.evaluated({"data": f"{TASK}={moved}", "regression": "stop"})
    with runs.as_alone():
        main([*argv, *data])
    moved.write_text(questions.read_text().replace("x", "y"))
    told = runs.refused(capsys, *argv, *data)
    assert "changed since the run began: evaluate.data of commonsense_qa" in told


def test_the_dry_run_says_what_will_be_asked(tasks, prompts, tmp_path, capsys):
    argv = ["online", *online.arguments("m", prompts, tmp_path / "r", *tasks, "--dry-run")]
    main(argv)
    said = " ".join(capsys.readouterr().out.split())
    assert f"at most 20 prompts of tasks ({TASK}; of a group, of each of its tasks)" in said
    assert f"at each of {len(LOOKS)} evaluations" in said
    more = ["--evaluate.tasks", TASK, "ifeval", "--evaluate.limit"]
    for limit, says in (("30", "at most 54 prompts of"), ("None", "all prompts of")):
        main([*argv, *more, limit])
        assert says in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "r").exists()
