"""How much the guardrails catch, and how much they catch wrongly.

    python -m benchmarks.guardrails

Personal data and injections are measured on the labelled texts under tests/data/filters/labelled:
on their "test" half, which the patterns were not tuned on. All of it is invented, and by the
authors of the patterns: expect lower rates on real logs. Near duplicates are generated from a seed:
edits of known kinds, and pairs on one topic that share a template but are no duplicates; the truth
is the exact Jaccard index of the shingles.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import thread_time
from timeit import repeat
from typing import Any, NamedTuple

import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.report import grid
from sdpo.data.filters import duplicates, injections, pii

LABELLED = Path(__file__).parents[1] / "tests" / "data" / "filters" / "labelled"
BUCKETS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.5, 0.0)
"""Lower ends of the classes of true similarity."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the measurement."""

    pairs: int = 3000
    """Generated pairs of conversations, a quarter of them no duplicates."""
    seed: int = 0
    """Seed of the generated conversations."""


def labelled(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of one half, "tune" or "test", of a labelled file."""
    lines = (LABELLED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


# Personal data


def pii_rates(split: str = "test") -> dict[str, dict[str, int]]:
    """By kind: labelled `values`, how many were `found`, `claims` made, and how many were `right`.

    A value is found where claims of its kind cover at least half of it; a claim is right where
    labelled values of its kind cover at least half of it.
    """
    rates = {kind: dict(values=0, found=0, claims=0, right=0) for kind in pii.PII_KINDS}
    for row in labelled("pii", split):
        for kind, rate in rates.items():
            truth = [(start, end) for k, start, end in row["spans"] if k == kind]
            claims = [(s.start, s.end) for s in pii.find_pii(row["text"]) if s.kind == kind]
            rate["values"] += len(truth)
            rate["found"] += sum(_half_covered(value, claims) for value in truth)
            rate["claims"] += len(claims)
            rate["right"] += sum(_half_covered(claim, truth) for claim in claims)
    return rates


def _half_covered(span: tuple[int, int], others: Iterable[tuple[int, int]]) -> bool:
    start, end = span
    covered = sum(max(0, min(end, b) - max(start, a)) for a, b in others)
    return 2 * covered >= end - start


def flagged_negatives(split: str = "test") -> tuple[int, int]:
    """Texts that hold no personal data, and in how many of them some was found."""
    texts = [row["text"] for row in labelled("pii", split) if not row["spans"]]
    return len(texts), sum(bool(pii.find_pii(text)) for text in texts)


# Injections


def injection_rates(split: str = "test") -> dict[str, dict[str, int]]:
    """For injections and for ordinary follow-ups: how many there are, how many were caught."""
    rates = {name: dict(followups=0, caught=0) for name in ("injections", "ordinary")}
    for row in labelled("injections", split):
        rate = rates["injections" if row["injection"] else "ordinary"]
        rate["followups"] += 1
        rate["caught"] += injections.injection(row["followup"]) is not None
    return rates


# Near duplicates

_SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ker", "lin", "mor")
_CHARACTERS = [chr(0x4E00 + 7 * i) for i in range(600)]


class _Writer:
    """Invented conversations: words of syllables in sentences, or characters without spaces."""

    def __init__(self, random: random.Random):
        self.random = random
        self.words = [
            "".join(random.choices(_SYLLABLES, k=random.randint(1, 4))) for _ in range(3000)
        ]
        self.weights = [1 / rank for rank in range(1, len(self.words) + 1)]

    def some_words(self, count: int) -> list[str]:
        return self.random.choices(self.words, self.weights, k=count)

    def sentence(self) -> str:
        return " ".join(self.some_words(self.random.randint(5, 18))).capitalize() + "."

    def conversation(self) -> str:
        if self.random.random() < 0.2:
            return "".join(self.random.choices(_CHARACTERS, k=self.random.randint(80, 600)))
        sentences = [self.sentence() for _ in range(self.random.randint(6, 40))]
        return "\n".join(" ".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4))

    def on_one_topic(self) -> tuple[str, str]:
        """Two conversations that fill the same template with other words."""
        headings = [" ".join(self.some_words(6)) for _ in range(self.random.randint(2, 8))]

        def fill() -> str:
            return ".\n".join(
                f"{h}: {' '.join(self.some_words(self.random.randint(3, 12)))}" for h in headings
            )

        return fill(), fill()


def _words_replaced(text: str, writer: _Writer) -> str:
    share = 1 / writer.random.choice((10, 20, 40, 80, 160))
    spaced = " " in text
    units = text.split(" ") if spaced else list(text)
    fresh = writer.words if spaced else _CHARACTERS
    changed = [writer.random.choice(fresh) if writer.random.random() < share else u for u in units]
    return (" " if spaced else "").join(changed)


EDITS: dict[str, Callable[[str, _Writer], str]] = {
    "case and white space": lambda text, _: text.upper().replace(" ", "  "),
    "punctuation": lambda text, _: text.replace(".", "!").replace("\n", " -\n") + " ...",
    "one word in 10 to 160 replaced": _words_replaced,
    "sentence added": lambda text, writer: f"{text}\n{writer.sentence()}",
    "end cut": lambda text, writer: text[: int(len(text) * writer.random.uniform(0.6, 0.98))],
}


class Pair(NamedTuple):
    """Two conversations, what was done to the second ("" if nothing), and their similarity."""

    texts: tuple[str, str]
    edit: str
    similarity: float


def pairs(count: int, seed: int) -> list[Pair]:
    """Generated pairs; every fourth one shares no more than a template."""
    writer = _Writer(random.Random(seed))
    made = []
    for i in range(count):
        if i % 4 == 3:
            edit, (first, second) = "", writer.on_one_topic()
        else:
            edit = writer.random.choice(list(EDITS))
            first = writer.conversation()
            second = EDITS[edit](first, writer)
        made.append(Pair((first, second), edit, jaccard(first, second)))
    return made


def jaccard(first: str, second: str) -> float:
    """The exact similarity: of the sets of shingles, as sets of words."""
    some, others = _shingles(first), _shingles(second)
    return len(some & others) / len(some | others)


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = duplicates.split_words(text)
    return set(zip(*(words[i:] for i in range(duplicates.SHINGLE)), strict=False))


def duplicate_rates(generated: Sequence[Pair]) -> tuple[dict[str, Counter], dict[str, Counter]]:
    """`pairs` and `caught`, by class of similarity and by edit, with all of them in one search."""
    texts = [text for side in (0, 1) for text in (pair.texts[side] for pair in generated)]
    found = duplicates.earlier_similar(duplicates.sketches(texts))[len(generated) :]
    by_similarity, by_edit = defaultdict(Counter), defaultdict(Counter)
    for pair, original in zip(generated, found, strict=True):
        bucket = next(low for low in BUCKETS if pair.similarity >= low)
        for rate in (by_similarity[f"{bucket:.2f}"], by_edit[pair.edit or "none: only a template"]):
            rate["pairs"] += 1
            rate["caught"] += int(original >= 0)
    return dict(sorted(by_similarity.items(), reverse=True)), dict(sorted(by_edit.items()))


# Speed


def speeds(seed: int) -> dict[str, float]:
    """MB/s of one thread, best of three: the scan of all messages, and the precise patterns."""
    writer = _Writer(random.Random(seed))
    prose = [" ".join(writer.sentence() for _ in range(30)) for _ in range(1000)]
    array, megabytes = pa.array(prose), sum(map(len, prose)) / 1e6

    def speed(work: Callable[[], Any]) -> float:
        return megabytes / min(repeat(work, timer=thread_time, repeat=3, number=1))

    return {
        "suspects": speed(lambda: pii.suspects(array)),
        "find_pii": speed(lambda: [pii.find_pii(text) for text in prose]),
    }


# Tables


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _caught(title: str, rates: dict[str, Any], of: str) -> Table:
    table = grid(title, "", of, "caught", "share")
    for name, rate in rates.items():
        whole, caught = rate[of], rate["caught"]
        table.add_row(name, f"{whole:,}", f"{caught:,}", _share(caught, whole))
    return table


def _pii_table(rates: dict[str, dict[str, int]]) -> Table:
    title = "Personal data (half of a span has to overlap)"
    table = grid(title, "", "values", "recall", "claims", "precision")
    for kind, r in rates.items():
        recall, precision = _share(r["found"], r["values"]), _share(r["right"], r["claims"])
        table.add_row(kind, str(r["values"]), recall, str(r["claims"]), precision)
    return table


def main(settings: Settings) -> None:
    """Measure and print."""
    by_similarity, by_edit = duplicate_rates(pairs(settings.pairs, settings.seed))
    negatives, flagged = flagged_negatives()
    console = Console()
    console.print(_pii_table(pii_rates()))
    console.print(f"Found in {flagged} of {negatives} texts that hold none.\n")
    title = "Near duplicates, by true similarity from (threshold 0.80)"
    console.print(_caught(title, by_similarity, "pairs"))
    console.print(_caught("Near duplicates, by edit", by_edit, "pairs"))
    console.print(_caught("Prompt injections", injection_rates(), "followups"))
    for name, speed in speeds(settings.seed).items():
        console.print(f"{name}: {speed:,.1f} MB/s of one thread")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
