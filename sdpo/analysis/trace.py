"""`sdpo data trace ID`: where a conversation, an interaction or a user went, and what has read it.

From the manifest beside a file of interactions to the rows of the logs, and from there to the
checkpoints of runs: a run draws interactions in an order that its seed and their number fix, and
each checkpoint counts how many it has drawn, so that what it has read is known exactly. Nothing
here reads a model.

What was dropped as a duplicate lives on in the conversation kept in its place, and would come back
if only that one were removed: duplicates are traced along.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..batching import BatchConfig, Cursor, total_interactions
from ..conversations import DataError
from ..data.manifest import Hit, find
from ..interactions import iter_interactions
from ..io.files import sha256, write_text
from ..train.drift import drift_places
from ..train.selection import Judge, SelectConfig, selection_sha256


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What one of a run's checkpoints, or its export, has read of the interactions traced."""

    name: str
    interactions_seen: int
    """All that it has drawn, repeats counted."""
    read: dict[str, int]
    """Times by interaction's id, of those at least once."""
    usable: bool = True
    """False for one that was set aside as damaged."""


@dataclass(frozen=True, kw_only=True)
class RunTrace:
    """One run and one data file."""

    run: str
    data: str
    trained_on_it: bool
    note: str = ""
    """Why nothing can be told, or what else is to know."""
    left_out: tuple[str, ...] = ()
    """Interactions that the run's selection does not train on."""
    probe: tuple[str, ...] = ()
    """Interactions that the safeguards' probe reads, without training on them."""
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def has_read(self) -> bool:
        """Some of it."""
        return any(c.read for c in self.checkpoints)

    @property
    def newest_before(self) -> str | None:
        """The newest usable checkpoint that has read none."""
        clean = [c.name for c in self.checkpoints if not c.read and c.usable and c.name != "export"]
        return clean[-1] if clean else None


# Runs


class _Stored(NamedTuple):
    """A checkpoint's folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.folder.name.split("-")[1].split(".")[0])


def find_runs(folders: Iterable[str]) -> list[Path]:
    """Every run at or under the folders.

    Raises:
        DataError: a folder holds none.
    """
    runs: dict[Path, None] = {}
    for folder in folders:
        found = [p.parent for p in sorted(Path(folder).rglob("config.json")) if _is_run(p)]
        if not found:
            raise DataError(f"{folder}: no run there; give the folder of a run, or one of runs")
        runs |= dict.fromkeys(found)
    return list(runs)


def _is_run(config: Path) -> bool:
    """A model's folder has a config.json too."""
    stored = _json(config)
    return isinstance(stored, dict) and {"data", "batch", "model"} <= stored.keys()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it, or leave it out") from None


def trace_run(run: Path, data: str, digest: str, wanted: Sequence[str]) -> RunTrace:
    """What a run's checkpoints have read of some interactions of a data file."""
    config = _json(run / "config.json")

    def told(note: str, trained_on_it: bool = False) -> RunTrace:
        return RunTrace(run=str(run), data=data, trained_on_it=trained_on_it, note=note)

    stored = _checkpoints(run)
    if not stored:
        return told(f"no checkpoint, so it is not known what it read; its data is {config['data']}")
    newest = stored[-1].manifest
    if newest["data_sha256"] != digest:
        return told(
            f"trained on other data: {config['data']} (sha256 {newest['data_sha256'][:12]}), not "
            f"on {data} as it is ({digest[:12]}); trace there, or the file as it was then"
        )
    try:
        kept = _kept(data, newest)
    except DataError as error:
        return told(f"trained on this file, by a selection that cannot be told ({error})", True)
    place = {id: i for i, id in enumerate(kept)}
    traced = {place[id]: id for id in wanted if id in place}
    return RunTrace(
        run=str(run),
        data=data,
        trained_on_it=True,
        left_out=tuple(id for id in wanted if id not in place),
        probe=_probed(len(kept), config, traced),
        checkpoints=tuple(_read_by(run, stored, len(kept), traced)),
    )


def _checkpoints(run: Path) -> list[_Stored]:
    """By step; one that was set aside as damaged is there too: its weights still are."""
    paths = (run / "checkpoints").glob("step-*/manifest.json")
    whole = [p for p in paths if not p.parent.name.endswith(".partial")]
    return sorted((_Stored(p.parent, _json(p)) for p in whole), key=lambda s: s.step)


def _kept(data: str, manifest: dict[str, Any]) -> list[str]:
    """Ids of the interactions that the run draws from, in the file's order."""
    ids = [i.id for i in iter_interactions(data)]
    stored = dict(manifest["config"].get("select") or {})
    stored.pop("kind", None)
    select = SelectConfig(**stored)
    if not select.selects:
        return ids
    if selection_sha256(select) != manifest["selection_sha256"]:
        raise DataError(f"{select.scores} have changed since")
    judge = Judge(select)
    return [id for id in ids if isinstance(judge(id), float)]


def _probed(n: int, config: dict[str, Any], traced: dict[int, str]) -> tuple[str, ...]:
    places = drift_places(n, config["safeguard"]["probe_interactions"])
    return tuple(traced[i] for i in places if i in traced)


def _read_by(
    run: Path, stored: Sequence[_Stored], n: int, traced: dict[int, str]
) -> Iterator[Checkpoint]:
    batch = stored[-1].manifest["config"]["batch"]
    seen = {s.folder.name: s.manifest["interactions_seen"] for s in stored}
    if (run / "export").is_dir():  # written at a run's end
        seen["export"] = total_interactions(n, BatchConfig(epochs=batch["epochs"]))
    drawn = np.array(Cursor(n, batch["seed"]).peek(max(seen.values())))
    for name, count in seen.items():
        times = {id: int((drawn[:count] == i).sum()) for i, id in traced.items()}
        yield Checkpoint(
            name=name,
            interactions_seen=count,
            read={id: n for id, n in times.items() if n},
            usable=name.removeprefix("step-").isdigit(),
        )


def descendants(runs: Sequence[Path], traces: Sequence[RunTrace]) -> dict[str, str]:
    """Runs that started from, or were taught by, the export of one that has read some of it.

    Weights that were copied or exported out of a run's folder are not recognised.
    """
    tainted = {str(Path(t.run).resolve()) for t in traces if t.has_read}
    out: dict[str, str] = {}
    grown = True
    while grown:
        grown = False
        for run in runs:
            origin = _origin(_json(run / "config.json"), tainted)
            if origin and str(run) not in out:
                out[str(run)] = origin
                tainted.add(str(run.resolve()))
                grown = True
    return out


def _origin(config: dict[str, Any], tainted: set[str]) -> str | None:
    """The folder of weights that a run began with and that lies within one of `tainted`."""
    for folder in (config["model"], (config.get("teacher") or {}).get("folder")):
        if folder and any(str(p) in tainted for p in Path(folder).resolve().parents):
            return folder
    return None


# The command


def trace_command(
    id: tyro.conf.Positional[str],
    /,
    *,
    data: tuple[str, ...],
    runs: tuple[str, ...] = (),
    json_out: Annotated[str | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Where a conversation, an interaction or a user went, and which checkpoints have read it.

    Args:
        id: of a conversation or an interaction, a user (hashed IP or user id), or "path:row".
        data: files of interactions with their manifests, as `sdpo data prepare` writes them.
        runs: folders of runs, or folders of those.
        json_out: file to write the findings to, as JSON.
    """
    hits = [hit for file in data for hit in find(file, id)]
    if not hits:
        print(f"{id}: in none of the manifests of {', '.join(data)}")
        raise SystemExit(1)
    folders = find_runs(runs)
    traces = [
        trace_run(run, file, sha256(file), _wanted(hits, file))
        for file in data
        if _wanted(hits, file)
        for run in folders
    ]
    inherited = descendants(folders, traces)
    if json_out is not None:
        _write(json_out, id, hits, traces, inherited)
    _show(Console(), id, hits, traces, inherited)


def _wanted(hits: Iterable[Hit], data: str) -> list[str]:
    return [i for hit in hits if hit.data == data for i in hit.interactions]


def _write(path: str, id: str, hits, traces, inherited: dict[str, str]) -> None:
    row = {
        "id": id,
        "hits": [asdict(hit) for hit in hits],
        "runs": [
            asdict(t) | {"newest_before": None if t.run in inherited else t.newest_before}
            for t in traces
        ],
        "inherited": inherited,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(row, indent=2, ensure_ascii=False))


def _show(console: Console, id: str, hits, traces, inherited: dict[str, str]) -> None:
    columns = ("source", "conversation", "user", "decision", "interactions", "found as")
    table = _table(*columns, title=id)
    for hit in hits:
        asked = (hit.source, hit.conversation_id, hit.user or "", hit.decision)
        table.add_row(*map(escape, (*asked, "\n".join(hit.interactions) or "none", hit.via)))
    console.print(table)
    for trace in traces:
        _show_run(console, trace)
    for run, origin in inherited.items():
        _say(
            console, f"{run} began with, or was taught by, {origin}: it carries what that has read"
        )
    if any(hit.interactions for hit in hits):
        _say_what_to_do(console, id, hits, traces, inherited)
    else:
        _say(console, "None of it is in the data.")


def _table(*columns: str, title: str) -> Table:
    """Whose ids are told whole, on narrow terminals too."""
    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _show_run(console: Console, trace: RunTrace) -> None:
    if trace.note:
        _say(console, f"{trace.run}: {trace.note}")
        return
    title = f"{trace.run}, trained on {trace.data}"
    table = _table("checkpoint", "drawn", "read of it", title=title)
    table.columns[1].justify = "right"
    for c in trace.checkpoints:
        read = ", ".join(f"{id} ({n}x)" for id, n in c.read.items()) or "nothing"
        table.add_row(c.name, f"{c.interactions_seen:,}", escape(read))
    console.print(table)
    if trace.left_out:
        _say(console, f"left out by the run's selection: {', '.join(trace.left_out)}")
    if trace.probe:
        names = ", ".join(trace.probe)
        _say(console, f"the safeguards' probe reads, without training on it: {names}")


def _say_what_to_do(console: Console, id: str, hits, traces, inherited: dict[str, str]) -> None:
    _say(console, "To remove it:")
    # a user's request names the user; one for a conversation leaves the user's others alone
    named = [id if id == hit.user else hit.conversation_id for hit in hits]
    _say(console, f"1. add to the opt-out list: {', '.join(dict.fromkeys(named))}")
    files = ", ".join(dict.fromkeys(hit.data for hit in hits))
    _say(console, f"2. prepare the data again, in place of {files}")
    for t in (t for t in traces if t.has_read and t.run not in inherited):
        if t.newest_before is None:
            remedy = "no checkpoint left is from before: train again from the run's own model"
        else:
            step = t.newest_before.removeprefix("step-")
            remedy = (
                f"the newest checkpoint from before is {t.newest_before}: `sdpo export {t.run} "
                f"--step {step} --out FOLDER`, then `sdpo train --model FOLDER` on the new data"
            )
        gone = ", ".join(c.name for c in t.checkpoints if c.read)
        _say(console, f"3. {t.run}: {remedy}. Delete {gone}")
    for run, origin in inherited.items():
        _say(
            console, f"3. {run}: train again from what replaces {origin}. Delete all of its weights"
        )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
