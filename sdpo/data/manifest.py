"""What `prepare` writes beside a file of interactions, `x.jsonl`: its manifest and its report.

The manifest has one row per conversation of the log that was examined: where it came from, what
became of it, and which interactions it gave.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from .arrow import pc


def manifest_path(out: str | Path) -> Path:
    """`x.manifest.parquet`: where every row came from, and what became of every conversation."""
    return Path(out).with_suffix(".manifest.parquet")


def report_path(out: str | Path) -> Path:
    """`x.report.json`: settings and counts."""
    return Path(out).with_suffix(".report.json")


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One conversation of a manifest.

    `via` says why it was found: "asked for", "duplicate of" (what was asked for) or "kept in place
    of" (it).
    """

    data: str
    conversation_id: str
    source: str
    user: str | None
    decision: str
    duplicate_of: str | None
    interactions: tuple[str, ...]
    via: str
    unused: dict[str, int]
    """Why answers became no interactions, and how many."""
    left_out: dict[str, int]
    """What of its messages no prompt holds."""


_FOR_HITS = (
    *("conversation_id", "source_file", "row", "user"),
    *("decision", "duplicate_of", "interaction_ids"),
)
_COUNTS = ("unused", "left_out")
"""Manifests of 0.1 do not have them."""


def find(data: str, id: str) -> list[Hit]:
    """Conversations of one data file's manifest, duplicates included.

    Args:
        id: a conversation's, an interaction's, a user's, or "path:row".

    Raises:
        DataError: there is no manifest beside the file, or it is not one.
    """
    path = manifest_path(data)
    asked = [_hit(data, row, "asked for", id) for row in _rows(path, lambda b: _names(b, id))]
    hits = {hit.source: hit for hit in asked}
    new = asked
    while new:
        kept = {hit.duplicate_of for hit in new} - {None}
        sources = {hit.source for hit in new}
        rows = list(_rows(path, lambda b, k=kept, s=sources: _related(b, k, s)))
        found = [
            _hit(data, r, "kept in place of" if _source(r) in kept else "duplicate of")
            for r in rows
        ]
        new = [hit for hit in found if hit.source not in hits]
        hits |= {hit.source: hit for hit in new}
    return list(hits.values())


def read_manifest(
    path: Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[pa.RecordBatch]:
    """Streams some columns of a manifest, and those of the `optional` ones that it has.

    Raises:
        DataError: there is no manifest, or the file is not one.
    """
    try:
        with pq.ParquetFile(path) as file:
            if missing := set(columns) - set(file.schema_arrow.names):
                problem = f"not a manifest, it has no {', '.join(sorted(missing))}"
                raise DataError(problem, file=str(path), hint="Prepare again")
            there = [*columns, *(n for n in optional if n in file.schema_arrow.names)]
            for batch in file.iter_batches(4096, columns=there):
                yield batch.select(there)
    except FileNotFoundError:
        hint = "Name the file that `sdpo data prepare` wrote, with the manifest beside it"
        raise DataError("no such manifest", file=str(path), hint=hint) from None
    except (OSError, pa.ArrowException) as error:
        problem = f"not a readable manifest ({str(error).splitlines()[0]})"
        raise DataError(problem, file=str(path), hint="Prepare again") from None


def _rows(path: Path, mask: Callable[[pa.RecordBatch], pa.Array]) -> Iterator[dict[str, Any]]:
    """Rows of a manifest for which `mask` of a batch is true; memory does not grow with it."""
    for batch in read_manifest(path, _FOR_HITS, _COUNTS):
        yield from batch.filter(mask(batch)).to_pylist()


def _names(batch: pa.RecordBatch, id: str) -> pa.Array:
    """Which rows an id names, in any of its meanings."""
    path, _, row = id.rpartition(":")
    named = [_is_in(batch[name], [id]) for name in ("conversation_id", "user")]
    named.append(_holds(batch["interaction_ids"], id))
    if row.isdigit():
        files = batch["source_file"].unique().to_pylist()
        same = [f for f in files if f == path or Path(f).resolve() == Path(path).resolve()]
        there = pc.equal(batch["row"], int(row))
        named.append(pc.and_(_is_in(batch["source_file"], same), there))
    return pa.array(np.logical_or.reduce([np.asarray(m) for m in named]))


def _related(batch: pa.RecordBatch, kept: Iterable[str | None], sources: Iterable[str]) -> pa.Array:
    """Which rows lie at `kept`, or are duplicates of `sources`."""
    files = batch["source_file"].cast(pa.string())
    at = pc.binary_join_element_wise(files, batch["row"].cast(pa.string()), ":")
    same = [np.asarray(_is_in(at, kept)), np.asarray(_is_in(batch["duplicate_of"], sources))]
    return pa.array(np.logical_or.reduce(same))


def _is_in(column: pa.Array, values: Iterable[str | None]) -> pa.Array:
    wanted = pa.array(list(values), pa.string())
    return pc.is_in(column.cast(pa.string()), value_set=wanted, skip_nulls=True)


def _holds(lists: pa.Array, id: str) -> pa.Array:
    """Which lists of texts hold one."""
    mask = np.zeros(len(lists), bool)
    there = np.asarray(pc.equal(pc.list_flatten(lists), id), bool)
    mask[np.asarray(pc.list_parent_indices(lists))[there]] = True
    return pa.array(mask)


def _source(row: dict[str, Any]) -> str:
    return f"{row['source_file']}:{row['row']}"


def _hit(data: str, row: dict[str, Any], via: str, id: str = "") -> Hit:
    """`id`: what was asked for; of a single interaction that is all that counts."""
    ids = row["interaction_ids"] or []
    alone = id in ids and id not in (row["conversation_id"], row["user"])
    return Hit(
        data=data,
        conversation_id=row["conversation_id"],
        source=_source(row),
        user=row["user"],
        decision=row["decision"],
        duplicate_of=row["duplicate_of"],
        interactions=(id,) if alone else tuple(ids),
        via=via,
        unused=dict(row.get("unused") or ()),
        left_out=dict(row.get("left_out") or ()),
    )
