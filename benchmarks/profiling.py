"""Where the time of one reverse KL goes, kernel by kernel; `step --profile` has a whole step's.

    python -m benchmarks.profiling [--head qwen3-8b --tokens 8192] [--out results.jsonl]

By torch's profiler: calls, device time and its share. On a CPU operators stand where kernels would.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import OnDevice, machine
from benchmarks.peers import ours
from benchmarks.problems import head, problem
from benchmarks.report import grid
from sdpo_kernels import linear_logprob

LINES = 14
"""Kernels of a table; the rest of the time is one line."""


@dataclass(frozen=True, kw_only=True)
class Settings(OnDevice):
    """The problem to profile."""

    head: str = "qwen3-8b"
    """A name in ``problems.HEADS``, or VxD."""
    tokens: int = 8192
    dtype: str = "bfloat16"
    once: bool = False
    """Run each call once after its warm-up and measure nothing: for another profiler, as in
    `ncu python -m benchmarks.profiling --once`."""


def run(settings: Settings) -> list[dict[str, Any]]:
    """Measure, print and write; the rows."""
    device = torch.device(settings.device)
    v, d = head(settings.head)
    n = settings.tokens
    x = problem(n, v, d, 0.1, getattr(torch, settings.dtype), device)
    loss = ours("reverse_kl")

    def reverse_kl() -> None:
        x.forget()
        loss(x).backward()

    def score() -> None:
        with torch.no_grad():
            linear_logprob(x.hidden, x.weight, x.targets)

    console = Console(width=150)
    about = machine(device)
    rows = []
    for name, call in (("reverse KL, both ways", reverse_kl), ("log p(y), no gradient", score)):
        call()
        if settings.once:
            call()
            continue
        found = profiled(call, device)
        at = dict(benchmark="profile", kind=name, head=settings.head, tokens=n, vocabulary=v)
        at |= dict(hidden=d, dtype=settings.dtype, machine=about, verdict="right")
        rows += [at | row for row in found]
        console.print(kernel_table(name, found))
    settings.keep(rows)
    return rows


def profiled(call: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Self time of each kernel, or on a CPU of each operator; the longest first."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as p:
        call()
        if gpu:
            torch.cuda.synchronize()
    rows = []
    for event in p.key_averages():
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        if microseconds:
            kernel = dict(contender=event.key, calls=event.count)
            rows.append(kernel | dict(kernel_seconds=microseconds / 1e6))
    return sorted(rows, key=lambda r: -r["kernel_seconds"])


def kernel_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """The longest kernels, and the rest in a line."""
    total = sum(r["kernel_seconds"] for r in rows)
    found = grid(f"{name}: {1e3 * total:.2f} ms", "", "calls", "ms", "share, %")
    for row in rows[:LINES]:
        seconds = row["kernel_seconds"]
        cells = (str(row["calls"]), f"{1e3 * seconds:.3f}", f"{100 * seconds / total:.1f}")
        found.add_row(row["contender"][:90], *cells)
    rest = sum(r["kernel_seconds"] for r in rows[LINES:])
    found.add_row("all others", "", f"{1e3 * rest:.3f}", f"{100 * rest / total:.1f}")
    return found


if __name__ == "__main__":
    run(tyro.cli(Settings, description=__doc__))
