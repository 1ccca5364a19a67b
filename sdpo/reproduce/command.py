"""`sdpo reproduce ROW`: an experiment of the paper, from its data to its numbers.

sdpo reproduce R6 --dry-run
sdpo reproduce R6 --miniature --out runs/r6
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..demo.prompts import held_out_prompts, training_prompts
from ..demo.smollm2 import smollm2
from ..errors import SdpoError
from ..io.files import write_text
from .results import Target
from .rows import GIVEN, Row, Setup, find_row
from .steps import Cost, Step

FILE = "reproduce.json"


def command(
    row: tyro.conf.Positional[str],
    /,
    *,
    out: str | None = None,
    dry_run: bool = False,
    miniature: bool = False,
    model: str | None = None,
    log: str | None = None,
    prompts: str | None = None,
    held_out: str | None = None,
    user: str = "",
    judge: str = "",
    gpus: int = 8,
    data: tuple[str, ...] = (),
) -> None:
    """Run an experiment of the paper: prepare, train, evaluate, compare with what was published.

    Steps that are done are not done again: the same command goes on where it was.

    Args:
        row: R1 to R9, as docs/reproduce.md lists them.
        out: folder of everything; None: runs/ROW.
        dry_run: show the steps, what each takes at most, and what is missing; run nothing.
        miniature: the same way with SmolLM2-135M-Instruct, users by rule and a few updates, on a
            laptop.
        model: of a miniature, in place of SmolLM2.
        log: conversations, for the rows that train on a log.
        prompts: file of prompts to train on, for the rows that talk with users.
        held_out: file of prompts to evaluate with.
        user: URL#MODEL of the model that plays the users; "": users by rule.
        judge: URL#MODEL, or the folder, of the model that judges.
        gpus: processes of a training run, one for each GPU of the machine; a miniature has two, on
            CPU cores.
        data: TASK=FILE of benchmarks, where the hub cannot be reached.
    """
    found = find_row(row)
    folder = Path(out or f"runs/{row.upper()}")
    given = {"log": log, "prompts": prompts, "held_out": held_out, "user": user, "judge": judge}
    missing = [name for name in found.needs if not given[name]]
    small = None
    if miniature:
        missing = [name for name in missing if name == "log"]
        small = model or ("SmolLM2" if dry_run else smollm2())
        prompts, held_out = _own_prompts(folder, prompts, held_out, dry_run)
        user, judge, gpus = "", "", min(2, os.cpu_count() or 1)
    setup = Setup(
        out=folder,
        small=small,
        log=log or GIVEN,
        prompts=prompts or GIVEN,
        held_out=held_out or GIVEN,
        user=user,
        judge=judge,
        gpus=gpus,
        data=data,
    )
    steps, console = found.steps(setup), Console()
    for step in steps:
        step.check()
    show(row.upper(), found, steps, missing, console)
    if dry_run:
        return
    if missing:
        needed = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise SdpoError(f"{row.upper()} needs {needed}")
    seconds = run(steps, folder, console)
    compared = compare(found.targets(setup))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(setup).items()}
    report = {
        "kind": "reproduce",
        "sdpo": __version__,
        "row": row.upper(),
        "says": found.says,
        "miniature": miniature,
        "setup": settings,
        "steps": [{"name": s.name, "command": s.line()} for s in steps],
        "seconds": seconds,
        "numbers": compared,
    }
    write_text(folder / FILE, json.dumps(report, indent=2) + "\n")
    show_numbers(compared, miniature, console)


def run(steps: Sequence[Step], folder: Path, console: Console) -> dict[str, float]:
    """Run all steps in order; the seconds that each took, over all times that it was started."""
    file = folder / "seconds.json"
    spent: dict[str, float] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    for step in steps:
        console.rule(step.name)
        start = time.monotonic()
        try:
            step.run()
        finally:
            spent[step.name] = spent.get(step.name, 0.0) + time.monotonic() - start
            write_text(file, json.dumps(spent, indent=2) + "\n")
    return spent


def compare(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Published numbers and ours."""
    return [{"says": t.says, "published": t.published, "ours": t.read()} for t in targets]


def show(
    name: str, row: Row, steps: Sequence[Step], missing: Sequence[str], console: Console
) -> None:
    """Print the steps and what they take."""
    table = Table(title=f"{name}, {row.says}", title_justify="left")
    for column in ("step", "GPU hours", "calls", "GiB on disk", "done"):
        table.add_column(column, justify="left" if column == "step" else "right")
    total = Cost()
    for step in steps:
        total += step.cost
        done = "yes" if step.makes.exists() else ""
        table.add_row(step.name, *_costs(step.cost), done)
    table.add_section()
    table.add_row("all", *_costs(total), "")
    console.print(table)
    for step in steps:
        console.print(step.line(), soft_wrap=True, highlight=False, markup=False)
    if missing:
        console.print(f"still to be named: {', '.join(missing)} ({GIVEN} above)")


def _costs(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.gpu_hours:.2f}", f"{cost.calls:,}", f"{cost.disk:.1f}"


def show_numbers(numbers: Sequence[dict[str, Any]], miniature: bool, console: Console) -> None:
    """Print published numbers beside ours."""
    title = "published, and of this miniature" if miniature else "published, and ours"
    table = Table("", "published", "ours", title=title, title_justify="left")
    for row in numbers:
        table.add_row(row["says"], _number(row["published"]), _number(row["ours"]))
    console.print(table)
    if miniature:
        console.print("A miniature is another model with other users: it shows the way, not these.")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1 else f"{value:.1f}"


def _own_prompts(
    folder: Path, prompts: str | None, held_out: str | None, dry_run: bool
) -> tuple[str, str]:
    """The demo's, where none are named."""
    files = []
    for name, given, own in (
        ("prompts", prompts, training_prompts()),
        ("held-out", held_out, held_out_prompts()),
    ):
        path = Path(given) if given else folder / f"{name}.txt"
        if not given and not dry_run:
            write_text(path, "".join(f"{prompt}\n" for prompt in own))
        files.append(str(path))
    return files[0], files[1]
