"""Figures as files: reproducible, whole or not at all."""

import pytest
from matplotlib.figure import Figure

from sdpo.errors import SdpoError
from sdpo.io.figures import check_figure_path, write_figure
from sdpo.io.files import write_bytes


def figure(value: float) -> Figure:
    made = Figure(figsize=(2, 1))
    made.add_subplot().plot([0, value])
    return made


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_figure_is_the_same_bytes(suffix, tmp_path):
    first, second, other = (tmp_path / f"{name}{suffix}" for name in "abc")
    for path, value in ((first, 1.0), (second, 1.0), (other, 2.0)):
        write_figure(path, figure(value))
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert first.read_bytes()[:5] == {".svg": b"<?xml", ".png": b"\x89PNG\r"}[suffix]


@pytest.mark.parametrize("name", ["signal.pdf", "signal", "svg"])
def test_other_formats_are_refused(name):
    with pytest.raises(SdpoError, match=r"must end in \.svg or \.png"):
        check_figure_path(name)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_bytes(path, "no bytes")  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["old.png"]
