"""The demo on the real model, in miniature: too short to meet its targets, long enough to show all
that it shows."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from helpers import runs
from sdpo.demo.report import DECODINGS, TARGETS, WHEN

QUESTIONS = 3


@pytest.fixture(scope="module")
def demo(smollm2, tmp_path_factory):
    """The folder of a demo of one update with each kind of users, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    argv = [sys.executable, "-m", "sdpo", "demo", "--model", smollm2, "--out", str(out)]
    argv += ["--updates", "1", "--questions", str(QUESTIONS), "--conversations", "3"]
    argv += ["--answers", "4", "--max-tokens", "24"]
    env = {**os.environ, **runs.ENV, "COLUMNS": "200"}
    result = subprocess.run(argv, env=env, capture_output=True, text=True)
    # what has not learned misses the targets, and says so
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-2000:]
    return out, result.stdout


def test_everything_is_measured_before_and_after(demo):
    folder, said = demo
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["questions"] == QUESTIONS and report["updates"] == {"concise": 1, "detailed": 1}
    for when in WHEN:
        measured = report["measured"][when]
        assert 8 < measured["perplexity"] < 25, "real text read by a model that knows English"
        for decoding in DECODINGS:
            assert 0.5 < measured[decoding]["entropy"] < 4
            assert len(measured[decoding]["answers"]) == QUESTIONS
    before, after = (report["measured"][when] for when in ("before", "after"))
    assert before["perplexity"] != after["perplexity"], "an update was exported"
    assert all(target.claim in said for target in TARGETS.values())


def test_the_users_log_went_through_the_real_commands(demo):
    folder, _ = demo
    assert pq.read_table(folder / "log.parquet").num_rows == 3
    for name in ("interactions.jsonl", "interactions.report.json", "interactions.html"):
        assert (folder / name).is_file()
    assert len((folder / "signal.jsonl").read_text(encoding="utf-8").splitlines()) == 6


def test_the_page_shows_answers_replies_curves_and_coloured_tokens(demo):
    folder, _ = demo
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http" not in page and "<svg" in page and page.count("background:rgba") > 50
    assert len(report["samples"]) == QUESTIONS
    said = [s for sample in report["samples"] for d in DECODINGS for s in sample[d].values()]
    assert page.count('<div class="reply') == sum(s["reply"] is not None for s in said) > 0
    assert page.count('<div class="answer') == len(said) == QUESTIONS * 3 * 2
