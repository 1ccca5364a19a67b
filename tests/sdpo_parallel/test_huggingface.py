"""Model names: a folder, the hub, its cache, a revision, and what cannot be had."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from helpers import hub, runs, tiny
from sdpo.cli import main
from sdpo_parallel.errors import SdpoError
from sdpo_parallel.huggingface import resolve_model

NAME = "tiny-org/tiny-qwen3"
UNWANTED = {"README.md", "pytorch_model.bin"}


@pytest.fixture
def online(models, tmp_path, monkeypatch):
    """A hub with one model, and a cache of our own; the model's folder and what was asked for."""
    folder = tmp_path / "on-the-hub"
    folder.mkdir()
    for file in Path(models("qwen3")).iterdir():
        os.link(file, folder / file.name)
    for name in UNWANTED:
        (folder / name).write_text("of no use here")
    older = tmp_path / "older"
    older.mkdir()
    (older / "config.json").write_text('{"model_type": "older"}')
    with hub.serve(NAME, folder, older) as (address, requests):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield folder, requests


def test_a_folder_wins_over_the_hub(online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert resolve_model(NAME) == NAME
    assert not online[1]


def test_only_what_a_model_needs_is_downloaded_and_only_once(online, monkeypatch):
    folder, requests = online
    found = Path(resolve_model(NAME))
    wanted = {f.name for f in folder.iterdir()} - UNWANTED
    assert {f.name for f in found.iterdir()} == wanted
    assert all((found / name).read_bytes() == (folder / name).read_bytes() for name in wanted)
    requests.clear()
    assert resolve_model(NAME) == str(found)
    assert requests == [f"/api/models/{NAME}/revision/main"], "whether there is anything newer"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests.clear()
    assert resolve_model(NAME) == str(found)
    assert not requests


@pytest.mark.parametrize("revision", ["v1", hub.OLDER])
def test_a_revision(online, revision):
    found = Path(resolve_model(f"{NAME}@{revision}"))
    assert found.name == hub.OLDER and "older" in (found / "config.json").read_text()


@pytest.mark.parametrize(
    "name, offline, reason",
    [
        ("tiny-org/other", False, "404"),
        (f"{NAME}@v9", False, "404"),
        (NAME, True, "HF_HUB_OFFLINE"),
        ("tiny-org/..", False, "tiny-org/.."),
    ],
)
def test_what_cannot_be_had_says_what_was_tried(online, monkeypatch, name, offline, reason):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(SdpoError) as error:
        resolve_model(name)
    said = str(error.value)
    for word in (name, "no such model folder", constants.ENDPOINT, constants.HF_HUB_CACHE, reason):
        assert word in said, said


def test_what_is_no_name_is_not_looked_up(online):
    for name in ("Qwen3-4B", "/models/missing/qwen", "a/b/c"):
        with pytest.raises(SdpoError, match="no such model folder, nor a name"):
            resolve_model(name)
    assert not online[1]


def test_commands_take_names(online, tmp_path, monkeypatch):
    """Training downloads what the other commands then find in the cache."""
    run, exported, signal = tmp_path / "run", tmp_path / "exported", tmp_path / "signal.jsonl"
    data = tiny.make_interactions(tmp_path / "i.jsonl", 4)
    training = runs.command("reverse-kl", NAME, data, run)[3:]
    main([*training, "--engine", "transformers", "--teacher", f"frozen:{NAME}"])
    assert json.loads((run / "config.json").read_text())["model"] == NAME
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    main(["export", str(run), "--out", str(exported)])
    assert (exported / "model.safetensors").is_file()
    main(["signal", "--model", NAME, "--interactions", data, "--out", str(signal)])
    assert len(signal.read_text().splitlines()) == 4
