"""Mutated logs: only DataError comes out, and no line that was left alone is lost.

The four fuzzers take 20 seconds together, or SDPO_FUZZ_SECONDS; with `-m exhaustive`, two minutes.
Every run starts from another seed; a failure says which, and SDPO_FUZZ_SEED starts there again.
"""

import json
import multiprocessing
import os
import re
import resource
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded

from helpers import logs
from helpers.logs import all_turns, rows_of
from helpers.malformed import changed
from sdpo.data.prepare.prepare import prepare
from sdpo.errors import DataError

SECONDS = float(os.environ.get("SDPO_FUZZ_SECONDS", "20"))
LONG_OR_SHORT = pytest.mark.parametrize(
    "seconds", [SECONDS, pytest.param(60.0, marks=pytest.mark.exhaustive)]
)
NAMES = [f"r{i}" for i in range(6)]
SHAPES = st.sampled_from(list(logs.ROWS))
UNCHECKED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
WORKER_MEMORY = 16 * 2**30  # of address space
MAGIC = (b"PAR1", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd")


def fuzz(seconds: float, strategy: st.SearchStrategy, check: Callable[[Any], None]) -> None:
    """Runs `check` on what `strategy` draws, seed after seed, until the time is over."""
    until = time.monotonic() + seconds
    options = settings(
        max_examples=30, database=None, deadline=None, suppress_health_check=UNCHECKED
    )
    first = int(os.environ.get("SDPO_FUZZ_SEED", "0")) or secrets.randbits(32)
    for seed in count(first):
        try:
            seeded(seed)(options(given(strategy)(lambda drawn: check(drawn))))()
        except BaseException as error:
            error.add_note(f"again: SDPO_FUZZ_SEED={seed}")
            raise
        if time.monotonic() > until:
            return


# Mutations

# at a place, so many bytes go, and new ones come: given, or a copy of some others
Op = tuple[int, int, bytes | tuple[int, int]]
_place = st.integers(0, 2**16)
_size = st.integers(1, 64)
_tokens = st.sampled_from(
    [b"\n", b"\r", b"\x00", b'"', b"\\", b"[", b"]", b"{", b"}", b",", b"null", b"\\ud800"]
    + [b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"PAR1", b"1e999", b"-", b"\x1f\x8b"]
)
_new = _tokens | st.binary(max_size=8) | st.tuples(_place, _size)
OPS = st.lists(
    st.tuples(_place, st.sampled_from([0, 1, 2**20]) | _size, _new), min_size=1, max_size=5
)


def mutated(data: bytes, ops: list[Op]) -> bytes:
    for place, size, new in ops:
        at = place % (len(data) + 1)
        if isinstance(new, tuple):
            start = new[0] % (len(data) + 1)
            new = data[start : start + new[1]]
        data = data[:at] + new + data[at + size :]
    return data


@cache
def whole(shape: str, container: str) -> bytes:
    """A log of one conversation for every name."""
    rows = [logs.row(shape, name, logs.exchange(name)) for name in NAMES]
    return logs.packed(shape, rows, container)


# Runs


def names_after(data: bytes, container: str, bad_rows: str) -> set[str] | None:
    """Names of the conversations that `prepare` finds in a file; None if it says DataError."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / f"log.{container}", Path(folder) / "x.jsonl"
        path.write_bytes(data)
        try:
            prepare(all_turns(path, out=out, bad_rows=bad_rows))
        except DataError as error:
            assert str(path) in str(error)
            assert [p.name for p in Path(folder).iterdir()] == [path.name]
            return None
        text = json.dumps(rows_of(out))
        return set(re.findall(r"\b(r\d): (?:question|answer|thanks)", text))


def assert_none_lost(data: bytes, container: str, expected: set[str]) -> None:
    found = names_after(data, container, "skip")
    assert expected <= (found or set()), f"lost: {expected - (found or set())}"
    stopped = names_after(data, container, "stop")
    assert stopped is None or stopped == found


@LONG_OR_SHORT
def test_mutated_lines(seconds):
    def check(drawn: tuple[str, list[Op]]) -> None:
        shape, ops = drawn
        original = whole(shape, "jsonl")
        lines = dict(zip(original.split(b"\n"), NAMES, strict=False))
        data = mutated(original, ops)
        left = {lines[line] for line in data.split(b"\n") if line in lines}
        if data.startswith(MAGIC):  # a broken file of another kind, as far as one can tell
            left = set()
        assert_none_lost(data, "jsonl", left)

    fuzz(0.3 * seconds, st.tuples(SHAPES, OPS), check)


@LONG_OR_SHORT
def test_mutated_files(seconds):
    def check(drawn: tuple[str, str, list[Op]]) -> None:
        shape, container, ops = drawn
        assert_none_lost(mutated(whole(shape, container), ops), container, set())

    containers = st.sampled_from(["json", "jsonl.gz", "jsonl.zst"])
    fuzz(0.2 * seconds, st.tuples(SHAPES, containers, OPS), check)


# Any value in place of a field

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**70, max_value=2**80),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(["\ud800", "\x00", "user", "assistant", "human", "gpt", "", " "]),
)
_keys = st.sampled_from(["role", "content", "from", "value", "type", "text", "id", "messages"])
VALUES = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=6,
)


def paths_in(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_in(inner, (*path, key))


@LONG_OR_SHORT
def test_any_value_in_place_of_a_field(seconds):
    def check(drawn: tuple[str, int, list[tuple[int, Any]]]) -> None:
        shape, at, changes = drawn
        rows: list[Any] = [json.loads(line) for line in whole(shape, "jsonl").splitlines()]
        for place, value in changes:
            paths = list(paths_in(rows[at]))
            path = paths[place % len(paths)]
            rows[at] = changed(rows[at], path, value) if path else value
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        assert_none_lost(data, "jsonl", {*NAMES} - {NAMES[at]})

    changes = st.lists(st.tuples(st.integers(0, 200), VALUES), min_size=1, max_size=3)
    fuzz(0.25 * seconds, st.tuples(SHAPES, st.integers(0, len(NAMES) - 1), changes), check)


# Parquet: pyarrow's own code may die of it, and must not take the other tests along


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))


class Prison:
    """One process that runs `names_after`, replaced when it dies."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def names_after(self, data: bytes, bad_rows: str) -> set[str] | None:
        if self._pool is None:
            method = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=method, initializer=_limit_memory)
        try:
            return self._pool.submit(names_after, data, "parquet", bad_rows).result(timeout=60)
        except (BrokenProcessPool, TimeoutError) as error:
            self.close()
            raise AssertionError(f"the process died or hung: {error!r}") from None

    def close(self) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


@pytest.fixture
def prison() -> Iterator[Prison]:
    prison = Prison()
    yield prison
    prison.close()


@LONG_OR_SHORT
def test_mutated_parquet(prison, seconds):
    def check(drawn: tuple[str, list[Op]]) -> None:
        shape, ops = drawn
        data = mutated(whole(shape, "parquet"), ops)
        for bad_rows in ("skip", "stop"):
            prison.names_after(data, bad_rows)

    fuzz(0.25 * seconds, st.tuples(SHAPES, OPS), check)
