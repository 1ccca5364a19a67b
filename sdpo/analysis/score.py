"""`sdpo data score`: how much each follow-up says about the response before it.

Every response is read three times: without its follow-up, with it, and with the follow-up of
another conversation, the control. A is log q(y_t) - log p(y_t), hindsight minus policy, in nats.

How to read the control. `relevance` = mean |A| with its own follow-up - mean |A| with another's:
above 0, this user's words move the response more than another user's do. A single negative value
means little, as the other follow-up may simply be the stronger one. Nor is a mean of 0 over the
file a fault: users who all want the same say the same. So the file gets a second number, which
compares token by token:

    share = mean |A_own - A_other| / (mean |A_own| + mean |A_other|),   from 0 to 1

At 0, every token moves alike whichever follow-up the hindsight context holds: the signal comes
from the template's wording. At 1, the two have nothing in common: the signal is all about what the
follow-up says. It does not say that the model is right to be moved; `sdpo check-hindsight` tests
that.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import DataError
from ..interactions import conversation_of, iter_interactions
from ..io.files import sha256, written_whole
from .journal import Journal
from .options import ReaderOptions

if TYPE_CHECKING:
    from .advantages import Reading

OUTLIER = 3.5
"""Modified z-score beyond which a value is an outlier (Iglewicz and Hoaglin, 1993)."""
DRAWS = 1000
"""Bootstrap samples."""
NAMED = 3
"""Outliers of each tail that are printed with their texts."""
SHOWN = 90
"""Characters to which a printed text is shortened."""
FIGURES = np.dtype(
    [
        ("tokens", np.int64),
        ("mean_advantage", np.float64),
        ("mean_abs_advantage", np.float64),
        ("max_abs_advantage", np.float64),
        ("shuffled_mean_abs_advantage", np.float64),
        ("shuffled_difference", np.float64),
        ("relevance", np.float64),
    ]
)
"""Figures of one interaction over its response tokens, in nats. `shuffled_difference` is the mean
of |A_own - A_other|."""


def partners(conversations: Sequence[str], seed: int, where: str) -> NDArray[np.int64]:
    """(n,): index of the interaction whose follow-up each one gets, always from another
    conversation; every follow-up is used once.

    The interactions are shuffled, conversations staying together, and each takes the follow-up
    half the list further on: if n is even, partners exchange theirs.

    Raises:
        DataError: one conversation has more than half of the interactions of the file ``where``.
    """
    groups, of = np.unique(np.asarray(conversations), return_inverse=True)
    n, sizes = len(of), np.bincount(of, minlength=1)
    longest = int(sizes.max())
    if 2 * longest > n:
        name = groups[sizes.argmax()] if n else ""
        raise DataError(
            f"{longest} of {n} interactions are of one conversation ('{name}'), so there are too "
            "few follow-ups of others to compare with",
            hint="Add conversations or, where these are several, ids of the form conversation_turn",
            file=where,
        )
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(n), rng.permutation(len(groups))[of]))
    partner = np.empty(n, np.int64)
    partner[order] = np.roll(order, n // 2)
    return partner


def interval(
    columns: Sequence[NDArray],
    groups: Sequence[Any] | NDArray,
    statistic: Callable[[NDArray], float],
    seed: int = 0,
) -> tuple[float, float]:
    """A 95% bootstrap interval. Whole groups are drawn, as the turns of one conversation, for
    example, are not independent.

    Args:
        columns: k arrays of (n,), drawn together, so that pairs stay paired.
        groups: (n,) labels.
        statistic: function of the columns' means, (k,).
    """
    _, of = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.stack([np.bincount(of, weights=c) for c in (*columns, np.ones(len(of)))], axis=1)
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        total = sums[rng.integers(len(sums), size=len(sums))].sum(0)
        drawn.append(statistic(total[:-1] / total[-1]))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def outliers(values: NDArray) -> list[Literal["low", "high"] | None]:
    """Marks the (n,) magnitudes that lie far below or above the rest, by the modified z-score of
    their logarithms; none if half of them are equal."""
    logs = np.log(np.maximum(values, 1e-12))
    deviation = logs - np.median(logs)
    mad = np.median(np.abs(deviation))
    if not mad:
        return [None] * len(values)
    z = 0.6745 * deviation / mad
    return ["high" if x > OUTLIER else "low" if x < -OUTLIER else None for x in z]


class FollowUps:
    """Texts kept in a file and read by index: those of a whole log need not fit into memory."""

    def __init__(self, file: BinaryIO):
        self._file, self._ends = file, [0]

    def append(self, text: str) -> None:
        """Add a text."""
        self._ends.append(self._ends[-1] + self._file.write(text.encode()))

    def __getitem__(self, i: int) -> str:
        self._file.seek(self._ends[i])
        return self._file.read(self._ends[i + 1] - self._ends[i]).decode()


def figures(reading: "Reading") -> tuple[float, ...]:
    """The row of `FIGURES` of an interaction that was read with another conversation's follow-up,
    too."""
    own, other = (advantage.numpy() for advantage in reading.advantages)
    size, control = np.abs(own).mean(), np.abs(other).mean()
    difference = np.abs(own - other).mean()
    row = own.mean(), size, np.abs(own).max(), control, difference, size - control
    return len(own), *map(float, row)


def score_command(
    *,
    model: str,
    interactions: str,
    out: str,
    options: Annotated[ReaderOptions, tyro.conf.arg(name="")],
    seed: int = 0,
) -> None:
    """Measure how much each follow-up says about its response, next to another conversation's.

    A run that was killed goes on where it was when the same command is started again.

    Args:
        model: any causal LM: a local Hugging Face folder, or a name on the hub.
        interactions: file that `sdpo data prepare` wrote.
        out: JSONL file to write, one row per interaction; training selects by it.
        seed: decides which interactions exchange follow-ups.
    """
    from .advantages import Reader, read_into  # torch: seconds, which --help need not pay

    with tempfile.TemporaryFile() as file:
        ids, conversations, texts = [], [], FollowUps(file)
        for i in iter_interactions(interactions):
            ids.append(i.id)
            conversations.append(conversation_of(i))
            texts.append(i.followup)
        partner = partners(conversations, seed, interactions)
        data = zip(iter_interactions(interactions), partner, strict=True)
        header = {"command": "data score", "interactions": sha256(interactions), "seed": seed}
        with Journal(out) as journal, Reader.load(model, options) as reader:
            read_into(
                journal,
                reader,
                ((interaction, [texts[j]]) for interaction, j in data),
                figures,
                header=header,
                total=len(ids),
                says="reading three times",
            )
            reader.inference.on_main(
                lambda: _write(journal, interactions, out, ids, conversations, seed)
            )


def _write(
    journal: Journal,
    interactions: str,
    out: str,
    ids: Sequence[str],
    conversations: Sequence[str],
    seed: int,
) -> None:
    table = np.fromiter(map(tuple, journal.rows()), FIGURES, count=len(ids))
    flags = outliers(table["mean_abs_advantage"])
    with written_whole(out) as file:
        for id, values, flag in zip(ids, table, flags, strict=True):
            figures = dict(zip(FIGURES.names or (), values.item(), strict=True))
            row = {"id": id, **figures, "outlier": flag}
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    journal.discard()
    console = Console()
    _show(console, table, conversations, seed)
    _name_outliers(console, interactions, table, flags)
    console.print(f"{len(ids):,} rows -> {out}", markup=False, soft_wrap=True)


def share(means: NDArray) -> float:
    """Share of the signal that is about the follow-up, from the means of |A_own - A_other|,
    |A_own| and |A_other|; 0 if there is no signal."""
    difference, own, other = means
    return float(difference / (own + other)) if own + other else 0.0


def _show(console: Console, table: NDArray, conversations: Sequence[str], seed: int) -> None:
    own, other = table["mean_abs_advantage"], table["shuffled_mean_abs_advantage"]
    columns = [table["shuffled_difference"], own, other]
    low, high = interval([table["relevance"]], conversations, lambda means: means[0], seed)
    shown = Table("nats per token", "value", title="signal", title_justify="left")
    shown.columns[1].justify = "right"
    shown.add_row("mean |A|, own follow-up", f"{own.mean():.4f}")
    shown.add_row("mean |A|, another conversation's", f"{other.mean():.4f}")
    middle = f"{table['relevance'].mean():+.4f}  [{low:+.4f}, {high:+.4f}]"
    shown.add_row("relevance: own - another's, 95%", escape(middle))
    low, high = interval(columns, conversations, share, seed)
    middle = f"{share(np.array([c.mean() for c in columns])):.1%}  [{low:.1%}, {high:.1%}]"
    shown.add_row("share about the follow-up, 95%", escape(middle), end_section=True)
    for q in (5, 25, 50, 75, 95):
        shown.add_row(f"|A| of interactions, {q}%", f"{np.percentile(own, q):.4f}")
    console.print(shown)


def _name_outliers(console: Console, path: str, table: NDArray, flags: Sequence) -> None:
    """Print the counts of both tails, and the furthest few with their texts."""
    size = table["mean_abs_advantage"]
    tails = {tail: [i for i, flag in enumerate(flags) if flag == tail] for tail in ("low", "high")}
    counts = ", ".join(f"{len(of)} {tail}" for tail, of in tails.items())
    console.print(f"outliers of |A|, modified z-score beyond {OUTLIER}: {counts}")
    furthest = sorted(tails["low"], key=lambda i: size[i])[:NAMED]
    furthest += sorted(tails["high"], key=lambda i: -size[i])[:NAMED]
    wanted = set(furthest)
    text = {n: i for n, i in enumerate(iter_interactions(path)) if n in wanted} if wanted else {}
    for n in furthest:
        i = text[n]
        console.print(f"{flags[n]:>4} {size[n]:.4f} {i.id}", markup=False, highlight=False)
        for name, words in (("response", i.response), ("follow-up", i.followup)):
            console.print(f"{name:>14}: {shortened(words)}", markup=False, highlight=False)


def shortened(text: str) -> str:
    """The text on one line, cut to `SHOWN` characters."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
