"""Arena-Hard v2: published questions and answers, and judgments in its format about them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from helpers import runs
from helpers.leaderboards import ARENA_O3, ArenaFiles
from sdpo.cli import main
from sdpo.errors import DataError, SdpoError
from sdpo.evaluate import arena
from sdpo.evaluate.arena import Pair

HARD, WRITING = 8, 6


@pytest.fixture
def files(tmp_path) -> ArenaFiles:
    return ArenaFiles(tmp_path)


def test_the_command_scores_each_category(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    rows = files.judgments("B>>A", "A>B")  # far better, better
    for row in rows[:4]:  # of eight hard prompts, four are worse and tied
        row |= files.judgment(row["uid"], "A>B", "A=B")
    for row in rows[HARD:]:  # all of creative writing are lost
        row |= files.judgment(row["uid"], "A>>B", "B>>A")
    rows[-1] |= files.judgment(rows[-1]["uid"], "A>>B", None)
    out = tmp_path / "report.json"
    main([*files.arguments(files.write(rows)), "--out", str(out)])
    hard, writing = json.loads(out.read_text())["scores"]
    # won 3 + 1 of 4 each; 0 and 1/2 of 2 each
    assert hard["win_rate"] == pytest.approx(100 * (4 * 4 + 4 * 0.5) / (4 * 4 + 4 * 2))
    assert hard["low"] < hard["win_rate"] < hard["high"]
    assert (hard["baseline"], hard["judges"]) == ("o3-mini-2025-01-31", ["gpt-4.1"])
    assert (hard["questions"], hard["pairs"], hard["unjudged"]) == (HARD, HARD, 0)
    assert (writing["win_rate"], writing["low"], writing["high"]) == (0, 0, 0)
    assert (writing["pairs"], writing["unjudged"]) == (WRITING - 1, 1)
    assert hard["model"]["bold"]["share"] == 1 and hard["model"]["finished"] == 1
    assert hard["reference"]["characters"] > 1000 and writing["reference"]["characters"] < 20
    shown = capsys.readouterr().out
    assert "hard prompt" in shown and "gemini-2.0-flash-001" in shown and "75.0" in shown


@pytest.mark.parametrize(
    ("label", "a_is_better"),
    [("A>>B", [1] * 3), ("A>B", [1]), ("A=B", [0.5]), ("B>A", [0]), ("B>>A", [0] * 3)]
    + [("B<<A", [1] * 3), ("B<A", [1]), ("B=A", [0.5]), ("A<B", [0]), ("A<<B", [0] * 3)],
)
def test_a_verdict_counts_for_who_was_a(files, label, a_is_better):
    uid = files.asked[0].uid
    pair = files.read(files.judgments(label, "A=B"))[uid]
    assert pair.scores == (0.5, *(1 - score for score in a_is_better))
    pair = files.read(files.judgments("A=B", label))[uid]
    assert pair.scores == (*a_is_better, 0.5)


def test_the_last_label_is_the_verdict():
    assert arena.verdict("[[A>>B]]? No: [[b>a]]") == "B>A"
    assert arena.verdict("My final verdict is [A=B]") == "A=B"
    assert arena.verdict("[A>B] at first, then [[B>A]]") == "B>A"
    assert arena.verdict("A>B") is None


def test_the_interval_draws_questions_and_not_verdicts():
    """The two games of a question agree here, so an interval over verdicts would be too narrow."""
    rng = np.random.default_rng(0)
    wins = rng.random(400) < 0.6
    pairs = [Pair(uid=str(i), scores=(float(w),) * 6) for i, w in enumerate(wins)]
    rate, low, high = arena.score(pairs)
    assert rate == pytest.approx(100 * wins.mean())
    width = 2 * 1.96 * 100 * wins.std() / 400**0.5
    assert high - low == pytest.approx(width, rel=0.15)


def test_several_judges_count_alike(files, tmp_path):
    other = [row | {"judge": "gemini-2.5"} for row in files.judgments("A>B", "B>A")]
    one, two = files.write(files.judgments()), files.write(other, "other.jsonl")
    out = tmp_path / "report.json"
    main([*files.arguments(one, two), "--out", str(out)])
    hard, _ = json.loads(out.read_text())["scores"]
    assert hard["win_rate"] == 50 and hard["pairs"] == 2 * HARD
    assert hard["judges"] == ["gpt-4.1", "gemini-2.5"]


def test_a_judge_counts_once(files, capsys):
    one, two = files.write(files.judgments()), files.write(files.judgments(), "same.jsonl")
    refused = runs.refused(capsys, *files.arguments(one, two))
    assert "same.jsonl, field `judge`: 'gpt-4.1' is the judge of another file too" in refused


def test_a_category_is_left_out_with_its_baseline(files, tmp_path):
    said = files.arguments(files.write(files.judgments()[:HARD]))
    where = said.index("--creative-writing")
    out = tmp_path / "report.json"
    main([*said[:where], *said[where + 2 :], "--out", str(out)])
    (hard,) = json.loads(out.read_text())["scores"]
    assert hard["category"] == "hard_prompt" and hard["win_rate"] == 100


def test_without_a_baseline_there_is_nothing_to_compare(files, capsys):
    said = files.arguments(files.write(files.judgments()))
    said = [*said[: said.index("--hard-prompt")], *said[said.index("--judgments") :]]
    assert "nothing to compare" in runs.refused(capsys, *said)


def test_games_without_a_verdict(files):
    rows = files.judgments(None, "A>B")
    rows[1]["games"][1] = None  # a call that failed
    pairs = files.read(rows)
    assert all(pair.scores == () for pair in pairs.values())
    with pytest.raises(SdpoError, match="not one pair"):
        arena.score(list(pairs.values()))


def swapped(row: dict) -> None:
    row["games"].reverse()


def relabelled(row: dict) -> None:
    row["games"][0]["score"] = "A>B"


def unknown(row: dict) -> None:
    row["games"][0] |= {"score": "AB", "judgment": {"answer": "[[AB]]"}}


def edited(row: dict) -> None:
    prompt = row["games"][1]["prompt"][-1]
    prompt["content"] = prompt["content"].replace("Short", "Long")


SPOILED = {
    "swapped games": (swapped, "games[0].prompt", "the wrong way round"),
    "relabelled": (relabelled, "games[0].score", "'A>B', but the judge wrote 'B>A'"),
    "unknown label": (unknown, "games[0].score", "'AB' is no verdict"),
    "edited": (edited, "games[1].prompt", "these two answers"),
    "one game": (lambda row: row["games"].pop(), "games", "found 1 games"),
    "no games": (lambda row: row.pop("games"), "games", "list is needed"),
    "no prompt": (lambda row: row["games"][0].pop("prompt"), "games[0].prompt", "list is needed"),
    "other model": (lambda row: row.update(model="x"), "model", "'ours' is needed"),
    "other judge": (lambda row: row.update(judge="x"), "judge", "'gpt-4.1' is needed"),
    "other baseline": (lambda row: row.update(baseline="x"), "baseline", "'o3-mini-2025-01-31'"),
    "other category": (lambda row: row.update(category="x"), "category", "'hard_prompt'"),
    "foreign": (lambda row: row.update(uid="x"), "uid", "'x' is no uid of"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_judgments_are_refused(name, files):
    spoil, field, says = SPOILED[name]
    rows = files.judgments()
    spoil(rows[2])
    with pytest.raises(DataError) as error:
        files.read(rows)
    where = f"{files.folder / 'judged.jsonl'}, line 3, field `{field}`: "
    assert str(error.value).startswith(where) and says in str(error.value)


def test_missing_and_repeated_judgments_are_refused(files):
    rows = files.judgments()
    with pytest.raises(DataError, match=r"field `uid`: 2 of 14 rows are missing, first that of"):
        files.read(rows[:-2])
    with pytest.raises(DataError, match=r"line 15, field `uid`: .* is the uid of line 2 too"):
        files.read([*rows, rows[1]])


def test_answers_are_read_as_written(files):
    uids = [q.uid for q in files.asked]
    read = arena.read_answers(files.answers, files.questions, uids, "ours")
    assert {uid: answer.text for uid, answer in read.by_uid.items()} == files.ours
    row = json.loads(Path(files.answers).read_text().splitlines()[0])
    published = json.loads(gzip.decompress(ARENA_O3.read_bytes()))[0]
    assert row.keys() - {"finished"} == published.keys() - {"metadata"}
    assert row["messages"][0] == published["messages"][0]


BAD_ANSWERS = {
    "repeated": (lambda rows: rows.append(rows[0]), "line 15, field `uid`"),
    "missing": (lambda rows: rows.pop(), "1 of 14 rows are missing"),
    "foreign": (lambda rows: rows[0].update(uid="x"), "line 1, field `uid`: 'x' is no uid of"),
    "other question": (
        lambda rows: rows[0].update(messages=rows[1]["messages"]),
        "line 1, field `messages[0].content`: the prompt is not the question's",
    ),
    "unanswered": (lambda rows: rows[0]["messages"].pop(), "line 1, field `messages`"),
    "no text": (
        lambda rows: rows[0]["messages"][1].update(content={"answer": None}),
        "line 1, field `messages[1].content.answer`",
    ),
    "two models": (lambda rows: rows[3].update(model="x"), "line 4, field `model`"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answers_are_refused(name, files, tmp_path):
    spoil, says = BAD_ANSWERS[name]
    rows = [json.loads(line) for line in Path(files.answers).read_text().splitlines()]
    spoil(rows)
    path = files.write(rows, "bad.jsonl")
    with pytest.raises(DataError) as error:
        arena.read_answers(path, files.questions, [q.uid for q in files.asked])
    assert str(error.value).startswith(path) and says in str(error.value)


def test_another_baseline_is_refused(files, capsys):
    said = files.arguments(files.write(files.judgments()))
    said[said.index("--hard-prompt") + 1] = files.gemini
    refused = runs.refused(capsys, *said)
    assert "field `model`: found 'gemini-2.0-flash-001' where 'o3-mini-2025-01-31'" in refused
