"""Users who share a model: each one's run is what it is alone, and nobody touches another's."""

import hashlib
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from helpers import online, runs
from sdpo.cli import main
from sdpo.errors import SdpoError
from sdpo.online.config import parse_user
from sdpo.online.talk import Talk
from sdpo.online.together import read_users

LORA = ["--lora.rank", "4", "--lora.alpha", "8", "--optimizer.lr", "3e-3"]
USERS = ("alice=no_lists:2,no_emojis:1", "bob=no_emojis:2")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return online.make_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


def arguments(model, prompts, out, *options, users=USERS):
    argv = online.arguments(model, prompts, out, *LORA, *options, phases=())
    at = argv.index("--phases")
    return ["online", *argv[:at], "--users", *users, *argv[at + 1 :]]


def went(model, prompts, out, *options, **how):
    """Folders of the users, by name."""
    with runs.as_alone():
        main(arguments(model, prompts, out, *options, **how))
    return {folder.name: folder for folder in (out / "users").iterdir()}


@pytest.fixture(scope="module")
def pair(models, prompts, tmp_path_factory):
    return went(models("qwen3"), prompts, tmp_path_factory.mktemp("pair"))


def adapters(folder):
    return load_file(folder / "export" / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def digests(folder: Path) -> dict[str, str]:
    """Of all files but TensorBoard's, which its own thread writes."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and "tensorboard" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("text", USERS)
def test_each_users_run_is_what_it_is_alone(text, pair, models, prompts, tmp_path):
    name, phases = parse_user(text)
    options = [*LORA, "--checkpoint.interval", "1"]
    rows = online.online(models("qwen3"), prompts, tmp_path / "r", *options, phases=phases)
    theirs = runs.read_metrics(pair[name])
    assert len(rows) == len(theirs) > 1
    runs.assert_same_trajectory(theirs, rows, tolerance=1e-6)
    assert online.records(pair[name]) == online.records(tmp_path / "r")
    with runs.as_alone():
        main(["export", str(tmp_path / "r"), "--adapters", "--out", str(tmp_path / "r" / "export")])
    assert same(adapters(pair[name]), adapters(tmp_path / "r"))


def test_a_checkpoint_holds_what_is_a_users_own_and_not_the_model(pair):
    held = FileSystemReader(pair["bob"] / "checkpoints" / "step-2").read_metadata()
    names = [name for name in held.state_dict_metadata if name.startswith("model.")]
    assert names and all(".lora_" in name for name in names)


def test_users_differ_and_have_folders_of_their_own(pair):
    assert pair.keys() == {"alice", "bob"}
    a, b = adapters(pair["alice"]), adapters(pair["bob"])
    assert a.keys() == b.keys() and not same(a, b)
    assert all(w.abs().max() > 0 for name, w in a.items() if "lora_B" in name)
    assert {r.persona for r in online.records(pair["bob"])} == {"no_emojis"}


def test_the_folder_is_a_store_of_users(pair, capsys):
    store = pair["alice"].parents[1]
    assert read_users(store) == dict(map(parse_user, USERS))
    main(["users", "list", str(store)])
    assert "no_lists:2" in capsys.readouterr().out


def test_a_turn_leaves_the_others_bytes_as_they_are(models, prompts, tmp_path, monkeypatch):
    seen, step = [], Talk._step

    def watched(self, update):
        folders = {name: self.folder.parent / name for name in ("alice", "bob")}
        seen.append((self.folder.name, {name: digests(f) for name, f in folders.items()}))
        return step(self, update)

    monkeypatch.setattr(Talk, "_step", watched)
    users = ("alice=no_lists:3", "bob=no_emojis:3")
    went(models("qwen3"), prompts, tmp_path / "s", "--evaluate.prompts", "0", users=users)
    assert [name for name, _ in seen] == ["alice", "bob"] * 3
    for (whose, before), (other, after) in zip(seen[1:-1], seen[2:], strict=True):
        assert before[other] == after[other] and len(before[other]) > 5
        assert before[whose] != after[whose]


def test_users_go_on_where_a_signal_stopped_them(pair, models, prompts, tmp_path, monkeypatch):
    out, step = tmp_path / "s", Talk._step

    def signals(self, update):
        if self.folder.name == "bob" and update == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, update)

    monkeypatch.setattr(Talk, "_step", signals)
    half = went(models("qwen3"), prompts, out)
    monkeypatch.undo()
    assert [len(runs.read_metrics(half[n])) for n in ("alice", "bob")] == [1, 1]
    whole = went(models("qwen3"), prompts, out, "--resume")
    for name in pair:
        assert online.records(whole[name]) == online.records(pair[name])
        assert same(adapters(whole[name]), adapters(pair[name]))


def test_somebody_comes_later(pair, models, prompts, tmp_path):
    out = tmp_path / "s"
    shutil.copytree(pair["alice"].parent, out / "users")
    before = digests(out / "users" / "alice" / "export")
    users = (*USERS, "carol=no_lists:1")
    now = went(models("qwen3"), prompts, out, "--resume", users=users)
    assert len(runs.read_metrics(now["carol"])) == 1
    assert digests(now["alice"] / "export") == before


def test_one_users_brake_is_not_the_others(models, prompts, tmp_path, capsys):
    """Both answer in more words than bob's brake allows; brakes are the run's, so it trips for
    each by itself, and what both have is their first weights."""
    options = ["--brakes.max-words", "0.5", "--evaluate.every", "2"]
    argv = arguments(models("qwen3"), prompts, tmp_path / "s", *options)
    with runs.as_alone():
        told = runs.refused(capsys, *argv)
    assert "alice: update 2" in told and "bob: update 2" in told
    for name in ("alice", "bob"):
        folder = tmp_path / "s" / "users" / name
        assert (folder / "undone-1").is_dir() and not any((folder / "rollouts").iterdir())
        assert all(w.abs().max() == 0 for n, w in adapters(folder).items() if "lora_B" in n)


@pytest.mark.parametrize(
    ("options", "users", "says"),
    [
        (["--lora.rank", "0"], USERS, "set lora.rank"),
        (["--engine", "transformers"], USERS, "torchtitan"),
        (["--teacher", "ema:0.9"], USERS, "average"),
        ([], ("alice=no_lists:1", "alice=no_lists:2"), "twice"),
        ([], ("../alice=no_lists:1",), "expected NAME=PERSONA:UPDATES"),
        ([], ("alice",), "phase ''"),
    ],
)
def test_what_users_cannot_have(options, users, says, models, prompts, tmp_path, capsys):
    argv = arguments(models("qwen3"), prompts, tmp_path / "s", *options, users=users)
    with runs.as_alone():
        assert says in runs.refused(capsys, *argv)
    assert not (tmp_path / "s").exists()
    with pytest.raises(SdpoError):
        parse_user("=x:1")
