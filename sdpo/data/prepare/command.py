"""`sdpo data prepare`: the command, its progress and its table."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

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

from ...errors import DataError
from ..filters.guardrails import GuardrailConfig
from ..manifest import find, manifest_path, report_path
from ..read.formats import Format
from .config import PrepareConfig, Preset
from .prepare import prepare
from .report import Report


def prepare_command(
    inputs: tyro.conf.Positional[list[str]],
    /,
    *,
    out: str,
    preset: Preset = "strict",
    format: Format | Literal["auto"] = "auto",
    languages: tuple[str, ...] | None = None,
    shuffle_seed: int | None = None,
    max_conversations: int | None = None,
    guardrails: GuardrailConfig = GuardrailConfig(),  # noqa: B008 (frozen)
    bad_rows: Literal["stop", "skip"] = "stop",
    workers: int = 0,
    explain: str | None = None,
) -> None:
    """Turn conversation logs into interactions (x, y, o).

    Killed, it goes on where it was when the same command runs again.

    Args:
        inputs: files, folders, globs, or data sets on the Hugging Face hub (owner/name): WildChat,
            WildFeedback, LMSYS, ShareGPT, OpenAI messages, ready triples; parquet or JSON lines.
        out: the .jsonl or .parquet file to write.
        preset: which conversations and turns to keep; the paper's give the published rows.
        format: of the inputs; auto recognises it file by file.
        languages: to keep, as the log names them, or any; unset: as the preset says.
        shuffle_seed: shuffle the rows; unset: as the preset says.
        max_conversations: stop at so many; unset: as the preset says.
        guardrails: unset: on, but off under the paper's presets.
        bad_rows: skip leaves out, and counts, what cannot be read.
        workers: processes; 0: one a core.
        explain: also say why one conversation went or stayed, named by its id or "file:row".
    """
    if not inputs:
        raise DataError("no input", hint="Name at least one file, folder, glob or data set")
    config = PrepareConfig(
        inputs=tuple(inputs),
        out=out,
        preset=preset,
        format=format,
        languages=languages,
        shuffle_seed=shuffle_seed,
        max_conversations=max_conversations,
        guardrails=guardrails,
        bad_rows=bad_rows,
        workers=workers,
    )
    console = Console()
    began = time.perf_counter()
    with _progress(console) as tell:
        report = prepare(config, progress=tell)
    seconds = time.perf_counter() - began
    _tell(report, config, seconds, console)
    if explain is not None:
        for line in _explained(explain, report, out):
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


def _tell(report: Report, config: PrepareConfig, seconds: float, console: Console) -> None:
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
            table.add_row(what, f"{count:,}")
    console.print(table)
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
    yield "  answers without usable history", counts["answers_without_history"]
    yield from ((f"  answers dropped: {why}", n) for why, n in report.interaction_drops.items())
    yield from ((f"  replaced: {kind}", n) for kind, n in report.pii.items())
    yield "  ready triples", counts["ready_interactions"]
    yield "  ids made unique", counts["renamed_ids"]
    yield "interactions written", counts["interactions"]
