"""`sdpo signal`: the advantage of every response token, log q(y_t) - log p(y_t).

Reads each response with and without the follow-up, without training; writes one JSON row per
interaction and prints the first few in colour.
"""

import json
from typing import TYPE_CHECKING, Annotated, TypedDict

import tyro
from rich.console import Console
from rich.text import Text

from ..interactions import iter_interactions
from ..io.files import sha256, written_whole
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
    show: int = 5,
) -> None:
    """Show what each follow-up says about each token of the response before it.

    A run that was killed goes on where it was when the same command is started again.

    Args:
        model: any causal LM: a local Hugging Face folder, or a name on the hub.
        interactions: file that `sdpo data prepare` wrote.
        out: JSONL file to write, one row per interaction.
        show: number of interactions to print in colour.
    """
    from .advantages import Reader, read_into  # torch: seconds, which --help need not pay

    total = sum(1 for _ in iter_interactions(interactions))  # every row is checked before loading
    with Journal(out) as journal, Reader.load(model, options) as reader:

        def row(reading: "Reading") -> tuple[Signal, bool]:
            return signal_of(reading, reader.tokenizer), any(reading.encoded.truncated)

        read_into(
            journal,
            reader,
            ((i, ()) for i in iter_interactions(interactions)),
            row,
            header={"command": "signal", "interactions": sha256(interactions)},
            total=total,
            says="reading twice",
        )
        reader.inference.on_main(lambda: _write(journal, out, show))


def _write(journal: Journal, out: str, show: int) -> None:
    shown, truncated = [], 0
    with written_whole(out) as file:
        for row, lost_tokens in journal.rows():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            shown += [row] if len(shown) < show else []
            truncated += lost_tokens
    journal.discard()
    console = Console()
    if truncated:
        console.print(f"[yellow]{truncated} of {journal.count} were truncated to the limits[/]")
    for row in shown:
        console.rule(Text(row["id"]))
        console.print(coloured(row))
    console.print(f"{journal.count:,} rows -> {out}", markup=False, soft_wrap=True)
