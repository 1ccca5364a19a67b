"""The report: what it is made of, and that one bad source spoils nothing."""

import json

import pytest

from sdpo.cli import main
from sdpo.evaluate.report import forgetting, read_run

SCORE = {"value": 0.5, "low": 0.4, "high": 0.6}


def row(step, phase, persona, **preference):
    return {"step": step, "phase": phase, "persona": persona, "preference": preference}


SEEN = [
    row(0, 1, "concise", concise=0.1, detailed=0.8),
    row(4, 1, "concise", concise=0.9, detailed=0.2),
    row(8, 2, "detailed", concise=0.3, detailed=0.95),
]


def test_forgetting_is_told_for_each_phase():
    first, second = forgetting(SEEN)
    assert first == {
        "phase": 1, "persona": "concise", "start": 0.1, "ends": {1: 0.9, 2: 0.3},
        "forgotten": pytest.approx(0.6),
    }  # fmt: skip
    assert second["start"] == 0.2 and second["ends"] == {2: 0.95} and second["forgotten"] == 0
    assert forgetting([]) == []


@pytest.fixture
def sources(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": n, "entropy/policy": 1.0 + n, "drift/kl": 0.1 * n} for n in range(9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + '{"st')
    (run / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in SEEN))
    bench = tmp_path / "benchmarks"
    bench.mkdir()
    change = {"value": -0.1, "low": -0.2, "high": -0.01}
    base = {"task": "ifeval", "metric": "strict", "prompts": 541, "score": SCORE}
    rows = [
        base | {"model": "base", "change": None, "verdict": None},
        base | {"model": "after", "change": change, "verdict": "regressed"},
    ]
    made = {"kind": "benchmarks", "rows": rows, "lm_eval": "0", "problems": ["x failed <b>"]}
    (bench / "benchmarks.json").write_text(json.dumps(made))
    signal = tmp_path / "signal.jsonl"
    signal.write_text(json.dumps({"id": "a", "tokens": ["<script>", " b"], "advantage": [1, -3]}))
    signal.write_text(signal.read_text() + "\n")
    return [str(run), str(bench), str(signal)]


def test_all_sources_are_on_one_page_without_links(sources, tmp_path):
    main(["evaluate", "report", *sources, "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "regressed" in page and "x failed &lt;b&gt;" in page and "&lt;script&gt;" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") == 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["runs"][0]["kept"][0]["ends"] == {"1": 0.9, "2": 0.3}
    assert len(read_run(tmp_path / "run").metrics) == 9  # half a line is none


def test_a_source_that_is_gone_or_broken_is_named_and_the_rest_made(sources, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text('{"kind": "pref')
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "x"}\n')
    bad = [str(tmp_path / "gone"), str(broken), str(other)]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "report", *sources, *bad, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(path in said and path in page for path in bad)
    assert "regressed" in page
    with pytest.raises(SystemExit):
        main(["evaluate", "report", *bad, "--out", str(tmp_path / "none")])
    assert "nothing to report" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
