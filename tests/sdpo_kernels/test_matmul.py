"""The matmuls alone."""

import pytest
import torch

from helpers.oracle import rel_err
from sdpo_kernels._impl import matmul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("onednn", [False, True], ids=["by MKL", "by oneDNN"])
def test_float32_logits_are_exact_by_either_library(dtype, onednn, monkeypatch):
    """oneDNN is chosen by the CPU; here both are, whatever it is."""
    monkeypatch.setattr(matmul, "linear_by_onednn", lambda: onednn)
    hidden, weight = torch.randn(37, 65).to(dtype), torch.randn(301, 65).to(dtype)
    buffer = torch.full((37, 304), torch.nan)
    matmul.logits(hidden, weight, buffer[:, :301])
    truth = hidden.double() @ weight.double().T
    baseline = rel_err(hidden.float() @ weight.float().T, truth)
    assert rel_err(buffer[:, :301], truth) <= 2 * baseline
    assert rel_err((hidden.bfloat16() @ weight.bfloat16().T).float(), truth) > 100 * baseline
    assert buffer[:, 301:].isnan().all(), "what lies behind a row is left alone"


def test_the_switch_that_other_threads_would_see_is_not_touched(monkeypatch):
    seen = []
    monkeypatch.setattr(matmul, "linear_by_onednn", lambda: True)
    linear = torch.ops.mkldnn._linear_pointwise
    switch = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]

    def watched(*args):
        seen.append(switch.fp32_precision)
        return linear(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched)
    before = switch.fp32_precision
    matmul.logits(torch.randn(2, 8), torch.randn(500, 8), torch.empty(2, 500))
    assert len(seen) == 5 and set(seen) == {before}
