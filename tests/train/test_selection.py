"""Selection by signal, alone and in a run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import runs, tiny
from sdpo.errors import DataError
from sdpo.interactions import read_interactions
from sdpo.io.files import sha256
from sdpo.train.config import read_config
from sdpo.train.dry_run import dry_run
from sdpo.train.loader import fingerprint
from sdpo.train.recipes import reverse_kl
from sdpo.train.selection import SelectConfig, choose
from sdpo.train.trainer import train

SIGNALS = (0.0, 0.1, 0.2, 0.3, 0.4, 9.0)
RELEVANCE = (0.5, -0.1, 0.0, 0.2, 0.3, -0.5)
OUTLIERS = ("low", None, None, None, None, "high")


@pytest.fixture
def data(tmp_path):
    return tiny.make_interactions(tmp_path / "i.jsonl", 6)


@pytest.fixture
def scores(tmp_path):
    path = tmp_path / "scores.jsonl"
    columns = zip(SIGNALS, RELEVANCE, OUTLIERS, strict=True)
    rows = [
        {"id": f"c{n}", "mean_abs_advantage": s, "relevance": r, "outlier": o}
        for n, (s, r, o) in enumerate(columns)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("asked", "kept", "told"),
    [
        (dict(min_signal=0.2), "c2 c3 c4 c5", "kept 4 of 6: 2 below min_signal"),
        (dict(min_relevance=0.0), "c0 c2 c3 c4", "kept 4 of 6: 2 below min_relevance"),
        (dict(drop_outliers=True), "c1 c2 c3 c4", "kept 4 of 6: 2 outliers"),
        (
            dict(min_signal=0.1, min_relevance=-0.2, drop_outliers=True),
            "c1 c2 c3 c4",
            "kept 4 of 6: 1 below min_signal, 1 below min_relevance",
        ),
        (dict(weight="signal"), "c0 c1 c2 c3 c4 c5", "kept 6 of 6"),
    ],
)
def test_what_is_kept_and_why_the_rest_is_not(asked, kept, told, data, scores):
    interactions = read_interactions(data)
    selection = choose(iter(interactions), SelectConfig(scores=scores, **asked))
    assert [i.id for i in selection.interactions] == kept.split()
    assert str(selection) == told


def test_weights_are_signal_over_its_mean_among_the_kept_and_capped(data, scores):
    interactions = [replace(i, weight=2.0) for i in read_interactions(data)]
    config = SelectConfig(scores=scores, min_signal=0.1, drop_outliers=True, weight="signal")
    weights = [i.weight for i in choose(interactions, config).interactions]
    assert weights == pytest.approx([2 * s / 0.25 for s in (0.1, 0.2, 0.3, 0.4)])
    config = SelectConfig(scores=scores, weight="signal")
    weights = [i.weight for i in choose(interactions, config).interactions]
    assert weights == pytest.approx([2 * min(s / (10 / 6), 4) for s in SIGNALS])
    assert weights[-1] == 8.0


def test_what_cannot_be_selected_by(data, scores, tmp_path):
    interactions = read_interactions(data)

    def refused(match, text=None, **asked):
        path = scores
        if text is not None:
            path = str(tmp_path / "other.jsonl")
            (tmp_path / "other.jsonl").write_text(text)
        with pytest.raises(DataError, match=match):
            choose(interactions, SelectConfig(scores=path, **asked))

    short = '{"id": "c0", "mean_abs_advantage": 1.0}\n'
    refused("other.jsonl: no score of interaction c1; score the same file", short, min_signal=0.1)
    refused("nothing is left to train on .kept 0 of 6: 6 below min_signal", min_signal=10.0)
    refused("line 1, field `mean_abs_advantage`.*Score", '{"id": "c0"}\n', min_signal=0.1)
    refused("field `relevance`", short, min_relevance=0.0)
    refused("field `id`", '{"mean_abs_advantage": 1}\n', min_signal=0.1)
    flat = "".join(f'{{"id": "c{n}", "mean_abs_advantage": 0}}\n' for n in range(6))
    refused("every mean_abs_advantage is 0", flat, weight="signal")


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (dict(min_signal=0.1), "needs select.scores"),
        (dict(weight="signal"), "needs select.scores"),
        (dict(scores="x"), "alone selects nothing"),
        (dict(scores="x", min_signal=-1.0), "0 or more"),
        (dict(scores="x", min_relevance=float("nan")), "finite"),
    ],
)
def test_settings_that_make_no_sense(asked, match):
    with pytest.raises(ValueError, match=match):
        SelectConfig(**asked)


def test_the_fingerprint_is_of_data_settings_and_scores(data, scores, models):
    plain = reverse_kl(models("qwen3"), data)
    assert fingerprint(plain) == sha256(data)

    def selected(**asked):
        return fingerprint(replace(plain, select=SelectConfig(scores=scores, **asked)))

    first = selected(min_signal=0.2)
    assert first == selected(min_signal=0.2) and first.startswith(sha256(data) + "+")
    assert len({first, selected(min_signal=0.1), selected(drop_outliers=True)}) == 3
    copy = scores + ".copy"
    shutil.copy(scores, copy)
    moved = replace(plain, select=SelectConfig(scores=copy, min_signal=0.2))
    assert fingerprint(moved) == first
    with open(scores, "a") as file:
        file.write('{"id": "c9", "mean_abs_advantage": 1.0}\n')
    assert selected(min_signal=0.2) != first


def test_a_run_trains_on_what_is_selected_and_resumes_only_with_it(
    data, scores, models, tmp_path, capsys
):
    out, told = tmp_path / "run", f"{data}: kept 4 of 6: 2 below min_signal"
    options = ["--engine", "transformers", "--batch.interactions-per-step", "2"]
    options += ["--select.scores", scores, "--select.min-signal", "0.2"]
    runs.train("reverse-kl", models("qwen3"), data, out, *options)
    assert f"sdpo: {told}" in capsys.readouterr().err
    manifest = json.loads((out / "checkpoints/step-2/manifest.json").read_text())
    assert manifest["interactions_seen"] == 4 and manifest["data_sha256"] == sha256(data)
    config = read_config(out)
    dry_run(config, ranks=1)
    assert told in capsys.readouterr().out

    changed = replace(config, select=replace(config.select, min_signal=0.1))
    with pytest.raises(ValueError, match="select.min_signal: 0.2 -> 0.1"):
        train(changed, resume=True)
    path = Path(scores)
    path.write_text(path.read_text().replace("9.0", "8.0"))
    with pytest.raises(ValueError, match="the selection, or its file of scores, has changed"):
        train(config, resume=True)
    tiny.make_interactions(Path(data), 6, seed=9)
    with pytest.raises(ValueError, match="the interactions file has changed"):
        train(config, resume=True)
