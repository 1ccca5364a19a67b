"""`sdpo data prepare`: the command, its progress and its table."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ...errors import SdpoError
from ..manifest import find, manifest_path, report_path
from .config import PrepareConfig
from .prepare import prepare
from .report import Report, most
from .rules import UNKNOWN_ROLE


def prepare_command(
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")], explain: str | None = None
) -> None:
    """Turn conversation logs into interactions (x, y, o).

    If it is killed, the same command goes on from what was done.

    Args:
        explain: also say why one conversation was dropped or kept, named by its id or "file:row".
    """
    if not config.inputs:
        raise SdpoError("no input: name at least one file, folder, glob or data set")
    console = Console()
    began = time.perf_counter()
    with _progress(console) as tell:
        report = prepare(config, progress=tell)
    seconds = time.perf_counter() - began
    _print(report, config, seconds, console)
    if explain is not None:
        for line in _explained(explain, report, config.out):
            console.print(line, markup=False, soft_wrap=True, highlight=False)


def _explained(id: str, report: Report, out: str) -> Iterator[str]:
    """What became of a conversation, and of those that it repeats or that repeat it."""
    hits = find(out, id)
    if not hits:
        examined, rows = (report.counts[n] for n in ("conversations_examined", "rows"))
        yield (
            f"{id}: not among the {examined:,} conversations examined; {rows - examined:,} rows "
            "came after the rules' stop"
        )
    for hit in hits:
        fate = hit.decision
        if hit.duplicate_of:
            fate += f" of {hit.duplicate_of}"
        if hit.decision == "kept":
            fate += f", {len(hit.interactions)} interactions: {', '.join(hit.interactions)}"
        for what, counts in (("answers not used", hit.unused), ("left out", hit.left_out)):
            if counts:
                fate += f"; {what}: {', '.join(f'{n:,} {name}' for name, n in counts.items())}"
        yield f"{hit.conversation_id} ({hit.source}, {hit.via}): {fate}"


class _Speed(ProgressColumn):
    """Rows a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


@contextmanager
def _progress(console: Console) -> Iterator:
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), _Speed())
    shown = Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    with shown:
        tasks: dict[str, int] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)  # pyright: ignore

        yield tell


def _print(report: Report, config: PrepareConfig, seconds: float, console: Console) -> None:
    found = Counter((i["format"], i["container"]) for i in report.inputs)
    for (format, container), n in found.items():
        files = "1 file" if n == 1 else f"{n:,} files"
        console.print(f"{files}: {format or 'unreadable'} ({container})", highlight=False)
    for message in report.bad_rows:
        console.print(f"left out: {message}", markup=False, soft_wrap=True, highlight=False)
    table = Table(title=Text(f"{config.out} (preset {report.preset})"))
    table.add_column("what")
    table.add_column("count", justify="right")
    for what, count in _counts(report):
        if count or not what.startswith(" "):
            table.add_row(Text(what), f"{count:,}")
    console.print(table)
    if unknown := [name for name in report.left_out if name.startswith(UNKNOWN_ROLE)]:
        name = unknown[0].removeprefix(UNKNOWN_ROLE).replace("(none)", "")
        says = f"unknown roles: --role-map {name}=assistant, say, tells what {name!r} means"
        console.print(says, markup=False, soft_wrap=True, highlight=False)
    states = (f"{name} {state}" for name, state in report.guards.items())
    console.print(f"guardrails: {', '.join(states)}", markup=False, highlight=False)
    rows = report.counts["rows"]
    beside = f"{manifest_path(config.out).name}, {report_path(config.out).name}"
    console.print(
        f"{rows:,} rows in {seconds:,.1f} s, {rows / seconds:,.0f} rows/s; beside it: {beside}",
        highlight=False,
        soft_wrap=True,
    )


def _counts(report: Report) -> Iterator[tuple[str, int]]:
    counts = report.counts
    yield "files", len(report.inputs)
    yield "rows", counts["rows"]
    yield from ((f"  dropped: {reason}", n) for reason, n in report.drops.items())
    yield "  after the stop", counts["rows"] - counts["conversations_examined"]
    yield "conversations kept", counts["conversations_kept"]
    yield from ((f"  answers dropped: {why}", n) for why, n in report.interaction_drops.items())
    yield from ((f"  left out: {what}", n) for what, n in most(report.left_out).items())
    yield from ((f"  replaced: {kind}", n) for kind, n in report.pii.items())
    yield "  ready interactions", counts["ready_interactions"]
    yield "  ids made unique", counts["renamed_ids"]
    yield "interactions written", counts["interactions"]
