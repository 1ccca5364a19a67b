"""The commands that score, under torchrun: every layout has the rows of transformers alone."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import forked, kill, runs, tiny
from sdpo.analysis.score import FIGURES
from sdpo.cli import main

LIMITS = "--max-prompt-tokens 150 --max-hindsight-prompt-tokens 250 --max-response-tokens 60"
SMALL = (*LIMITS.split(), "--batch-tokens", "900")
more = pytest.mark.exhaustive
N = 70
"""Interactions: more than a chunk of one data-parallel rank."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny.make_interactions(tmp_path_factory.mktemp("data") / "i.jsonl", N, seed=3)


def asked(command: str, model: str, data: str, *options: str) -> list[str]:
    files = ["--model", model, "--interactions", data]
    return [*command.split(), *files, *SMALL, *options]


def sharded(ranks: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    return forked.run(ranks, "-m", "sdpo", *words, "--engine", "torchtitan")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(rows: list[dict]) -> np.ndarray:
    return np.array([[row[name] for name in FIGURES.names or ()] for row in rows])


@pytest.fixture(scope="module")
def alone(models, data, tmp_path_factory) -> list[dict]:
    """Rows of `sdpo data score` with transformers."""
    out = tmp_path_factory.mktemp("alone") / "scores.jsonl"
    words = asked("data score", models("qwen3"), data, "--out", str(out))
    runs.succeeded(forked.run(1, "-m", "sdpo", *words))
    return read(out)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ""),
        (2, "--parallel.replicate 2"),
        (2, "--parallel.tensor 2"),
        (2, "--parallel.tensor 2 --parallel.no-sequence-parallel"),
        (2, "--parallel.context 2"),
        pytest.param(1, "", marks=more),
        pytest.param(2, "--parallel.compile aot_eager", marks=more),
        pytest.param(2, "--parallel.cpu-offload", marks=more),
        pytest.param(4, "--parallel.tensor 2", marks=more),
        pytest.param(4, "--parallel.context 2 --parallel.tensor 2", marks=more),
        pytest.param(4, "--parallel.context 2 --parallel.replicate 2", marks=more),
    ],
)
def test_every_layout_gives_the_same_rows_in_order(ranks, layout, models, data, alone, tmp_path):
    out = tmp_path / "scores.jsonl"
    words = asked("data score", models("qwen3"), data, "--out", str(out), *layout.split())
    shown = runs.succeeded(sharded(ranks, words))
    rows = read(out)
    assert [row["id"] for row in rows] == [f"c{n}" for n in range(N)]
    np.testing.assert_allclose(figures(rows), figures(alone), rtol=1e-5, atol=1e-5)
    assert shown.count(f"{N} rows -> ") == 1 and shown.count(f"{N}/{N}") == 1, shown
    assert [p.name for p in tmp_path.iterdir()] == ["scores.jsonl"]


@pytest.mark.exhaustive
def test_killed_on_two_ranks_and_finished_on_one(models, tmp_path):
    """SIGKILL to one rank ends the other; what was read is not read again, on whatever layout."""
    data = tiny.make_interactions(tmp_path / "i.jsonl", 600)
    out, undisturbed = tmp_path / "scores.jsonl", tmp_path / "undisturbed.jsonl"
    words = asked("data score", models("qwen3"), data, "--out")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "sdpo"]
    argv = [sys.executable, *launch, *words, str(out), "--engine", "torchtitan"]
    process = subprocess.Popen(argv, env=runs.ENV, stderr=subprocess.PIPE, text=True)
    partial = Path(f"{out}.partial")
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 128):
        assert process.poll() is None, "it was faster"
        time.sleep(0.005)
    kill.kill(kill.workers(process)[1:])
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0, told
    left = partial.read_bytes().count(b"\n") - 1
    assert 128 <= left < 600 and not out.exists()
    result = forked.run(1, "-m", "sdpo", *words, str(out))
    runs.succeeded(result)
    assert f"{left} of 600 interactions have been read already" in result.stderr
    runs.succeeded(forked.run(1, "-m", "sdpo", *words, str(undisturbed)))
    rows, others = read(out), read(undisturbed)
    assert [row["id"] for row in rows] == [f"c{n}" for n in range(600)]
    np.testing.assert_allclose(figures(rows), figures(others), rtol=1e-5, atol=1e-5)
    assert not partial.exists()


def test_fewer_interactions_than_ranks(models, tmp_path):
    """One rank reads rows without a response, in the same collectives."""
    data = tiny.make_interactions(tmp_path / "i.jsonl", 1)
    rows = []
    for name in ("transformers", "torchtitan"):
        out = tmp_path / f"{name}.jsonl"
        words = asked("signal", models("llama-tied"), data, "--out", str(out))
        result = sharded(2, words) if name == "torchtitan" else forked.run(1, "-m", "sdpo", *words)
        runs.succeeded(result)
        rows += read(out)
    one, other = rows
    assert one["token_ids"] == other["token_ids"]
    for name in ("logp_policy", "logp_hindsight"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-5)


def test_the_verdict_is_that_of_one_process(models, data, tmp_path):
    """torchrun's own status tells no more than that one rank's was not 0."""
    out, alone = tmp_path / "check.json", tmp_path / "alone.json"
    words = asked("check-hindsight", models("qwen3"), data, "--sample", "20", "--json")
    result = sharded(2, [*words, str(out)])
    assert result.returncode == 1 and "sdpo: error" not in result.stderr
    assert result.stdout.count("does not make use of hindsight") == 1
    assert "exitcode  : 1 " in result.stderr and [p.name for p in tmp_path.iterdir()] == [out.name]
    with pytest.raises(SystemExit, match="1"):
        main([*words, str(alone)])
    found, expected = (json.loads(path.read_text()) for path in (out, alone))
    for name in ("size", "advantage", "own_over_shuffled", "revealed_over_misled"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5)


def test_numbers_and_figure_of_two_ranks_are_those_of_one_process(models, data, tmp_path):
    found = []
    for name in ("transformers", "torchtitan"):
        out = tmp_path / f"{name}.jsonl"
        made = ["--json", str(tmp_path / f"{name}.json"), "--figure", str(tmp_path / f"{name}.svg")]
        words = asked("signal", models("qwen3"), data, "--out", str(out), *made)
        if name == "torchtitan":
            runs.succeeded(sharded(2, words))
        else:
            main(words)
        assert (tmp_path / f"{name}.svg").stat().st_size > 10_000
        found.append(json.loads((tmp_path / f"{name}.json").read_text())["conditions"])
    one, other = found
    assert list(one) == list(other) == ["own", "swapped", "none"]
    for condition, measures in one.items():
        for measure in ("mean_abs_advantage", "mean_abs_advantage_first", "mean_advantage"):
            values = other[condition][measure]
            assert measures[measure] == pytest.approx(values, rel=1e-4, abs=1e-5), condition


def test_an_error_of_the_main_rank_ends_all(models, data, tmp_path):
    """torchrun stops the ranks that have not said so yet."""
    (tmp_path / "file").touch()
    words = asked("signal", models("qwen3"), data, "--out", str(tmp_path / "file" / "signal.jsonl"))
    result = sharded(2, words)
    assert result.returncode == 1 and "exitcode  : 2 " in result.stderr
    told = rf"sdpo: error: rank [01]: {tmp_path}/file/signal.jsonl.partial could not be written"
    assert re.search(told, result.stderr)


def test_transformers_refuses_ranks_and_layouts(models, data, tmp_path, capsys):
    words = asked("signal", models("qwen3"), data, "--out", str(tmp_path / "out"))
    result = forked.run(2, "-m", "sdpo", *words)
    assert "runs on one device, and here are 2 ranks" in result.stderr
    told = runs.refused(capsys, *words, "--parallel.tensor", "2")
    assert "parallel.tensor=2: the transformers engine runs on one device" in told
    assert not list(tmp_path.iterdir())


def test_torchtitan_refuses_what_does_not_fit(models, data, tmp_path, capsys):
    words = asked("signal", models("qwen3"), data, "--out", str(tmp_path / "out"))
    words += ["--engine", "torchtitan"]
    assert "does not divide 1 ranks" in runs.refused(capsys, *words, "--parallel.tensor", "2")
    told = runs.refused(capsys, *words, "--max-response-tokens", "2000")
    assert "allow 2250 tokens" in told and "max_position_embeddings=1024" in told
    assert not list(tmp_path.iterdir())
