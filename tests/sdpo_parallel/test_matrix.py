"""Every layout has the one-process run's losses and gradient norms, and exports what it trained.

``make test`` runs a representative part, ``make test-all`` all of it (``-m exhaustive``).
"""

import itertools
import json
from pathlib import Path

import pytest

from helpers import matrix, runs, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "i.jsonl"
    return tiny.make_interactions(path, 22, next_response=True)


def train(ranks: int, cases: list[dict], models, data: str, out: Path) -> dict[str, list[dict]]:
    """name -> metrics of each step. A process keeps to one layout, as users' do."""
    rows = {}
    for i, (_, group) in enumerate(itertools.groupby(cases, key=lambda c: c["layout"])):
        folder = out / str(i)
        folder.mkdir(parents=True)
        work = {"data": data, "cases": [{**c, "model": models(c["kind"])} for c in group]}
        (folder / "cases.json").write_text(json.dumps(work))
        runs.worker("matrix_worker.py", ranks, str(folder / "cases.json"), str(folder))
        rows |= json.loads((folder / "rows.json").read_text())
    return rows


def check(ranks: int, cases: list[dict], models, data: str, out: Path) -> None:
    """Train the cases, and once on one process what each must equal."""
    alone = {c["name"]: matrix.alone(c) for c in cases}
    distinct = {run["name"]: run for run in alone.values()}
    expected = train(1, list(distinct.values()), models, data, out / "alone")
    found = train(ranks, cases, models, data, out / str(ranks))
    wrong = []
    for c in cases:
        rows = expected[alone[c["name"]]["name"]], found[c["name"]]
        try:
            runs.assert_same_trajectory(*rows, matrix.tolerance(c))
        except AssertionError as error:
            wrong.append(f"{c['name']}: {error}")
    assert not wrong, "\n".join(wrong)
    names = {name: rows[0]["loss"] for name, rows in expected.items()}
    assert len(set(names.values())) > 1, "the cases are all the same run"


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_part_of_the_matrix(ranks, models, data, tmp_path):
    check(ranks, matrix.representative(ranks), models, data, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", matrix.KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_whole_matrix(ranks, kind, models, data, tmp_path):
    cases = [c for c in matrix.everything(ranks) if c["kind"] == kind]
    check(ranks, cases, models, data, tmp_path)
