"""Fixtures shared by all tests. Seeds come from a test's id, so that order never matters."""

import importlib.util
import os
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the same numbers on every machine; CUDA_VISIBLE_DEVICES=0 pytest -m gpu runs what needs a GPU
if not os.environ.setdefault("CUDA_VISIBLE_DEVICES", ""):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
import torch

# the kernels' tests run where torch is all there is
if importlib.util.find_spec("transformers"):
    from helpers import tiny
if importlib.util.find_spec("torchtitan"):
    from sdpo_parallel.torchtitan import cpu

    cpu.prepare()  # whichever test imports torchtitan first

# a busy machine is no failure
hypothesis.settings.register_profile("sdpo", deadline=None, print_blob=True)
hypothesis.settings.load_profile("sdpo")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", metavar="K/N", help="every N-th test, from the K-th")


@pytest.hookimpl(trylast=True)  # after marks have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    k, n = map(int, config.getoption("part").split("/"))
    if not 1 <= k <= n:
        raise pytest.UsageError(f"--part {k}/{n}: the first number must be from 1 to the second")
    config.hook.pytest_deselected(items=[i for at, i in enumerate(items) if at % n != k - 1])
    items[:] = items[k - 1 :: n]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own, already set."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory):
    """kind -> folder of a tiny model, made once."""
    made: dict[tuple, str] = {}

    def get(kind: str, **options) -> str:
        key = (kind, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / kind
            made[key] = tiny.make_model(Path(folder), kind, **options)
        return made[key]

    return get
