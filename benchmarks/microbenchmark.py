"""What ``divergence`` and ``logprob`` share: contenders by turns, on one problem after another.

Forward is the loss without gradient; backward is ``loss.backward()`` alone, of a call that also ran
the forward; both is that call. Who forms gradients while the logits are there spends the time in
the forward. Every result carries its error against float64, and one that is further off than
``LIMIT`` is wrong: its time is kept in the JSON lines, and is nobody's speed.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.measure import (
    Clock,
    Spread,
    Timed,
    interleaved,
    machine,
    peak_bytes,
    relative_error,
)
from benchmarks.peers import Contender, Loss, chosen, floor
from benchmarks.problems import Kind, Problem, Truth, head, problem, truth
from benchmarks.report import append, excuses, first_line, plot, table

LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative error of the loss, dH or dW beyond which an answer is wrong. Rounding every logit's
gradient to bfloat16 costs about 0.3 %, rounding the logits themselves far more."""
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Problems, device and duration of the comparison."""

    heads: tuple[str, ...] = ()
    """Names in ``problems.HEADS``, or VxD. Default: by device."""
    tokens: tuple[int, ...] = ()
    """Tokens per problem, N. Default: by device."""
    dtype: tuple[str, ...] = ("bfloat16", "float32")
    """Dtypes of hidden states and lm_head."""
    distance: float = 0.1
    """Standard deviation of the difference between the two passes' logits."""
    distances: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 3.0)
    """Further standard deviations at which errors are measured, at the first shape."""
    seconds: float = 3.0
    """Seconds of timing per contender, shape and pass."""
    only: tuple[str, ...] = ()
    """Contenders of these names, or whose names contain one of these. Default: all."""
    out: Path | None = None
    """JSON lines are appended to this file."""
    plots: Path | None = None
    """Folder for plots."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")

    def shapes(self) -> list[tuple[str, int, int, int]]:
        """(head, N, V, D)."""
        gpu = torch.device(self.device).type == "cuda"
        heads = self.heads or (("qwen3-8b", "llama-3.2-1b") if gpu else ("32000x512",))
        tokens = self.tokens or ((1024, 4096, 8192) if gpu else (512, 2048))
        return [(name, n, *head(name)) for name in heads for n in tokens]


def run(benchmark: str, kinds: Sequence[Kind], settings: Settings) -> list[dict[str, Any]]:
    """Measure, print, write and plot; the rows."""
    console = Console(width=150)
    device = torch.device(settings.device)
    about = machine(device)
    console.print(_title(about))
    rows = []

    def keep(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        if settings.out is not None:
            append(settings.out, new)

    for dtype in settings.dtype:
        for kind in kinds:
            for name, *shape in settings.shapes():
                at = dict(benchmark=benchmark, kind=kind, head=name, dtype=dtype, machine=about)
                found = _compare(kind, tuple(shape), getattr(torch, dtype), device, settings)
                keep([at | row for row in found])
                console.print(table(rows[-len(found) :]), *excuses(found), sep="\n")
            if kind != "logprob" and settings.distances:
                keep(_distances(at, kind, getattr(torch, dtype), device, settings))
    if settings.plots is not None:
        for path in plot(rows, settings.plots):
            console.print(f"wrote {path}")
    return rows


def _title(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    changed = " + changes" if about["changed"] else ""
    commit = f"commit {about['commit'] or 'unknown'}{changed}"
    return f"{about['device']}, {about['threads']} threads, {commit}, {versions}"


def _compare(
    kind: Kind,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    settings: Settings,
) -> list[dict[str, Any]]:
    """One row for the floor and one for each contender."""
    n, v, d = shape
    x = problem(n, v, d, settings.distance, dtype, device)
    at = dict(tokens=n, vocabulary=v, hidden=d, distance=settings.distance)
    oracle = truth(kind, x)
    _empty_cache(device)
    rows, timed = {}, {}
    for contender in chosen(settings.only, kind):
        row, loss = _try(contender, kind, x, oracle, dtype, device)
        rows[contender.name] = at | row
        if loss is not None:
            timed[contender.name] = loss
    del oracle
    _empty_cache(device)
    products = floor(kind, x)
    tasks: dict[str, Timed] = {"floor": lambda _: products()}
    for name, loss in timed.items():
        tasks[f"{name}/forward"] = _forward(loss, x)
        tasks[f"{name}/both"] = _both(loss, x)
    seconds = interleaved(tasks, device, settings.seconds)
    spread = _spread([sum(s) for s in seconds.pop("floor")])
    best = at | dict(contender="floor", verdict="floor", seconds={"both": spread})
    for name in timed:
        both = seconds[f"{name}/both"]
        passes = {
            "forward": _spread([sum(s) for s in seconds[f"{name}/forward"]]),
            "backward": _spread([s[-1] for s in both]),
            "both": _spread([sum(s) for s in both]),
        }
        if rows[name]["verdict"] == "wrong":
            rows[name]["seconds_of_wrong"] = passes
            continue
        over = passes["both"]["median"] / spread["median"]
        rows[name] |= dict(seconds=passes, over_floor=over)
    return [best, *rows.values()]


def _try(
    contender: Contender,
    kind: Kind,
    x: Problem,
    oracle: Truth,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[str, Any], Loss | None]:
    """Its errors and its memory, or why there are none; and its loss."""
    row: dict[str, Any] = dict(contender=contender.name)
    if (why := contender.missing(kind, device)) is not None:
        return row | dict(verdict="unavailable", note=why), None
    try:
        torch.compiler.reset()  # each problem is compiled for itself
        loss = contender.make(kind)
        row["error"] = errors(loss, x, oracle)  # also the warm-up of what compiles
        x.forget()
        extra = peak_bytes(lambda: loss(x).backward(), device)
    except Exception as error:  # whatever a peer may raise is its result
        return row | dict(verdict="failed", note=first_line(error)), None
    finally:
        x.forget()
        _empty_cache(device)
    if extra is not None:
        row["extra_bytes"] = max(0, extra - x.gradient_bytes)
    wrong = not max(row["error"].values()) <= LIMIT[dtype]
    return row | dict(verdict="wrong" if wrong else "right"), loss


def errors(loss: Loss, x: Problem, oracle: Truth) -> dict[str, float]:
    """Relative, of the loss and of both gradients."""
    x.forget()
    value = loss(x)
    value.backward()
    assert x.hidden.grad is not None and x.weight.grad is not None
    found = Truth(value.detach(), x.hidden.grad, x.weight.grad)
    return {
        name: relative_error(getattr(found, name), getattr(oracle, name)) for name in found._fields
    }


def _distances(
    at: dict[str, Any], kind: Kind, dtype: torch.dtype, device: torch.device, settings: Settings
) -> list[dict[str, Any]]:
    """Errors alone, from distributions that almost agree to ones that do not."""
    name, n, v, d = settings.shapes()[0]
    n = min(n, 1024)
    rows = []
    for distance in settings.distances:
        x = problem(n, v, d, distance, dtype, device)
        oracle = truth(kind, x)
        for contender in chosen(settings.only, kind):
            if contender.missing(kind, device) is None:
                row, _ = _try(contender, kind, x, oracle, dtype, device)
                where = dict(head=name, tokens=n, vocabulary=v, hidden=d, distance=distance)
                rows.append(at | where | row | dict(sweep="distance"))
    return rows


def _forward(loss: Loss, x: Problem) -> Callable[[Clock], Tensor]:
    # some peers form gradients wherever an input says that it requires one
    x = x._replace(hidden=x.hidden.detach(), weight=x.weight.detach())

    def call(_: Clock) -> Tensor:
        with torch.no_grad():
            return loss(x)

    return call


def _both(loss: Loss, x: Problem) -> Callable[[Clock], None]:
    def call(clock: Clock) -> None:
        x.forget()
        value = loss(x)
        clock.mark()
        value.backward()

    return call


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return asdict(Spread.of(seconds))


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a peer may have broken the context
            torch.cuda.empty_cache()
