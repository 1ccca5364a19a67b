"""Block sizes, one after another: what to write into sdpo_kernels/_impl/tuning.py.

    python -m benchmarks.tuning [--tokens 8192 --head qwen3-8b] [--out results.jsonl]

Row kernels by block and warps, the fused kernel by tiles, the whole reverse KL by the memory for
logits. Every variant's result is held against the first one's, and one that fails to compile, or
differs, is reported with its reason. TRITON_INTERPRET=1 runs it without a GPU, for its own sake.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import OnDevice, Spread, interleaved, machine, relative_error
from benchmarks.problems import head, problem
from benchmarks.report import first_line, grid, milliseconds
from sdpo_kernels import linear_reverse_kl
from sdpo_kernels._impl import fused_triton, rows_triton, tuning
from sdpo_kernels._impl.options import Spec

ROW_VARIANTS = ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (2048, 16), (4096, 8), (4096, 16))
ROW_VARIANTS += ((8192, 16),)
"""Logits and warps."""
LANE_VARIANTS = ((1024, 2, 8), (512, 4, 4), (1024, 4, 8), (2048, 2, 16), (1024, 1, 8), (256, 8, 2))
"""Lanes, rows of logits that each takes in at a time, and warps."""
FUSED_VARIANTS = tuple(
    tuning.FusedTiles(*tiles)
    for tiles in (
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 3),
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
        (64, 256, 64, 8, 4),
        (64, 128, 64, 4, 4),
        (128, 64, 64, 8, 4),
        (128, 128, 32, 8, 4),
        (128, 128, 128, 8, 2),
    )
)
SMALL_FUSED = (tuning.FusedTiles(16, 32, 16, 4, 1), tuning.FusedTiles(32, 32, 16, 4, 1))
"""For Triton's interpreter."""
CHUNKS_MIB = (320, 640, 1280, 2560, 5120)
TOLERANCE = 1e-3
SPEC = Spec("reverse_kl")


@dataclass(frozen=True, kw_only=True)
class Settings(OnDevice):
    """The problem that is tuned for."""

    head: str = "qwen3-8b"
    """A name in ``problems.HEADS``, or VxD."""
    tokens: int = 8192
    chunk: int = 2048
    """Tokens whose logits the row kernels read."""
    seconds: float = 0.5
    """Seconds of timing per variant."""


@dataclass(frozen=True)
class Variant:
    """One setting of one kernel: ``values`` of ``module``."""

    name: str
    module: Any
    values: dict[str, Any]
    check: Callable[[], Tensor]
    """What must not depend on the setting."""
    call: Callable[[], Any]
    """What is timed."""
    work: float
    """Flops or bytes of a call."""

    @contextmanager
    def use(self) -> Iterator[None]:
        names = vars(self.module)
        before = {name: names[name] for name in self.values}
        names.update(self.values)
        try:
            yield
        finally:
            names.update(before)


def run(settings: Settings) -> list[dict[str, Any]]:
    """Measure, print and write; the rows."""
    device = torch.device(settings.device)
    v, d = head(settings.head)
    about = machine(device)
    console = Console(width=150)
    rows = []
    for title, unit, variants in (
        ("reverse KL, whole", "Tflop/s", _chunk_variants(settings, v, d, device)),
        ("reverse KL and its gradient", "GB/s", _rows_variants(settings, v, device, "divergence")),
        ("statistics of a pair", "GB/s", _rows_variants(settings, v, device, "stats")),
        ("fused statistics", "Tflop/s", _fused_variants(settings, v, d, device)),
    ):
        found = _measure(list(variants), unit, device, settings.seconds)
        for row in found:
            row |= dict(benchmark="tuning", kind=title, head=settings.head, vocabulary=v, hidden=d)
            row |= dict(tokens=settings.tokens, machine=about)
        rows += found
        console.print(_table(title, unit, found))
        settings.keep(found)
    return rows


def _measure(
    variants: list[Variant], unit: str, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    rows, timed, expected = {}, {}, None
    for variant in variants:
        try:
            with variant.use():
                got = variant.check().double()
        except Exception as error:  # does not compile, or asks for too much shared memory
            note = first_line(error)
            rows[variant.name] = dict(contender=variant.name, verdict="failed", note=note)
            continue
        expected = got if expected is None else expected
        apart = relative_error(got, expected)
        verdict = "right" if apart <= TOLERANCE else "wrong"
        rows[variant.name] = dict(contender=variant.name, verdict=verdict, error={"result": apart})
        if verdict == "right":
            timed[variant.name] = variant

    def timer(variant: Variant) -> Callable:
        def call(_: Any) -> None:
            with variant.use():
                variant.call()

        return call

    found = interleaved({n: timer(v) for n, v in timed.items()}, device, seconds)
    for name, rounds in found.items():
        spread = Spread.of(map(sum, rounds))
        scale = 1e12 if unit == "Tflop/s" else 1e9
        rate = timed[name].work / spread.median / scale
        rows[name] |= dict(seconds={"call": asdict(spread)}, rate=rate, unit=unit)
    return list(rows.values())


def _rows_variants(
    settings: Settings, v: int, device: torch.device, which: str
) -> Iterator[Variant]:
    """The kernels that read a pair of rows of float32 logits."""
    c = settings.chunk
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(c, v, device=device, generator=generator) * 3
    u = z + 0.1 * torch.randn(c, v, device=device, generator=generator)
    targets = torch.randint(v, (c,), device=device, generator=generator)
    found = torch.empty(6, c, device=device)
    norm, gap = rows_triton.whole_stats(SPEC, z, u, targets, None, None, found)
    weights = torch.full((c,), 1 / c, device=device)
    grad = torch.empty(c, v, device=device, dtype=torch.bfloat16)

    def stats() -> Tensor:
        rows_triton.whole_stats(SPEC, z, u, targets, None, None, found)
        return found

    def divergence() -> Tensor:
        return rows_triton.divergence(SPEC, z, u, norm, gap, weights, grad)

    call = stats if which == "stats" else divergence
    word_bytes = 8 if which == "stats" else 10
    few = slice(None) if device.type == "cuda" else slice(2)
    if which == "stats":
        for lanes, rows, warps in LANE_VARIANTS[few]:
            values = {"LANES": lanes, "LANE_ROWS": rows, "LANE_WARPS": warps}
            name = f"{lanes} lanes, {rows} rows, {warps} warps"
            yield Variant(name, tuning, values, call, call, word_bytes * c * v)
        return
    for block, warps in ROW_VARIANTS[few]:
        values = {"ROW_BLOCK": block, "ROW_WARPS": warps}
        name = f"block {block}, {warps} warps"
        yield Variant(name, tuning, values, call, call, word_bytes * c * v)


def _fused_variants(settings: Settings, v: int, d: int, device: torch.device) -> Iterator[Variant]:
    x = problem(settings.chunk, v, d, 0.1, torch.bfloat16, device)
    hidden, weight = x.hidden.detach(), x.weight.detach()

    def call() -> Tensor:
        return fused_triton.stream_stats(SPEC, hidden, weight, None, x.targets)

    for tiles in FUSED_VARIANTS if device.type == "cuda" else SMALL_FUSED:
        values = {"fused_tiles": lambda *_, t=tiles: t}
        name = ", ".join(f"{field} {n}" for field, n in tiles._asdict().items())
        yield Variant(name, fused_triton, values, call, call, 2 * settings.chunk * v * d)


def _chunk_variants(settings: Settings, v: int, d: int, device: torch.device) -> Iterator[Variant]:
    n = settings.tokens
    x = problem(n, v, d, 0.1, torch.bfloat16, device)
    weights = torch.full((n,), 1 / n, device=device)

    def call() -> Tensor:
        x.forget()
        out = linear_reverse_kl(x.hidden, x.weight, x.teacher, token_weights=weights)
        assert out.loss is not None
        out.loss.backward()
        return out.value

    for mib in CHUNKS_MIB:
        values = {"CHUNK_BYTES": {device.type: mib * 2**20, "cpu": mib * 2**20}}
        yield Variant(f"{mib} MiB of logits", tuning, values, call, call, 8 * n * v * d)


def _table(title: str, unit: str, rows: list[dict[str, Any]]) -> Table:
    found = grid(title, "", "ms", unit)
    for row in sorted(rows, key=lambda r: -r.get("rate", 0)):
        cells = row["verdict"], row.get("note", "")
        if "rate" in row:
            cells = milliseconds(row["seconds"]["call"]), f"{row['rate']:,.1f}"
        found.add_row(row["contender"], *cells)
    return found


if __name__ == "__main__":
    run(tyro.cli(Settings, description=__doc__))
