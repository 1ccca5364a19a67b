"""Triton kernels compiled on one machine for another, whose first minutes are then not compilation.

    python -m benchmarks.triton_cache fill FOLDER [--sm 90] [--wheel triton-3.6.0-cp312-X.whl]
    python benchmarks/gpu_suite.py OUT --triton-cache FOLDER

`fill` needs no GPU: it is a rehearsal (``benchmarks.rehearsal``), whose launches are specialised as
real ones are. Triton finds a kernel again by a hash of the kernel's source and line, types,
divisibility, constants and options, of Triton's own sources and library, of ptxas's version, and
of some environment variables. Both machines must therefore have this checkout and one build of
Triton; what it was is kept in FOLDER/built.json, and `install` says what differs. The library is
another one for every version of Python: ``--wheel`` names what the other machine has installed.

The index of a kernel's files holds absolute paths, so that a folder that was only copied is of no
use: `install` writes them anew. The launchers that Triton 3.6 has a C compiler make, one for each
signature, are not prepared, as they need the GPU's driver.
"""

import hashlib
import importlib
import itertools
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Annotated

import tyro

BUILT = "built.json"
KEPT = (".cubin", ".json")
"""Suffixes of what is read when a kernel is launched; the stages' sources are many times that."""


TESTED = (300, 5003, 256)
"""N, V and D of most tests in ``tests/gpu``."""
DTYPES = ("bfloat16", "float16", "float32")


def fill(
    folder: Annotated[Path, tyro.conf.Positional], sm: int = 90, wheel: Path | None = None
) -> None:
    """Compile what tests and benchmarks launch.

    Args:
        folder: of the cache; must not exist.
        sm: compute capability of the machine that will use it, times ten.
        wheel: Triton as it is installed there, of this release; needed where Python is another one.
    """
    folder = folder.resolve()
    if folder.exists():
        sys.exit(f"error: {folder} is there; name a new folder")
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    os.environ.pop("TRITON_INTERPRET", None)
    if wheel is not None:
        pose_as(wheel)
    rehearse(sm)
    close(folder, sm)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{len(kernels(folder))} kernels in {size / 2**20:.1f} MiB")


def rehearse(sm: int) -> None:
    """Compile what the rehearsal launches, and every function as ``tests/gpu`` calls it."""
    # imported late, as it tells torch and Triton of a GPU that is not there
    rehearsal = importlib.import_module("benchmarks.rehearsal")
    stage = rehearsal.Stage()
    rehearsal.run(rehearsal.Settings(sm=(sm,)), stage)
    for function, dtype, impl, transforms, kept in itertools.product(
        rehearsal.FUNCTIONS, DTYPES, ("triton", "fused"), (False, True), (False, True)
    ):
        given = dict(function=function, dtype=dtype, impl=impl, transforms=transforms, kept=kept)
        rehearsal.rehearse(rehearsal.Case(shape=TESTED, **given), stage, (sm,))


def pose_as(wheel: Path) -> None:
    """From here on this process's kernels are kept as those of ``wheel``'s Triton.

    Raises:
        ValueError: the wheel is not of the Triton that is installed here.
    """
    from triton import __version__
    from triton.runtime import cache

    if not wheel.name.startswith(f"triton-{__version__}-"):
        raise ValueError(f"{wheel.name} is not of Triton {__version__}, which compiles here")
    with zipfile.ZipFile(wheel) as archive, archive.open("triton/_C/libtriton.so") as file:
        theirs = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore
    with (Path(cache.__file__).parents[1] / "_C" / "libtriton.so").open("rb") as file:
        ours = hashlib.file_digest(file, "sha256").hexdigest()
    before, key = cache.triton_key(), cache.triton_key().replace(ours, theirs)
    assert ours in before, "the key of this release holds no hash of its library"
    cache.triton_key = lambda: key


def close(folder: Path, sm: int) -> None:
    """Leave what a launch reads, and say for which Triton it was compiled."""
    for file in folder.glob("*/*"):
        if file.suffix not in KEPT:
            file.unlink()
    text = json.dumps({"sm": sm, **build(sm)}, indent=1)
    (folder / BUILT).write_text(text + "\n", encoding="utf-8")


def build(sm: int) -> dict[str, str]:
    """What must be the same on both machines, besides kernels and their arguments."""
    from triton import __version__
    from triton._C.libtriton import get_cache_invalidating_env_vars  # pyright: ignore
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime import cache

    return {
        "Triton": __version__,
        "Triton's build": hashlib.sha256(cache.triton_key().encode()).hexdigest()[:16],
        "ptxas": make_backend(GPUTarget("cuda", sm, 32)).hash(),
        "environment": str(sorted(get_cache_invalidating_env_vars().items())),
    }


def install(
    folder: Annotated[Path, tyro.conf.Positional], into: Annotated[Path, tyro.conf.Positional]
) -> None:
    """Copy a cache to where it will be read and written. Exits 1 where it was compiled for another
    Triton, which will not find its kernels.

    Args:
        folder: as `fill` left it.
        into: becomes the value of TRITON_CACHE_DIR; must not exist.
    """
    if not (folder / BUILT).is_file():
        sys.exit(
            f"error: {folder} has no {BUILT}: `python -m benchmarks.triton_cache fill` leaves one"
        )
    shutil.copytree(folder, into)
    into = into.resolve()
    for index in into.glob("*/__grp__*"):
        names = json.loads(index.read_text(encoding="utf-8"))["child_paths"]
        here = {n: str(index.parent / n) for n in names if (index.parent / n).exists()}
        index.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
    told = json.loads((into / BUILT).read_text(encoding="utf-8"))
    here = {"sm": told["sm"], **build(told["sm"])}
    different = [f"{k}: {told[k]} there, {here[k]} here" for k in told if told[k] != here[k]]
    if different:
        sys.exit(f"error: {folder} was compiled for another Triton: {'; '.join(different)}")
    print(f"{len(kernels(into))} kernels, compiled for sm_{told['sm']} by Triton {told['Triton']}")


def kernels(folder: Path) -> set[str]:
    """Folders of compiled kernels."""
    return {file.parent.name for file in folder.glob("*/*.cubin")}


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"fill": fill, "install": install}, description=__doc__)
