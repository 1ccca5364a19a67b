"""The demo's table and page."""

import io
import json

import pytest
from rich.console import Console

from sdpo.demo import report as reports


def measured(preference: float, **changes) -> dict:
    """What `measure` gives of a model, as JSON values."""
    answers = {
        "preference": {"concise": preference, "detailed": 1 - preference},
        "words": 20.0,
        "finished": 0.9,
        "leaks": 0.0,
        "similarity": 0.5,
        "entropy": 2.0,
        **{k: v for k, v in changes.items() if k != "perplexity"},
    }
    return {
        "greedy": dict(answers),
        "sampled": dict(answers),
        "perplexity": changes.get("perplexity", 30.0),
        "openings": {"policy": 0.01, "hindsight": 0.02},
    }


def a_report(**models: dict) -> dict:
    """A report in which every target is met, but for what ``models`` says."""
    values = {"before": measured(0.1), "after": measured(0.9), "changed": measured(0.2), **models}
    said = {"answer": "<b>Yes", "finished": True, "pleased": False, "reply": "<i>Shorter"}
    samples = dict.fromkeys(reports.WHEN, said) | {"changed": {**said, "reply": None}}
    return {
        "seed": 0,
        "model": {"name": "a model", "folder": "x", "parameters": 1000},
        "personas": ["concise", "detailed"],
        "updates": {"concise": 2, "detailed": 2},
        "answers": 16,
        "questions": 64,
        "temperature": 1.0,
        "max_tokens": 80,
        **reports.summary(values, "concise"),
        "measured": values,
        "table": reports.table(values, ("concise", "detailed")),
        "signal": {"what users said": 0.3, "other remarks": 0.1},
        "samples": [{"question": "Why?"} | dict.fromkeys(reports.DECODINGS, samples)],
        "seconds": {"training": 1.0, "total": 1.0},
    }


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("preference.before.greedy", {"before": measured(0.26)}),
        ("preference.after.sampled", {"after": measured(0.74)}),
        ("preference.changed.greedy", {"changed": measured(0.36)}),
        ("kept.perplexity_ratio", {"after": measured(0.9, perplexity=31.6)}),
        ("kept.entropy_ratio", {"after": measured(0.9, entropy=1.49)}),
        ("kept.entropy_ratio", {"changed": measured(0.2, entropy=2.51)}),
        ("kept.similarity_ratio", {"changed": measured(0.2, similarity=0.44)}),
        ("kept.leaks", {"after": measured(0.9, leaks=0.06)}),
    ],
)
def test_each_target_can_be_missed(name, models):
    assert reports.all_met(a_report())
    report = a_report(**models)
    missed = {row.claim for row in reports.checked(report) if not row.met}
    assert reports.TARGETS[name].claim in missed and not reports.all_met(report)
    assert {claim.split(",")[0] for claim in missed} == {reports.TARGETS[name].claim.split(",")[0]}


def test_the_terminal_shows_answers_replies_and_every_target():
    out = io.StringIO()
    reports.print_report(a_report(), Console(file=out, width=200))
    said = out.getvalue()
    assert "Why?" in said and "<b>Yes" in said and "<i>Shorter" in said
    assert all(target.claim in said for target in reports.TARGETS.values())
    assert "no embedding model" not in said


def test_without_an_embedding_model_similarity_is_not_claimed():
    report = a_report(**{when: measured(0.9, similarity=None) for when in reports.WHEN})
    claims = [row.claim for row in reports.checked(report)]
    assert len(claims) == len(reports.TARGETS) - 1
    assert not any("similarity" in claim for claim in claims)
    out = io.StringIO()
    reports.print_report(report, Console(file=out, width=200))
    assert "no embedding model" in out.getvalue()


def test_the_page_stands_alone(tmp_path):
    row = dict(tokens=["<ok>", "no"], advantage=[1.0, -3.0])
    curve = [
        {
            "update": update,
            "phase": update // 3,
            "preference": {"concise": 0.5, "detailed": 0.5},
            "words": 20.0,
            "entropy": 2.0,
        }
        for update in range(1, 5)
    ]
    report = a_report()
    reports.write(tmp_path, report, curve, {"what users said": [("o!", row)]})  # pyright: ignore
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "o!" in page and "&lt;ok&gt;" in page
    assert "&lt;b&gt;Yes" in page and "&lt;i&gt;Shorter" in page
    assert page.count('class="met"') == len(reports.TARGETS) and "missed</td>" not in page
    assert "http" not in page and "<script" not in page
    assert json.loads((tmp_path / "report.json").read_text()) == report
