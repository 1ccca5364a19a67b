"""What ``divergence`` and ``logprob`` share: contenders by turns, on one problem after another.

Forward is the loss without gradient; backward is ``loss.backward()`` alone, of a call that also ran
the forward; both is that call. Who forms gradients while the logits are there spends the time in
the forward. Every result carries its error against float64, and one that is further off than
``LIMIT`` is wrong: its time is kept in the JSON lines, and is nobody's speed.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.measure import (
    Clock,
    OnDevice,
    Spread,
    Timed,
    interleaved,
    machine,
    peak_bytes,
    relative_error,
)
from benchmarks.peers import FLOOR, Contender, Loss, chosen, floors
from benchmarks.problems import Kind, Problem, Shape, Truth, entropy, head, problem, truth
from benchmarks.report import excuses, first_line, plot, table

LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative error of the loss, dH or dW beyond which an answer is wrong. Rounding every logit's
gradient to bfloat16 costs about 0.3 %, rounding the logits themselves far more."""


@dataclass(frozen=True, kw_only=True)
class Settings(OnDevice):
    """Problems, device and duration of the comparison."""

    heads: tuple[str, ...] = ()
    """Names in ``problems.HEADS``, or VxD. Default: by device."""
    tokens: tuple[int, ...] = ()
    """Tokens per problem, N. Default: by device."""
    dtype: tuple[str, ...] = ("bfloat16", "float32")
    """Dtypes of hidden states and lm_head."""
    problem: tuple[Shape, ...] = ("gaussian",)
    """Gaussian logits of 5 to 8 nats, or peaked ones of 1.5, as in real conversations."""
    distance: float = 0.1
    """Standard deviation of the difference between student's and teacher's logits."""
    distances: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 3.0)
    """Further standard deviations at which errors are measured, at the first shape."""
    seconds: float = 3.0
    """Seconds of timing per contender, shape and pass."""
    only: tuple[str, ...] = ()
    """Contenders of these names, or whose names contain one of these. Default: all."""
    plots: Path | None = None
    """Folder for plots."""

    def shapes(self) -> list[tuple[Shape, str, int]]:
        """(problem, head, N)."""
        gpu = torch.device(self.device).type == "cuda"
        heads = self.heads or (("qwen3-8b", "llama-3.2-1b") if gpu else ("32000x512",))
        tokens = self.tokens or ((1024, 4096, 8192) if gpu else (512, 2048))
        return [(shape, name, n) for shape in self.problem for name in heads for n in tokens]


def run(benchmark: str, kinds: Sequence[Kind], settings: Settings) -> list[dict[str, Any]]:
    """Measure, print, write and plot; the rows."""
    console = Console(width=150)
    about = machine(torch.device(settings.device))
    console.print(_title(about))
    rows = []
    for name in settings.dtype:
        dtype = getattr(torch, name)
        for kind in kinds:
            at = dict(benchmark=benchmark, kind=kind, dtype=name, machine=about)
            for shape in settings.shapes():
                found = [at | row for row in _compare(kind, *shape, dtype, settings)]
                settings.keep(found)
                rows += found
                console.print(table(found), *excuses(found), sep="\n")
            if kind != "logprob":
                found = [at | row for row in _distances(kind, dtype, settings)]
                settings.keep(found)
                rows += found
    if settings.plots is not None:
        for path in plot(rows, settings.plots):
            console.print(f"wrote {path}")
    return rows


def _title(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    changed = " + changes" if about["changed"] else ""
    commit = f"commit {about['commit'] or 'unknown'}{changed}"
    return f"{about['device']}, {about['threads']} threads, {commit}, {versions}"


def _posed(
    *,
    kind: Kind,
    shape: Shape,
    model: str,
    n: int,
    distance: float,
    dtype: torch.dtype,
    device: str,
) -> tuple[dict[str, Any], Problem, Truth]:
    """What a row says of a problem, the problem, and its truth."""
    v, d = head(model)
    x = problem(n, v, d, distance, dtype, torch.device(device), shape)
    at = dict(head=model, tokens=n, vocabulary=v, hidden=d, distance=distance)
    return at | dict(problem=shape, entropy=entropy(x)), x, truth(kind, x)


def _compare(
    kind: Kind, shape: Shape, model: str, n: int, dtype: torch.dtype, settings: Settings
) -> list[dict[str, Any]]:
    """One row for each floor and one for each contender."""
    where = dict(distance=settings.distance, dtype=dtype, device=settings.device)
    at, x, oracle = _posed(kind=kind, shape=shape, model=model, n=n, **where)
    _empty_cache()
    rows, timed = {}, {}
    for contender in chosen(settings.only, kind):
        row, loss = _try(contender, kind, x, oracle)
        rows[contender.name] = at | row
        if loss is not None:
            timed[contender.name] = loss
    del oracle
    _empty_cache()
    bare = floors(kind, x)
    tasks: dict[str, Timed] = {name: lambda _, call=call: call() for name, call in bare.items()}
    for name, loss in timed.items():
        tasks[f"{name}/forward"] = _forward(loss, x)
        tasks[f"{name}/both"] = _both(loss, x)
    seconds = interleaved(tasks, x.hidden.device, settings.seconds)
    spreads = {name: Spread.of(map(sum, seconds[name])) for name in bare}
    lowest = spreads[FLOOR]
    best = [
        at
        | dict(contender=name, verdict="floor", seconds={"both": asdict(spread)})
        | ({} if name == FLOOR else dict(over_floor=spread.median / lowest.median))
        for name, spread in spreads.items()
    ]
    for name in timed:
        forward, both = seconds[f"{name}/forward"], seconds[f"{name}/both"]
        total = Spread.of(map(sum, both))
        passes = {
            "forward": asdict(Spread.of(map(sum, forward))),
            "backward": asdict(Spread.of(intervals[-1] for intervals in both)),
            "both": asdict(total),
        }
        if rows[name]["verdict"] == "wrong":
            rows[name] |= dict(seconds_of_wrong=passes)
        else:
            rows[name] |= dict(seconds=passes, over_floor=total.median / lowest.median)
    return [*best, *rows.values()]


def _try(
    contender: Contender, kind: Kind, x: Problem, oracle: Truth
) -> tuple[dict[str, Any], Loss | None]:
    """Its errors and its memory, or why there are none; and its loss."""
    row: dict[str, Any] = dict(contender=contender.name)
    if (why := contender.missing(kind, x.hidden.device)) is not None:
        return row | dict(verdict="unavailable", note=why), None
    try:
        torch.compiler.reset()  # each problem is compiled for itself
        loss = contender.make(kind)
        row["error"] = errors(loss, x, oracle)  # also the warm-up of what compiles
        x.forget()
        extra = peak_bytes(lambda: loss(x).backward(), x.hidden.device)
    except Exception as error:  # whatever a peer may raise is its result
        return row | dict(verdict="failed", note=first_line(error)), None
    finally:
        x.forget()
        _empty_cache()
    if extra is not None:
        row["extra_bytes"] = max(0, extra - x.gradient_bytes)
    right = max(row["error"].values()) <= LIMIT[x.hidden.dtype]
    return row | dict(verdict="right" if right else "wrong"), loss


def errors(loss: Loss, x: Problem, oracle: Truth) -> dict[str, float]:
    """Relative, of the loss and of both gradients."""
    x.forget()
    value = loss(x)
    value.backward()
    assert x.hidden.grad is not None and x.weight.grad is not None
    found = value.detach(), x.hidden.grad, x.weight.grad
    return {
        name: relative_error(mine, true)
        for name, mine, true in zip(Truth._fields, found, oracle, strict=True)
    }


def _distances(kind: Kind, dtype: torch.dtype, settings: Settings) -> list[dict[str, Any]]:
    """Errors alone, from distributions that almost agree to ones that do not."""
    shape, model, n = settings.shapes()[0]
    where = dict(kind=kind, shape=shape, model=model, n=min(n, 1024), dtype=dtype)
    rows = []
    for distance in settings.distances:
        at, x, oracle = _posed(**where, distance=distance, device=settings.device)
        for contender in chosen(settings.only, kind):
            if contender.missing(kind, x.hidden.device) is None:
                row, _ = _try(contender, kind, x, oracle)
                rows.append(at | row | dict(sweep="distance"))
    return rows


def _forward(loss: Loss, x: Problem) -> Timed:
    # some peers form gradients wherever an input says that it requires one
    x = x._replace(hidden=x.hidden.detach(), weight=x.weight.detach())

    def call(_: Clock) -> Tensor:
        with torch.no_grad():
            return loss(x)

    return call


def _both(loss: Loss, x: Problem) -> Timed:
    def call(clock: Clock) -> None:
        x.forget()
        value = loss(x)
        clock.mark()
        value.backward()

    return call


def _empty_cache() -> None:
    with contextlib.suppress(RuntimeError):  # a peer may have broken the context
        torch.cuda.empty_cache()  # which does nothing without a GPU
