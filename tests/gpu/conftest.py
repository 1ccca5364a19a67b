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


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure is told at once: a run on a GPU may be cut short."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        said = str(crash.message if crash else report.longrepr).strip().splitlines() or [""]
        print(f"\nFAILED {report.nodeid}: {said[0][:300]}", flush=True)
