"""What answers look like, beside every win rate: judges prefer long and formatted ones.

By the rules of `sdpo.online.users.rules`; code is not searched for formatting. Offers, praise and
leaks are those of English.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Self

from rich.table import Table

from ..errors import SdpoError
from ..online.measures import leaks
from ..online.users.rules import (
    NoClosingOffer,
    NoPraiseOpening,
    Rule,
    count_emojis,
    count_marks,
    count_words,
)


@dataclass(frozen=True, kw_only=True)
class Marks:
    """How often answers have marks of one kind."""

    mean: float
    """Marks per answer."""
    share: float
    """Share of answers with at least one."""

    @classmethod
    def of(cls, counts: Sequence[int]) -> Self:
        """From each answer's count."""
        return cls(mean=fmean(counts), share=fmean(map(bool, counts)))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.share:.0%})"


@dataclass(frozen=True, kw_only=True)
class Style:
    """Style markers of a set of answers: means per answer, and shares of answers."""

    answers: int
    characters: float
    words: float
    list_items: Marks
    headers: Marks
    bold: Marks
    """Bold stretches."""
    table_rows: Marks
    emojis: Marks
    """Icons such as a check mark count as well."""
    blank: float
    finished: float | None
    """Share that ended by itself and was not cut at a limit, of the answers of which it is known;
    None where it is known of none."""
    praise: float
    """Share that begins with praise for the question, or with "Certainly!"."""
    offers: float
    """Share that ends with a question or an offer of more help."""
    leaks: float
    """Share whose opening speaks of feedback that nobody gave."""

    @classmethod
    def of(cls, answers: Sequence[str], finished: Iterable[bool | None] = ()) -> Self:
        """The markers of some answers.

        Args:
            finished: whether each answer ended by itself, or None where that is unknown.

        Raises:
            SdpoError: there are no answers.
        """
        if not answers:
            raise SdpoError("no answers to tell the style of; give at least one")
        marks = list(map(count_marks, answers))
        known = [f for f in finished if f is not None]
        return cls(
            answers=len(answers),
            characters=fmean(map(len, answers)),
            words=fmean(map(count_words, answers)),
            list_items=_marks(marks, "item"),
            headers=_marks(marks, "header"),
            bold=_marks(marks, "bold"),
            table_rows=_marks(marks, "table"),
            emojis=Marks.of(list(map(count_emojis, answers))),
            blank=fmean(not answer.strip() for answer in answers),
            finished=fmean(known) if known else None,
            praise=_broken(NoPraiseOpening(), answers),
            offers=_broken(NoClosingOffer(), answers),
            leaks=fmean(map(leaks, answers)),
        )


def _marks(marks: Sequence[Counter], kind: str) -> Marks:
    return Marks.of([counted[kind] for counted in marks])


def _broken(rule: Rule, answers: Sequence[str]) -> float:
    """The share of answers that break a rule; a blank one breaks none."""
    return fmean(rule.judged(answer, True) < 1 for answer in answers)


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


_ROWS: dict[str, Callable[[Style], str]] = {
    "answers": lambda s: str(s.answers),
    "characters": lambda s: f"{s.characters:,.0f}",
    "words": lambda s: f"{s.words:,.0f}",
    "list items": lambda s: str(s.list_items),
    "headers": lambda s: str(s.headers),
    "bold stretches": lambda s: str(s.bold),
    "table rows": lambda s: str(s.table_rows),
    "emojis": lambda s: str(s.emojis),
    "blank": lambda s: _share(s.blank),
    "finished": lambda s: _share(s.finished),
    "open with praise": lambda s: _share(s.praise),
    "close with an offer": lambda s: _share(s.offers),
    "leak hindsight": lambda s: _share(s.leaks),
}


def comparison(title: str, columns: Sequence[str]) -> Table:
    """An empty table with a column for each set of answers."""
    caption = "marks per answer (share of answers that have any)"
    table = Table("", *columns, title=title, caption=caption, title_justify="left")
    table.caption_justify, table.columns[0].no_wrap = "left", True
    for column in table.columns[1:]:
        column.justify, column.overflow = "right", "fold"
    return table


def add_style(table: Table, styles: Sequence[Style]) -> None:
    """Put style markers under what `comparison` holds of the same sets of answers."""
    table.add_section()
    for name, text in _ROWS.items():
        table.add_row(name, *map(text, styles))
