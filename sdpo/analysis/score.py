"""`sdpo data score`: how much each follow-up says about the response before it.

Every response is read three times: without its follow-up, with it, and with the follow-up of
another conversation, the control. A is log q(y_t) - log p(y_t), hindsight minus policy, in nats.

How to read the control. `relevance` = mean |A| with its own follow-up - mean |A| with another's:
above 0, this user's words move this answer more than a stranger's do. A single negative one is no
fault: a stranger's remark may well be the stronger. Nor is a mean of 0 over the file: users who
all want the same say the same. So the file gets a second number, which compares token by token:

    share = mean |A_own - A_other| / (mean |A_own| + mean |A_other|),   from 0 to 1

At 0 the note moves every token alike, whoever's follow-up it holds: the signal is its wording's.
At 1 the two have no token's shift in common: all of it is about what the follow-up says. It does
not say that the model is right to be moved; `sdpo check-hindsight` asks that.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ..conversations import DataError
from ..hindsight import HindsightConfig, encode, load_tokenizer
from ..interactions import Interaction, iter_interactions
from ..io.files import written_whole

CHUNK = 512
"""Interactions encoded at a time."""
OUTLIER = 3.5
"""Modified z-score beyond which a value is one (Iglewicz and Hoaglin, 1993)."""
DRAWS = 1000
"""Of a bootstrap."""
NAMED = 3
"""Outliers of each tail that are shown with their text."""
SHOWN = 90
"""Characters of a text that is shown shortened."""
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
"""One interaction's: of its response's tokens, in nats. `shuffled_difference` is the mean of
|A_own - A_other|."""


def conversation_of(id: str, turn_id: int | None = None) -> str:
    """The conversation of an interaction's id: "c1" of "c1_3" and of "c1_3~2".

    With a `turn_id`, only that turn's number is taken off: "row_7" of no turn 7 stays whole.
    """
    whole = re.sub(r"~\d+$", "", id)
    return re.sub(r"_\d+$" if turn_id is None else rf"_{turn_id}$", "", whole)


def strangers(conversations: Sequence[str], seed: int, where: str) -> NDArray[np.int64]:
    """(n,) whose follow-up each interaction gets: another conversation's, each used once.

    In a random order that keeps conversations together, everyone takes the follow-up half a turn
    on; of an even number, partners exchange theirs.

    Raises:
        DataError: one conversation has more than half of the interactions; `where` is named.
    """
    groups, of = np.unique(np.asarray(conversations), return_inverse=True)
    n, sizes = len(of), np.bincount(of, minlength=1)
    longest = int(sizes.max())
    if 2 * longest > n:
        name = groups[sizes.argmax()] if n else ""
        raise DataError(
            f"{where}: {longest} of {n} interactions are of one conversation ('{name}'), so there "
            "are too few follow-ups of others to compare with: add conversations, or, where these "
            "are several, ids of the form conversation_turn"
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
    """A 95% bootstrap interval. Whole groups are drawn: turns of one conversation, say, are not
    independent.

    Args:
        columns: k of (n,), drawn together: what is compared in pairs stays paired.
        groups: (n,) labels.
        statistic: of the columns' means, (k,).
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
    """Which of (n,) magnitudes lie far below or above the rest, by the modified z-score of their
    logarithms; none where half of them are equal."""
    logs = np.log(np.maximum(values, 1e-12))
    deviation = logs - np.median(logs)
    mad = np.median(np.abs(deviation))
    if not mad:
        return [None] * len(values)
    z = 0.6745 * deviation / mad
    return ["high" if x > OUTLIER else "low" if x < -OUTLIER else None for x in z]


def figures(own: NDArray, other: NDArray) -> tuple:
    """A row of `FIGURES` from the advantages of a response's tokens, twice (tokens,)."""
    mean_abs, shuffled = float(np.abs(own).mean()), float(np.abs(other).mean())
    difference = float(np.abs(own - other).mean())
    most = float(np.abs(own).max())
    return len(own), float(own.mean()), mean_abs, most, shuffled, difference, mean_abs - shuffled


class FollowUps:
    """Texts in a file, by number: a log's need not fit into memory."""

    def __init__(self, file: BinaryIO):
        self._file, self._ends = file, [0]

    def append(self, text: str) -> None:
        """The next one."""
        self._ends.append(self._ends[-1] + self._file.write(text.encode()))

    def __getitem__(self, i: int) -> str:
        self._file.seek(self._ends[i])
        return self._file.read(self._ends[i + 1] - self._ends[i]).decode()


def score(
    model,
    tokenizer,
    pairs: Iterable[tuple[Interaction, str]],
    config: HindsightConfig,
    *,
    batch_tokens: int = 8192,
) -> Iterator[tuple]:
    """Rows of `FIGURES` for interactions, each with another conversation's follow-up."""
    from .signal import read

    pairs, device = iter(pairs), str(model.module.device)
    while chunk := list(islice(pairs, CHUNK)):
        encoded = [encode(i, tokenizer, config) for i, _ in chunk]
        swapped = [replace(i, followup=other) for i, other in chunk]
        others = [(encode(i, tokenizer, config).hindsight,) for i in swapped]
        passes = read(model, encoded, others, device=device, batch_tokens=batch_tokens)
        for e, logps in zip(encoded, passes, strict=True):
            policy, own, other = (logp.double().numpy() for logp in logps)
            row = figures(own - policy, other - policy)
            if not np.isfinite(row).all():
                raise DataError(
                    f"interaction {e.id}: its log-probabilities are not finite; the model "
                    "overflows in this dtype, try --dtype float32"
                )
            yield row


def score_command(
    *,
    model: str,
    interactions: str,
    out: str,
    template: str = "paper-offline",
    max_prompt_tokens: int = 2048,
    max_hindsight_prompt_tokens: int = 4096,
    max_response_tokens: int = 2048,
    batch_tokens: int = 8192,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    seed: int = 0,
) -> None:
    """How much each follow-up says about its response, beside another conversation's follow-up.

    Args:
        model: local Hugging Face folder of any causal LM.
        interactions: as `sdpo data prepare` writes them.
        out: JSONL to write, a row per interaction; training selects by it.
        template: hindsight template, a preset or a text with {followup}.
        max_prompt_tokens: longer prompts lose their left end.
        max_hindsight_prompt_tokens: the same for prompts with a follow-up.
        max_response_tokens: longer responses lose their right end.
        batch_tokens: tokens of one pass computed at a time.
        dtype: of the weights; auto is bfloat16 on a GPU, float32 on a CPU.
        seed: of who gets whose follow-up.
    """
    from sdpo_parallel.transformers.engine import load_model

    config = HindsightConfig(
        template=template,
        max_prompt_tokens=max_prompt_tokens,
        max_hindsight_prompt_tokens=max_hindsight_prompt_tokens,
        max_response_tokens=max_response_tokens,
    )
    with tempfile.TemporaryFile() as file:
        ids, conversations, texts = _first_look(interactions, FollowUps(file))
        partner = strangers(conversations, seed, interactions)
        tokenizer, policy = load_tokenizer(model), load_model(model, dtype=dtype)
        data = zip(iter_interactions(interactions), partner, strict=True)
        pairs = ((interaction, texts[j]) for interaction, j in data)
        rows = score(policy, tokenizer, pairs, config, batch_tokens=batch_tokens)
        rows = track(rows, description="reading three times", total=len(ids))
        table = np.fromiter(rows, FIGURES, count=len(ids))
    flags = outliers(table["mean_abs_advantage"])
    _write(Path(out), ids, table, flags)
    console = Console()
    _show(console, table, conversations, seed)
    _name_outliers(console, interactions, table, flags)
    console.print(f"{len(ids):,} rows -> {out}", markup=False, soft_wrap=True)


def _first_look(path: str, texts: FollowUps) -> tuple[list[str], list[str], FollowUps]:
    """Ids, conversations and follow-ups of a file of interactions."""
    ids, conversations = [], []
    for i in iter_interactions(path):
        ids.append(i.id)
        conversations.append(conversation_of(i.id, i.turn_id))
        texts.append(i.followup)
    return ids, conversations, texts


def _write(out: Path, ids: Sequence[str], table: NDArray, flags: Sequence[str | None]) -> None:
    """All rows or no file."""
    names = FIGURES.names or ()
    with written_whole(out) as file:
        for id, values, flag in zip(ids, table, flags, strict=True):
            row = {"id": id, **dict(zip(names, values.item(), strict=True)), "outlier": flag}
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def share(means: NDArray) -> float:
    """Of the signal, what is about the follow-up: from the means of |A_own - A_other|, |A_own|
    and |A_other|; 0 where there is no signal."""
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
    """Counts of both tails, and the furthest few with their text."""
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
        for name, words in (("answer", i.response), ("follow-up", i.followup)):
            console.print(f"{name:>14}: {shortened(words)}", markup=False, highlight=False)


def shortened(text: str) -> str:
    """On one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
