"""Small blocks, so that small tests cross every loop's borders; a mended interpreter."""

import pytest

from helpers import interpreter
from sdpo_kernels._impl import matmul, rows_torch, tuning

interpreter.mend()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ROW_BLOCK", 128)
    monkeypatch.setattr(matmul, "HEAD_ROWS", 100)
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", 700)


@pytest.fixture(params=[0, 2**40], ids=["not kept", "kept"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default memory for the gradients with respect to logits: none, or enough for any test."""
    monkeypatch.setitem(tuning.GRAD_BYTES, "cpu", request.param)
