"""What the device itself reaches: copies, and each matmul that a loss is made of, alone.

    python -m benchmarks.ceilings [--head qwen3-8b --tokens 8192 --chunk 2048] [--out results.jsonl]

A prediction of a kernel's time needs these rates; datasheets have others. Matmuls come with
half-precision and with float32 results, whole and as one chunk of tokens, and dW also added to a
float32 sum: what the chunk loop pays for its precision can be read off.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.measure import OnDevice, Spread, interleaved, machine
from benchmarks.problems import head
from benchmarks.report import grid, milliseconds


@dataclass(frozen=True, kw_only=True)
class Settings(OnDevice):
    """The shapes whose ceilings are measured."""

    head: str = "qwen3-8b"
    """A name in ``problems.HEADS``, or VxD."""
    tokens: int = 8192
    chunk: int = 2048
    """Tokens of a chunk; logits of a pair are twice as many rows."""
    dtype: str = "bfloat16"
    seconds: float = 0.3
    """Seconds of timing for each."""


Work = tuple[Callable[[], Any], float, str]
"""A call, its flops or bytes, and the unit of its rate."""


def run(settings: Settings) -> list[dict[str, Any]]:
    """Measure, print and write; the rows."""
    device = torch.device(settings.device)
    v, d = head(settings.head)
    work = _copies(v, d, device) | _matmuls(settings, v, d, device)
    calls = {name: lambda _, call=call: call() for name, (call, *_) in work.items()}
    found = interleaved(calls, device, settings.seconds)
    about = machine(device)
    at = dict(benchmark="ceilings", head=settings.head, tokens=settings.tokens, vocabulary=v)
    at |= dict(hidden=d, chunk=settings.chunk, dtype=settings.dtype, machine=about, verdict="right")
    rows = []
    table = grid(f"{about['device']}, {settings.head}, N={settings.tokens:,}", "", "ms", "rate", "")
    for name, rounds in found.items():
        spread = Spread.of(map(sum, rounds))
        _, amount, unit = work[name]
        rate = amount / spread.median / (1e12 if unit == "Tflop/s" else 1e9)
        seconds = {"call": asdict(spread)}
        rows.append(at | dict(contender=name, seconds=seconds, rate=rate, unit=unit))
        table.add_row(name, milliseconds(seconds["call"]), f"{rate:,.0f}", unit)
    Console(width=150).print(table)
    settings.keep(rows)
    return rows


def _copies(v: int, d: int, device: torch.device) -> dict[str, Work]:
    """Copying, zeroing and rounding a float32 matrix of the lm_head's shape."""
    x, y = (torch.randn(v, d, device=device) for _ in range(2))
    half = torch.empty(v, d, device=device, dtype=torch.bfloat16)
    n = x.numel()
    return {
        "copy, float32 (V, D)": (lambda: y.copy_(x), 8 * n, "GB/s"),
        "zero, float32 (V, D)": (lambda: y.zero_(), 4 * n, "GB/s"),
        "scale and round, float32 (V, D)": (lambda: torch.mul(x, 0.5, out=half), 6 * n, "GB/s"),
    }


def _matmuls(settings: Settings, v: int, d: int, device: torch.device) -> dict[str, Work]:
    dtype, n, c = getattr(torch, settings.dtype), settings.tokens, settings.chunk
    weight = (torch.randn(v, d, device=device) * 3 / d**0.5).to(dtype)
    hidden = torch.randn(n, d, device=device).to(dtype)
    both = torch.randn(2 * c, d, device=device).to(dtype)
    grad = torch.randn(n, v, device=device, dtype=dtype) / v
    dweight = torch.zeros(v, d, device=device)
    gpu = device.type == "cuda"
    wide = dict(out_dtype=torch.float32) if gpu and dtype != torch.float32 else {}
    out = dict(dtype=torch.float32 if wide else dtype, device=device)
    logits_half, logits = (
        torch.empty(2 * c, v, dtype=dtype, device=device),
        torch.empty(2 * c, v, **out),
    )
    dh_half, dh = torch.empty(n, d, dtype=dtype, device=device), torch.empty(n, d, **out)
    dw_half, dw = torch.empty(v, d, dtype=dtype, device=device), torch.empty(v, d, **out)
    g, h = grad[:c], hidden[:c]
    side = 8192 if gpu else 256
    square = torch.randn(side, side, device=device).to(dtype)

    def add() -> None:
        if wide:
            torch.addmm(dweight, g.T, h, out=dweight, **wide)
        else:  # a CPU adds nothing but operands of the sum's dtype
            dweight.addmm_(g.T.float(), h.float())

    pair, chunk, whole = 4.0 * c * v * d, 2.0 * c * v * d, 2.0 * n * v * d
    calls: dict[str, tuple[Callable[[], Any], float]] = {
        "square matmul": (lambda: square @ square, 2.0 * side**3),
        "logits of a pair, half": (lambda: torch.mm(both, weight.T, out=logits_half), pair),
        "logits of a pair, float32": (lambda: torch.mm(both, weight.T, out=logits, **wide), pair),
        "dH of a chunk, half": (lambda: torch.mm(g, weight, out=dh_half[:c]), chunk),
        "dH of a chunk, float32": (lambda: torch.mm(g, weight, out=dh[:c], **wide), chunk),
        "dH whole, half": (lambda: torch.mm(grad, weight, out=dh_half), whole),
        "dH whole, float32": (lambda: torch.mm(grad, weight, out=dh, **wide), whole),
        "dW of a chunk, half": (lambda: torch.mm(g.T, h, out=dw_half), chunk),
        "dW of a chunk, float32": (lambda: torch.mm(g.T, h, out=dw, **wide), chunk),
        "dW of a chunk, added in float32": (add, chunk),
        "dW whole, half": (lambda: torch.mm(grad.T, hidden, out=dw_half), whole),
        "dW whole, float32": (lambda: torch.mm(grad.T, hidden, out=dw, **wide), whole),
    }
    return {name: (call, flops, "Tflop/s") for name, (call, flops) in calls.items()}


if __name__ == "__main__":
    run(tyro.cli(Settings, description=__doc__))
