"""The plan: what every file holds, the units of work, and the order of all rows.

Every file is looked through once. Which rows a unit holds is known before any is read for good, so
that every row has its place in the order from the start, whatever the number of workers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ...errors import DataError
from ...io.rows import Chunk, split
from ..read.formats import Format, LogFile, describe


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePlan:
    """A file and its chunks; `error`: why it, or the rest of it, cannot be read."""

    path: Path
    log: LogFile | None
    chunks: tuple[Chunk, ...]
    size: int
    mtime_ns: int
    error: str | None = None

    @property
    def rows(self) -> int:
        """Rows of all chunks."""
        return sum(chunk.rows for chunk in self.chunks)

    @property
    def is_ready(self) -> bool:
        """It holds interactions, not conversations."""
        return self.log is not None and self.log.format == "triples"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A chunk that one worker processes; `offset` rows come before it in all files."""

    index: int
    log: LogFile
    chunk: Chunk
    offset: int


def plan_file(path: Path, forced: Format | Literal["auto"], lenient: bool) -> FilePlan:
    """Looks through a file once. Raises DataError if it cannot be read, unless `lenient`."""
    log, chunks, error = None, [], None
    try:
        log = describe(path, forced, lenient=lenient)
        for chunk in split(log.file):
            chunks.append(chunk)
    except DataError as broken:
        if not lenient:
            rows = sum(chunk.rows for chunk in chunks)
            hint = f"--bad-rows skip keeps the {rows:,} rows before the break"
            raise broken.hinting(hint) if rows else broken from None
        error = str(broken)
    stat = path.stat()
    return FilePlan(
        path=path,
        log=log,
        chunks=tuple(chunks),
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        error=error,
    )


def units_of(plans: list[FilePlan]) -> list[Unit]:
    """All units, in the order of the files."""
    units, offset = [], 0
    for plan in plans:
        for chunk in plan.chunks:
            assert plan.log is not None
            units.append(Unit(index=len(units), log=plan.log, chunk=chunk, offset=offset))
            offset += chunk.rows
    return units


def order_of(plans: list[FilePlan], shuffle_seed: int | None) -> np.ndarray | None:
    """(rows of all files,) every row's place in the order; None: as they come.

    Conversations are in the order of `datasets.Dataset.shuffle(seed)`, after ready interactions.
    """
    if shuffle_seed is None:
        return None
    n_rows = sum(plan.rows for plan in plans)
    n_ready = sum(plan.rows for plan in plans if plan.is_ready)
    permutation = np.random.default_rng(shuffle_seed).permutation(n_rows - n_ready)
    places = np.arange(n_rows)
    places[n_ready + permutation] = np.arange(n_ready, n_rows)
    return places
