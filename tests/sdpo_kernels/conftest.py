"""Small blocks, so that small tests cross every loop's borders; bfloat16 as GPUs round it."""

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from sdpo_kernels._impl import matmul, rows_torch, tuning


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ROW_BLOCK", 128)
    monkeypatch.setattr(matmul, "HEAD_ROWS", 100)
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", 700)


@pytest.fixture(autouse=True)
def rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts the low half of a float32 off where hardware rounds to nearest."""
    cut_off = interpreter.InterpreterBuilder.create_fp_trunc

    def trunc(self, source, to):
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cut_off(self, source, to)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, to.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", trunc)
