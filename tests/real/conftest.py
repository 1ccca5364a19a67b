"""make test-real   (what assets.py builds, from PyPI, npm and apt)"""

import json
from pathlib import Path

import pytest

from real.assets import ROOT, browser
from sdpo.cli import main


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


def part(name: str) -> str:
    """The path of a real part; the test fails where it has not been built."""
    if not (ROOT / name).exists():
        pytest.fail(f"{ROOT / name} is missing: `make test-real` builds it, with the network")
    return str(ROOT / name)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct."""
    return part("smollm2")


@pytest.fixture(scope="session")
def vllm() -> str:
    """Path of the program."""
    return part("vllm/bin/vllm")


@pytest.fixture(scope="session")
def nltk_data() -> str:
    """Folder that NLTK_DATA is to name."""
    return part("nltk")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the program; the test fails where there is none."""
    found = browser()
    if found is None:
        pytest.fail("no chromium is on the PATH: `make test-real` installs it, as root")
    return found


@pytest.fixture(scope="session")
def sharegpt() -> str:
    """Path of a published ShareGPT file, a JSON array that was cut in its 17,672nd element."""
    return part("sharegpt.json")


@pytest.fixture(scope="session")
def tokenizer_folder():
    """Name -> folder: qwen3, gemma3, llama3_1, deepseek_v3."""
    return lambda name: part(f"tokenizers/{name}")


def prepared(sharegpt: str, folder: Path, preset: str, rows: int) -> str:
    """The first rows of the ShareGPT file, as `sdpo data prepare` makes them: a path."""
    with open(sharegpt, encoding="utf-8") as file:
        text, at, log = file.read(9_000_000), 1, []
    for _ in range(rows):
        at = text.index("{", at)
        conversation, at = json.JSONDecoder().raw_decode(text, at)
        log.append(json.dumps(conversation) + "\n")
    (folder / "log.jsonl").write_text("".join(log), encoding="utf-8")
    out = str(folder / "prepared.jsonl")
    main(["data", "prepare", str(folder / "log.jsonl"), "--out", out]
         + ["--preset", preset, "--workers", "1"])  # fmt: skip
    return out
