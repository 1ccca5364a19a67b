"""The three files of a preparation: the interactions, the manifest that ties every one of them to
its source row, and the report. Each is written beside its place and then renamed."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from ...errors import SdpoError
from ...io.files import sha256
from ..arrow import pc
from ..manifest import manifest_path, report_path
from .config import PrepareConfig
from .merge import DECISIONS, Choice
from .plan import FilePlan
from .process import Job, Shard, whole_table
from .report import Report, make_report

_TURN = pa.struct({"from": pa.string(), "value": pa.string()})
_TOOLS = {name: pa.string() for name in ("tool_calls", "tool_call_id", "name")}
INTERACTIONS = pa.schema(
    {
        "id": pa.string(),
        "turn_id": pa.int64(),
        "prompt": pa.list_(_TURN),
        "completion": _TURN,
        "user_response": _TURN,
        "weight": pa.float64(),
        "completion_token_ids": pa.list_(pa.int64()),
        "completion_logprobs": pa.list_(pa.float64()),
    }
)
WITH_TOOLS = INTERACTIONS.set(
    INTERACTIONS.get_field_index("prompt"),
    pa.field("prompt", pa.list_(pa.struct([*_TURN, *pa.schema(_TOOLS)]))),
)
"""The columns of a parquet file in whose prompts tools are called."""
MANIFEST = pa.schema(
    {
        "conversation_id": pa.string(),
        "source_file": pa.dictionary(pa.int32(), pa.string()),
        "row": pa.int64(),
        "place": pa.int64(),
        "user": pa.string(),
        "language": pa.string(),
        "model": pa.string(),
        "messages": pa.int32(),
        "characters": pa.int64(),
        "decision": pa.dictionary(pa.int32(), pa.string()),
        "duplicate_of": pa.string(),
        "interaction_ids": pa.list_(pa.string()),
        "unused": pa.map_(pa.string(), pa.int32()),
        "left_out": pa.map_(pa.string(), pa.int32()),
    }
)
_COPIED = 1 << 25


def write(
    config: PrepareConfig, job: Job, plans: list[FilePlan], shards: list[Shard], choice: Choice
) -> Report:
    """Writes the three files, whole or not at all, and returns the report."""
    out = Path(config.out)
    manifest, summary = manifest_path(out), report_path(out)
    partials = {path: path.with_name(f".{path.name}.partial") for path in (manifest, summary, out)}
    try:
        schema = _schema(shards, choice, job.rules.next_response)
        _write_rows(partials[out], _chosen(shards, choice), schema)
        _write_manifest(partials[manifest], shards, plans, choice)
        report = make_report(config, job, plans, shards, choice, sha256(partials[out]))
        text = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
        partials[summary].write_text(text, encoding="utf-8")
        for path, written in partials.items():
            os.replace(written, path)
    except BaseException:
        for written in partials.values():
            written.unlink(missing_ok=True)
        raise
    return report


# The interactions


def _schema(shards: list[Shard], choice: Choice, next_response: bool) -> pa.Schema:
    has_tools = whole_table(shards)["has_tools"].take(pa.array(choice.kept))
    schema = WITH_TOOLS if pc.any(has_tools).as_py() else INTERACTIONS
    return schema.append(pa.field("next_completion", _TURN)) if next_response else schema


def _write_rows(partial: Path, pieces: Iterator[bytes], schema: pa.Schema) -> None:
    """Writes JSON lines to `x.jsonl.partial`, or as row groups to `x.parquet.partial`."""
    with partial.open("wb") as file:
        if partial.name.endswith(".parquet.partial"):
            _write_row_groups(file, pieces, schema)
        else:
            file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _write_row_groups(file: BinaryIO, pieces: Iterator[bytes], schema: pa.Schema) -> None:
    held = bytearray()
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for piece in pieces:
            held += piece
            if len(held) >= _COPIED:
                _write_whole_lines(writer, held)
        _write_whole_lines(writer, held)


def _write_whole_lines(writer: pq.ParquetWriter, held: bytearray) -> None:
    """Moves the lines that are whole by now from `held` into a row group."""
    if end := held.rfind(b"\n") + 1:
        options = pa_json.ReadOptions(block_size=end + 1)
        parsing = pa_json.ParseOptions(explicit_schema=writer.schema)
        whole = io.BytesIO(held[:end])
        table = pa_json.read_json(whole, read_options=options, parse_options=parsing)
        writer.write_table(table.select(writer.schema.names).cast(writer.schema))
    del held[:end]


def _chosen(shards: list[Shard], choice: Choice) -> Iterator[bytes]:
    """The lines of the kept rows in order, neighbours in one piece."""
    shard, start, end = _extents(shards)
    rows = choice.kept[end[choice.kept] > start[choice.kept]]
    if not len(rows):
        return
    renamed = {position for position, _ in choice.renamed}
    is_renamed = np.isin(rows, list(renamed))
    before, after = rows[:-1], rows[1:]
    splits = (shard[after] != shard[before]) | (start[after] != end[before])
    splits |= is_renamed[1:] | is_renamed[:-1]
    firsts = np.flatnonzero(np.append(True, splits))
    lasts = np.append(firsts[1:], len(rows)) - 1
    open_shard = lru_cache(maxsize=256)(lambda i: shards[i].lines.open("rb"))
    for first, last in zip(rows[firsts].tolist(), rows[lasts].tolist(), strict=True):
        file = open_shard(int(shard[first]))
        pieces = _copied(file, int(start[first]), int(end[last]))
        if first in renamed:
            yield _with_new_ids(b"".join(pieces), first, choice)
        else:
            yield from pieces


def _copied(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    for at in range(start, end, _COPIED):
        piece = os.pread(file.fileno(), min(_COPIED, end - at), at)
        if len(piece) != min(_COPIED, end - at):
            raise SdpoError(f"{file.name} was cut short: remove its folder, and run again")
        yield piece


def _extents(shards: list[Shard]) -> tuple[np.ndarray, ...]:
    """(R,) shard, first byte and byte after the last of every row's lines."""
    shard, start, end = [], [], []
    for i, part in enumerate(shards):
        column = part.table["ends"]
        count = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
        bytes_at = np.concatenate([[0], pc.list_flatten(column).to_numpy()])[[0, *count]]
        shard.append(np.full(len(count), i))
        start.append(bytes_at[:-1])
        end.append(bytes_at[1:])
    none = np.empty(0, np.int64)
    return tuple(np.concatenate([none, *parts]) for parts in (shard, start, end))


def _with_new_ids(lines: bytes, row: int, choice: Choice) -> bytes:
    out = []
    for i, line in enumerate(lines.splitlines(keepends=True)):
        if n := choice.renamed.get((row, i)):
            parsed = orjson.loads(line)
            parsed["id"] = f"{parsed['id']}~{n}"
            line = orjson.dumps(parsed, option=orjson.OPT_APPEND_NEWLINE)
        out.append(line)
    return b"".join(out)


# The manifest


def _write_manifest(
    partial: Path, shards: list[Shard], plans: list[FilePlan], choice: Choice
) -> None:
    """Writes the decision on every examined row, in the order of the log."""
    numbers = whole_table(shards).select(["index", "number"])
    ends = np.cumsum([plan.rows for plan in plans])
    of_file = np.searchsorted(ends, numbers["index"].to_numpy(), side="right")
    files, number = [str(plan.path) for plan in plans], numbers["number"].to_numpy()
    starts = np.cumsum([0, *(shard.table.num_rows for shard in shards)])
    of_unit: dict[int, list[int]] = {}
    for i, shard in enumerate(shards):
        of_unit.setdefault(shard.unit, []).append(i)
    is_kept = np.zeros(len(choice.places), bool)
    is_kept[choice.kept] = True
    with pq.ParquetWriter(partial, MANIFEST, compression="zstd") as writer:
        for unit in sorted(of_unit):
            part = pa.concat_tables(
                [shards[i].table.select(_COPIED_COLUMNS) for i in of_unit[unit]]
            )
            rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in of_unit[unit]])
            order = np.argsort(part["index"].to_numpy(), kind="stable")
            order = order[choice.examined[rows[order]]]
            part, rows = part.take(pa.array(order)), rows[order]
            ids = zip(
                rows.tolist(), part["interaction_ids"].to_pylist(), is_kept[rows], strict=True
            )
            columns = {name: part[name] for name in MANIFEST.names if name in part.column_names}
            columns |= {
                "source_file": _coded(of_file[rows], files),
                "row": part["number"],
                "place": choice.places[rows],
                "decision": _coded(choice.decisions[rows], list(DECISIONS)),
                "duplicate_of": [
                    f"{files[of_file[i]]}:{number[i]}" if i >= 0 else None
                    for i in choice.duplicate_of[rows].tolist()
                ],
                "interaction_ids": [
                    _new_ids(row, given, choice) if kept else [] for row, given, kept in ids
                ],
            }
            writer.write_table(pa.table([columns[name] for name in MANIFEST.names], MANIFEST))


_COPIED_COLUMNS = [
    *("index", "number", "conversation_id", "user", "language", "model"),
    *("messages", "characters", "interaction_ids", "unused", "left_out"),
]


def _coded(codes: np.ndarray, names: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), names)


def _new_ids(row: int, ids: list[str], choice: Choice) -> list[str]:
    renamed = ((id, choice.renamed.get((row, i))) for i, id in enumerate(ids))
    return [f"{id}~{n}" if n else id for id, n in renamed]
