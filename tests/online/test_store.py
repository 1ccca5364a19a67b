"""`sdpo users`: a store of users, from adding one to forgetting them."""

import json
import shutil

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from helpers import online, runs
from online.test_together import LORA, digests
from sdpo.cli import main
from sdpo.online.snapshots import read_snapshots
from sdpo.online.store import FORGETTING, read_users


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return online.make_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


def train(store, model, prompts, *options):
    """`sdpo users train` of a small model."""
    argv = online.arguments(model, prompts, store, *LORA, *options, phases=())
    recipe, *rest = argv
    at = rest.index("--out")
    del rest[at : at + 2]
    with runs.as_alone():
        main(["users", "train", str(store), recipe, *rest])


@pytest.fixture(scope="module")
def trained(models, prompts, tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "s"
    main(["users", "add", str(store), "alice", "no_lists:1", "no_emojis:2"])
    main(["users", "add", str(store), "bob@home", "no_emojis:2"])
    train(store, models("qwen3"), prompts)
    return store


@pytest.fixture
def store(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "s")


def exported(store, name, out, *options):
    with runs.as_alone():
        main(["users", "export", str(store), name, "--out", str(out), *options])
    return load_file(out / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_users_are_added_trained_and_listed(trained, capsys):
    assert read_users(trained) == {
        "alice": ("no_lists:1", "no_emojis:2"),
        "bob@home": ("no_emojis:2",),
    }
    main(["users", "list", str(trained)])
    told = capsys.readouterr().out
    for word in ("alice", "bob@home", "no_lists:1", "phase-1", "phase-2", "end", "satisfied"):
        assert word in told
    assert [r["step"] for r in runs.read_metrics(trained / "users" / "alice")] == [1, 2, 3]


def test_phases_are_added_to_a_user_who_came_to_the_end(trained, models, prompts, tmp_path):
    """The run is what it would have been with all phases from the beginning."""
    later = tmp_path / "later"
    main(["users", "add", str(later), "alice", "no_lists:1"])
    train(later, models("qwen3"), prompts)
    assert [s.name for s in read_snapshots(later / "users" / "alice")] == ["phase-1", "end", "good"]
    main(["users", "add", str(later), "alice", "no_emojis:2"])
    train(later, models("qwen3"), prompts)
    here, there = (folder / "users" / "alice" for folder in (later, trained))
    assert online.records(here) == online.records(there)
    assert read_snapshots(here) == read_snapshots(there)
    weights = [load_file(f / "export" / "adapter_model.safetensors") for f in (here, there)]
    assert same(*weights)


def test_phases_are_not_added_where_the_learning_rate_knows_the_end(
    models, prompts, tmp_path, capsys
):
    store = tmp_path / "s"
    main(["users", "add", str(store), "alice", "no_lists:1"])
    train(store, models("qwen3"), prompts, "--optimizer.schedule", "cosine")
    main(["users", "add", str(store), "alice", "no_emojis:1"])
    with pytest.raises(SystemExit):
        train(store, models("qwen3"), prompts, "--optimizer.schedule", "cosine")
    assert "its learning rate depends on how long the run is" in capsys.readouterr().err


def test_a_rollback_restores_the_answers_exactly(store, models, prompts, tmp_path):
    """And what came after it is not trained on again: other answers are drawn."""
    before = exported(store, "alice", tmp_path / "phase-2", "--snapshot", "phase-2")
    first = online.records(store / "users" / "alice")
    main(["users", "rollback", str(store), "alice", "phase-2"])
    assert same(exported(store, "alice", tmp_path / "now"), before)
    others = digests(store / "users" / "bob@home")
    train(store, models("qwen3"), prompts)
    again = online.records(store / "users" / "alice")
    assert again[:4] == first[:4] and len(again) == 12
    assert {r.token_ids for r in again[4:]}.isdisjoint(r.token_ids for r in first[4:])
    kept = digests(store / "users" / "bob@home")
    assert {n: d for n, d in kept.items() if n.startswith("checkpoints")} == {
        n: d for n, d in others.items() if n.startswith("checkpoints")
    }


def test_what_somebody_said_is_traced_to_the_checkpoints_that_read_it(store, tmp_path, capsys):
    trained = {r.id for r in online.records(store / "users" / "alice") if r.dropped is None}
    main(["users", "rollback", str(store), "alice", "phase-2"])
    out = tmp_path / "trace.json"
    main(["data", "trace", "alice", "--runs", str(store), "--json", str(out)])
    (run,) = json.loads(out.read_text())["runs"]
    read = {c["name"]: sorted(c["read"]) for c in run["checkpoints"]}
    first = {id for id in trained if id.startswith("000001.")}
    assert first and set(read["step-1"]) == first
    assert read["step-0"] == [] and run["newest_before"] == "step-0"
    later = [name for name in read if name.startswith("undone-1/")]
    assert {"undone-1/step-3", "undone-1/export"} <= set(later)
    assert set(read["undone-1/step-3"]) == set(read["undone-1/export"]) == trained
    told = capsys.readouterr().out
    assert f"sdpo users forget {store} alice" in "".join(told.split("\n"))

    one = min(first)
    main(["data", "trace", one, "--runs", str(store / "users" / "alice"), "--json", str(out)])
    (run,) = json.loads(out.read_text())["runs"]
    assert {c["name"] for c in run["checkpoints"] if c["read"]} == set(read) - {"step-0"}
    assert "another run from there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main(["data", "trace", "carol", "--runs", str(store)])
    assert "carol: not in" in capsys.readouterr().out


def test_somebody_who_is_forgotten_leaves_no_byte(store, capsys):
    folder = store / "users" / "alice"
    said = {r.followup for r in online.records(folder) if r.followup} | {
        r.answer for r in online.records(folder)
    }
    others = digests(store / "users" / "bob@home")
    theirs = {r.answer for r in online.records(store / "users" / "bob@home")}
    main(["users", "forget", str(store), "alice"])
    assert digests(store / "users" / "bob@home") == others
    left = [p for p in store.rglob("*") if p.is_file()]
    assert left and not any("alice" in str(p.relative_to(store)) for p in left)
    for path in left:
        content = path.read_bytes()
        assert b"alice" not in content, path
        assert not any(t.encode() in content for t in said - theirs if len(t) > 40), path
    assert list(read_users(store)) == ["bob@home"]
    told = runs.refused(capsys, "users", "forget", store, "alice")
    assert "no user 'alice'; there are: bob@home" in told


def test_what_a_killed_command_left_of_somebody_goes_with_the_next(store):
    shutil.copytree(store / "users" / "alice", store / "users" / f"{FORGETTING}carol")
    main(["users", "forget", str(store), "alice"])
    assert [p.name for p in (store / "users").iterdir()] == ["bob@home"]


def test_a_user_in_training_is_not_forgotten(store, capsys):
    lock = FileLock(store / "users" / "alice" / "lock")
    with lock:
        assert "stop it first" in runs.refused(capsys, "users", "forget", store, "alice")
    assert (store / "users" / "alice").is_dir() and "alice" in read_users(store)


def test_what_cannot_be_added_or_trained(store, tmp_path, capsys):
    told = runs.refused(capsys, "users", "add", store, "../x", "no_lists:1")
    assert "expected NAME=PERSONA:UPDATES" in told
    assert "expected PERSONA:UPDATES" in runs.refused(
        capsys, "users", "add", store, "c", "no_lists"
    )
    told = runs.refused(capsys, "users", "train", tmp_path / "none", "online")
    assert "no users; add one" in told
    (store / "users.json").write_text("[1")
    assert "not a list of users" in runs.refused(capsys, "users", "list", store)
    with pytest.raises(SystemExit):
        main(["users", "train"])
