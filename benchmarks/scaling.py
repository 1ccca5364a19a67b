"""Step time, memory and traffic of 8 to 1024 GPUs, predicted; how far the prediction is checked.

    python -m benchmarks.scaling [--model qwen3-8b] [--results benchmarks/results] [--all-layouts]
    python -m benchmarks.prefixes MODEL INTERACTIONS --count-only --out shared.jsonl
    python -m benchmarks.scaling --results shared.jsonl --unit conversation

Three tables, from what was measured most directly to what was not measured at all:

    bytes       that one rank sends in a step, by this model and as gloo ranks count them here
    cost        of the objective over N, V, D, and of an all-gather over bytes: fitted, with errors
    prediction  from those bytes, a GPU's datasheet and stated links; its assumptions come with it

Not modelled: the gradient norm's and the metrics' few numbers, FSDP2's padding of uneven shards,
checkpoints, reading data, ranks that wait for longer interactions, AdamW's own time.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.counting import JOBS, Compared, compare, count
from benchmarks.fits import TERMS, Fit, fit, fit_objective, measure_objective, measured_points
from benchmarks.measure import machine
from benchmarks.models import QWEN3
from benchmarks.prediction import GIB, GPU, GPUS, Links, Prediction, layouts, predict
from benchmarks.report import Output, Row, grid, read
from benchmarks.slots import UnitName
from benchmarks.traffic import Interactions, shape_of
from sdpo_parallel.memory import USABLE, ModelShape

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Settings(Output):
    """Model, GPUs and measurements of the prediction."""

    model: str = "qwen3-8b"
    """A name in ``models.QWEN3``, or a folder with a config.json."""
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    interactions: Interactions = field(default_factory=Interactions)
    links: Links = field(default_factory=Links)
    activation_checkpoint: Literal["none", "selective", "full"] = "selective"
    results: Path | None = None
    """A file or folder of JSON lines, of the benchmarks step, divergence and prefixes."""
    unit: UnitName = "interaction"
    """What a step draws, where ``results`` have counts of shared prefixes. They are used unless
    ``interactions`` says how much is read."""
    count: bool = True
    """Count bytes on gloo ranks here: one to four minutes."""
    seconds: float = 10.0
    """Seconds of timing the objective here, if there are no results."""
    all_layouts: bool = False
    """Print every layout that fits, not the fastest alone."""

    def __post_init__(self):
        if not self.gpus or any(n < 1 for n in self.gpus):
            raise ValueError(f"gpus must name at least one positive number, got {self.gpus}")


def chosen_gpu(name: str, rows: Sequence[Row]) -> GPU:
    """With the efficiency that ``step`` measured on a GPU, and the objective's fitted time, where
    ``rows`` have them."""
    gpu, found = GPUS[name], defaultdict(list)
    for r in rows:
        if r.get("benchmark") != "step" or r.get("verdict") != "right" or "seconds" not in r:
            continue
        device = r["machine"]["device"]
        known = next((g for g in GPUS.values() if g.name in device), None)
        if r["contender"].startswith("sdpo") and r["machine"]["cuda"] is not None and known:
            found[device].append(r["flops"] / r["seconds"]["step"]["median"] / known.peak)
    if found:  # the same kind, else whichever was measured
        device = next((d for d in found if gpu.name in d), next(iter(found)))
        values = found[device]
        source = f"efficiency {median(values):.2f} is the median of {len(values)} steps measured "
        source += f"on one {device} ({min(values):.2f} to {max(values):.2f}), by benchmarks.step"
        if gpu.name not in device:
            source += f"; that a {gpu.name} reaches it, too, is an assumption"
        gpu = replace(gpu, efficiency=median(values), source=source)
    for where, points in measured_points(rows, gpu=True).items():
        if gpu.name in where and "bfloat16" in where:
            gpu = replace(gpu, head=fit_objective(points, where))
    return gpu


def chosen_interactions(settings: Settings, rows: Sequence[Row]) -> tuple[Interactions, str]:
    """With the shares of both passes that are read, and where they come from: from the settings,
    else by the newest count in ``rows``; else everything is read."""
    given = settings.interactions
    if given.policy_read < 1 or given.hindsight_read < 1:
        return given, "as given"
    counts = [r for r in rows if r.get("benchmark") == "prefixes" and r.get("kind") == "count"]
    for row in reversed(counts):
        if (row["sharing"], row["unit"]) == ("keys", settings.unit):
            policy, hindsight = (row["read"][name] for name in ("policy", "hindsight"))
            source = f"as counted by benchmarks.prefixes in {row['interactions']:,} "
            source += f"interactions of {row['data']}, drawn by {settings.unit}"
            return replace(given, policy_read=policy, hindsight_read=hindsight), source
    return given, ""


def assumptions(settings: Settings, gpu: GPU, source: str = "") -> list[str]:
    """All that the prediction rests on; ``source``: of the shares that are read."""
    e, k = settings.interactions, settings.links
    shared = "no prefix is shared: there are no counts of benchmarks.prefixes"
    if source:
        shared = f"{e.policy_read:.0%} of the policy's and {e.hindsight_read:.0%} of hindsight's "
        shared += f"tokens are read, {source}; under context parallelism all are"
    head = "the objective runs at the layers' efficiency: there are no bfloat16 rows of "
    head += f"benchmarks.divergence from a {gpu.name}"
    if gpu.head is not None:
        head = f"the objective takes the time that was fitted on {gpu.head.source}"
    each = "for every 8 GPUs" if e.scaling == "weak" else "whatever the GPUs"
    return [
        gpu.source,
        head,
        f"{gpu.name}, by its datasheet: {gpu.peak / 1e12:,.0f} Tflop/s in bfloat16, "
        f"{gpu.memory_gib:g} GiB; tensors fill at most {USABLE:.0%}, by sdpo_parallel.memory",
        "model flops as benchmarks.step counts them; what activation checkpointing "
        f"({settings.activation_checkpoint}) computes again is part of the efficiency, and that "
        "is the same for every layout and number of GPUs",
        f"nodes of {k.node}; NVLink {k.nvlink / GB:g} and InfiniBand {k.infiniband / GB:g} GB/s "
        f"per GPU and direction, {k.achieved:.0%} achieved; latency {k.launch * 1e6:g} us a "
        f"collective, {k.nvlink_hop * 1e6:g} and {k.infiniband_hop * 1e6:g} us a step of its ring",
        "a group with g GPUs in a node sends 1/g of its bytes over InfiniBand; groups do not "
        "share links",
        "FSDP2's gathers and reductions overlap wholly with compute: a step is max(compute, "
        "FSDP) + the exchanges of tensor and context ranks, of which nothing overlaps",
        f"{e.scaling} scaling: {e.per_8_gpus} interactions a step {each}, all of {e.prompt} + "
        f"{e.response} tokens with hindsight {e.hindsight} + {e.response}; no padding, and no "
        "rank waits for longer ones",
        shared,
        "reverse KL, live teacher, no adapters; AdamW and metrics take no time of their own",
    ]


def table_of_bytes(jobs: Mapping[str, Sequence[Compared]]) -> Table:
    """Predicted next to counted."""
    title = "bytes that one rank sends in a step: predicted, and counted on gloo ranks (tiny Qwen3)"
    columns = "layout", "ranks of", "operator", "what"
    numbers = "predicted, B", "counted, B", "ratio", "collectives, both"
    table = grid(title, *columns, *numbers, left=len(columns))
    for job, compared in jobs.items():
        for c in compared:
            first = job if c is compared[0] else ""
            ratio = "" if not c.predicted else f"{c.ratio:.3f}"
            calls = f"{c.collectives[0]:g} / {c.collectives[1]:g}"
            sizes = f"{c.predicted:,.0f}", f"{c.counted:,.0f}"
            table.add_row(first, c.axis, c.operator, c.what, *sizes, ratio, calls)
        table.add_section()
    return table


def table_of_fit(found: Fit, points: Sequence[tuple[Sequence[int], float]]) -> Table:
    """Each shape's time and the fit's."""
    title = f"the objective (reverse KL, forward and backward), measured on {found.source}"
    table = grid(title, "N", "V", "D", "measured, ms", "fitted, ms", "error", left=0)
    for (shape, seconds), error in zip(points, found.errors, strict=True):
        times = f"{1e3 * seconds:.2f}", f"{1e3 * seconds * (1 + error):.2f}", f"{error:+.1%}"
        table.add_row(*(f"{x:,}" for x in shape), *times)
    return table


def rates(found: Fit) -> list[str]:
    """The objective's coefficients for people, and the fit's errors."""
    a, b, c, d = found.coefficients
    told = (
        f"{8e-9 / a:,.1f} Gflop/s (8 flops each, in four matmuls)" if a else "",
        f"{1e9 * b:,.2f} ns for each logit of both streams" if b else "",
        f"{4e-9 / c:,.2f} GB/s, at the 4 bytes of its float32 gradient" if c else "",
        f"{d * 1e6:,.0f} us a call" if d else "",
    )
    lines = [
        f"  {t}: {x or '0, as it would be negative'}" for t, x in zip(TERMS, told, strict=True)
    ]
    return [*lines, f"  error of a shape: median {found.typical:.1%}, worst {found.worst:.1%}"]


def table_of_gathers(fits: Mapping[int, Fit]) -> Table:
    """Latency and bandwidth of gloo by number of ranks."""
    columns = "ranks", "latency, us", "GB/s sent by a rank", "error: median", "worst"
    table = grid(
        "an all-gather over gloo ranks on this machine (no cluster's link)", *columns, left=0
    )
    for ranks, f in fits.items():
        latency, each = f.coefficients
        speed = f"{1e-9 / each:.2f}" if each else ""
        errors = f"{f.typical:.0%}", f"{f.worst:.0%}"
        table.add_row(str(ranks), f"{latency * 1e6:,.0f}", speed, *errors)
    return table


def table_of_predictions(found: Sequence[Prediction], title: str, base: float) -> Table:
    """``base``: tokens/s per GPU that efficiency refers to."""
    columns = "GPUs", "layout", "step, s", "compute", "FSDP", "exposed", "tokens/s/GPU"
    columns += "efficiency", "without overlap", "memory, GiB", "NVLink, GB", "InfiniBand, GB"
    table = grid(title, *columns, left=0)
    table.columns[1].justify = "left"
    before = None
    for p in found:
        if before not in (None, p.ranks) and len(found) > len({x.ranks for x in found}):
            table.add_section()
        seconds = (f"{x:.3g}" for x in (p.seconds, p.compute, p.overlapped, p.exposed))
        sizes = (f"{p.nvlink / GB:,.1f}", f"{p.infiniband / GB:,.1f}")
        share = p.tokens_per_second / base
        shares = f"{share:.0%}", f"{share * p.seconds / p.apart:.0%}"
        first = "" if p.ranks == before else str(p.ranks)
        rate, memory = f"{p.tokens_per_second:,.0f}", f"{p.memory / GIB:.1f}"
        table.add_row(first, p.layout, *seconds, rate, *shares, memory, *sizes)
        before = p.ranks
    return table


def predictions(settings: Settings, gpu: GPU) -> dict[int, list[Prediction]]:
    """GPUs -> layouts that fit, the fastest first."""
    shape = QWEN3.get(settings.model)
    model = ModelShape.from_config(settings.model) if shape is None else shape_of(shape)
    found: dict[int, list[Prediction]] = {}
    for ranks in sorted(settings.gpus):
        found[ranks] = []
        for layout in layouts(ranks, settings.activation_checkpoint):
            try:
                p = predict(model, settings.interactions, layout, ranks, gpu, settings.links)
            except ValueError:  # the degree does not divide the model's sizes
                continue
            if p.memory <= USABLE * gpu.memory_gib * GIB:
                found[ranks].append(p)
        found[ranks].sort(key=lambda p: (p.seconds, p.apart))
    return found


def run(settings: Settings) -> list[dict[str, Any]]:
    """Count, fit, predict, print and write; the rows."""
    console = Console(width=185)
    rows = read(settings.results) if settings.results else []
    about = machine(torch.device("cpu"))
    each, source = chosen_interactions(settings, rows)
    known = replace(settings, interactions=each)
    new = [
        *(_show_counts(console) if settings.count else []),
        *_show_fit(console, settings, rows),
        *_show_predictions(console, known, chosen_gpu(settings.gpu, rows), source),
    ]
    found = [dict(benchmark="scaling", machine=about) | row for row in new]
    settings.keep(found)
    return found


def _show_counts(console: Console) -> list[dict[str, Any]]:
    jobs, gathers = {}, {}
    for name, job in JOBS.items():
        counted = count(job)
        jobs[name] = compare(job.predicted(), counted)
        gathers.setdefault(job.ranks, counted.gathers)
    fits = {
        ranks: fit([((1.0, sent), t) for sent, t in points], f"gloo, {ranks} ranks")
        for ranks, points in gathers.items()
    }
    console.print(table_of_bytes(jobs))
    console.print("not modelled and not counted: the gradient norm's and metrics' few numbers\n")
    console.print(table_of_gathers(fits))
    rows = [
        dict(kind="bytes", verdict="counted", layout=name, ratio=c.ratio) | c._asdict()
        for name, compared in jobs.items()
        for c in compared
    ]
    return rows + [
        dict(kind="all-gather", verdict="fitted", ranks=n) | asdict(f) for n, f in fits.items()
    ]


def _show_fit(console: Console, settings: Settings, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The objective's fits, one per device and dtype; without results, one of this CPU."""
    points = measured_points(rows, gpu=True) | measured_points(rows, gpu=False)
    if not points:
        about = machine(torch.device("cpu"))
        here = f"{about['device']}, {about['threads']} threads, float32"
        points = {here: measure_objective(settings.seconds)}
    found = []
    for where, p in points.items():
        f = fit_objective(p, where)
        console.print(table_of_fit(f, p), *rates(f), sep="\n")
        found.append(dict(kind="objective", verdict="fitted", terms=TERMS) | asdict(f))
    return found


def _show_predictions(
    console: Console, settings: Settings, gpu: GPU, source: str
) -> list[dict[str, Any]]:
    found = predictions(settings, gpu)
    shown = None if settings.all_layouts else 1
    some = [p for fitting in found.values() for p in fitting[:shown]]
    which = "every layout that fits" if settings.all_layouts else "the fastest layout that fits"
    title = f"PREDICTED, not measured: {settings.model} on {gpu.name}, {which}"
    stated = assumptions(settings, gpu, source)
    if some:
        console.print(table_of_predictions(some, title, some[0].tokens_per_second))
        console.print(
            f"efficiency: tokens/s per GPU over the fastest layout's on {some[0].ranks} GPUs, as "
            "if all of FSDP's traffic overlapped with compute, and as if none did"
        )
    for ranks, fitting in found.items():
        if not fitting:
            console.print(
                f"{ranks} GPUs: no layout fits {gpu.memory_gib:g} GiB; activation_checkpoint full?"
            )
    lines = "\n".join(["the prediction assumes:", *(f"  - {line}" for line in stated)])
    console.print(lines, soft_wrap=True)
    return [
        dict(kind="prediction", verdict="predicted", model=settings.model, gpu=gpu.name)
        | dict(layout=p.layout, best=p is found[p.ranks][0], assumptions=stated)
        | asdict(p)
        for fitting in found.values()
        for p in fitting
    ]


if __name__ == "__main__":
    run(tyro.cli(Settings, description=__doc__))
