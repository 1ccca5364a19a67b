"""`sdpo evaluate preference`: which of two models a persona prefers, on the same prompts.

A persona's rule counts, where it has one; judges are models, asked in both orders. Whatever models
say is kept in books in the output's folder, from which the report can be made again offline.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..conversations import Message
from ..errors import SdpoError
from ..io.files import sha256, write_text
from ..online.prompts import read_prompts
from ..online.users.config import BudgetConfig
from ..online.users.personas import Persona, load_persona
from .intervals import Estimate, Outcome, Wins, agreement, mean, wins
from .judging import REASONS, Judged, judge
from .models import Model, find_models
from .style import Style, add_style, comparison
from .talking import Answer, Question, TalkConfig, Talker, talker

FILE = "preference.json"
PAIRS = "pairs.jsonl"
RULE = "rule"
"""What tables call a persona's own rule, among the judges."""
LETTER = 16
"""Tokens of a judge that is to say one letter."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How judges are asked."""

    reasons: bool = False
    """Let judges give their reasons before the verdict, as larger models judge better so."""
    key_variable: str = ""
    """Environment variable that holds the key of judges' servers; "" where they want none."""
    extra: str = ""
    """More of a request to a judge's server, as a JSON object."""
    concurrency: int = 16
    """Requests that a judge's server has at a time."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What each judge's server may be asked for."""

    def talk(self) -> TalkConfig:
        """As a model that answers is asked."""
        return TalkConfig(
            max_new_tokens=REASONS if self.reasons else LETTER,
            key_variable=self.key_variable,
            extra=self.extra,
            concurrency=self.concurrency,
            budget=self.budget,
        )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two models under one persona, by its rule or by one judge.

    Attributes:
        first: the model whose wins are counted.
        by: "rule", or the judge's name.
        rates: model -> share of its answers that satisfy the rule.
        difference: of both rates, the first model's less the second's.
        unread: share of a judge's replies that are no verdict, and count as ties.
    """

    persona: str
    first: str
    second: str
    by: str
    wins: Wins
    rates: dict[str, Estimate] | None = None
    difference: Estimate | None = None
    unread: float | None = None


def command(
    models: tyro.conf.Positional[tuple[str, str]],
    /,
    *,
    prompts: str,
    personas: tuple[str, ...],
    out: str,
    judges: tuple[str, ...] = (),
    oracle: bool = False,
    system: str | None = None,
    first: int | None = None,
    offline: bool = False,
    talk: TalkConfig,
    judging: JudgeConfig,
) -> None:
    """Compare two models on the same prompts, by what a persona wants.

    Args:
        models: the model that is asked about, and the one that it is compared with: folders, runs,
            RUN@SNAPSHOT, adapters, names on the hub, or URL#MODEL; NAME= before it names it.
        prompts: file of prompts: a text in each line, or rows with a prompt.
        personas: names or files of personas.
        out: folder for the report, the answers and the books of what models said.
        judges: models that judge, named as the others are; none: personas' rules alone.
        oracle: compare the second model, told in its system message what the persona wants, with
            itself without that: what a prompt alone does.
        system: text of a system message for prompts that do not begin with one.
        first: use so many prompts, from the file's beginning; None: all.
        offline: ask no model: everything must be in the books already.
        talk: how the two models answer.
        judging: how judges are asked.
    """
    folder = Path(out)
    asked = [Question(p.id, p.messages) for p in read_prompts(prompts, system)[:first]]
    who = [load_persona(name) for name in personas]
    if not judges and (ruleless := next((p.name for p in who if p.rule is None), None)):
        raise SdpoError(f"persona {ruleless} has no rule: name a model to judge it with --judges")
    pair, judge_models = find_models(models, folder), find_models(judges, folder)
    call = partial(talker, books=folder / "books", offline=offline)
    games = play(pair, asked, who, lambda model: call(model, talk), oracle=oracle)
    played = [by_rule(game) for game in games if game.persona.rule is not None]
    spent, problems = dict[str, Any](), list[str]()
    for model in judge_models:
        try:
            with closing(call(model, judging.talk())) as talking:
                played += by_judge(games, model.name, talking, asked, judging.reasons)
                spent[model.name] = talking.spent()._asdict()
        except SdpoError as error:
            problems.append(f"judge {model.name}: {error}")
    styles = dict[str, Style]()
    for game in games:
        for name, said in ((game.first, game.ones), (game.second, game.others)):
            styles[name] = Style.of([a.text for a in said], [a.finished for a in said])
    report = {
        "kind": "preference",
        "sdpo": __version__,
        "models": [asdict(model) | {"identity": model.identity} for model in pair],
        "judges": [asdict(model) | {"spent": spent.get(model.name)} for model in judge_models],
        "prompts": {"file": prompts, "sha256": sha256(prompts), "count": len(asked)},
        "settings": {"system": system, "talk": asdict(talk), "judging": asdict(judging)},
        "style": {name: asdict(style) for name, style in styles.items()},
        "compared": [asdict(one.compared) for one in played],
        "agreement": _agreements(played),
        "problems": problems,
    }
    write_text(folder / PAIRS, "".join(_pairs(asked, games, played)))
    write_text(folder / FILE, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    show(report, styles, Console())
    if problems:
        raise SdpoError("; ".join(problems) + f". All else is in {folder / FILE}")


@dataclass(frozen=True)
class Game:
    """The answers of two models to the same prompts, before one persona."""

    persona: Persona
    first: str
    second: str
    ones: list[Answer]
    others: list[Answer]

    @property
    def pairs(self) -> list[tuple[Answer, Answer]]:
        """Both answers to each prompt."""
        return list(zip(self.ones, self.others, strict=True))


@dataclass(frozen=True)
class Played:
    """What came of a game: of each pair who won, and what a judge said of it."""

    game: Game
    compared: Compared
    outcomes: Sequence[Outcome]
    judged: Sequence[Judged] | None = None


def play(
    pair: Sequence[Model],
    asked: Sequence[Question],
    personas: Sequence[Persona],
    call: Callable[[Model], Talker],
    *,
    oracle: bool,
) -> list[Game]:
    """Have both models answer; for each persona one game, and with the oracle another, of the
    second model told what the persona wants against itself."""
    one, other = pair

    def said(model: Model, questions: Sequence[Question]) -> list[Answer]:
        with closing(call(model)) as talking:
            return talking.answer(questions, f"{model.name} answers")

    ones, others = said(one, asked), said(other, asked)
    games = list[Game]()
    for persona in personas:
        games.append(Game(persona, one.name, other.name, ones, others))
        if oracle:
            told = said(other, [_told(persona, question) for question in asked])
            name = f"{other.name} told {persona.name}"
            games.append(Game(persona, name, other.name, told, others))
    return games


def by_rule(game: Game) -> Played:
    """Play a game by the persona's rule: the higher score wins."""
    persona = game.persona
    scores = [[persona.score(*answer) for answer in pair] for pair in game.pairs]
    outcomes: list[Outcome] = [
        "win" if one > other else "loss" if one < other else "tie" for one, other in scores
    ]
    met = [[persona.satisfied(*answer) for answer in pair] for pair in game.pairs]
    rates = {
        name: mean([pair[i] for pair in met]) for i, name in enumerate((game.first, game.second))
    }
    compared = Compared(
        persona=persona.name,
        first=game.first,
        second=game.second,
        by=RULE,
        wins=wins(outcomes),
        rates=rates,
        difference=mean([float(one) - other for one, other in met]),
    )
    return Played(game, compared, outcomes)


def by_judge(
    games: Sequence[Game],
    name: str,
    talking: Talker,
    prompts: Sequence[Question],
    reasons: bool,
) -> list[Played]:
    """Play games before a judge."""
    played = list[Played]()
    for game in games:
        says = f"{name} judges for {game.persona.name}"
        judged = judge(talking, game.persona, prompts, game.pairs, reasons=reasons, says=says)
        outcomes: list[Outcome] = [one.outcome for one in judged]
        unread = [verdict is None for one in judged for verdict in one.verdicts]
        compared = Compared(
            persona=game.persona.name,
            first=game.first,
            second=game.second,
            by=name,
            wins=wins(outcomes),
            unread=fmean(unread),
        )
        played.append(Played(game, compared, outcomes, judged))
    return played


def _told(persona: Persona, question: Question) -> Question:
    """A prompt with what the persona wants in its system message."""
    wants = f"This is the person you are talking with. Answer as they like it.\n\n{persona.wants}"
    own, *rest = question.messages
    if own.role == "system":
        wants = f"{own.content}\n\n{wants}"
    else:
        rest = [own, *rest]
    system = Message("system", wants.strip())
    return Question(f"{question.id}/{persona.name}", (system, *rest))


def _agreements(played: Sequence[Played]) -> list[dict[str, Any]]:
    """Of each two that decided the same game."""
    return [
        {"persona": one.compared.persona, "first": one.compared.first}
        | {"between": [one.compared.by, other.compared.by]}
        | asdict(agreement(one.outcomes, other.outcomes))
        for i, one in enumerate(played)
        for other in played[i + 1 :]
        if other.game is one.game
    ]


def _pairs(
    prompts: Sequence[Question], games: Sequence[Game], played: Sequence[Played]
) -> Iterator[str]:
    """A line for each pair of answers: both texts, and who decided how."""
    for game in games:
        own = [one for one in played if one.game is game]
        for i, (prompt, (one, other)) in enumerate(zip(prompts, game.pairs, strict=True)):
            row = {
                "prompt_id": prompt.id,
                "prompt": [m.for_template() for m in prompt.messages],
                "persona": game.persona.name,
                "answers": {game.first: one._asdict(), game.second: other._asdict()},
                "outcomes": {p.compared.by: p.outcomes[i] for p in own},
                "replies": {p.compared.by: p.judged[i].replies for p in own if p.judged},
            }
            yield json.dumps(row, ensure_ascii=False) + "\n"


def show(report: Mapping[str, Any], styles: Mapping[str, Style], console: Console) -> None:
    """Print wins, rates and style markers."""
    table = Table("persona", "by", "", "wins", "ties as half", "decided", "rates")
    table.columns[0].no_wrap = True
    for row in report["compared"]:
        won = row["wins"]
        rates = [f"{100 * rate['value']:.1f}" for rate in (row["rates"] or {}).values()]
        unread = f", {row['unread']:.0%} unread" if row["unread"] else ""
        table.add_row(
            row["persona"],
            row["by"] + unread,
            f"{row['first']} against {row['second']}",
            told(won["rate"]),
            told(won["half"]),
            f"{won['coverage']:.0%}",
            " against ".join(rates),
        )
    console.print(table)
    for row in report["agreement"]:
        kappa = "-" if row["kappa"] is None else f"{row['kappa']:.2f}"
        both = " and ".join(row["between"])
        console.print(f"{row['persona']}: {both} agree on {row['share']:.0%}, kappa {kappa}")
    table = comparison("style of the answers", list(styles))
    add_style(table, list(styles.values()))
    console.print(table)


def told(estimate: Mapping[str, float] | None) -> str:
    """An estimate and its interval, in percent."""
    if estimate is None:
        return "-"
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
