"""What a demo may replace."""

import pytest

from sdpo.demo.folder import make_room


def test_only_a_demos_folder_is_replaced(tmp_path):
    folder = tmp_path / "demo"
    make_room(folder)
    (folder / "old").touch()
    make_room(folder)
    assert not (folder / "old").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no demo"):
        make_room(mine)
    assert (mine / "thesis.tex").exists()
