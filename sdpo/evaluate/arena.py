"""`sdpo evaluate arena`: Arena-Hard v2, answers in its format and judgments replayed.

The benchmark (github.com/lmarena/arena-hard-auto): 500 hard prompts and 250 of creative writing. A
judge compares a model's answer with that of the category's baseline twice, each answer first once.
Files are JSON lines, as its `gen_answer.py` and `gen_judgment.py` write them:

    questions   {"uid", "category", "subcategory", "prompt"}
    answers     {"uid", "ans_id", "model", "messages", "tstamp"}; the last message is the answer,
                {"role": "assistant", "content": {"answer": …}}, and where it is known the row has
                "finished", whether it ended by itself
    judgments   {"uid", "category", "judge", "model", "baseline", "games"}: two games, each with
                "score", a verdict such as "A>>B", the judge's text in "judgment" and its "prompt";
                in the first game A is the baseline, in the second the model

Scores are those of its `show_result.py` without style control: a verdict is 1 for the model, 0 for
the baseline and 1/2 for a tie, "much better" counts three times, and games without a verdict are
left out with their pair. There the score is the mean of 100 resamplings; here it is what they vary
around, and the interval draws whole questions, as the verdicts on one are not independent.
"""

import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.console import Console

from ..analysis.score import interval
from ..errors import DataError, SdpoError
from ..io.fields import as_list, as_object, as_text, bad, listed, shown
from ..io.files import sha256, written_whole
from .files import SameName, finished_of, read_by
from .style import Style, add_style, comparison

BENCHMARK = "Arena-Hard v2"
BASELINES = {
    "hard_prompt": "o3-mini-2025-01-31",
    "creative_writing": "gemini-2.0-flash-001",
}
"""Whose answers a category's are compared with."""
WEIGHT = 3
"""What "much better" counts."""
PROMPT = (
    "<|User Prompt|>\n{question}\n\n"
    "<|The Start of Assistant A's Answer|>\n{a}\n<|The End of Assistant A's Answer|>\n\n"
    "<|The Start of Assistant B's Answer|>\n{b}\n<|The End of Assistant B's Answer|>"
)
"""What a judge is given."""
_A_IS_BETTER = {
    "A>>B": (1.0,) * WEIGHT,
    "A>B": (1.0,),
    "A=B": (0.5,),
    "B>A": (0.0,),
    "B>>A": (0.0,) * WEIGHT,
}
VERDICTS = _A_IS_BETTER | {
    "B<<A": _A_IS_BETTER["A>>B"],
    "B<A": _A_IS_BETTER["A>B"],
    "B=A": _A_IS_BETTER["A=B"],
    "A<B": _A_IS_BETTER["B>A"],
    "A<<B": _A_IS_BETTER["B>>A"],
}
"""What each verdict adds to A's score, an element for each time it counts."""
_VERDICT = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt of the benchmark."""

    uid: str
    category: str
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The benchmark's prompts, by uid."""

    file: str
    by_uid: Mapping[str, Question]

    def of(self, category: str) -> list[str]:
        """The uids of a category. Raises SdpoError if it has none."""
        found = [q.uid for q in self.by_uid.values() if q.category == category]
        if not found:
            known = sorted({q.category for q in self.by_uid.values()})
            problem = f"{self.file} has no questions of category {category!r}"
            raise SdpoError(f"{problem}; its categories are {listed(known)}")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model answered to a question."""

    uid: str
    text: str
    finished: bool | None = None
    """Whether it ended by itself; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's answers, by uid."""

    file: str
    model: str
    by_uid: Mapping[str, Answer]

    def style(self, uids: Iterable[str]) -> Style:
        """Style markers of the answers to some questions."""
        rows = [self.by_uid[uid] for uid in uids]
        return Style.of([row.text for row in rows], [row.finished for row in rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """What a judge said about a question in its two games: the model's scores, one for each time
    that a verdict counts; none where a game has no verdict."""

    uid: str
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A model's score in a category, in percent, with its 95% bootstrap interval."""

    category: str
    baseline: str
    judges: tuple[str, ...]
    win_rate: float
    low: float
    high: float
    questions: int
    pairs: int
    """Pairs of games with two verdicts."""
    unjudged: int
    """Pairs left out, as a game has no verdict."""
    model: Style
    """Of the model's answers."""
    reference: Style
    """Of the baseline's answers."""


# Files


def read_questions(path: str | Path) -> Questions:
    """The benchmark's questions. Raises DataError for a row that is bad or repeated."""

    def parse(row: dict[str, Any]) -> Question:
        names = ("uid", "category", "prompt")
        return Question(**{name: as_text(row.get(name), name) for name in names})

    return Questions(file=str(path), by_uid=read_by("uid", path, parse))


def read_answers(
    path: str | Path, questions: Questions, wanted: Sequence[str], model: str = ""
) -> Answers:
    """A model's answers to some questions.

    Args:
        wanted: their uids.
        model: the model that they must be of; "": any, but one.

    Raises:
        DataError: a row is bad, repeated, missing, of another question or of another model.
    """
    name = SameName("model", model)

    def parse(row: dict[str, Any]) -> Answer:
        name(row)
        return _answer(row, questions.by_uid[row["uid"]])

    known = questions.by_uid
    rows = read_by("uid", path, parse, known=known, wanted=wanted, source=questions.file)
    return Answers(file=str(path), model=name.name, by_uid=rows)


def _answer(row: dict[str, Any], question: Question) -> Answer:
    messages = as_list(row.get("messages"), "messages")
    roles = [as_object(m, f"messages[{i}]").get("role") for i, m in enumerate(messages)]
    if roles[-2:] != ["user", "assistant"]:
        problem = "the last two messages are not the user's prompt and the assistant's answer"
        raise bad("messages", problem, "Write both, in this order")
    if messages[-2].get("content") != question.prompt:
        problem = "the prompt is not the question's"
        field = f"messages[{len(messages) - 2}].content"
        raise bad(field, problem, "Answer the questions of the same file, unchanged")
    field = f"messages[{len(messages) - 1}].content"
    content = as_object(messages[-1].get("content"), field)
    text = as_text(content.get("answer"), f"{field}.answer")
    return Answer(uid=question.uid, text=text, finished=finished_of(row))


def write_answers(
    path: str | Path, model: str, questions: Questions, answers: Iterable[Answer]
) -> None:
    """Write answers as Arena-Hard's `gen_judgment.py` reads them, whole or not at all.

    The lengths and counts of formatting that its style control needs are added by its own
    `utils/add_markdown_info.py`.

    Args:
        model: the model's name; Arena-Hard looks for the file under ``<model>.jsonl``.
    """
    with written_whole(path) as file:
        for answer in answers:
            prompt = questions.by_uid[answer.uid].prompt
            row: dict[str, Any] = {
                "uid": answer.uid,
                "ans_id": uuid.uuid4().hex,
                "model": model,
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": {"answer": answer.text}},
                ],
                "tstamp": time.time(),
            }
            if answer.finished is not None:
                row["finished"] = answer.finished
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE).decode())


def read_judgments(
    path: str | Path,
    questions: Questions,
    wanted: Sequence[str],
    model: Answers,
    baselines: Mapping[str, Answers],
) -> tuple[str, dict[str, Pair]]:
    """A judge's name, and what it said about some questions.

    Args:
        baselines: the answers of each category's baseline.

    Raises:
        DataError: a row is bad, repeated, missing or of another question; a game is about other
            answers than these or the wrong way round, or its score is not what the judge wrote.
    """
    judge, name = SameName("judge"), SameName("model", model.model)

    def parse(row: dict[str, Any]) -> Pair:
        question = questions.by_uid[row["uid"]]
        judge(row)
        name(row)
        _check_text(row, "category", question.category)
        baseline = baselines[question.category]
        _check_text(row, "baseline", baseline.model)
        texts = baseline.by_uid[question.uid].text, model.by_uid[question.uid].text
        return _pair(row, question, *texts)

    known = questions.by_uid
    rows = read_by("uid", path, parse, known=known, wanted=wanted, source=questions.file)
    return judge.name, rows


def _check_text(row: dict[str, Any], field: str, needed: str) -> None:
    if (found := row.get(field)) != needed:
        problem = f"found {shown(found)} where {shown(needed)} is needed"
        raise bad(field, problem, "Give judgments of these questions and answers")


def _pair(row: dict[str, Any], question: Question, baseline: str, model: str) -> Pair:
    games = as_list(row.get("games"), "games")
    if len(games) != 2:
        hint = "Judge both orders: the baseline first, then the model first"
        raise bad("games", f"found {len(games)} games, not two", hint)
    first = _game(games[0], "games[0]", question, baseline, model)
    second = _game(games[1], "games[1]", question, model, baseline)
    if first is None or second is None:
        return Pair(uid=question.uid, scores=())
    return Pair(uid=question.uid, scores=(*second, *(1 - score for score in first)))


def _game(game: object, field: str, question: Question, a: str, b: str) -> tuple[float, ...] | None:
    """A's scores in a game; None if it has no verdict."""
    if game is None:
        return None
    row = as_object(game, field)
    _check_prompt(row.get("prompt"), f"{field}.prompt", question.prompt, a, b)
    judgment = as_object(row.get("judgment"), f"{field}.judgment")
    said = verdict(as_text(judgment.get("answer"), f"{field}.judgment.answer"))
    if said != row.get("score"):
        problem = f"the score is {shown(row.get('score'))}, but the judge wrote {shown(said)}"
        raise bad(f"{field}.score", problem, "Write what the judge's text ends with")
    if said is not None and said not in VERDICTS:
        problem = f"{shown(said)} is no verdict"
        raise bad(f"{field}.score", problem, f"It must be one of {listed(VERDICTS)}, or null")
    return None if said is None else VERDICTS[said]


def _check_prompt(prompt: object, field: str, question: str, a: str, b: str) -> None:
    messages = as_list(prompt, field)
    last = as_object(messages[-1] if messages else None, f"{field}[-1]")
    text = as_text(last.get("content"), f"{field}[-1].content")
    if text == PROMPT.format(question=question, a=a, b=b):
        return
    if text == PROMPT.format(question=question, a=b, b=a):
        hint = "In the first game A is the baseline, in the second the model; swap the games"
        raise bad(field, "the answers are the wrong way round", hint)
    problem = "the judge was not given this question with these two answers"
    raise bad(field, problem, "Give the answers that were judged")


def verdict(text: str) -> str | None:
    """The last label in a judge's text, such as A>>B of "[[A>>B]]"; None if there is none."""
    found = (pattern.findall(text.upper()) for pattern in _VERDICT)
    return next((labels[-1] for labels in found if labels), None)


# Numbers


def score(pairs: Sequence[Pair]) -> tuple[float, float, float]:
    """The mean score in percent, and its 95% bootstrap interval over questions.

    Raises:
        SdpoError: no pair has two verdicts.
    """
    judged = [pair for pair in pairs if pair.scores]
    if not judged:
        raise SdpoError("not one pair of games has two verdicts; judge them again")
    sums = np.array([sum(pair.scores) for pair in judged])
    counts = np.array([float(len(pair.scores)) for pair in judged])
    uids = [pair.uid for pair in judged]
    low, high = interval((sums, counts), uids, lambda means: float(means[0] / means[1]))
    return 100 * float(sums.sum() / counts.sum()), 100 * low, 100 * high


def evaluate(
    questions: Questions,
    model: Answers,
    baselines: Mapping[str, Answers],
    judgments: Sequence[str],
) -> list[Score]:
    """A model's score in each category, all judges together.

    Args:
        baselines: by category; their keys are the categories to look at.
        judgments: files, one for each judge.

    Raises:
        DataError: as `read_judgments`, and two files are of one judge.
    """
    wanted = {category: questions.of(category) for category in baselines}
    uids = [uid for category in wanted.values() for uid in category]
    said: dict[str, dict[str, Pair]] = {}
    for path in judgments:
        judge, pairs = read_judgments(path, questions, uids, model, baselines)
        if judge in said:
            problem = f"{shown(judge)} is the judge of another file too"
            hint = "Give one file for each judge"
            raise DataError(problem, file=str(path), field="judge", hint=hint)
        said[judge] = pairs
    return [_score(c, wanted[c], said, model, baselines[c]) for c in baselines]


def _score(
    category: str,
    uids: Sequence[str],
    said: Mapping[str, Mapping[str, Pair]],
    model: Answers,
    baseline: Answers,
) -> Score:
    pairs = [of_judge[uid] for of_judge in said.values() for uid in uids]
    win_rate, low, high = score(pairs)
    judged = sum(bool(pair.scores) for pair in pairs)
    return Score(
        category=category,
        baseline=baseline.model,
        judges=tuple(said),
        win_rate=win_rate,
        low=low,
        high=high,
        questions=len(uids),
        pairs=judged,
        unjudged=len(pairs) - judged,
        model=model.style(uids),
        reference=baseline.style(uids),
    )


# The command


def command(
    *,
    questions: str,
    answers: str,
    judgments: tuple[str, ...],
    hard_prompt: str | None = None,
    creative_writing: str | None = None,
    out: str | None = None,
) -> None:
    """Arena-Hard v2: win rate by category and style of a model's answers, from judgments.

    Args:
        questions: the benchmark's question.jsonl.
        answers: the model's, as Arena-Hard's gen_answer.py writes them.
        judgments: what its gen_judgment.py wrote about them, a file for each judge; several judges
            count alike.
        hard_prompt: answers of o3-mini-2025-01-31, which hard prompts are compared with; leave it
            out to leave out the category.
        creative_writing: answers of gemini-2.0-flash-001, with which creative writing is.
        out: JSON file to write all numbers to.
    """
    asked = read_questions(questions)
    given = {"hard_prompt": hard_prompt, "creative_writing": creative_writing}
    files = {category: path for category, path in given.items() if path is not None}
    if not files or not judgments:
        raise SdpoError(
            "nothing to compare; give --judgments, and the baseline's answers in --hard-prompt, in "
            "--creative-writing or in both"
        )
    baselines = {
        category: read_answers(path, asked, asked.of(category), BASELINES[category])
        for category, path in files.items()
    }
    model = read_answers(answers, asked, [uid for category in files for uid in asked.of(category)])
    scores = evaluate(asked, model, baselines, judgments)
    _show(model.model, scores)
    if out is not None:
        report: dict[str, Any] = {"benchmark": BENCHMARK, "model": model.model}
        report["scores"] = [asdict(s) for s in scores]
        read = {"questions": questions, "answers": answers, **files}
        hashes = {name: sha256(path) for name, path in read.items()}
        report["sha256"] = {**hashes, "judgments": [sha256(path) for path in judgments]}
        with written_whole(out) as file:
            json.dump(report, file, indent=2, allow_nan=False)


def _show(model: str, scores: Sequence[Score]) -> None:
    names = [
        f"{s.category.replace('_', ' ')}\n{name}" for s in scores for name in (model, s.baseline)
    ]
    table = comparison(f"{BENCHMARK}, judged by {', '.join(scores[0].judges)}", names)
    rates = [r for s in scores for r in (s.win_rate, 100 - s.win_rate)]
    table.add_row("win rate, %", *(f"{rate:.1f}" for rate in rates))
    sides = [i for s in scores for i in ((s.low, s.high), (100 - s.high, 100 - s.low))]
    table.add_row("95% interval", *(f"{low:.1f} – {high:.1f}" for low, high in sides))
    counts = [f"{s.pairs} ({s.unjudged})" for s in scores for _ in range(2)]
    table.add_row("pairs (unjudged)", *counts)
    add_style(table, [style for s in scores for style in (s.model, s.reference)])
    Console().print(table)
