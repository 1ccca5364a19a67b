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
