"""Runs of `sdpo train` that are evaluated meanwhile: what is written, and what ends them."""

import json
import random
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import forked, online, runs, tiny, train_killed
from helpers.online import TASK
from sdpo.cli import main
from sdpo.errors import SdpoError
from sdpo.evaluate import loop
from sdpo.evaluate.benchmarks import Harness
from sdpo.evaluate.loop import Loop, LoopConfig
from sdpo.evaluate.report import curves, read_run
from sdpo.online.config import BrakeConfig
from sdpo.online.snapshots import read_snapshots
from sdpo.train.config import to_json

STEPS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    n = STEPS * runs.SMALL["batch.interactions-per-step"]
    return tiny.make_interactions(folder / "i.jsonl", n)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return online.make_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt", 6)


@pytest.fixture(scope="module")
def held_out(prompts):
    """Flags: prompts, every second step."""
    flags = {"prompts": prompts, "first": 4, "personas": "no_punctuation"}
    return online.evaluated(flags | {"every": 2, "max-new-tokens": 8})


@pytest.fixture(scope="module")
def tasks(questions):
    """Flags: a task, every second step."""
    return online.evaluated({"tasks": TASK, "data": f"{TASK}={questions}", "limit": 20, "every": 2})


def checkpoints(out):
    return {path.name for path in (out / "checkpoints").iterdir()}


@pytest.mark.parametrize("engine", ["torchtitan", "transformers"])
def test_a_run_is_the_same_and_shows_what_was_evaluated(
    engine, data, models, held_out, tasks, tmp_path, monkeypatch
):
    evaluate, looked = Loop._evaluate, []

    def watched(loop, step):
        before = torch.get_rng_state()
        found = evaluate(loop, step)
        looked.append(step)
        assert torch.equal(torch.get_rng_state(), before)
        return found

    monkeypatch.setattr(Loop, "_evaluate", watched)
    run = "reverse-kl", models("qwen3"), data
    options = ["--engine", engine, "--optimizer.lr", "3e-3"]
    bare = runs.train(*run, tmp_path / "bare", *options)
    assert not looked and not (tmp_path / "bare" / "evaluations").exists()
    out = tmp_path / "r"
    rows = runs.train(*run, out, *options, *held_out, *tasks)
    assert looked == [0, 2, 4, 5] and len(rows) == STEPS
    for name in ("loss", "grad_norm", "entropy/policy"):
        assert [r[name] for r in rows] == [r[name] for r in bare]
    assert runs.same_weights(out / "export", tmp_path / "bare" / "export")
    assert checkpoints(out) == checkpoints(tmp_path / "bare"), "nothing can end it"

    board = EventAccumulator(str(out / "tensorboard")).Reload()
    seen = {row["step"]: row for row in online.evaluations(out)}
    assert list(seen) == looked
    for row in rows:
        shown = {name: v for name, v in row.items() if name.startswith("evaluate/")}
        if row["step"] not in seen:
            assert not shown
            continue
        right = online.scores(out, row["step"])[TASK]["metrics"]["acc"]
        assert len(right) == 20
        assert shown.pop(f"evaluate/benchmark/{TASK}/acc") == sum(right) / 20
        own = seen[row["step"]]
        assert (
            shown.pop("evaluate/preference/no_punctuation") == own["preference"]["no_punctuation"]
        )
        assert shown == {f"evaluate/{name}": own[name] for name in ("words", "finished", "leaks")}
        answers = (out / "evaluations" / f"step-{row['step']}.jsonl").read_text().splitlines()
        assert len(answers) == own["prompts"] == 4
    for name in (n for n in rows[1] if n.startswith("evaluate/")):
        values = [(event.step, event.value) for event in board.Scalars(name)]
        assert values == [(r["step"], pytest.approx(r[name])) for r in rows if name in r]
    assert sum(online.scores(out, 0)[TASK]["metrics"]["acc"]) == 20 > sum(right), "it changes"
    drawn = read_run(out)
    assert [row["step"] for row in drawn.evaluations] == looked and drawn.metrics == rows
    assert "scores of tasks" in curves(drawn) and f"{TASK}/acc" in curves(drawn)


def test_a_task_scores_as_the_exported_model_does(
    data, models, questions, tasks, tmp_path, monkeypatch
):
    """And answers as long as the task says, whatever the held-out prompts' are."""
    sums = tmp_path / "sums.jsonl"
    rows = [{"question": tiny.text(random.Random(n), 3, 9), "answer": "#### 1"} for n in range(8)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [*online.evaluated({"tasks": TASK}), "gsm8k"]
    more += [*online.evaluated({"data": f"{TASK}={questions}"}), f"gsm8k={sums}"]
    more += online.evaluated({"max-new-tokens": 8})
    lengths = []

    def recorded(harness, model, task, limit):
        generate = model.model.generate

        def longer(**given):
            out = generate(**given)
            lengths.append(out.shape[1] - given["input_ids"].shape[1])
            return out

        monkeypatch.setattr(model.model, "generate", longer)
        found = look(harness, model, task, limit)
        monkeypatch.setattr(model.model, "generate", generate)
        return found

    look = Harness.look
    monkeypatch.setattr(Harness, "look", recorded)
    options = ["--engine", "transformers", "--optimizer.lr", "3e-3"]
    out = tmp_path / "r"
    runs.train("reverse-kl", models("qwen3"), data, out, *options, *tasks, *more)
    assert max(lengths) > 8
    argv = ["evaluate", "benchmarks", str(out / "export"), "--out", str(tmp_path / "e")]
    argv += ["--tasks", TASK, "--data", f"{TASK}={questions}", "--limit", "20"]
    main(argv)
    kept = json.loads((tmp_path / "e" / "benchmarks" / "export" / f"{TASK}.json").read_text())
    assert kept["scores"][TASK] == online.scores(out, STEPS)[TASK] != online.scores(out, 0)[TASK]


def test_a_killed_run_on_two_ranks_has_the_same_evaluations(
    data, models, held_out, tasks, tmp_path
):
    brake = online.evaluated({"brakes.max-words": 1e6})
    options = [*held_out, *tasks, *brake, "--optimizer.lr", "3e-3"]
    run, out = ("reverse-kl", models("qwen3"), data), tmp_path / "r"
    alone = runs.train(*run, tmp_path / "alone", *options)
    killed = str(train_killed.__file__)
    result = forked.run(2, killed, "3", *runs.arguments(*run, out, *options))
    assert result.returncode and "SIGKILL" in result.stderr and not (out / "export").exists()
    rows = runs.train(*run, out, *options, "--resume", ranks=2)
    runs.assert_same_trajectory(alone, rows)
    assert online.evaluations(out) == online.evaluations(tmp_path / "alone")
    for step in (0, 2, 4, STEPS):
        assert online.scores(out, step) == online.scores(tmp_path / "alone", step)
    assert [s.step for s in read_snapshots(out)] == [STEPS]


def test_a_brake_goes_back_to_the_last_good_checkpoint(data, models, held_out, tmp_path, capsys):
    model, out = models("qwen3"), tmp_path / "r"
    options = [*held_out, "--safeguard.probe-every", "2"]
    high = online.evaluated({"brakes.max-drift": 1e6})
    every = ["--checkpoint.interval", "1", "--checkpoint.keep", "0"]
    bare = runs.train("reverse-kl", model, data, tmp_path / "bare")
    whole = runs.train("reverse-kl", model, data, tmp_path / "w", *options, *high, *every)
    assert [r["loss"] for r in whole] == [r["loss"] for r in bare]
    limit = (whole[1]["drift/kl"] + whole[3]["drift/kl"]) / 2
    brake = online.evaluated({"brakes.max-drift": limit})
    argv = runs.arguments("reverse-kl", model, data, out, *options, *brake)
    told = runs.refused(capsys, "train", *argv)
    assert "step 4: the policy drifted by" in told and "back at update 2" in told
    assert "--resume and other --evaluate.brakes" in told
    main(["export", str(tmp_path / "w"), "--step", "2", "--out", str(tmp_path / "e")])
    assert runs.same_weights(out / "export", tmp_path / "e")
    assert checkpoints(out) == {"step-0", "step-2"}
    assert [r["step"] for r in runs.read_metrics(out)] == [1, 2]
    assert [r["step"] for r in online.evaluations(out)] == [0, 2]
    undone = out / "undone-1"
    assert [r["step"] for r in runs.read_metrics(undone)] == [3, 4]
    assert (undone / "evaluations" / "step-4.jsonl").is_file()
    assert checkpoints(undone) == {"step-4"}

    rows = runs.train("reverse-kl", model, data, out, *options, *high, "--resume")
    runs.assert_same_trajectory(whole, rows, tolerance=1e-6)
    assert online.evaluations(out) == online.evaluations(tmp_path / "w")


def test_a_task_that_falls_ends_the_run_where_asked(data, models, tasks, tmp_path, capsys):
    model, lr = models("qwen3"), ["--engine", "transformers", "--optimizer.lr", "1e-2"]
    reported = runs.train("reverse-kl", model, data, tmp_path / "w", *lr, *tasks)
    assert reported[1][f"evaluate/benchmark/{TASK}/acc"] < 0.8
    stop = online.evaluated({"regression": "stop"})
    argv = runs.arguments("reverse-kl", model, data, tmp_path / "r", *lr, *tasks, *stop)
    told = runs.refused(capsys, "train", *argv)
    assert f"step 2: {TASK}'s acc changed by -" in told and "back at update 0" in told
    assert runs.same_weights(tmp_path / "r" / "export", Path(model)), "what it started from"
    assert online.scores(tmp_path / "r", 0)[TASK]["metrics"]["acc"] == [1.0] * 20
    assert (tmp_path / "r" / "undone-1" / "evaluations" / "step-2.json").is_file()
    argv = [*argv, "--resume", *online.evaluated({"regression": "report"})]
    main(["train", *argv])
    runs.assert_same_trajectory(reported, runs.read_metrics(tmp_path / "r"), tolerance=1e-6)


def test_evaluations_of_something_else_are_not_mixed(data, models, held_out, tmp_path, capsys):
    run = "reverse-kl", models("qwen3"), data, tmp_path / "r", "--engine", "transformers"
    runs.train(*run, *held_out)
    argv = runs.arguments(*run, *held_out, "--resume")
    told = runs.refused(capsys, "train", *argv, *online.evaluated({"first": 3}))
    assert "settings.json: the run was evaluated with other first" in told
    main(["train", *argv, *online.evaluated({"every": 3})])


def test_a_run_that_ends_between_answers_and_tasks_goes_on(
    data, models, held_out, tasks, tmp_path, capsys, monkeypatch
):
    def gone(*_):
        raise SdpoError("the hub is gone")

    run = "reverse-kl", models("qwen3"), data, tmp_path / "r", "--engine", "transformers"
    argv = runs.arguments(*run, *held_out, *tasks)
    with monkeypatch.context() as patch:
        patch.setattr(Harness, "look", gone)
        assert "the hub is gone" in runs.refused(capsys, "train", *argv)
    assert len(online.evaluations(tmp_path / "r")) == 1
    main(["train", *argv, "--resume"])
    assert [e["step"] for e in online.evaluations(tmp_path / "r")] == [0, 2, 4, STEPS]
    assert online.scores(tmp_path / "r", 0)


def test_what_cannot_be_evaluated_is_refused_before_the_run_begins(
    data, models, held_out, tmp_path, capsys
):
    run = runs.arguments("reverse-kl", models("qwen3"), data, tmp_path / "r")
    for flags, says in (
        ({"prompts": tmp_path / "gone.txt"}, "gone.txt"),
        ({"tasks": "helaswag"}, "no task helaswag; it has hellaswag"),
        ({"tasks": TASK, "data": f"{TASK}=gone"}, "no such file"),
        ({"prompts": held_out[1], "personas": "poetic"}, "poetic has no rule"),
        ({"prompts": held_out[1], "brakes.max-drift": 1.0, "every": 2}, "probe_every must divide"),
    ):
        assert says in runs.refused(capsys, "train", *run, *online.evaluated(flags))
        assert not (tmp_path / "r" / "config.json").exists()


def test_a_config_file_says_what_a_run_is_evaluated_on(
    data, models, prompts, questions, tmp_path, capsys, monkeypatch
):
    ran = []
    monkeypatch.setattr(loop, "train", lambda *given, resume: ran.append(given))
    file = tmp_path / "run.toml"
    table = f'tasks = ["{TASK}"]\ndata = ["{TASK}={questions}"]\nevery = 7\nprompts = "{prompts}"'
    file.write_text(f"[evaluate]\n{table}\n[evaluate.brakes]\nmax_leaks = 0.1\n")
    argv = ["train", *runs.arguments("reverse-kl", models("qwen3"), data, tmp_path / "r")]
    argv += ["--config", str(file)]
    main([*argv, *online.evaluated({"every": 3, "regression": "stop"})])
    (config, evaluate), *_ = ran
    assert evaluate == LoopConfig(
        tasks=(TASK,),
        data=(f"{TASK}={questions}",),
        every=3,
        prompts=prompts,
        regression="stop",
        brakes=BrakeConfig(max_leaks=0.1),
    )
    assert "evaluate" not in to_json(config)
    main([*argv, "--dry-run"])
    said = " ".join(capsys.readouterr().out.split())
    assert "evaluated before the first step, every 7 steps and after the last: 6 prompts" in said
    assert f"at most 24 prompts of tasks ({TASK};" in said and len(ran) == 1
    main([*argv[:-2], "--dry-run"])
    assert "evaluated" not in capsys.readouterr().out
    for text, says in (
        ("[evaluate]\ntaks = []", "field evaluate.taks: unknown"),
        ("[evaluate.brakes]\nmax_leak = 0.1", "field evaluate.brakes.max_leak: unknown"),
        ("evaluate = 3", "field evaluate: expected an object of settings, found 3"),
        ('[evaluate]\nregression = "stop"', "field evaluate: evaluate.data and"),
    ):
        file.write_text(text)
        assert f"{file}, {says}" in runs.refused(capsys, *argv)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"every": 0}, "evaluate.every must be at least 1"),
        ({"personas": ("concise",)}, "need evaluate.prompts"),
        ({"brakes": BrakeConfig(max_words=9)}, "need evaluate.prompts"),
        ({"prompts": "p", "brakes": BrakeConfig(preference_drop=0.1)}, "needs evaluate.personas"),
        ({"regression": "stop"}, "need evaluate.tasks"),
        ({"data": ("a=b",)}, "need evaluate.tasks"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, says):
    with pytest.raises(SdpoError, match=says):
        LoopConfig(**given)
