"""How far from the four bare matmuls a GPU would be, from what the rehearsal records.

    python -m benchmarks.roofline [--upstream any] [--out results.jsonl]

Each matmul, kernel and small launch of a reverse KL takes its flops or its bytes at the rates
below, whichever is slower, and our kernels the issue of their machine instructions, as compiled.
All of it is added up. The two ratios are bounds: in one a matmul's traffic beyond a half-precision
result hides behind its flops, in the other none of it does. To model another version of the
kernels, put its folder first: ``PYTHONPATH=OTHER/kernels:. python -m benchmarks.roofline``.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from benchmarks.operator_stream import Collective, Event, Kernel, Matmul
from benchmarks.report import Output, grid, read

if TYPE_CHECKING:
    from benchmarks.rehearsal import Report

SHAPES = (
    (8192, 151_936, 4096),
    (4096, 151_936, 4096),
    (1024, 151_936, 4096),
    (8192, 128_256, 2048),
)
RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "h100" / "divergence.jsonl", RESULTS / "h200" / "after.jsonl"
LANES = 128
"""Threads of which a multiprocessor issues an instruction per cycle."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a GPU reaches."""

    name: str
    flops: float
    """Flop/s of large matmuls in bfloat16."""
    bandwidth: float
    """Bytes/s of copies."""
    clock: float = 1.755e9
    multiprocessors: int = 132
    issue: float = 0.7
    """Share of issue slots that an instruction-bound kernel fills."""
    launch: float = 2e-6
    """Seconds from a kernel's end to the next one's begin."""


CARDS = (
    Card(name="H100", flops=680e12, bandwidth=3.0e12),
    Card(name="H200", flops=790e12, bandwidth=4.3e12),
)


def seconds(events: Iterable[Event], card: Card, hidden: bool) -> dict[str, float]:
    """By kind of work.

    Args:
        hidden: the traffic of matmuls' results beyond one half-precision write hides.
    """
    spent: dict[str, float] = defaultdict(float)
    rate = card.clock * card.multiprocessors * LANES * card.issue
    for e in events:
        if isinstance(e, Collective):
            continue
        spent["launches"] += card.launch
        memory = e.bytes / card.bandwidth
        if isinstance(e, Matmul):
            narrow = (e.bytes - e.beyond_half) / card.bandwidth
            spent["matmuls"] += max(e.flops / card.flops, narrow)
            if not hidden:
                spent["results of matmuls"] += e.beyond_half / card.bandwidth
        elif isinstance(e, Kernel):
            spent[e.name] += max(memory, e.instructions / rate)
        else:
            spent["small operators"] += memory
    return dict(spent)


def floor(shape: tuple[int, int, int], card: Card) -> float:
    """Seconds of both logits, dH and dW as bare half-precision matmuls."""
    n, v, d = shape
    each = 2.0 * n * v * d / card.flops
    moved = 2.0 * (n * v + v * d + n * d) / card.bandwidth
    return 4 * max(each, moved)


def predictions(report: "Report") -> list[dict[str, Any]]:
    """A row per card."""
    n, v, d = report.case.shape
    rows = []
    for card in CARDS:
        least = floor(report.case.shape, card)
        parts = seconds(report.events, card, hidden=False)
        rows.append(
            dict(
                benchmark="roofline",
                contender="sdpo",
                verdict="predicted",
                kind="reverse_kl",
                card=asdict(card),
                tokens=n,
                vocabulary=v,
                hidden=d,
                upstream=report.case.upstream,
                floor_seconds=least,
                parts=parts,
                over_floor={
                    "hidden": sum(seconds(report.events, card, hidden=True).values()) / least,
                    "exposed": sum(parts.values()) / least,
                },
                gemms=len(report.of(Matmul)),
                matmuls=report.matmuls(),
                launches=len([e for e in report.events if not isinstance(e, Collective)]),
                peak_bytes=report.peak_bytes,
                per_pair=per_pair(report),
                problems=report.problems,
            )
        )
    return rows


def per_pair(report: "Report") -> dict[str, float]:
    """Machine instructions per pair of logits, by kernel."""
    n, v, _ = report.case.shape
    found: dict[str, float] = defaultdict(float)
    for e in report.of(Kernel):
        found[e.name] += e.instructions / (n * v)
    return dict(found)


@dataclass(frozen=True, kw_only=True)
class Settings(Output):
    """What is predicted."""

    upstream: str = "weights"
    """weights: known in the call; any: a gradient per token."""
    measured: tuple[Path, ...] = MEASURED
    """Results of benchmarks.divergence, which are shown beside the predictions for their card."""


def run(settings: Settings) -> list[dict[str, Any]]:
    """Rehearse, predict, print and write; the rows."""
    from benchmarks.rehearsal import Case, Stage, rehearse  # which hides the process's GPUs

    stage = Stage()
    stage.gpu.disassemble = True
    rows = []
    for shape in SHAPES:
        rows += predictions(rehearse(Case(shape=shape, upstream=settings.upstream), stage))
    found = [row for path in settings.measured for row in read(path)]
    columns = (
        "floor, ms",
        "all hidden",
        "none hidden",
        "measured",
        "matmuls",
        "launches",
        "peak, MB",
    )
    table = grid(
        "PREDICTED: reverse KL, bfloat16, multiples of the floor", "N, V, D", "", *columns, left=2
    )
    for r in rows:
        r["measured"] = measured(found, r)
        table.add_row(
            f"{r['tokens']}, {r['vocabulary']:,}, {r['hidden']}",
            r["card"]["name"],
            f"{1e3 * r['floor_seconds']:.2f}",
            *(f"{r['over_floor'][bound]:.3f}" for bound in ("hidden", "exposed")),
            "" if r["measured"] is None else f"{r['measured']:.3f}",
            f"{r['matmuls']:.3g}",
            str(r["launches"]),
            f"{r['peak_bytes'] / 1e6:,.0f}",
        )
    console = Console(width=150)
    console.print(table)
    for line in assumptions(rows):
        console.print(f"  - {line}", markup=False, highlight=False)
    settings.keep(rows)
    return rows


def measured(found: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """The ratio that a run on this card found for a shape."""
    name = "sdpo" if row["upstream"] == "weights" else "sdpo, any upstream"
    shape = [row[k] for k in ("tokens", "vocabulary", "hidden")]
    for r in found:
        if (r.get("kind"), r.get("contender"), r.get("dtype")) != ("reverse_kl", name, "bfloat16"):
            continue
        if [r.get(k) for k in ("tokens", "vocabulary", "hidden")] == shape and (
            row["card"]["name"] in r["machine"]["device"]
        ):
            return r.get("over_floor")
    return None


def assumptions(rows: list[dict[str, Any]]) -> list[str]:
    """What the table rests on."""
    cards = {
        r["card"]["name"]: f"{r['card']['flops'] / 1e12:.0f} Tflop/s and "
        f"{r['card']['bandwidth'] / 1e12:.1f} TB/s"
        for r in rows
    }
    card = CARDS[0]
    lines = [f"{name}: matmuls and copies reach {rates}" for name, rates in cards.items()]
    lines += [
        f"{card.clock / 1e9} GHz, {card.multiprocessors} multiprocessors, {LANES} threads of which "
        f"issue an instruction per cycle, at {card.issue:.0%} where that is the limit",
        f"{1e6 * card.launch:.0f} us between any two launches; nothing overlaps",
        "machine instructions per pair of logits, for sm_90: "
        + ", ".join(f"{k} {x:.1f}" for k, x in rows[0]["per_pair"].items()),
        "the floor's matmuls write half precision; every row of a result is of whole tiles",
    ]
    first = rows[0]
    lines.append(
        f"{first['card']['name']}, first shape, none hidden, ms: "
        + ", ".join(f"{k} {1e3 * x:.2f}" for k, x in sorted(first["parts"].items()))
    )
    return lines


if __name__ == "__main__":
    run(tyro.cli(Settings, description=__doc__))
