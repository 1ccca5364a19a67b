"""Two of the paper's rows in miniature, on SmolLM2, from its data to its numbers."""

import json

import pytest

from sdpo.cli import main
from sdpo.reproduce.steps import Step


def reproduce(row, model, out):
    main(["reproduce", row, "--miniature", "--model", model, "--out", str(out)])
    report = json.loads((out / "reproduce.json").read_text())
    return {number["says"]: number["ours"] for number in report["numbers"]}


@pytest.fixture
def never_again(monkeypatch):
    """Call it, and steps that run fail."""

    def forbid():
        def run(self):
            assert self.makes.exists(), f"{self.name} would be run again"

        monkeypatch.setattr(Step, "run", run)

    return forbid


def test_r6_a_user_who_changes_their_mind(smollm2, tmp_path, never_again):
    ours = reproduce("R6", smollm2, tmp_path)
    assert None not in ours.values()
    assert ours["wins for concise at its phase's end"] > 75
    assert ours["wins for detailed there"] < 25
    assert ours["answers still concise at the end, %"] < 50
    assert (tmp_path / "report" / "report.html").is_file()
    never_again()
    assert reproduce("R6", smollm2, tmp_path) == ours


def test_r8_what_follow_ups_say_about_tokens(smollm2, tmp_path):
    (ratio,) = reproduce("R8", smollm2, tmp_path).values()
    effects = json.loads((tmp_path / "effects.json").read_text())
    assert ratio == effects["ratio"]["value"] and 0 < ratio < 5
    assert "<svg" in (tmp_path / "signal.svg").read_text()
