"""AlpacaEval: the published verdicts on gemma-7b-it, whole, in part and spoiled."""

import json
import math
import random
import sys
from pathlib import Path

import pytest

from helpers import runs
from helpers.leaderboards import alpaca_arguments, alpaca_verdicts, side, write_json
from sdpo.cli import main
from sdpo.errors import DataError, SdpoError
from sdpo.evaluate import alpaca

LEADERBOARD = {  # its row of gemma-7b-it
    "win_rate": 6.937294379677018,
    "standard_error": 0.7869665731853178,
    "n_wins": 50,
    "n_wins_base": 754,
    "n_draws": 1,
    "n_total": 805,
    "discrete_win_rate": 6.273291925465839,
    "avg_length": 1115,
}
LENGTH_CONTROLLED = 10.425760403690134


@pytest.fixture(scope="module")
def published() -> list[dict]:
    return alpaca_verdicts()


@pytest.fixture
def few(published) -> list[dict]:
    """Rows that a test may spoil."""
    return [dict(row) for row in published[:6]]


def outputs(tmp_path: Path, rows: list[dict]) -> tuple[alpaca.Outputs, alpaca.Outputs]:
    """Of the reference and of the model, in files."""
    base = alpaca.read_outputs(write_json(tmp_path / "reference.json.gz", side(rows, 1)))
    return base, alpaca.read_outputs(write_json(tmp_path / "model.json", side(rows, 2)), of=base)


def rate(tmp_path: Path, rows: list[dict], verdicts: list[dict]) -> alpaca.WinRate:
    base, model = outputs(tmp_path, rows)
    path = write_json(tmp_path / "annotations.json", verdicts)
    return alpaca.win_rate(alpaca.read_annotations(path, base, model), model)


def test_published_verdicts_give_the_leaderboards_row(published, tmp_path, capsys):
    out = tmp_path / "report.json"
    named = [row | {"annotator": "gpt-4-turbo"} for row in published]
    main([*alpaca_arguments(tmp_path, published, named), "--out", str(out)])
    report = json.loads(out.read_text())
    assert {name: report[name] for name in LEADERBOARD} == pytest.approx(LEADERBOARD)
    assert report["length_controlled_winrate"] == pytest.approx(LENGTH_CONTROLLED, abs=0.01)
    assert report["style"]["model"]["characters"] == pytest.approx(1115.97, abs=0.01)
    assert report["style"]["reference"]["characters"] > 2000
    assert report["judges"] == ["gpt-4-turbo"]
    shown = capsys.readouterr().out
    assert "judged by gpt-4-turbo" in shown and "gemma-7b-it" in shown
    assert "gpt4_1106_preview" in shown
    assert "10.43 ± 0.48" in shown and "93.06 ± 0.79" in shown


def test_verdicts_may_be_in_any_order(published, tmp_path):
    shuffled = random.Random(0).sample(published, len(published))
    found = rate(tmp_path, published, shuffled)
    assert found.length_controlled_winrate == pytest.approx(LENGTH_CONTROLLED, abs=0.01)


def test_longer_outputs_with_the_same_verdicts_are_worth_less(published, tmp_path):
    """Length control: padded outputs that win as often as before win less at equal lengths."""
    liked = [row | {"preference": max(row["preference"], 1.3)} for row in published]
    padded = [row | {"output_2": row["output_2"] + "x" * 3000} for row in liked]
    short, long = (rate(tmp_path, rows, rows) for rows in (liked, padded))
    assert short.win_rate == long.win_rate
    assert short.length_controlled_winrate and long.length_controlled_winrate
    assert long.length_controlled_winrate < short.length_controlled_winrate - 5


def test_other_instructions_have_no_length_controlled_win_rate(few, tmp_path, capsys):
    found = rate(tmp_path, few, few)
    assert found.length_controlled_winrate is None and found.lc_standard_error is None
    mean = sum(row["preference"] - 1 for row in few) / len(few)
    assert found.win_rate == pytest.approx(100 * mean)
    main(alpaca_arguments(tmp_path, few, few))
    assert "no length-controlled win rate" in capsys.readouterr().out


def test_a_zero_is_a_draw_and_a_null_is_no_verdict(few, tmp_path):
    few[0]["preference"], few[1]["preference"] = 0, None
    found = rate(tmp_path, few, few)
    assert (found.n_total, found.n_draws) == (5, 1)
    for row in few:
        row["preference"] = None
    with pytest.raises(SdpoError, match=r"model\.json: not one output has a verdict"):
        rate(tmp_path, few, few)


def swap(row: dict, *fields: str) -> None:
    for field in fields:
        first, second = f"{field}_1", f"{field}_2"
        row[first], row[second] = row[second], row[first]


SPOILED = {
    "swapped outputs": (lambda rows: swap(rows[2], "output"), "2", "output_1", "wrong way round"),
    "swapped sides": (
        lambda rows: swap(rows[0], "output", "generator"),
        "0",
        "generator_1",
        "wrong way round",
    ),
    "edited": (lambda rows: rows[3].update(output_2="."), "3", "output_2", "outputs that were"),
    "other model": (lambda rows: rows[3].update(generator_2="x"), "3", "generator_2", "not what"),
    "twice": (lambda rows: rows.append(rows[1]), "6", "instruction", "of item 1"),
    "foreign": (lambda rows: rows[1].update(instruction="Hi"), "1", "instruction", "no instruc"),
    "no text": (lambda rows: rows[1].update(output_1=None), "1", "output_1", "text is needed"),
    "beyond": (lambda rows: rows[4].update(preference=2.5), "4", "preference", "no verdict"),
    "below": (lambda rows: rows[4].update(preference=0.5), "4", "preference", "no verdict"),
    "true": (lambda rows: rows[4].update(preference=True), "4", "preference", "no verdict"),
    "text": (lambda rows: rows[4].update(preference="2"), "4", "preference", "no verdict"),
    "nan": (lambda rows: rows[4].update(preference=math.nan), "4", "preference", "no verdict"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_verdicts_are_refused(name, few, published, tmp_path):
    spoil, item, field, says = SPOILED[name]
    base, model = outputs(tmp_path, published[:6])
    spoil(few)
    path = write_json(tmp_path / "spoiled.json", few)
    with pytest.raises(DataError) as error:
        alpaca.read_annotations(path, base, model)
    assert str(error.value).startswith(f"{path}, item {item} (counted from 0), field `{field}`: ")
    assert says in str(error.value)


def test_missing_verdicts_are_refused(few, tmp_path, capsys):
    refused = runs.refused(capsys, *alpaca_arguments(tmp_path, few, few[:3] + few[5:]))
    assert "a.json, field `instruction`: 2 of 6 rows are missing, first that of " in refused
    assert few[3]["instruction"][:20] in refused


def test_swapped_files_are_refused(few, tmp_path, capsys):
    said = alpaca_arguments(tmp_path, few, few)
    said[2], said[4] = said[4], said[2]
    assert "wrong way round" in runs.refused(capsys, *said)


BAD_OUTPUTS = {
    "missing": (lambda rows: rows.pop(), "1 of 6 rows are missing"),
    "twice": (lambda rows: rows.append(rows[0]), "item 6 (counted from 0), field `instruction`"),
    "foreign": (lambda rows: rows[2].update(instruction="Hi"), "'Hi' is no instruction of"),
    "two models": (lambda rows: rows[1].update(generator="x"), "item 1 (counted from 0), field `g"),
    "no text": (lambda rows: rows[1].update(output=3), "field `output`: found a number"),
    "finished": (lambda rows: rows[1].update(finished="yes"), "field `finished`: found text"),
    "nobody's": (lambda rows: rows[0].pop("generator"), "item 0 (counted from 0), field `g"),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_bad_outputs_are_refused(name, few, tmp_path):
    spoil, says = BAD_OUTPUTS[name]
    base, _ = outputs(tmp_path, few)
    rows = side(few, 2)
    spoil(rows)
    path = write_json(tmp_path / "bad.json", rows)
    with pytest.raises(DataError, match="bad.json") as error:
        alpaca.read_outputs(path, of=base)
    assert says in str(error.value)


def test_outputs_are_read_as_written(tmp_path):
    texts = [("a", True), ("ü\n🐧", False), ("", None)]
    rows = [
        alpaca.Output(instruction=f"i{i}", output=text, generator="m", finished=ended)
        for i, (text, ended) in enumerate(texts)
    ]
    alpaca.write_outputs(tmp_path / "o.json", rows)
    read = alpaca.read_outputs(tmp_path / "o.json")
    assert read.rows == tuple(rows) and read.generator == "m"
    assert read.style().finished == 0.5
    assert "finished" not in json.loads((tmp_path / "o.json").read_text())[2]


def judge_config(folder: Path) -> Path:
    """A judge of alpaca_eval's that needs no model: it always likes the output it reads first."""
    folder.mkdir()
    (folder / "prompt.txt").write_text("{instruction}\n(a) {output_1}\n(b) {output_2}")
    (folder / "configs.yaml").write_text(f"""
likes_the_first:
  prompt_template: "{folder}/prompt.txt"
  fn_completions: "test_completions"
  completions_kwargs: {{model_name: "none", value: "Output (a)"}}
  completion_parser_kwargs:
    outputs_to_match: {{1: 'Output \\(a\\)', 2: 'Output \\(b\\)'}}
""")
    return folder


def test_alpaca_evals_own_judges_can_be_asked(published, tmp_path, capsys):
    few = published[:30]
    config = judge_config(tmp_path / "likes_the_first")
    said = [*alpaca_arguments(tmp_path, few, few), "--judge", str(config)]
    assert "a.json exists; replay it without --judge" in runs.refused(capsys, *said)
    (tmp_path / "a.json").unlink()
    main(said)
    base, model = outputs(tmp_path, few)
    read = alpaca.read_annotations(tmp_path / "a.json", base, model)
    assert alpaca.judges_of(read) == ["likes_the_first"]
    judged = json.loads((tmp_path / "a.json").read_text())
    verdicts = [row["preference"] for row in judged]
    assert len(verdicts) == 30 and set(verdicts) == {1, 2}  # which is first is drawn
    assert not list(tmp_path.glob("*.partial"))
    found = rate(tmp_path, few, judged)
    assert found.win_rate == pytest.approx(100 * verdicts.count(2) / 30)


def test_a_judge_that_fails_is_not_asked_again_what_it_said(published, tmp_path, monkeypatch):
    from alpaca_eval.decoders import test

    few, asked = published[:200], []
    config = judge_config(tmp_path / "likes_the_first")
    base, model = outputs(tmp_path, few)

    def fails_at_the_end(prompts, **kwargs):
        asked.extend(prompts)
        if len(asked) == 200:
            raise ConnectionError
        return answer(prompts, **kwargs)

    answer = test.test_completions
    monkeypatch.setattr(test, "test_completions", fails_at_the_end)
    with pytest.raises(ConnectionError):
        alpaca.judge(tmp_path / "judged.json", base, model, str(config))
    assert not (tmp_path / "judged.json").exists()
    alpaca.judge(tmp_path / "judged.json", base, model, str(config))
    assert len(json.loads((tmp_path / "judged.json").read_text())) == 200
    assert len(set(asked)) == 200 and len(asked) == 200 + 200 % alpaca.ASKED


def test_without_its_package_the_error_says_what_to_install(few, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "alpaca_eval", None)
    monkeypatch.setitem(sys.modules, "alpaca_eval.metrics", None)
    with pytest.raises(SdpoError, match=r"pip install 'sdpo\[eval\]'"):
        rate(tmp_path, few, few)
