"""Files, folders, globs; names on the hub are test_preparation's."""

from pathlib import Path

import pytest

from sdpo.errors import DataError
from sdpo.io.paths import resolve_paths


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    names = ("b.jsonl", "a.parquet", "sub/c.jsonl.gz", "sub/d.json", ".cache/e.jsonl", ".f.jsonl")
    for name in (*names, "README.md", "a.manifest.parquet", "a.report.json", "only/g.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVERYTHING = ["a.parquet", "b.jsonl", "sub/c.jsonl.gz"]


@pytest.mark.parametrize(
    "paths, found",
    [
        (".", EVERYTHING),  # `.json` may well be a config where there is other data
        ("only", ["only/g.json"]),
        ("*.jsonl", ["b.jsonl"]),
        ("**/[b-g].jso*", ["b.jsonl", "only/g.json", "sub/c.jsonl.gz", "sub/d.json"]),
        ("s*", ["sub/c.jsonl.gz"]),
        ("README.md", ["README.md"]),
        (["b.jsonl", "sub/../b.jsonl", "."], ["b.jsonl", "a.parquet", "sub/c.jsonl.gz"]),
    ],
)
def test_files_come_sorted_and_each_once(folder, paths, found):
    assert [file.resolve() for file in resolve_paths(paths)] == [
        (folder / name).resolve() for name in found
    ]


def test_a_file_may_have_a_name_that_looks_like_a_glob(tmp_path):
    (tmp_path / "log[1].jsonl").touch()
    assert resolve_paths(tmp_path / "log[1].jsonl") == [tmp_path / "log[1].jsonl"]


@pytest.mark.parametrize(
    "name, problem",
    [
        ("no.jsonl", "no such file"),
        ("no*.jsonl", "matches no file"),
        ("", "holds no .parquet, .jsonl, .ndjson or .json file"),
    ],
)
def test_paths_that_name_nothing(tmp_path, name, problem):
    with pytest.raises(DataError, match=problem) as caught:
        resolve_paths(tmp_path / name)
    assert caught.value.file == str(tmp_path / name) and caught.value.hint
    with pytest.raises(DataError, match="the list of paths is empty"):
        resolve_paths([])
