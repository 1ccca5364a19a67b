"""The report: what it is made of, and that one bad source spoils nothing."""

import json
import re
from html import unescape

import pytest

from helpers import runs
from helpers.leaderboards import ArenaFiles, alpaca_arguments, alpaca_verdicts
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


def report_of(sources, out, *options):
    main(["evaluate", "report", *map(str, sources), "--out", str(out), *options])
    return (out / "report.html").read_text()


def texts(page, heading, kind="board"):
    """The cells of the first table of a class after a heading."""
    after = page.partition(f'<h2 id="{heading}">')[2].partition(f'<table class="{kind}">')[2]
    table = after.partition("</table>")[0]
    rows = (re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in table.split("</tr>"))
    return [[unescape(cell) for cell in row] for row in rows if row]


def notes(page, heading):
    after = page.partition(f'<h2 id="{heading}">')[2]
    return unescape(re.search(r'<p class="note">(.*?)</p>', after, re.S)[1])


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """Reports of gemma-7b-it, and of another model on six instructions, whose judge is unknown."""
    folder = tmp_path_factory.mktemp("alpaca")
    whole = [row | {"annotator": "gpt-4-turbo"} for row in alpaca_verdicts()]
    few = [row | {"generator_2": "other"} for row in alpaca_verdicts()[:6]]
    few[0]["preference"] = None
    for name, rows in (("gemma", whole), ("other", few)):
        out = str(folder / f"{name}.json")
        (folder / name).mkdir()
        main([*alpaca_arguments(folder / name, rows, rows), "--out", out])
    return [folder / "gemma.json", folder / "other.json"]


def test_alpacaevals_numbers_are_one_table_of_all_models(alpaca, tmp_path):
    page = report_of(alpaca, tmp_path)
    assert page.count('<h2 id="alpaca">AlpacaEval 2</h2>') == 1 and '<h2 id="arena">' not in page
    head, gemma, other = texts(page, "alpaca")
    assert head == [
        "model", "win rate, %", "length-controlled win rate, %", "characters", "verdicts",
        "compared with", "judged by",
    ]  # fmt: skip
    assert gemma == [
        "gemma-7b-it", "6.94 ± 0.79", "10.43 ± 0.48", "1,115", "805 of 805",
        "gpt4_1106_preview", "gpt-4-turbo",
    ]  # fmt: skip
    report = json.loads(alpaca[1].read_text())
    rate = f"{report['win_rate']:.2f} ± {report['standard_error']:.2f}"
    length = f"{report['avg_length']:,}"
    assert other == ["other", rate, "–", length, "5 of 6", "gpt4_1106_preview", "–"]
    said = notes(page, "alpaca")
    assert "No length-controlled win rate of other:" in said and "of gemma" not in said
    assert "The verdicts on other do not say whose they are." in said
    assert f"From {alpaca[0]} and {alpaca[1]}." in said


def test_the_style_of_the_answers_is_beside_and_a_reference_there_once(alpaca, tmp_path):
    page = report_of([*alpaca, alpaca[0]], tmp_path)
    head, *rows = texts(page, "alpaca", "style")
    reference = "gpt4_1106_preview"  # of 805 answers, and of six
    assert head[1:] == ["gemma-7b-it", reference, "other", reference]
    style = json.loads(alpaca[0].read_text())["style"]
    by = {name: cells for name, *cells in rows}
    assert by["characters"][:2] == [f"{style[n]['characters']:.1f}" for n in ("model", "reference")]
    assert by["leak hindsight"][0] == f"{100 * style['model']['leaks']:.1f} %"
    assert by["finished"] == ["–"] * 4
    assert len(json.loads((tmp_path / "report.json").read_text())["rates"]) == 3


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """Reports of two models, the second without creative writing, each with a game unjudged."""
    found = []
    for model, said in (("ours", ("B>>A", "A>B")), ("other", ("A>B", "A=B"))):
        files = ArenaFiles(tmp_path_factory.mktemp(model), model)
        rows = files.judgments(*said)
        for row in rows[1::2]:  # lost
            row |= files.judgment(row["uid"], "A>B", "B>A")
        rows[0] |= files.judgment(rows[0]["uid"], said[0], None)
        argv = files.arguments(files.write(rows))
        if model == "other":
            at = argv.index("--creative-writing")
            del argv[at : at + 2]
        found.append(files.folder / "report.json")
        main([*argv, "--out", str(found[-1])])
    return found


def test_arena_hards_categories_stand_together(arena, tmp_path):
    page = report_of(arena, tmp_path)
    head, *rows = texts(page, "arena")
    assert head == [
        "model", "category", "win rate, %", "characters", "judged pairs", "compared with",
        "judged by",
    ]  # fmt: skip
    ours, writing = json.loads(arena[0].read_text())["scores"]
    (other,) = json.loads(arena[1].read_text())["scores"]
    assert [row[:2] + row[4:] for row in rows] == [
        ["ours", "hard prompt", "7 of 8", "o3-mini-2025-01-31", "gpt-4.1"],
        ["other", "hard prompt", "7 of 8", "o3-mini-2025-01-31", "gpt-4.1"],
        ["ours", "creative writing", "6 of 6", "gemini-2.0-flash-001", "gpt-4.1"],
    ]
    for row, score in zip(rows, (ours, other, writing), strict=True):
        low, high = score["low"], score["high"]
        assert low < score["win_rate"] < high
        length = f"{score['model']['characters']:.0f}"
        assert row[2:4] == [f"{score['win_rate']:.1f} [{low:.1f}, {high:.1f}]", length]
    said = notes(page, "arena")
    assert "No creative writing of other: the baseline's answers were not given." in said
    assert "No hard prompt" not in said and f"From {arena[0]} and {arena[1]}." in said
    styles = texts(page, "arena", "style")[0]
    assert styles[1:] == [
        "ours, hard prompt", "o3-mini-2025-01-31, hard prompt", "other, hard prompt",
        "ours, creative writing", "gemini-2.0-flash-001, creative writing",
    ]  # fmt: skip


def test_a_report_that_lacks_a_field_or_is_of_another_benchmark_is_named(
    alpaca, arena, tmp_path, capsys
):
    less = json.loads(alpaca[0].read_text())
    del less["win_rate"]
    (tmp_path / "less.json").write_text(json.dumps(less))
    (tmp_path / "mt.json").write_text(json.dumps(less | {"benchmark": "MT-Bench"}))
    sources = [tmp_path / "less.json", tmp_path / "mt.json", arena[0]]
    argv = ["evaluate", "report", *map(str, sources), "--out", str(tmp_path / "out")]
    said = runs.refused(capsys, *argv)
    assert "less.json: no field 'win_rate'" in said
    assert "mt.json: mt.json is no report of an evaluation" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "win_rate" in page and '<h2 id="arena">' in page and '<h2 id="alpaca">' not in page


def played(folder, prompts, games):
    """A comparison's report, as far as samples go, and its pairs: answer N of G is "G N"."""
    folder.mkdir()
    compared = {"kind": "preference", "compared": [], "agreement": [], "style": {}, "problems": []}
    (folder / "preference.json").write_text(json.dumps(compared | {"prompts": {"count": prompts}}))
    with (folder / "pairs.jsonl").open("w") as file:
        for persona, *names in games:
            for n in range(prompts):
                prompt = [{"role": "user", "content": f"prompt {n}"}]
                answers = {g: {"text": f"{persona} {g} {n}", "finished": True} for g in names}
                row = {"prompt_id": str(n), "prompt": prompt, "persona": persona}
                row |= {"answers": answers, "outcomes": {"rule": "win"}, "replies": {}}
                file.write(json.dumps(row) + "\n")
    return folder


GAMES = [("concise", "after", "base"), ("concise", "told", "base"), ("poetic", "after", "base")]


@pytest.mark.parametrize(("samples", "each"), [(9, 3), (8, 2), (2, 1), (100, 5), (0, 0)])
def test_samples_are_of_all_games(samples, each, tmp_path):
    comparison = played(tmp_path / "p", 5, GAMES)
    page = report_of([comparison], tmp_path / "out", "--samples", str(samples))
    _, *parts = page.partition('id="samples"')[2].split("<h3>")
    assert len(parts) == (3 if each else 0)
    for part, (persona, first, second) in zip(parts, GAMES, strict=bool(each)):
        assert part.startswith(f"{persona}: {first} against {second}</h3>")
        assert f"{each} of 5 prompts." in part
        wanted = [f"{persona} {name} {n}" for n in range(each) for name in (first, second)]
        assert re.findall(r'<div class="answer">(.*?)</div>', part) == wanted
