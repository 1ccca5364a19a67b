"""`sdpo evaluate alpaca`: AlpacaEval 2, replayed from verdicts or judged through its own package.

The benchmark: 805 instructions, a reference's outputs (gpt4_1106_preview) and a judge that says for
each instruction how likely it prefers the model's output: `preference` is 1 plus that probability.
Files have AlpacaEval's formats, plain or compressed:

    outputs      [{"dataset", "instruction", "output", "generator"}, …], and where it is known
                 "finished", whether an output ended by itself
    annotations  [{"instruction", "output_1", "generator_1", "output_2", "generator_2",
                 "preference"}, …], where 1 is the reference and 2 the model, and where it is known
                 "annotator", the judge

All numbers are computed by the package alpaca_eval (extra `eval`) and have the leaderboard's names.

Length-controlled win rate. alpaca_eval fits the judge's verdicts by a logistic regression on the
difference in length, the instruction's difficulty and the model, and predicts the win rate at equal
lengths. It regularises the fit with two gamed baselines, verbose and concise answers of the
reference, which it reads from the hub. `GAMED` stands in for that file: the same instructions,
lengths and difficulties, but in place of the judge's verdicts on the two the probabilities that
have the same sufficient statistics; `benchmarks/gamed_baselines.py` recovers them from published
fits. So a fit under a given penalty is the published one; which penalty cross-validation chooses
may differ, as folds see single verdicts. Of the 50 published rows that it was compared with, 37 are
met within 0.02 points, gemma-7b-it by 10.426 for 10.426, and the furthest is 0.15 points off.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any
from unittest.mock import patch

import tyro
from rich.console import Console

from ..errors import SdpoError
from ..io.fields import as_text, bad, shown
from ..io.files import sha256, write_text, written_whole
from .files import SameName, finished_of, read_by
from .style import Style, add_style, comparison

BENCHMARK = "AlpacaEval 2"
GAMED = Path(__file__).with_name("gamed.csv.gz")
"""The gamed baselines, in the format of the hub's df_gamed.csv."""
ASKED = 64
"""Outputs that are judged before what was said is written down."""
INSTRUCTIONS = "bfe8c45991f635de0b1f94abeeb1335ef665d58eddd87ddf6fa71b7b0c2ce7a5"
"""SHA-256 of the benchmark's instructions in the order of `GAMED`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What a model answered to an instruction."""

    instruction: str
    output: str
    generator: str
    """The model's name."""
    dataset: str = ""
    """The part of AlpacaEval that the instruction is from."""
    finished: bool | None = None
    """Whether it ended by itself; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """A model's outputs, in the order of the instructions."""

    file: str
    generator: str
    rows: tuple[Output, ...]

    def style(self) -> Style:
        """Their style markers."""
        return Style.of([row.output for row in self.rows], [row.finished for row in self.rows])


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """A row of the leaderboard, under its own names; rates in percent."""

    win_rate: float
    """Mean preference for the model."""
    standard_error: float
    n_wins: int
    n_wins_base: int
    """Wins of the reference."""
    n_draws: int
    n_total: int
    """Instructions with a verdict."""
    discrete_win_rate: float
    """Each verdict rounded to a win, a draw or a loss."""
    avg_length: int
    """Characters of the model's outputs, rounded down."""
    length_controlled_winrate: float | None = None
    """None unless the instructions are the benchmark's own, in its order."""
    lc_standard_error: float | None = None


# Files


def read_outputs(path: str | Path, of: Outputs | None = None) -> Outputs:
    """A model's outputs, in the file's order or in that of another's outputs.

    Args:
        of: the reference's, whose instructions it must have answered, each once.

    Raises:
        DataError: a row is bad, repeated, missing, of another instruction or of another model.
    """
    name, asked = SameName("generator"), [row.instruction for row in of.rows] if of else None
    rows = read_by(
        "instruction",
        path,
        lambda row: _output(row, name),
        known=None if asked is None else set(asked),
        wanted=asked,
        source=of.file if of else "",
    )
    return Outputs(file=str(path), generator=name.name, rows=tuple(rows.values()))


def _output(row: dict[str, Any], name: SameName) -> Output:
    return Output(
        instruction=row["instruction"],
        output=as_text(row.get("output"), "output"),
        generator=name(row),
        dataset=as_text(row.get("dataset") or "", "dataset"),
        finished=finished_of(row),
    )


def write_outputs(path: str | Path, outputs: Iterable[Output]) -> None:
    """Write outputs as AlpacaEval reads them, whole or not at all."""
    rows = [{k: v for k, v in asdict(row).items() if v is not None} for row in outputs]
    with written_whole(path) as file:
        json.dump(rows, file, indent=2, ensure_ascii=False)


def read_annotations(path: str | Path, reference: Outputs, model: Outputs) -> list[dict[str, Any]]:
    """The verdicts on a model's outputs, in their order, as alpaca_eval takes them.

    A `preference` of null, where the judge gave none, becomes NaN.

    Raises:
        DataError: a row is bad, repeated, missing or of another instruction; its outputs are not
            those that it must be about, or the wrong way round.
    """
    sides = {a.instruction: (a, b) for a, b in zip(reference.rows, model.rows, strict=True)}
    rows = read_by(
        "instruction",
        path,
        lambda row: _verdict(row, *sides[row["instruction"]]),
        known=sides,
        wanted=list(sides),
        source=reference.file,
    )
    return list(rows.values())


def judges_of(verdicts: Sequence[dict[str, Any]]) -> list[str]:
    """Whose verdicts they are; empty where they do not say."""
    return sorted({row["annotator"] for row in verdicts} - {""})


def _verdict(row: dict[str, Any], reference: Output, model: Output) -> dict[str, Any]:
    ours = {"instruction": reference.instruction}
    for field in ("generator", "output"):
        first, second = (as_text(row.get(f"{field}_{i}"), f"{field}_{i}") for i in (1, 2))
        needed = getattr(reference, field), getattr(model, field)
        if (first, second) != needed:
            side = 1 if first != needed[0] else 2
            if (second, first) == needed:
                problem = "the reference and the model are the wrong way round"
                hint = "1 must be the reference, 2 the model; swap the files, or judge again"
            else:
                problem = f"found {shown((first, second)[side - 1])}, not what the file of outputs "
                problem += f"has, {shown(needed[side - 1])}"
                hint = "Give the outputs that were judged"
            raise bad(f"{field}_{side}", problem, hint)
        ours |= {f"{field}_1": first, f"{field}_2": second}
    judge = as_text(row.get("annotator") or "", "annotator")
    return ours | {"preference": _preference(row.get("preference")), "annotator": judge}


def _preference(value: Any) -> float:
    if value is None:
        return math.nan
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value == 0 or 1 <= value <= 2):
        problem = f"found {shown(value)}, which is no verdict"
        hint = "Write 1 (the reference) to 2 (the model), 1.5 or 0 for a draw, null for none"
        raise bad("preference", problem, hint)
    return float(value)


# Numbers


def win_rate(verdicts: Sequence[dict[str, Any]], model: Outputs) -> WinRate:
    """The leaderboard's row of a model.

    Args:
        verdicts: as `read_annotations` returns them.

    Raises:
        SdpoError: no verdict among them, or no package alpaca_eval.
    """
    if all(math.isnan(row["preference"]) for row in verdicts):
        raise SdpoError(f"{model.file}: not one output has a verdict; judge them again")
    metrics = _package("alpaca_eval.metrics")
    text = "\0".join(row.instruction for row in model.rows)
    if hashlib.sha256(text.encode()).hexdigest() == INSTRUCTIONS:
        found = _length_controlled(verdicts)
    else:
        found = metrics.get_winrate(verdicts)
    length = sum(len(row.output) for row in model.rows) // len(model.rows)
    counts = {k: int(v) if k.startswith("n_") else float(v) for k, v in found.items()}
    return WinRate(avg_length=length, **counts)  # pyright: ignore[reportArgumentType]


def _length_controlled(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What alpaca_eval's own function returns where `GAMED` is what the hub has."""
    glm = _package("alpaca_eval.metrics.glm_winrate")
    with (
        patch.object(glm, "hf_hub_download", lambda **_: str(GAMED)),
        glm.sklearn.config_context(),  # the fit changes it
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # scikit-learn's, about its own arguments
        return glm.get_length_controlled_winrate(verdicts, save_weights_dir=None)


def _package(module: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what alpaca_eval imports
            return import_module(module)
    except ImportError as error:
        problem = f"AlpacaEval needs the package alpaca_eval ({error})"
        raise SdpoError(f"{problem}: pip install 'sdpo[eval]'") from None


def judge(path: str | Path, reference: Outputs, model: Outputs, config: str) -> None:
    """Have alpaca_eval judge a model's outputs, and write the annotations.

    Which of the two outputs a judge sees first is drawn by alpaca_eval. What was judged is kept
    beside the file until all is: asking again after a failure goes on from there.

    Args:
        path: where to write; there must be no file.
        config: one of alpaca_eval's annotators, such as weighted_alpaca_eval_gpt4_turbo, or a
            folder or file with another's configuration.
    """
    path = Path(path)
    if path.exists():
        raise SdpoError(f"{path} exists; replay it without --judge, or remove it")
    annotators, utils = _package("alpaca_eval.annotators"), _package("alpaca_eval.utils")
    annotator = annotators.PairwiseAnnotator(annotators_config=config, caching_path=None)
    sides = [[_plain(row) for row in outputs.rows] for outputs in (reference, model)]
    asked = hashlib.sha256(json.dumps([config, sides]).encode()).hexdigest()
    kept = path.with_name(f"{path.name}.{asked[:8]}.partial")
    done = json.loads(kept.read_text("utf-8")) if kept.is_file() else []
    for start in range(len(done), len(model.rows), ASKED):
        first, second = (side[start : start + ASKED] for side in sides)
        rows = annotator.annotate_head2head(outputs_1=first, outputs_2=second)
        done += json.loads(utils.convert_to_dataframe(rows).to_json(orient="records"))
        write_text(kept, json.dumps(done))
    write_text(path, json.dumps(done, indent=2))
    kept.unlink()


def _plain(row: Output) -> dict[str, str]:
    return {"instruction": row.instruction, "output": row.output, "generator": row.generator}


# The command


def command(
    *,
    outputs: str,
    reference: str,
    annotations: str,
    judge_by: Annotated[str, tyro.conf.arg(name="judge")] = "",
    out: str | None = None,
) -> None:
    """AlpacaEval 2: win rate, length-controlled win rate and style of a model's outputs.

    Args:
        outputs: the model's, a JSON file as AlpacaEval has them.
        reference: those of the reference, gpt4_1106_preview on the leaderboard.
        annotations: the verdicts to replay or, with --judge, the file to write them to.
        judge_by: alpaca_eval's name for the judge to ask, or the path of its configuration; it
            needs that judge's API key. Without, nothing is asked.
        out: JSON file to write all numbers to.
    """
    base = read_outputs(reference)
    model = read_outputs(outputs, of=base)
    if judge_by:
        judge(annotations, base, model, judge_by)
    verdicts = read_annotations(annotations, base, model)
    rate, judges = win_rate(verdicts, model), judges_of(verdicts)
    styles = model.style(), base.style()
    _show(rate, (model.generator, base.generator), styles, judges)
    if out is not None:
        report: dict[str, Any] = {"benchmark": BENCHMARK, "model": model.generator}
        report |= {"reference": base.generator, "judges": judges, **asdict(rate)}
        report["style"] = {"model": asdict(styles[0]), "reference": asdict(styles[1])}
        files = {"outputs": outputs, "reference": reference, "annotations": annotations}
        report["sha256"] = {name: sha256(path) for name, path in files.items()}
        with written_whole(out) as file:
            json.dump(report, file, indent=2, allow_nan=False)


def _show(
    rate: WinRate, names: Sequence[str], styles: Sequence[Style], judges: Sequence[str]
) -> None:
    by = f", judged by {', '.join(judges)}" if judges else ""
    table = comparison(f"{BENCHMARK}, {rate.n_total} verdicts{by}", names)

    def both(name: str, percent: float, error: float) -> None:
        table.add_row(name, *(f"{p:.2f} ± {error:.2f}" for p in (percent, 100 - percent)))

    if rate.length_controlled_winrate is not None and rate.lc_standard_error is not None:
        both("length-controlled win rate", rate.length_controlled_winrate, rate.lc_standard_error)
    both("win rate, % ± standard error", rate.win_rate, rate.standard_error)
    discrete = rate.discrete_win_rate
    table.add_row("discrete win rate", f"{discrete:.2f}", f"{100 - discrete:.2f}")
    table.add_row("wins", str(rate.n_wins), str(rate.n_wins_base))
    table.add_row("draws", str(rate.n_draws), str(rate.n_draws))
    add_style(table, styles)
    console = Console()
    console.print(table)
    if rate.length_controlled_winrate is None:
        console.print("These are not AlpacaEval's instructions: no length-controlled win rate.")
