"""A step against another checkout's: one set of weights and tokens, by turns, if they agree."""

import shutil
from dataclasses import replace

import pytest

from benchmarks import step_against
from benchmarks.measure import ROOT
from benchmarks.report import read
from benchmarks.step_against import Settings, examples
from helpers import tiny

FEW = dict(interactions=3, seconds=0.01, objective=("reverse_kl",))


@pytest.fixture
def checkout(tmp_path):
    """Another version: this one's packages in another folder."""
    folder = tmp_path / "other"
    for name in ("sdpo", "kernels", "parallel"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.slow
def test_both_versions_step_and_their_ratio_is_written(checkout, models, tmp_path, capfd):
    """On a model's folder and a file of interactions; the other version says that it ran."""
    with (checkout / "sdpo" / "step.py").open("a") as file:
        file.write("\nimport sys\nprint('the other version', file=sys.stderr)\n")
    data = tiny.make_interactions(tmp_path / "i.jsonl", 8)
    given = dict(model=models("qwen3"), data=tmp_path / "i.jsonl", out=tmp_path / "out.jsonl")
    (row,) = step_against.run(Settings(against=checkout, **FEW, **given))
    assert read(given["out"]) == [row] and row["interactions"] == 3 and data
    assert row["seconds"]["now"]["rounds"] == row["ratio"]["rounds"] >= 5
    assert 0.2 < row["ratio"]["median"] < 5
    told = capfd.readouterr()
    assert told.err.count("the other version") == 1 and "now / before" in told.out


@pytest.mark.slow
def test_steps_that_differ_or_fail_have_no_ratio(checkout):
    settings = Settings(against=checkout, **FEW)
    objective = checkout / "sdpo" / "objective.py"
    text = objective.read_text()
    assert "class ReverseKL" in text
    objective.write_text(text.replace("linear_reverse_kl", "linear_forward_kl"))
    with pytest.raises(ValueError, match="the two steps differ: loss"):
        step_against.run(settings)
    objective.write_text("import no_such_module\n")
    with pytest.raises(RuntimeError, match="this version's step failed"):
        step_against.run(settings)


def test_interactions_that_are_short_enough_are_taken(models, tmp_path):
    tiny.make_interactions(tmp_path / "i.jsonl", 8)
    settings = Settings(against=tmp_path, model=models("qwen3"), data=tmp_path / "i.jsonl", **FEW)
    assert len(examples(settings)) == 3
    assert len({e.policy for e in examples(settings)}) == 3
    with pytest.raises(ValueError, match="only 0 of 10 characters"):
        examples(replace(settings, characters=10))
