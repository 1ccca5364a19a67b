"""Whole runs of `sdpo online`: layouts, replays, kills, silence, brakes and snapshots."""

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import forked, kill_online, online, runs, tiny
from sdpo.chat import chat_format
from sdpo.cli import main
from sdpo.online.sampler import InProcessSampler
from sdpo.online.snapshots import read_snapshots
from sdpo_parallel.huggingface import load_tokenizer

LR = 3e-4
OWN_METRICS = ("rollouts", "user", "evaluate", "sampler", "seconds", "phase")
GRUMPY = """
wants = "You want a thousand words."
complaints = ["Longer, please."]
[[rules]]
kind = "at_least_words"
words = 1000
"""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return online.make_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture(scope="module")
def run(models, prompts, tmp_path_factory):
    """A run of two phases, with every checkpoint."""
    out = tmp_path_factory.mktemp("run") / "run"
    options = ["--checkpoint.interval", "1", "--checkpoint.keep", "0"]
    online.online(models("qwen3"), prompts, out, *options)
    return out


def said(out):
    """What must be alike wherever a run runs."""
    return [(r.id, r.prompt_id, r.token_ids, r.answer, r.followup) for r in online.records(out)]


def weights(folder):
    files = sorted(Path(folder).glob("*.safetensors"))
    assert files
    return {name: w for file in files for name, w in load_file(file).items()}


def exported(out, step, to):
    with runs.as_alone():
        main(["export", str(out), "--step", str(step), "--out", str(to)])
    return weights(to)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_of_two_phases_writes_down_what_it_does(run):
    rows, records = runs.read_metrics(run), online.records(run)
    assert [r["phase"] for r in rows] == [1, 1, 2, 2]
    assert all(0 < r["loss"] < 20 and r["sampler/gap"] < 1e-5 for r in rows)
    assert len({r.id for r in records}) == len(records) == 16
    assert [r.version for r in records] == [r.update - 1 for r in records]
    assert Counter((r.phase, r.persona) for r in records) == {
        (1, "no_lists"): 8,
        (2, "no_emojis"): 8,
    }
    assert len({r.prompt_id for r in records}) == 16, "fresh prompts"
    for row, update in zip(rows, range(1, 5), strict=True):
        some = [r for r in records if r.update == update and r.dropped is None]
        assert row["response/tokens"] == sum(len(r.token_ids) for r in some)
    looks = online.evaluations(run)
    assert [(e["step"], e["phase"]) for e in looks] == [(0, 1), (2, 1), (4, 2)]
    assert all(e["preference"].keys() == {"no_lists", "no_emojis"} for e in looks)
    answers = (run / "evaluations" / "step-0.jsonl").read_text().splitlines()
    held_out = {json.loads(line)["prompt_id"] for line in answers}
    assert len(held_out) == 4 and held_out.isdisjoint(r.prompt_id for r in records)
    kept = {s.name: s.step for s in read_snapshots(run)}
    assert kept == {"phase-1": 0, "phase-2": 2, "end": 4, "good": 4}
    assert not same(weights(run / "export"), exported(run, 0, run.parent / "first"))


def test_every_metric_of_a_run_is_explained(run):
    folder = Path(__file__).parents[2] / "docs"
    text = (folder / "online.md").read_text() + (folder / "training.md").read_text()
    known = set(re.findall(r"`([\w/]+)`", text))
    for row in runs.read_metrics(run):
        for name in row:
            if name.split("/")[0] in (
                "rollouts",
                "user",
                "evaluate",
                "sampler",
                "seconds",
                "phase",
            ):
                name = re.sub("^evaluate/preference/.*", "evaluate/preference/PERSONA", name)
                assert name in known or name == "seconds", name


@pytest.mark.parametrize("layout", ["", "--parallel.tensor 2"], ids=["fsdp", "tp"])
def test_two_ranks_say_and_learn_the_same(layout, run, models, prompts, tmp_path):
    rows = online.online(models("qwen3"), prompts, tmp_path / "r", *layout.split(), ranks=2)
    assert said(tmp_path / "r") == said(run)
    runs.assert_same_trajectory(runs.read_metrics(run), rows)
    assert online.evaluations(tmp_path / "r") == online.evaluations(run)


def test_a_replay_has_the_same_losses_and_asks_nobody(run, models, prompts, tmp_path, monkeypatch):
    def nobody(*_, **__):
        raise AssertionError("a replay samples nothing and asks nobody")

    monkeypatch.setattr("sdpo.online.run.build_user", nobody)
    monkeypatch.setattr("sdpo.online.run.InProcessSampler", nobody)
    replay = ["--replay", str(run)]
    rows = online.online(models("qwen3"), prompts, tmp_path / "r", *replay)
    runs.assert_same_trajectory(runs.read_metrics(run), rows, tolerance=1e-6)
    assert same(weights(run / "export"), weights(tmp_path / "r" / "export"))
    file = tmp_path / "other.toml"
    file.write_text('[objective]\nkind = "JSD"\n')
    others = online.online(
        models("qwen3"), prompts, tmp_path / "o", *replay, "--config", str(file),
        "--sampling.max-gap", "1e-5",
    )  # fmt: skip
    assert [r["response/tokens"] for r in others] == [r["response/tokens"] for r in rows]
    assert all(abs(a["loss"] - b["loss"]) > 1e-3 for a, b in zip(rows, others, strict=True))
    assert others[-1]["sampler/gap"] > 1e-5, "of other weights, and no reason to stop"


def test_a_replay_of_a_run_that_is_not_whole_says_so(run, models, prompts, tmp_path, capsys):
    shutil.copytree(run / "rollouts", tmp_path / "part" / "rollouts")
    shutil.copytree(run / "interactions", tmp_path / "part" / "interactions")
    (tmp_path / "part" / "interactions" / "update-000002.parquet").unlink()
    argv = online.arguments(
        models("qwen3"), prompts, tmp_path / "r", "--replay", str(tmp_path / "part")
    )
    assert "no recorded update 2; is the run whole?" in runs.refused(capsys, "online", *argv)


def test_killed_runs_go_on_without_losing_or_repeating_an_interaction(tmp_path):
    model, prompts, undisturbed = kill_online.prepare(tmp_path)
    out = tmp_path / "r"
    kill_online.killed(model, prompts, out, 2, "0.05")
    kill_online.killed(model, prompts, out, 4, "between")
    assert (out / "rollouts" / "update-000004.parquet").is_file()
    assert not (out / "interactions" / "update-000004.parquet").is_file()
    kill_online.resumed(model, prompts, out)
    kill_online.compare(undisturbed, out)


def stopped_after(run, step, out):
    """A copy of a run as if it had been killed a while after a checkpoint."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "export")
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return out


def test_a_spoiled_file_of_rollouts_is_named_and_asked_again_when_removed(
    run, models, prompts, tmp_path, capsys
):
    out = stopped_after(run, 2, tmp_path / "r")
    path = out / "rollouts" / "update-000003.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    options = ["--checkpoint.interval", "1", "--checkpoint.keep", "0", "--resume"]
    argv = online.arguments(models("qwen3"), prompts, out, *options)
    told = runs.refused(capsys, "online", *argv)
    assert str(path) in told and "Remove it to sample again" in told
    path.unlink()
    online.online(models("qwen3"), prompts, out, *options)
    assert said(out) == said(run)
    runs.assert_same_trajectory(runs.read_metrics(run), runs.read_metrics(out), tolerance=1e-6)


def test_what_is_written_down_is_taken_and_not_asked_again(
    run, models, prompts, tmp_path, monkeypatch
):
    out = stopped_after(run, 2, tmp_path / "r")
    asked = []
    sample = InProcessSampler.sample
    monkeypatch.setattr(
        InProcessSampler,
        "sample",
        lambda self, prompts, *a, **k: asked.append(len(prompts)) or sample(self, prompts, *a, **k),
    )
    online.online(models("qwen3"), prompts, out, "--resume")
    assert said(out) == said(run)
    runs.assert_same_trajectory(runs.read_metrics(run), runs.read_metrics(out), tolerance=1e-6)
    assert asked == [4], "the evaluation at the end"


def test_a_first_snapshot_whose_checkpoint_was_lost_is_made_again(run, models, prompts, tmp_path):
    """Killed after the list was written, and before the checkpoint was."""
    out = stopped_after(run, -1, tmp_path / "r")
    online.online(models("qwen3"), prompts, out, "--resume")
    assert (out / "checkpoints" / "step-0" / "manifest.json").is_file()
    assert said(out) == said(run)


def test_the_optimizer_restarts_where_a_phase_begins_if_asked(models, prompts, tmp_path):
    """Adam's first step is as long as the rate, in every weight."""

    def steps(how):
        out = tmp_path / how
        options = ["--phase-optimizer", how, "--optimizer.eps", "1e-12", "--checkpoint.keep", "0"]
        options += ["--optimizer.weight-decay", "0"]
        phases = ("no_lists:2", "no_emojis:1")
        rows = online.online(models("qwen3"), prompts, out, *options, phases=phases)
        before, after = exported(out, 2, tmp_path / f"{how}-2"), weights(out / "export")
        name = "model.layers.0.mlp.up_proj.weight"
        return rows, (after[name] - before[name]).abs()

    kept, step = steps("keep")
    assert (step < 0.9 * LR).float().mean() > 0.2
    restarted, step = steps("restart")
    assert step.max() < 1.01 * LR and (step < 0.9 * LR).float().mean() < 0.01
    runs.assert_same_trajectory(kept, restarted, tolerance=1e-6)


def test_a_phase_sees_the_prompts_of_the_last_one_again_if_asked(models, prompts, tmp_path):
    options = ["--phase-prompts", "repeat", "--engine", "transformers", "--evaluate.prompts", "0"]
    online.online(models("qwen3"), prompts, tmp_path / "r", *options)
    ids = [r.prompt_id for r in online.records(tmp_path / "r")]
    assert ids[:8] == ids[8:] and len(set(ids)) == 8


@pytest.fixture(scope="module")
def grumpy(tmp_path_factory):
    path = tmp_path_factory.mktemp("persona") / "grumpy.toml"
    path.write_text(GRUMPY)
    return str(path)


def test_an_update_in_which_nobody_said_anything_changes_nothing(grumpy, models, prompts, tmp_path):
    file = tmp_path / "silent.toml"
    file.write_text('[user]\nkind = "RuleUser"\npraise = 0.0\n')
    options = ["--config", str(file), "--checkpoint.keep", "0", "--checkpoint.interval", "1"]
    options += ["--evaluate.every", "1", "--safeguard.probe-every", "1"]
    options += ["--brakes.entropy-change", "0.9", "--optimizer.weight-decay", "0.1"]
    phases = (f"{grumpy}:2", "no_lists:1", f"{grumpy}:1")
    alone = online.online(models("qwen3"), prompts, tmp_path / "1", *options, phases=phases)
    silent = alone[2]
    assert [r["user/silent"] for r in alone] == [0, 0, 1, 0]
    for name in ("loss", "grad_norm", "lr", "skipped", "response/tokens", "entropy/policy"):
        assert silent[name] == 0, name
    assert all(value is not None for value in silent.values()), "no NaN"
    before, after, last = (exported(tmp_path / "1", s, tmp_path / f"e{s}") for s in (2, 3, 4))
    assert same(before, after) and not same(after, last)
    assert alone[3]["lr"] > 0
    two = online.online(models("qwen3"), prompts, tmp_path / "2", *options, phases=phases, ranks=2)
    runs.assert_same_trajectory(alone, two)


@pytest.mark.parametrize("how", ["train", "mask"])
def test_cut_answers_are_trained_on_as_they_are_or_masked(how, grumpy, models, prompts, tmp_path):
    model = models("qwen3")
    options = ["--guard.cut-answers", how, "--evaluate.prompts", "0", "--engine", "transformers"]
    options += ["--sampling.temperature", "3", "--sampling.max-new-tokens", "60"]
    options += ["--batch.interactions-per-step", "12"]
    rows = online.online(model, prompts, tmp_path / "r", *options, phases=(f"{grumpy}:2",))
    records, ends = online.records(tmp_path / "r"), chat_format(load_tokenizer(model)).end_ids
    cut = [r for r in records if not r.finished]
    assert 0 < len(cut) < len(records)
    for r in records:
        assert r.finished == (r.token_ids[-1] in ends) and ends.isdisjoint(r.token_ids[:-1])
        assert r.finished or len(r.token_ids) == 60
        assert r.dropped == ("cut answer" if how == "mask" and not r.finished else None)
    trained_on = [r for r in records if r.dropped is None]
    assert sum(r["response/tokens"] for r in rows) == sum(len(r.token_ids) for r in trained_on)


@pytest.mark.parametrize("ranks", [0, 2], ids=["alone", "fsdp"])
def test_a_brake_puts_the_run_back_to_its_last_good_snapshot(
    ranks, run, models, prompts, tmp_path, capsys
):
    kl = {r["step"]: r["drift/kl"] for r in runs.read_metrics(run) if "drift/kl" in r}
    assert 0 < kl[2] < kl[4]
    out = tmp_path / "r"
    limit = ["--brakes.max-drift", str((kl[2] + kl[4]) / 2)]
    argv = online.arguments(models("qwen3"), prompts, out, *limit)
    if ranks:
        result = forked.run(ranks, "-m", "sdpo.online", *argv)
        told = result.stderr
        assert result.returncode
    else:
        told = runs.refused(capsys, "online", *argv)
    assert "update 4: the policy drifted by" in told and "back at update 2" in told
    good = weights(out / "export")
    assert same(good, exported(out, 2, tmp_path / "e2"))
    if not ranks:
        assert same(good, exported(run, 2, tmp_path / "alone"))
    undone = out / "undone-1"
    moved = {str(p.relative_to(undone)) for p in undone.rglob("*.parquet")}
    names = [
        f"{kind}/update-00000{n}.parquet" for kind in ("rollouts", "interactions") for n in (3, 4)
    ]
    assert moved == set(names)
    assert (undone / "checkpoints" / "step-4").is_dir()
    assert (undone / "evaluations" / "step-4.jsonl").is_file()
    assert [r["step"] for r in runs.read_metrics(out)] == [1, 2]
    assert [r["step"] for r in runs.read_metrics(undone)] == [3, 4]
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-0", "step-2"}
    assert {s.name: s.step for s in read_snapshots(out)} == {"phase-1": 0, "phase-2": 2, "good": 2}

    rows = online.online(models("qwen3"), prompts, out, "--resume", ranks=ranks)  # no such brake
    assert len(rows) == 4
    runs.assert_same_trajectory(rows[:2], runs.read_metrics(run)[:2], tolerance=1e-6)
    before, after = online.records(run)[8:], online.records(out)[8:]
    assert [r.prompt_id for r in before] == [r.prompt_id for r in after]
    assert not {r.token_ids for r in before} & {r.token_ids for r in after}, "other numbers"


def test_snapshots_are_listed_exported_and_gone_back_to(
    run, models, prompts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "r"
    shutil.copytree(run, out)
    main(["snapshots", "list", str(out)])
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("phase-1", "phase-2", "good", "end", "no_emojis"))
    with runs.as_alone():
        main(["snapshots", "export", str(out), "phase-2", "--out", str(tmp_path / "e")])
    assert same(weights(tmp_path / "e"), exported(run, 2, tmp_path / "e2"))

    told = runs.refused(capsys, "snapshots", "export", out, "phase-2")
    assert "say where with --out" in told
    told = runs.refused(capsys, "snapshots", "restore", out, "phase-3")
    assert "no snapshot 'phase-3'; there are: phase-1, phase-2, end, good" in told

    main(["snapshots", "restore", str(out), "phase-2"])
    assert "back at phase-2, update 2" in capsys.readouterr().out
    assert not (out / "export").exists() and (out / "undone-1" / "export").is_dir()
    rows = online.online(models("qwen3"), prompts, out, "--resume")
    runs.assert_same_trajectory(rows[:2], runs.read_metrics(run)[:2], tolerance=1e-6)
    assert said(out)[:8] == said(run)[:8]
    answers = {r[2] for r in said(out)[8:]}
    assert len(answers) == 8 and answers.isdisjoint(r[2] for r in said(run))
    shutil.rmtree(out / "checkpoints" / "step-2")
    told = runs.refused(capsys, "snapshots", "restore", out, "phase-2")
    assert "the checkpoint of snapshot 'phase-2' is gone" in told


def test_snapshots_outlive_the_checkpoints_that_are_pruned(models, prompts, tmp_path):
    options = ["--checkpoint.keep", "2", "--checkpoint.interval", "1", "--evaluate.prompts", "0"]
    phases = ("no_lists:2", "no_emojis:4")
    online.online(models("qwen3"), prompts, tmp_path / "r", *options, phases=phases)
    left = {p.name for p in (tmp_path / "r" / "checkpoints").iterdir()}
    assert left == {"step-0", "step-2", "step-5", "step-6"}


def test_a_sampler_with_other_weights_than_the_trainers_stops_the_run(
    models, prompts, tmp_path, capsys, monkeypatch
):
    update = InProcessSampler.update

    @torch.no_grad()
    def wrong(self, engine, version):
        update(self, engine, version)
        for parameter in self.model.parameters():
            parameter.mul_(1.1)

    monkeypatch.setattr(InProcessSampler, "update", wrong)
    options = ["--evaluate.prompts", "0", "--engine", "transformers"]
    argv = online.arguments(models("qwen3"), prompts, tmp_path / "r", *options)
    told = runs.refused(capsys, "online", *argv)
    assert "nats from the trainer's in the mean, beyond sampling.max_gap 0.1" in told
    rows = runs.read_metrics(tmp_path / "r")
    assert rows[0]["sampler/gap"] < 1e-5 and rows[-1]["sampler/gap"] > 0.1
    assert len(rows) == 2, "the first answers came from the folder's own weights"


def test_a_thinking_token_in_the_middle_of_an_answer_opens_no_gap(prompts, tmp_path, grumpy):
    """Once, the trainer read a prompt that leaves the block open, and the sampler one without."""
    folder = tmp_path / "m"
    model = tiny.make_model(folder, "qwen3")
    think = load_tokenizer(model).convert_tokens_to_ids("<think>")
    parts = weights(folder)
    # as likely as the likeliest token, wherever that is
    parts["lm_head.weight"][think] = parts["lm_head.weight"].abs().max() * torch.sign(
        parts["lm_head.weight"].mean(0)
    )
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})
    options = ["--evaluate.prompts", "0", "--engine", "transformers"]
    rows = online.online(model, prompts, tmp_path / "r", *options, phases=(f"{grumpy}:2",))
    records = online.records(tmp_path / "r")
    inside = [r for r in records if think in r.token_ids[1:] and r.token_ids[0] != think]
    assert len(inside) > 1
    assert max(r["sampler/gap"] for r in rows) < 1e-5


@pytest.mark.exhaustive
def test_runs_killed_at_ten_random_points_go_on(tmp_path, seed):
    prepared = kill_online.prepare(tmp_path)
    for i in range(10):
        kill_online.point(*prepared, tmp_path / f"point-{i}", random.Random(seed + i))
