"""`sdpo data prepare` and `sdpo data inspect`."""

from collections.abc import Sequence
from statistics import mean, median
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .conversations import DataError
from .interactions import PRESETS, Interaction, prepare, read_interactions, write_interactions

Preset = Literal["paper-wildchat", "all-turns"]
assert set(Preset.__args__) == set(PRESETS)


def prepare_command(
    inputs: tyro.conf.Positional[list[str]], /, *, out: str, preset: Preset = "paper-wildchat"
) -> None:
    """Turn conversation logs into interactions (x, y, o).

    Args:
        inputs: files, folders or globs: WildChat parquet, OpenAI-messages JSONL, ready triples.
        out: the JSONL file to write.
        preset: which conversations and turns to keep; all-turns keeps every answered turn.
    """
    if not inputs:
        raise DataError("no input: name at least one file, folder or glob")
    interactions, report = prepare(inputs, PRESETS[preset])
    write_interactions(out, interactions)
    console = Console()
    console.print(f"{out} (preset {preset})", soft_wrap=True, markup=False, highlight=False)
    table = Table()
    table.add_column("what")
    table.add_column("count", justify="right")
    for what, count in {
        "files": report.files,
        "conversations read": report.conversations_read,
        **{f"  dropped: {reason}": n for reason, n in report.drops.most_common()},
        "conversations kept": report.conversations_kept,
        "rows after the stopping rule": report.rows - report.conversations_read,
        "answers without usable history": report.answers_without_history,
        "ready triples": report.ready_interactions,
        "ids made unique": report.renamed_ids,
        "interactions written": report.interactions,
    }.items():
        table.add_row(what, f"{count:,}")
    console.print(table)


def inspect_command(file: tyro.conf.Positional[str], /, *, samples: int = 2) -> None:
    """Check a file of interactions and show what is in it.

    Args:
        file: interactions, as `sdpo data prepare` writes them.
        samples: how many to print.
    """
    interactions = read_interactions(file)
    if not interactions:
        raise DataError(f"{file}: no interactions")
    console = Console()
    console.print(f"{file}: {len(interactions):,} interactions", soft_wrap=True, highlight=False)
    table = Table()
    for column in ("characters", "min", "median", "mean", "max"):
        table.add_column(column, justify="left" if column == "characters" else "right")
    for name, lengths in _lengths(interactions).items():
        figures = (min(lengths), median(lengths), mean(lengths), max(lengths))
        table.add_row(name, *(f"{x:,.0f}" for x in figures))
    console.print(table)
    for i in interactions[:samples]:
        console.rule(Text(i.id))
        for message in i.prompt:
            console.print(f"[dim]{message.role:>10}[/] ", end="")
            console.print(message.content, markup=False)
        for name, text in (("answer y", i.completion), ("follow-up o", i.user_response)):
            console.print(f"[bold]{name:>10}[/] ", end="")
            console.print(text, markup=False)


def _lengths(interactions: Sequence[Interaction]) -> dict[str, list[int]]:
    return {
        "prompt x": [sum(len(m.content) for m in i.prompt) for i in interactions],
        "answer y": [len(i.completion) for i in interactions],
        "follow-up o": [len(i.user_response) for i in interactions],
    }


def main(args: Sequence[str] | None = None) -> None:
    """Parse and run."""
    commands = {"prepare": prepare_command, "inspect": inspect_command}
    tyro.extras.subcommand_cli_from_dict(commands, prog="sdpo data", args=args)
