"""Time, memory and accuracy of one call, on a GPU or a CPU: what all benchmarks share.

Times are compared within one run only: every round runs each function once, in an order that
rotates, after the cache has been overwritten, and functions that belong together are therefore
measured under the same conditions. Median and quartiles of the rounds are what is kept.
"""

import ctypes
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import Output

ROOT = Path(__file__).resolve().parents[1]
COLD_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}
"""Overwritten before each timed call: more than the last-level caches of both hold."""
VERSIONED = ("triton", "transformers", "liger-kernel", "trl", "fla-core", "cut-cross-entropy")
VERSIONED += ("quack-kernels", "nvidia-cutlass-dsl", "nemo-rl", "flash-attn")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class OnDevice(Output):
    """Where a benchmark runs."""

    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Spread:
    """Seconds of one thing over several rounds."""

    median: float
    low: float
    """The lower quartile."""
    high: float
    """The upper quartile."""
    rounds: int

    @classmethod
    def of(cls, rounds: Iterable[float]) -> "Spread":
        seconds = list(rounds)
        low, median, high = np.percentile(seconds, (25, 50, 75))
        return cls(float(median), float(low), float(high), len(seconds))


class Clock:
    """Marks within one call; by events on a GPU, which a call need not wait for."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between consecutive marks."""
        if not self.cuda:
            return list(np.diff(self.marks))
        self.marks[-1].synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


Timed = Callable[[Clock], Any]
"""A call that may mark moments between its begin and its end."""


def interleaved(
    functions: Mapping[str, Timed], device: torch.device, seconds: float, least: int = 5
) -> dict[str, list[list[float]]]:
    """Each function's intervals, round by round; one warm-up comes first.

    Args:
        seconds: of each function, at least ``least`` rounds and then as many as fit.
    """
    cold = torch.empty(COLD_BYTES[device.type], dtype=torch.uint8, device=device)
    names = list(functions)
    found = {name: [] for name in names}

    def once(name: str) -> list[float]:
        cold.fill_(1)
        if device.type == "cuda":  # time for the host to be ahead: launches are not what is timed
            torch.cuda._sleep(2_000_000)
        clock = Clock(device)
        clock.mark()
        functions[name](clock)
        clock.mark()
        return clock.intervals()

    for name in names:
        once(name)
    spent, rounds = 0.0, 0
    while names and (rounds < least or spent < seconds * len(names)):
        first = rounds % len(names)
        begin = time.perf_counter()
        for name in names[first:] + names[:first]:
            found[name].append(once(name))
        spent += time.perf_counter() - begin
        rounds += 1
    return found


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that was in use during a call beyond what was before it.

    On a GPU what torch's allocator handed out; on a CPU under Linux the process's resident pages;
    None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    return 1024 * int(re.findall(rf"{field}:\s+(\d+) kB", STATUS.read_text())[0])


def relative_error(x: Tensor, oracle: Tensor) -> float:
    """||x - oracle|| / ||oracle||; infinite where x is not finite."""
    if not torch.isfinite(x).all():
        return float("inf")
    return float((x.to(oracle.dtype) - oracle).norm() / oracle.norm())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flop/s of a large square matmul of random numbers, as measured now."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    found = interleaved({"mm": lambda _: a @ b}, device, seconds=0.5)["mm"]
    return 2 * n**3 / Spread.of(map(sum, found)).median


def machine(device: torch.device) -> dict[str, Any]:
    """Commit, device and versions, without which no number may be read.

    A tree without git tells its commit by the environment's SDPO_COMMIT; else it is empty.
    """
    gpu = device.type == "cuda"
    return {
        "commit": os.environ.get("SDPO_COMMIT") or _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if gpu else None,
        "versions": {"torch": str(torch.__version__)}
        | {name: v for name in VERSIONED if (v := _version(name))},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git(*arguments: str) -> str:
    try:
        out = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except OSError:  # no git
        return ""
    return out.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*:(.+)", text, re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()
