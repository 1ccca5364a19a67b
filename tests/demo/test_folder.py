"""What a demo may replace."""

import shutil

import pytest

from sdpo.demo.folder import make_room


def interrupted(path):
    raise KeyboardInterrupt


def test_only_a_demos_folder_is_replaced(tmp_path, monkeypatch):
    folder = tmp_path / "demo"
    make_room(folder)
    (folder / "old").touch()
    make_room(folder)
    assert not (folder / "old").exists()
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    (folder / "run").mkdir()
    with pytest.raises(KeyboardInterrupt):
        make_room(folder)
    monkeypatch.undo()
    make_room(folder)  # a demo's still
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no demo"):
        make_room(mine)
    assert (mine / "thesis.tex").exists()
