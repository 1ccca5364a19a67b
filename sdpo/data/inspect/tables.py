"""An `Inspection` as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .inspection import Inspection, Origins, Preparation, Sample, Tokens

LISTED = 12
"""Languages, models and the like that are listed; the rest is summed up."""


def print_tables(inspection: Inspection, console: Console) -> None:
    """Print everything as tables."""
    users = f" of {inspection.users:,} users" if inspection.users else ""
    found = f"{inspection.interactions:,} interactions from {inspection.conversations:,} "
    headline = Text(f"{inspection.file}: {found}conversations{users}")
    console.print(headline, soft_wrap=True)
    for note in inspection.notes:
        console.print(Text(note, style="dim"), soft_wrap=True)
    console.print(Text("\nlengths", style="bold"), _lengths_table(inspection), sep="\n")
    for title, rows in sections_of(inspection).items():
        if rows:
            console.print(Text(f"\n{title}", style="bold"), _table(rows), sep="\n")
    for sample in inspection.samples:
        _print_sample(sample, console)


def _lengths_table(inspection: Inspection) -> Table:
    table = Table()
    for column in ("", "min", "median", "mean", "p95", "max"):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in length_rows(inspection).items():
        table.add_row(name, *figures)
    return table


def length_rows(inspection: Inspection) -> dict[str, list[str]]:
    """What was measured -> its min, median, mean, p95 and max."""
    tokens = inspection.tokens.lengths if inspection.tokens else {}
    lengths = {f"{name}, characters": n for name, n in inspection.characters.items()}
    lengths |= {f"{name}, tokens": n for name, n in tokens.items()} | inspection.turns
    return {
        name: [number(x) for x in (n.min, n.median, n.mean, n.p95, n.max)]
        for name, n in lengths.items()
    }


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 or x == int(x) else f"{x:,.1f}"


def sections_of(inspection: Inspection) -> dict[str, list[tuple[str, str]]]:
    """Title -> (what, figure), for everything that is a list of figures, in the page's order."""
    origins, made = inspection.origins, inspection.preparation
    weights = asdict(inspection.weights) if inspection.weights else {}
    return {
        "tokens": _token_rows(inspection.tokens),
        "weights": [(name, f"{x:,.6g}") for name, x in weights.items()],
        "conversations, examined to kept": _drop_rows(made),
        "interactions dropped": _counted(made.interaction_drops) if made else [],
        "left out of the prompts (messages)": _counted(most(made.left_out)) if made else [],
        "personal data replaced": _counted(made.pii) if made else [],
        "guards": list(made.guards.items()) if made else [],
        "rows that could not be read": [(row, "") for row in made.bad_rows] if made else [],
        "duplicates": _duplicate_rows(origins),
        "languages (interactions)": _counted(most(origins.languages)) if origins else [],
        "models (interactions)": _counted(most(origins.models)) if origins else [],
        "users' share of the interactions": _share_rows(origins),
    }


def _token_rows(tokens: Tokens | None) -> list[tuple[str, str]]:
    if tokens is None:
        return []
    n = tokens.interactions
    rows = [("interactions counted", f"{n:,}"), ("template", tokens.template)]
    for name, limit in tokens.limits.items():
        cut = tokens.cut[name]
        rows.append((f"{name} cut at {limit:,}", f"{cut:,} ({cut / n:.1%})"))
    return [*rows, ("refused by the chat template", f"{tokens.refused:,}")]


def _drop_rows(made: Preparation | None) -> list[tuple[str, str]]:
    if made is None:
        return []
    counts = {"examined": made.examined, **made.drops, "kept": made.kept}
    return [("preset", made.preset), *_counted(counts)]


def _duplicate_rows(origins: Origins | None) -> list[tuple[str, str]]:
    found = origins.duplicates if origins else {}
    return [
        (
            f"{why}, such as {d.conversation_id} ({d.source}) of {d.duplicate_of}",
            f"{d.conversations:,}",
        )
        for why, d in found.items()
    ]


def _share_rows(origins: Origins | None) -> list[tuple[str, str]]:
    if origins is None or not origins.users:
        return []
    rows = [(f"the busiest {k}", f"{share:.1%}") for k, share in origins.top_users.items()]
    return [*rows, ("interactions without a user", f"{origins.without_user:,}")]


def _counted(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(name, f"{n:,}") for name, n in counts.items()]


def most(counts: Mapping[str, int]) -> dict[str, int]:
    """The first `LISTED`, and the sum of the rest."""
    rest = list(islice(counts.values(), LISTED, None))
    more = {f"{len(rest)} more": sum(rest)} if rest else {}
    return dict(islice(counts.items(), LISTED)) | more


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for what, figure in rows:
        table.add_row(Text(what), Text(figure))
    return table


def _print_sample(sample: Sample, console: Console) -> None:
    console.rule(Text(sample.id))
    turns = [*sample.prompt, ("answer y", sample.completion), ("follow-up o", sample.user_response)]
    for i, (name, text) in enumerate(turns):
        style = "dim" if i < len(sample.prompt) else "bold"
        console.print(Text(f"{name:>11} ", style=style).append(text, style="not bold not dim"))
