"""Tracing against real runs: what the checkpoints themselves say they drew."""

import json
import shutil
from dataclasses import replace
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import runs, tiny
from sdpo.analysis.trace import trace_command
from sdpo.batching import Stream
from sdpo.data.manifest import find, manifest_path
from sdpo.data.prepare.write import MANIFEST
from sdpo.errors import DataError
from sdpo.interactions import conversation_of, read_interactions, write_interactions
from sdpo.train.config import read_config
from sdpo.train.loader import Loader, load_interactions

N = 12


def manifest(data: str, rows: list[dict]) -> None:
    """The manifest beside a file, of rows that only say what matters here."""
    blank = dict(source_file="logs/a.jsonl", user=None, decision="kept", duplicate_of=None)
    whole = [{**blank, "row": n, "interaction_ids": [], **r} for n, r in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(whole, MANIFEST), manifest_path(data), row_group_size=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 interactions of 11 conversations: c0 has two, c3 a duplicate that was dropped."""
    path = str(tmp_path_factory.mktemp("data") / "i.jsonl")
    tiny.make_interactions(manifest_path(path).with_name("i.jsonl"), N)
    interactions = read_interactions(path)
    interactions[1] = replace(interactions[1], id="c0_3")
    write_interactions(path, interactions)
    rows = [{"conversation_id": "c0", "user": "u1", "interaction_ids": ["c0", "c0_3"]}]
    rows += [{"conversation_id": f"c{n}", "interaction_ids": [f"c{n}"]} for n in range(2, N)]
    duplicate = {"decision": "exact duplicate", "duplicate_of": "logs/a.jsonl:2"}
    manifest(path, [*rows, {"conversation_id": "again", "user": "u1", **duplicate}])
    return path


@pytest.fixture(scope="module")
def run(data, models, tmp_path_factory):
    """Three steps of four, twice over the data less what has too little signal: 8 of 12."""
    folder = tmp_path_factory.mktemp("runs")
    scores = folder / "scores.jsonl"
    lost = {2, 5, 6, 9}
    rows = [
        {"id": i.id, "mean_abs_advantage": 0.1 if n in lost else 0.5}
        for n, i in enumerate(read_interactions(data))
    ]
    scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--engine", "transformers", "--checkpoint.interval", "1", "--checkpoint.keep", "0"]
    options += ["--batch.interactions-per-step", "4", "--batch.epochs", "1.5", "--batch.seed", "7"]
    options += ["--select.scores", str(scores), "--select.min-signal", "0.2"]
    options += ["--safeguard.probe-interactions", "2"]
    runs.train("reverse-kl", models("qwen3"), data, folder / "first", *options)
    return folder / "first"


@pytest.fixture
def trace(tmp_path):
    """Runs the command; what it writes with --json."""

    def call(id: str, data: str, *runs: str) -> dict:
        out = tmp_path / "trace.json"
        trace_command(id, data=(data,), runs=runs, json_out=str(out))
        return json.loads(out.read_text())

    return call


@pytest.fixture(scope="module")
def order(run, data) -> list[str]:
    """What the run's loop drew, in order, taken from the trainer's own parts."""
    config = read_config(str(run))
    interactions = load_interactions(config).interactions
    stream = Stream((i.id for i in interactions), config.batch)
    return [interactions[i].id for i in stream.places(0, 12)]


def test_every_interaction_is_read_by_the_checkpoints_that_drew_it(data, run, order, trace):
    assert len(set(order)) == 8
    for i in read_interactions(data):
        (one,) = trace(i.id, data, str(run.parent))["runs"]
        assert one["trained_on_it"] and (i.id in one["left_out"]) == (i.id not in order)
        told = {c["name"]: c["read"].get(i.id, 0) for c in one["checkpoints"]}
        counts = {f"step-{s}": order[: 4 * s].count(i.id) for s in (1, 2, 3)}
        assert told == {**counts, "export": order.count(i.id)}
        clean = [name for name, n in counts.items() if not n]
        assert one["newest_before"] == (clean[-1] if clean else None)


def test_whole_conversations_are_read_by_the_checkpoints_that_drew_them(
    models, trace, tmp_path, monkeypatch
):
    """As the run's own steps tell, which draw one and a half times over the conversations."""
    data = tiny.make_conversations(tmp_path / "i.jsonl", 8)
    interactions = read_interactions(data)
    groups = groupby(interactions, conversation_of)
    kept = [{"conversation_id": c, "interaction_ids": [i.id for i in g]} for c, g in groups]
    manifest(data, kept)
    steps, read = [], Loader.step
    monkeypatch.setattr(Loader, "step", lambda made, at: steps.append([*at]) or read(made, at))
    options = ["--engine", "transformers", "--checkpoint.interval", "1", "--checkpoint.keep", "0"]
    options += ["--batch.unit", "conversation", "--batch.epochs", "1.5"]
    options += ["--batch.interactions-per-step", "5", "--safeguard.probe-interactions", "0"]
    out = tmp_path / "run"
    assert len(runs.train("reverse-kl", models("qwen3"), data, out, *options)) == len(steps) > 3
    for row in kept:
        (told,) = trace(row["conversation_id"], data, str(out))["runs"]
        for s, checkpoint in enumerate([*told["checkpoints"]], start=1):
            drawn = [interactions[i].id for step in steps[:s] for i in step]
            expected = {i: drawn.count(i) for i in row["interaction_ids"] if i in drawn}
            assert checkpoint["read"] == expected
            assert checkpoint["interactions_seen"] == len(drawn)
        assert [c["name"] for c in told["checkpoints"]][-2:] == [f"step-{len(steps)}", "export"]
        assert len(set(told["checkpoints"][-1]["read"].values())) == 1, "all of it, as often"


def test_the_probe_reads_without_training(data, run, trace):
    """Two of eight: the first and the fifth that are kept."""
    kept = [i.id for n, i in enumerate(read_interactions(data)) if n not in {2, 5, 6, 9}]
    for id in kept:
        (one,) = trace(id, data, str(run))["runs"]
        assert one["probe"] == ([id] if id in (kept[0], kept[4]) else [])


@pytest.mark.parametrize(
    ("id", "sources", "interactions"),
    [
        ("c0", {"logs/a.jsonl:0"}, {"c0", "c0_3"}),
        ("c0_3", {"logs/a.jsonl:0"}, {"c0_3"}),
        ("c5", {"logs/a.jsonl:4"}, {"c5"}),
        ("logs/a.jsonl:4", {"logs/a.jsonl:4"}, {"c5"}),
        ("./logs/../logs/a.jsonl:4", {"logs/a.jsonl:4"}, {"c5"}),
        ("u1", {"logs/a.jsonl:0", "logs/a.jsonl:11", "logs/a.jsonl:2"}, {"c0", "c0_3", "c3"}),
        ("again", {"logs/a.jsonl:11", "logs/a.jsonl:2"}, {"c3"}),
        ("c3", {"logs/a.jsonl:2", "logs/a.jsonl:11"}, {"c3"}),
        ("logs/b.jsonl:4", set(), set()),
        ("c", set(), set()),
    ],
)
def test_what_an_id_names(id, sources, interactions, data):
    hits = find(data, id)
    assert {hit.source for hit in hits} == sources
    assert {i for hit in hits for i in hit.interactions} == interactions


def test_a_duplicate_says_how_it_was_found(data):
    via = {hit.conversation_id: hit.via for hit in find(data, "again")}
    assert via == {"again": "asked for", "c3": "kept in place of"}
    via = {hit.conversation_id: hit.via for hit in find(data, "c3")}
    assert via == {"c3": "asked for", "again": "duplicate of"}


def test_it_says_what_to_do(data, run, order, trace, capsys):
    late = next(id for id in order[4:8] if id not in order[:4])
    trace(late, data, str(run))
    shown = capsys.readouterr().out
    assert f"sdpo export {run} --step 1" in shown and "opt-out list" in shown
    trace(order[0], data, str(run))
    assert "train again from the run's own model" in capsys.readouterr().out


def test_a_checkpoint_set_aside_still_holds_what_it_read(data, run, order, trace, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step-1").rename(copy / "checkpoints" / "step-1.damaged")
    late = next(id for id in order[4:8] if id not in order[:4])
    (one,) = trace(late, data, str(copy))["runs"]
    assert one["checkpoints"][0]["name"] == "step-1.damaged" and one["newest_before"] is None
    (one,) = trace(order[0], data, str(copy))["runs"]
    assert one["checkpoints"][0]["read"] == {order[0]: 1}


def test_other_data_and_other_scores_are_told(data, run, trace, tmp_path):
    other = tmp_path / "other.jsonl"
    write_interactions(other, read_interactions(data)[:6])
    shutil.copy(manifest_path(data), manifest_path(other))
    (one,) = trace("c0", str(other), str(run))["runs"]
    assert not one["trained_on_it"] and "other data" in one["note"] and not one["checkpoints"]

    scores = run.parent / "scores.jsonl"
    before = scores.read_text()
    scores.write_text(before.replace("0.5", "0.1", 1))
    try:
        (one,) = trace("c0", data, str(run))["runs"]
    finally:
        scores.write_text(before)
    assert one["trained_on_it"] and "have changed" in one["note"] and not one["checkpoints"]


def test_a_run_from_a_tainted_export_is_named(data, run, trace, tmp_path, capsys):
    """Nothing of its own data is traced, but it began where the first had read it."""
    child = tmp_path / "child"
    shutil.copytree(run, child)
    shutil.rmtree(child / "checkpoints")
    config = json.loads((child / "config.json").read_text())
    config |= {"model": str(run / "export"), "data": "else.jsonl"}
    (child / "config.json").write_text(json.dumps(config))
    found = trace("c0", data, str(run), str(child))
    assert found["inherited"] == {str(child): str(run / "export")}
    assert "carries what that has read" in capsys.readouterr().out


def test_what_cannot_be_traced(data, run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        trace_command("nobody", data=(data,))
    assert f"nobody: not in the manifest of {data}" in capsys.readouterr().out
    with pytest.raises(DataError, match="no such manifest"):
        find(str(tmp_path / "none.jsonl"), "c0")
    (tmp_path / "x.manifest.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable manifest"):
        find(str(tmp_path / "x.jsonl"), "c0")
    with pytest.raises(DataError, match="no run there"):
        trace_command("c0", data=(data,), runs=(str(tmp_path),))
