"""`sdpo data score`: its rows against advantages of two readings, aggregated here."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tiny
from sdpo.analysis.advantages import Reader
from sdpo.analysis.options import ReaderOptions
from sdpo.analysis.score import interval, outliers, partners, score_command, share, shortened
from sdpo.errors import DataError
from sdpo.interactions import conversation_of, read_interactions, write_interactions


@pytest.fixture
def data(tmp_path):
    """26 interactions of 20 conversations; some came with the ids that were sampled."""
    path = tmp_path / "i.jsonl"
    tiny.make_interactions(path, 26, seed=3)
    rows = read_interactions(path)
    for n in range(6):
        rows[20 + n] = replace(rows[20 + n], id=f"c{n}_5", turn_id=5)
    rows[3] = replace(rows[3], response_token_ids=(7, 8, 9, 200))
    rows[4] = replace(rows[4], response="x", response_token_ids=(11,))
    write_interactions(path, rows)
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(model, data, out, seed=0, **options) -> None:
    options = ReaderOptions(**options)
    score_command(model=model, interactions=str(data), out=str(out), options=options, seed=seed)


def by_reader(reader, interactions) -> dict[str, np.ndarray]:
    """Advantages of each response's tokens."""
    readings = reader.read((i, ()) for i in interactions)
    return {r.encoded.id: r.advantages[0].numpy() for r in readings}


def test_rows_aggregate_two_readings(data, models, tmp_path, monkeypatch):
    monkeypatch.setattr("sdpo.analysis.advantages.CHUNK", 7)
    model, out = models("qwen3"), tmp_path / "scores.jsonl"
    score(model, data, out, seed=4, batch_tokens=900)
    rows, interactions = read(out), read_interactions(data)
    assert [row["id"] for row in rows] == [i.id for i in interactions]

    partner = partners([conversation_of(i) for i in interactions], 4, "")
    swapped = [
        replace(i, followup=interactions[j].followup)
        for i, j in zip(interactions, partner, strict=True)
    ]
    reader = Reader.load(model, ReaderOptions())
    own, other = by_reader(reader, interactions), by_reader(reader, swapped)
    for row in rows:
        a, b = own[row["id"]], other[row["id"]]
        expected = {
            "tokens": len(a),
            "mean_advantage": a.mean(),
            "mean_abs_advantage": abs(a).mean(),
            "max_abs_advantage": abs(a).max(),
            "shuffled_mean_abs_advantage": abs(b).mean(),
            "shuffled_difference": abs(a - b).mean(),
            "relevance": abs(a).mean() - abs(b).mean(),
        }
        assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-4)
        assert row["tokens"] == 4 if row["id"] == "c3" else True
    assert [row["outlier"] for row in rows] == outliers(
        np.array([row["mean_abs_advantage"] for row in rows])
    )


def test_the_summary_has_both_numbers_and_names_outliers(
    data, models, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sdpo.analysis.score.OUTLIER", 1.2)
    out = tmp_path / "scores.jsonl"
    score(models("qwen3"), data, out)
    rows, shown = read(out), capsys.readouterr().out
    own = np.mean([r["mean_abs_advantage"] for r in rows])
    other = np.mean([r["shuffled_mean_abs_advantage"] for r in rows])
    part = np.mean([r["shuffled_difference"] for r in rows]) / (own + other)
    for number in (f"{own:.4f}", f"{other:.4f}", f"{own - other:+.4f}", f"{part:.1%}"):
        assert number in shown
    highest = max((r for r in rows if r["outlier"]), key=lambda r: r["mean_abs_advantage"])
    assert highest["outlier"] == "high" and f"high {highest['mean_abs_advantage']:.4f}" in shown
    text = {i.id: shortened(i.followup) for i in read_interactions(data)}
    assert text[highest["id"]][:60] in shown


def test_one_conversation_cannot_be_compared(data, models, tmp_path):
    rows = [replace(i, id=f"c_{n}") for n, i in enumerate(read_interactions(data)[:4])]
    write_interactions(data, rows)
    with pytest.raises(DataError, match="4 of 4 interactions are of one conversation .'c'.*ids of"):
        score(models("qwen3"), data, tmp_path / "scores.jsonl")
    assert not list(tmp_path.glob("scores*"))


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 5))
def test_nobody_gets_a_follow_up_of_their_own_conversation(groups, seed):
    """Each is used once; refused exactly where the pigeonhole forbids it; partners swap."""
    names = [f"c{g}" for g in groups]
    most = max((groups.count(g) for g in groups), default=0)
    if 2 * most > len(groups):
        with pytest.raises(DataError, match="of one conversation"):
            partners(names, seed, "x")
        return
    partner = partners(names, seed, "x")
    assert sorted(partner) == list(range(len(groups)))
    assert all(groups[i] != groups[j] for i, j in enumerate(partner))
    if len(groups) % 2 == 0:
        assert (partner[partner] == np.arange(len(groups))).all()


def test_the_seed_decides_who_gets_what():
    names = [f"c{n}" for n in range(40)]
    first = partners(names, 0, "")
    assert (partners(names, 0, "") == first).all() and (partners(names, 1, "") != first).any()


def test_outliers_of_both_tails():
    values = np.exp(np.linspace(-1, 1, 101))
    flags = outliers(np.append(values, [np.exp(-2.2), np.exp(2.2), 1e-9, 0.0, 90.0]))
    assert flags == [None] * 103 + ["low", "low", "high"]
    assert outliers(np.array([1.0, 1.0, 1.0, 50.0])) == [None] * 4


def test_the_ends_of_the_share():
    """0: the same whichever follow-up is read; 1: nothing in common."""
    a, b = np.array([1.0, -2.0, 0.0, 0.0]), np.array([0.0, 0.0, 3.0, -1.0])

    def of(own, other):
        return share(np.array([abs(own - other).mean(), abs(own).mean(), abs(other).mean()]))

    assert of(a, a) == 0 and of(a, b) == of(a, -a) == 1 and of(0 * a, 0 * a) == 0


def test_the_interval_draws_whole_groups():
    """Two hundred equal turns of twenty conversations tell no more than one of each."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=20)
    once = interval([values], np.arange(20), lambda m: m[0])
    often = interval([np.repeat(values, 10)], np.repeat(np.arange(20), 10), lambda m: m[0])
    assert often == pytest.approx(once)
    error = values.std() / np.sqrt(20)
    assert once[1] - once[0] == pytest.approx(2 * 1.96 * error, rel=0.15)
