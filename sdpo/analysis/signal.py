"""`sdpo signal`: the advantage of every response token, log q(y_t) - log p(y_t).

Reads each response with and without the follow-up, without training; writes one JSON row per
interaction and prints the first few in colour. For a figure, or for numbers over all rows, each
response is also read under the other conditions of conditions.py; one reading makes both.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import tyro
from rich.console import Console
from rich.text import Text

from ..errors import SdpoError
from ..interactions import Interaction, conversation_of
from ..io.files import sha256, written_whole
from .conditions import Case, iter_cases, plain_cases
from .effects import Effects, Tally, print_effects
from .journal import Journal
from .options import ReaderOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .advantages import Reading


class Signal(TypedDict):
    """The row of one interaction; lists have one entry per response token, in nats."""

    id: str
    token_ids: list[int]
    tokens: list[str]
    logp_policy: list[float]
    logp_hindsight: list[float]
    advantage: list[float]


class UnderCondition(TypedDict):
    """A follow-up, and the advantage of every response token with it."""

    followup: str
    advantage: list[float]


class ComparedSignal(Signal):
    """A row with all conditions, ``own`` among them."""

    conversation: str
    kind: str
    conditions: dict[str, UnderCondition]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What a signal is compared with, and what is made of it."""

    figure: str | None = None
    """SVG or PNG file to draw the first rows in, under every condition: the follow-up that a
    response got (own), another conversation's (swapped), the template without one (none), and
    those that the file names."""
    json_out: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """JSON file to write numbers over all rows to, by condition and by kind of follow-up."""
    scale: Literal["data", "paper"] = "data"
    """Colours of the figure. data: symmetric, to a quantile of the values; paper: from -15 to 3
    nats, white at 0."""
    strips: int = 2
    """Responses whose tokens the figure shows as boxes."""
    rows: int = 24
    """Responses in the figure's heatmaps."""
    swap: bool = True
    """Also read under another conversation's follow-up."""
    by: str = "kind"
    """Field of the file with the kind of a row's own follow-up; rows may lack it."""
    seed: int = 0
    """Decides which interactions exchange follow-ups."""

    def __post_init__(self):
        if self.rows < 1 or self.strips < 0:
            raise SdpoError("rows must be at least 1, and strips at least 0")

    @property
    def compares(self) -> bool:
        """Something is made that needs all conditions."""
        return self.figure is not None or self.json_out is not None

    def cases(self, path: str) -> Iterator[Case]:
        """The rows of a file with the follow-ups to read them under."""
        if not self.compares:
            return plain_cases(path)
        return iter_cases(path, swap=self.swap, by=self.by, seed=self.seed)


def signal_of(reading: "Reading", tokenizer: "PreTrainedTokenizerBase") -> Signal:
    """The row of a reading."""
    ids = reading.encoded.response
    return Signal(
        id=reading.encoded.id,
        token_ids=list(ids),
        tokens=[str(tokenizer.decode([t])) for t in ids],
        logp_policy=reading.policy.tolist(),
        logp_hindsight=reading.hindsight[0].tolist(),
        advantage=reading.advantages[0].tolist(),
    )


def coloured(row: Signal) -> Text:
    """Tokens on green where hindsight makes them likelier, on red where less likely; from 2 nats on
    the colour is as strong as it gets."""
    out = Text()
    for token, advantage in zip(row["tokens"], row["advantage"], strict=True):
        strength = round(160 * min(abs(advantage) / 2, 1.0))
        colour = f"0,{strength},0" if advantage > 0 else f"{strength},0,0"
        out.append(token, style=f"on rgb({colour})")
    return out


def command(
    *,
    model: str,
    interactions: str,
    out: str,
    options: Annotated[ReaderOptions, tyro.conf.arg(name="")],
    compare: Annotated[CompareOptions, tyro.conf.arg(name="")],
    show: int = 5,
) -> None:
    """Show what each follow-up says about each token of the response before it.

    With --figure or --json, each response is also read under other follow-ups. A run that was
    killed goes on where it was when the same command is started again.

    Args:
        model: any causal LM: a local Hugging Face folder, or a name on the hub.
        interactions: file that `sdpo data prepare` or `sdpo signal-cases` wrote.
        out: JSONL file to write, one row per interaction.
        show: number of interactions to print in colour.
    """
    read_signal(model, interactions, out, options, compare, show=show)


def read_signal(
    model: str,
    interactions: str,
    out: str,
    options: ReaderOptions,
    compare: CompareOptions,
    *,
    show: int = 0,
) -> Effects | None:
    """Read a file's signal and write what was asked for; on all ranks.

    Returns:
        Numbers over all rows; None if nothing was compared.

    Raises:
        SdpoError: a row, the model or the figure's name cannot be used.
    """
    from ..io.figures import check_figure_path  # matplotlib and torch: seconds, which --help ...
    from .advantages import Reader, read_into  # ... need not pay

    def asked() -> Iterator[tuple[Interaction, list[str]]]:
        return ((c.interaction, [*c.followups.values()]) for c in compare.cases(interactions))

    if compare.figure is not None:
        check_figure_path(compare.figure)
    total = sum(1 for _ in compare.cases(interactions))  # every row is checked before loading
    header = {"command": "signal", "interactions": sha256(interactions)}
    if compare.compares:
        header |= {"compared": True, "swap": compare.swap, "seed": compare.seed}
    with Journal(out) as journal, Reader.load(model, options) as reader:

        def row(reading: "Reading") -> tuple[Signal, bool, list[list[float]]]:
            others = [advantage.tolist() for advantage in reading.advantages[1:]]
            return signal_of(reading, reader.tokenizer), any(reading.encoded.truncated), others

        read_into(
            journal,
            reader,
            (
                (case.interaction, [*case.followups.values()])
                for case in compare.cases(interactions)
            ),
            row,
            header=header,
            total=total,
            says="reading",
        )
        about = {"model": model, "interactions": interactions, "dtype": reader.decides["dtype"]}
        about["template"] = options.hindsight.template
        return reader.inference.on_main(
            lambda: _write(journal, compare.cases(interactions), out, show, compare, about)
        )


def _write(
    journal: Journal,
    cases: Iterable[Case],
    out: str,
    shown: int,
    compare: CompareOptions,
    about: Mapping[str, Any],
) -> Effects | None:
    first, truncated, tally = [], 0, Tally()
    with written_whole(out) as file:
        for case, (row, lost_tokens, others) in zip(cases, journal.rows(), strict=True):
            if compare.compares:
                row = compared(row, others, case)
                under = {name: c["advantage"] for name, c in row["conditions"].items()}
                tally.add(under, conversation=row["conversation"], kind=row["kind"])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            first += [row] if len(first) < max(shown, compare.rows) else []
            truncated += lost_tokens
    console = Console()
    if truncated:
        console.print(f"[yellow]{truncated} of {journal.count} were truncated to the limits[/]")
    for row in first[:shown]:
        console.rule(Text(row["id"]))
        console.print(coloured(row))
    found = _conclude(first[: compare.rows], tally, console, compare, about)
    journal.discard()
    console.print(f"{journal.count:,} rows -> {out}", markup=False, soft_wrap=True)
    return found


def compared(row: Signal, others: list[list[float]], case: Case) -> ComparedSignal:
    """A row with the advantages under the follow-ups of its case."""
    advantages = [row["advantage"], *others]
    conditions = {
        name: UnderCondition(followup=text, advantage=advantage)
        for (name, text), advantage in zip(case.texts.items(), advantages, strict=True)
    }
    conversation = conversation_of(case.interaction)
    return ComparedSignal(**row, conversation=conversation, kind=case.kind, conditions=conditions)


def _conclude(
    rows: list[ComparedSignal],
    tally: Tally,
    console: Console,
    compare: CompareOptions,
    about: Mapping[str, Any],
) -> Effects | None:
    """Draw, and write and print numbers, as asked for."""
    if not compare.compares:
        return None
    if compare.figure is not None:
        from ..io.figures import write_figure  # matplotlib
        from .figure import draw

        write_figure(compare.figure, draw(rows, scale=compare.scale, strips=compare.strips))
    found = tally.effects(compare.seed)
    if compare.json_out is not None:
        with written_whole(compare.json_out) as file:
            row = {**about, "verdict": found.verdict, **asdict(found)}
            json.dump(row, file, indent=2, allow_nan=False, ensure_ascii=False)
    print_effects(found, console)
    return found
