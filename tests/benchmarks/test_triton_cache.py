"""A cache of compiled kernels that was carried to another folder serves there."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

from benchmarks import triton_cache  # noqa: E402
from helpers.environment import ENV  # noqa: E402

COMPILE = """
import sys
from triton import knobs
from benchmarks import triton_cache
from benchmarks.resources import compile_for, kernels
hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
if len(sys.argv) > 1:
    triton_cache.pose_as(__import__("pathlib").Path(sys.argv[1]))
(few, *_) = [k for k in kernels(90) if k[1].__name__ == "softmax_grad_kernel"]
cubin = compile_for(90, *few[1:]).asm["cubin"]
print(*hits, len(cubin))
"""


def compile_in(folder: Path, *arguments: str) -> list[str]:
    """Whether each kernel of a new process was found in ``folder``, and a cubin's size."""
    environment = {k: v for k, v in ENV.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    argv = [sys.executable, "-c", COMPILE, *arguments]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.slow
def test_a_process_with_a_carried_cache_compiles_nothing(tmp_path, capsys):
    made, carried, copied = (tmp_path / name for name in ("made", "carried", "copied"))
    hit, size = compile_in(made)
    assert hit == "False"
    triton_cache.close(made, 90)
    assert {f.suffix for f in made.rglob("*") if f.is_file()} == {".cubin", ".json"}
    (tmp_path / "elsewhere").mkdir()
    moved = made.rename(tmp_path / "elsewhere" / "made")
    triton_cache.install(moved, carried)
    assert "1 kernels, compiled for sm_90" in capsys.readouterr().out
    before = sorted(carried.rglob("*"))
    assert compile_in(carried) == ["True", size]
    assert sorted(carried.rglob("*")) == before
    shutil.copytree(moved, copied)  # and without rewritten paths it is of no use
    assert compile_in(copied) == ["False", size]


@pytest.mark.slow
def test_kernels_are_kept_as_those_of_another_wheel(tmp_path):
    """As if its library were another one; this process's Triton does not find them."""
    wheel = tmp_path / f"triton-{triton.__version__}-cp399-cp399-linux.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("triton/_C/libtriton.so", b"the library for another Python")
    folder = tmp_path / "cache"
    assert compile_in(folder, str(wheel))[0] == "False"
    assert compile_in(folder, str(wheel))[0] == "True"
    assert compile_in(folder)[0] == "False"
    with pytest.raises(ValueError, match="is not of Triton"):
        triton_cache.pose_as(Path("triton-1.0.0-cp399-cp399-linux.whl"))


def test_filling_is_a_rehearsal_into_a_new_folder(tmp_path, monkeypatch, capsys):
    folder, calls = tmp_path / "cache", []

    def compile_one(settings: SimpleNamespace) -> None:
        kernel = Path(os.environ["TRITON_CACHE_DIR"], "ABC")
        kernel.mkdir(parents=True)
        for suffix in ("cubin", "ptx", "json"):
            (kernel / f"a_kernel.{suffix}").write_text(str(settings.sm))

    double = SimpleNamespace(
        run=lambda settings, stage: compile_one(settings),
        Settings=SimpleNamespace,
        Stage=lambda: "stage",
        FUNCTIONS={"reverse KL": None},
        Case=SimpleNamespace,
        rehearse=lambda case, stage, sms: calls.append((case.dtype, case.kept, sms)),
    )
    monkeypatch.setitem(sys.modules, "benchmarks.rehearsal", double)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setenv("TRITON_INTERPRET", "")
    triton_cache.fill(folder, sm=100)
    assert sorted(f.name for f in folder.glob("ABC/*")) == ["a_kernel.cubin", "a_kernel.json"]
    assert (folder / "ABC" / "a_kernel.cubin").read_text() == "(100,)"
    assert len(calls) == 24 and {c[2] for c in calls} == {(100,)}
    assert json.loads((folder / "built.json").read_text())["sm"] == 100
    assert "1 kernels in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="name a new folder"):
        triton_cache.fill(folder)


def test_another_build_of_triton_is_named(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    triton_cache.close(folder, 90)
    built = json.loads((folder / "built.json").read_text())
    built["ptxas"] = "Cuda compilation tools, release 1.0"
    (folder / "built.json").write_text(json.dumps(built))
    with pytest.raises(SystemExit, match="another Triton: ptxas: Cuda compilation tools, rel"):
        triton_cache.install(folder, tmp_path / "into")
    with pytest.raises(SystemExit, match="has no built.json"):
        triton_cache.install(tmp_path / "no-such-folder", tmp_path / "another")
