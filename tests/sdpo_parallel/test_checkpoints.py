"""Checkpoints of one process: whole or absent, verified, resumed from the newest good one."""

import json
from pathlib import Path

import pytest
import torch

from sdpo_parallel.checkpoints import MANIFEST, CheckpointError, Checkpoints
from sdpo_parallel.config import CheckpointConfig
from sdpo_parallel.errors import SdpoError


class Counter:
    """A part of a run's state."""

    def __init__(self):
        self.n = 0

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state_dict):
        self.n = state_dict["n"]


def checkpoints(folder: Path, keep: int = 3) -> Checkpoints:
    config = CheckpointConfig(interval=2, keep=keep, asynchronous=False)
    state = {"model": torch.nn.Linear(4, 3), "run": Counter()}
    return Checkpoints(folder, config, state)


def saved(folder: Path, *steps: int, keep: int = 3) -> Checkpoints:
    made = checkpoints(folder, keep)
    for step in steps:
        made.state["run"].n = step  # pyright: ignore
        torch.nn.init.constant_(made.state["model"].weight, step)  # pyright: ignore
        made.save(step, {"told": step})
    return made


def test_what_is_saved_is_loaded_with_its_manifest(tmp_path):
    saved(tmp_path, 2, 4)
    made = checkpoints(tmp_path)
    assert made.newest() == 4 and made.steps() == [2, 4] and made.due(4) and not made.due(3)
    made.load(4)
    assert made.state["run"].n == 4 and (made.state["model"].weight == 4).all()  # pyright: ignore
    manifest = json.loads((made.folder / "step-4" / MANIFEST).read_text())
    assert (manifest["step"], manifest["told"]) == (4, 4)
    assert {".metadata"} < manifest["files"].keys()
    assert not list(made.folder.glob("*.partial"))


def test_a_part_is_loaded_without_the_others(tmp_path):
    saved(tmp_path, 2)
    model = torch.nn.Linear(4, 3)
    weights = Checkpoints(tmp_path, CheckpointConfig(), {"model": model})
    weights.load(weights.undamaged(None))
    assert (model.weight == 2).all()


def test_only_the_newest_are_kept(tmp_path):
    assert saved(tmp_path, 2, 4, 6, 8, keep=2).steps() == [6, 8]
    assert saved(tmp_path / "all", 2, 4, 6, keep=0).steps() == [2, 4, 6]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_one_is_named_set_aside_and_the_one_before_it_taken(damage, tmp_path, capsys):
    made = saved(tmp_path, 2, 4)
    file = next((made.folder / "step-4").glob("*.distcp"))
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        file = made.folder / "step-4" / MANIFEST
        file.write_text(file.read_text()[:-9])
    with pytest.raises(SdpoError, match=f"step-4 is damaged .*{file.name}"):
        made.undamaged(4)
    assert made.undamaged(None) == 2 and made.steps() == [2, 4], "looking changes nothing"
    assert made.newest() == 2
    assert "set aside as step-4.damaged" in capsys.readouterr().err
    assert made.steps() == [2] and (made.folder / "step-4.damaged").is_dir()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    made = saved(tmp_path, 2)
    half = made.folder / "step-4.partial"
    half.mkdir()
    assert made.newest(set_aside=False) == 2 and half.is_dir()
    assert made.newest() == 2 and not half.exists()


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(SdpoError, match="no undamaged checkpoint"):
        checkpoints(tmp_path).undamaged(None)
    with pytest.raises(SdpoError, match="no checkpoint of step 3; there are: 2, 4"):
        saved(tmp_path, 2, 4).undamaged(3)


def test_a_save_that_fails_leaves_the_newest_untouched_and_says_what_is_free(tmp_path, monkeypatch):
    made = saved(tmp_path, 2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdpo_parallel.checkpoints.summed", full)
    with pytest.raises(CheckpointError, match="MiB are free.*step-2 is the newest"):
        made.save(4, {})
    assert made.steps() == [2] and not list(made.folder.glob("*.partial"))
