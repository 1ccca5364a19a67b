"""make test-real   (what assets.py builds, from PyPI and npm)"""

from pathlib import Path

import pytest

from real.assets import ROOT


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
def sharegpt() -> str:
    """Path of a published ShareGPT file, a JSON array that was cut in its 17,672nd element."""
    return part("sharegpt.json")


@pytest.fixture(scope="session")
def tokenizer_folder():
    """Name -> folder: qwen3, gemma3, llama3_1, deepseek_v3."""
    return lambda name: part(f"tokenizers/{name}")
