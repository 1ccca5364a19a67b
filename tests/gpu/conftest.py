"""CUDA_VISIBLE_DEVICES=0 python -m pytest -m gpu tests/gpu   (torch >= 2.11, triton >= 3.6)"""

import pytest
import torch


@pytest.fixture(autouse=True)
def on_gpu():
    """Skipped where there is no GPU; each test begins with empty caches."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_sync_debug_mode("default")
