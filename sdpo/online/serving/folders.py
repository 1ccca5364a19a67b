"""Weights on their way to servers: a folder for each version, written once and never changed."""

import contextlib
import shutil
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...errors import SdpoError

_TIED = "lm_head.weight"


class Versions:
    """The folders under ``root``, one for each label."""

    def __init__(self, root: Path):
        self.root = root.absolute()

    def of(self, label: str) -> Path:
        """Where the weights of that label are."""
        return self.root / label

    def keep(self, labels: Collection[str]) -> None:
        """Remove all others."""
        if self.root.is_dir():
            for folder in self.root.iterdir():
                if folder.name not in labels:
                    shutil.rmtree(folder)
            if not labels:
                with contextlib.suppress(OSError):
                    self.root.rmdir()


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors in a folder's safetensors.

    Raises:
        SdpoError: there are none, or a file is not whole.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise SdpoError(f"{path}: not a whole safetensors file ({error})") from None
    if not found:
        raise SdpoError(f"{folder}: no *.safetensors")
    return found


def check_weights(folder: Path, base: Path) -> None:
    """Refuse weights that a server would take in part or not survive: vLLM loads a folder with a
    missing tensor without a word and keeps the old one, and dies of a wrong shape.

    Args:
        base: the folder of the model that the server has.

    Raises:
        SdpoError: a file is not whole, or a tensor is missing, unknown or of another shape.
    """
    here, there = tensors(folder), tensors(base)
    for name in sorted((here.keys() ^ there.keys()) - {_TIED}):
        what = "is missing" if name in there else f"is not in {base}"
        raise SdpoError(f"{folder}: {name} {what}: the server would not have loaded it")
    for name, shape in there.items():
        if here.get(name, shape) != shape:
            raise SdpoError(f"{folder}: {name} is {here[name]}, where {base} has {shape}")
