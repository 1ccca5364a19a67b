"""The rows of good and bad files. test_malformed has many more bad ones."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import logs
from helpers.logs import write_lines
from sdpo.errors import DataError
from sdpo.io import rows as module
from sdpo.io.rows import plain_rows, read_chunk, read_rows, recognise, split

ROWS = [{"id": f"r{i}", "text": "a\u2028b\u0085c\rd\n"} for i in range(40)]
CONTAINERS = pytest.mark.parametrize("container", logs.CONTAINERS)


def packed(container: str) -> bytes:
    if container == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=7)
        return sink.getvalue().to_pybytes()
    return logs.packed("messages", ROWS, container)


def first_error(path: Path) -> DataError:
    """What is wrong with a file or with its first bad row: it must say where, and what to do."""
    try:
        error = next(row for _, _, row in read_rows(path) if isinstance(row, DataError))
    except DataError as raised:
        error = raised
    assert error.file == str(path) and error.hint
    return error


@CONTAINERS
@pytest.mark.parametrize("name", ["log", "x.bin"])
def test_containers_are_recognised_by_content(tmp_path, container, name):
    path = tmp_path / (f"log.{container}" if name == "log" else name)
    path.write_bytes(packed(container))
    assert recognise(path).container == container
    assert [row for _, _, row in read_rows(path)] == ROWS


@CONTAINERS
def test_chunks_hold_what_the_file_holds(tmp_path, container, monkeypatch):
    """In any number of chunks and batches; a mask selects rows, and all keep their numbers."""
    monkeypatch.setattr(module, "CHUNK_ROWS", 10)
    monkeypatch.setattr(module, "CHUNK_BYTES", 400)
    monkeypatch.setattr(module, "BATCH_ROWS", 3)
    path = tmp_path / f"log.{container}"
    path.write_bytes(packed(container))
    file, found = recognise(path), {}
    chunks = list(split(file))
    assert len(chunks) > 1 if container in ("parquet", "jsonl") else len(chunks) == 1
    for chunk in chunks:
        wanted = np.arange(chunk.rows) % 2 == 0
        for batch in read_chunk(file, chunk, wanted=wanted):
            assert len(batch.numbers) <= 3 and wanted[batch.indices].all()
            found |= dict(zip(batch.numbers, plain_rows(batch, file), strict=True))
    halves = [range(0, c.rows, 2) for c in chunks]
    assert list(found) == [
        c.first + i for c, half in zip(chunks, halves, strict=True) for i in half
    ]
    assert all(found[number] == row for number, _, row in read_rows(path) if number in found)


def test_blank_lines_count_as_lines_but_are_not_rows(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", b"\xef\xbb\xbf{}", b"", b"  ", {"a": 1})
    assert list(read_rows(path)) == [(1, "line 1", {}), (4, "line 4", {"a": 1})]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_rows_before_a_break_are_read(tmp_path, kind):
    noise = np.random.default_rng(0)
    rows = [{"id": i, "text": noise.bytes(400).hex()} for i in range(2000)]
    whole = logs.packed("messages", rows, kind)
    path = tmp_path / f"m.{kind}"
    path.write_bytes(whole[: len(whole) // 2])
    found = []
    with pytest.raises(DataError, match="truncated or corrupt"):
        for _, _, row in read_rows(path):
            found.append(row)
    assert 500 < len(found) < 1500 and found == rows[: len(found)]


BAD_LINES = {
    "not an object": (b"[1]", "found a list where an object is needed"),
    "bare text": (b'"hello"', "found text where an object is needed"),
    "too deep": (b"[" * 200_000, "unreadable JSON"),
    "number too long": (b'{"messages": ' + b"9" * 5000 + b"}", "unreadable JSON"),
    "broken": (b'{"messages": [}', "broken JSON at column 15"),
    "not UTF-8": (b'{"messages": "\xff"}', "not valid UTF-8 at byte 15"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_bad_lines(tmp_path, bad):
    line, problem = BAD_LINES[bad]
    error = first_error(write_lines(tmp_path / "m.jsonl", *[b"{}"] * 1233, line, b"{}"))
    assert error.row == "line 1234" and problem in error.problem


@pytest.mark.parametrize("content", [b"", b"\n\n"])
@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_empty_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    is_broken = bool(content) and name == "m.parquet"
    problem = "truncated or corrupt parquet" if is_broken else "the file is empty"
    assert problem in first_error(tmp_path / name).problem


def test_a_git_lfs_pointer_is_explained(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    assert "Git LFS pointer" in first_error(write_lines(tmp_path / "p.parquet", pointer)).hint


def test_a_corrupt_page_behind_a_good_footer(tmp_path):
    path, n = tmp_path / "p.parquet", 2000
    table = pa.table({"id": [f"c{i}" for i in range(n)], "other": ["x"] * n})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, path, row_group_size=1000, **options)
    data = bytearray(path.read_bytes())
    page = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data[page.data_page_offset + page.total_compressed_size - 1] ^= 1  # "c1999" reads as "c1998"
    path.write_bytes(data)
    error = first_error(path)
    assert "truncated or corrupt parquet" in error.problem
    assert int(re.fullmatch(r"at or after row (\d+) .*", error.row)[1]) == 1000
    file = recognise(path)
    (chunk,) = split(file)
    with pytest.raises(DataError, match="corrupt"):
        list(read_chunk(file, chunk))
    found = [r for b in read_chunk(file, chunk, lenient=True) for r in plain_rows(b, file)]
    assert found[:1000] == table.slice(0, 1000).to_pylist()
    assert len(found) == n and all(isinstance(row, DataError) for row in found[1000:])


def test_half_a_character_in_an_array(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps([{"a": "b"}, {"a": ["\ud83d"]}]))
    error = first_error(path)
    assert (error.row, error.field) == ("item 1 (counted from 0)", "a[0]")
