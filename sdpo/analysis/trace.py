"""`sdpo data trace ID`: where a conversation, an interaction or a user went, and what has read it.

The manifest beside a file of interactions leads back to the rows of the logs, and forward to the
checkpoints of runs: a run draws interactions in an order that its seed, their number and, where it
draws whole conversations, their ids fix, and each checkpoint counts how many it has drawn, so what
it has read is known exactly. No model is read.

A run of `sdpo online` reads what was said in it, which its folder holds update by update: there an
interaction's id is traced, or the name of a user of ``sdpo users``, all of whose interactions are
in their own run. What was undone still holds what it read.

A conversation that was dropped as a duplicate lives on in the one kept in its place, and would come
back if only that one were removed: duplicates are traced along.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..batching import BatchConfig, Stream, unit_of
from ..data.manifest import Hit, find
from ..errors import DataError
from ..interactions import iter_interactions
from ..io.files import sha256, written_whole
from ..train.drift import drift_places
from ..train.selection import Judge, SelectConfig, selection_sha256


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What one of a run's checkpoints, or its export, has read of the interactions traced."""

    name: str
    interactions_seen: int
    """Interactions drawn so far, repeats counted."""
    read: dict[str, int]
    """Id of an interaction -> how often it was read, where at least once."""
    usable: bool = True
    """False if it was set aside as damaged."""


@dataclass(frozen=True, kw_only=True)
class RunTrace:
    """What one run has read of one data file."""

    run: str
    data: str
    trained_on_it: bool
    note: str = ""
    """Why nothing is known of the run."""
    left_out: tuple[str, ...] = ()
    """Interactions that the run's selection leaves out."""
    probe: tuple[str, ...] = ()
    """Interactions that the drift monitor reads, without training on them."""
    checkpoints: tuple[Checkpoint, ...] = ()
    own: bool = False
    """The run trained on what was said in it."""

    @property
    def has_read(self) -> bool:
        """A checkpoint has read some of the interactions traced."""
        return any(c.read for c in self.checkpoints)

    @property
    def newest_before(self) -> str | None:
        """The newest usable checkpoint that has read none."""
        clean = [c.name for c in self.checkpoints if not c.read and c.usable and c.name != "export"]
        return clean[-1] if clean else None


def find_runs(folders: Iterable[str]) -> list[Path]:
    """Every run at or under the folders.

    Raises:
        DataError: a folder holds none.
    """
    runs: list[Path] = []
    for folder in folders:
        found = [p.parent for p in sorted(Path(folder).rglob("config.json")) if _is_run(p)]
        if not found:
            hint = "Give the folder of a run, or one that holds runs"
            raise DataError("no run there", file=folder, hint=hint)
        runs += found
    return list(dict.fromkeys(runs))


def _is_run(config: Path) -> bool:
    """Tells a run's config.json from a model's."""
    stored = _json(config)
    return isinstance(stored, dict) and (
        {"data", "batch", "model"} <= stored.keys() or _talks(config.parent, stored)
    )


def _talks(run: Path, config: dict[str, Any]) -> bool:
    """A run of `sdpo online`."""
    return {"prompts", "batch", "model"} <= config.keys() and (run / "interactions").is_dir()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "Restore it, or leave it out"
        raise DataError(f"cannot be read ({error})", file=str(path), hint=hint) from None


def trace_run(run: Path, data: str, digest: str, wanted: Sequence[str]) -> RunTrace:
    """What a run's checkpoints have read of some interactions of a data file.

    Args:
        digest: SHA-256 of the data file.
        wanted: ids of interactions.
    """
    config, manifests = _json(run / "config.json"), _manifests(run)

    def unknown(note: str, *, trained_on_it: bool = False) -> RunTrace:
        return RunTrace(run=str(run), data=data, trained_on_it=trained_on_it, note=note)

    if not manifests:
        return unknown(
            f"no checkpoint, so it is not known what it read; its data is {config['data']}"
        )
    *_, newest = manifests.values()
    if (theirs := newest["data_sha256"]) != digest:
        return unknown(
            f"trained on other data: {config['data']} (sha256 {theirs[:12]}), not on {data} as it "
            f"is ({digest[:12]}); trace there, or the file as it was then"
        )
    try:
        kept, stream = _drawn_from(data, newest)
    except DataError as error:
        note = f"trained on this file, by a selection that is not known any more ({error})"
        return unknown(note, trained_on_it=True)
    place = {id: i for i, id in enumerate(kept)}
    traced = {place[id]: id for id in wanted if id in place}
    monitored = drift_places(len(kept), config["safeguard"]["probe_interactions"])
    return RunTrace(
        run=str(run),
        data=data,
        trained_on_it=True,
        left_out=tuple(id for id in wanted if id not in place),
        probe=tuple(traced[i] for i in monitored if i in traced),
        checkpoints=tuple(_read_by(run, manifests, stream, traced)),
    )


def trace_own(run: Path, id: str) -> RunTrace | None:
    """What the checkpoints of a run of `sdpo online` have read of an interaction, or of all that a
    user said, whose name the run's folder has; None: it has nothing of either."""
    checkpoints, found = [], False
    everything = run.name == id and run.parent.name == "users"
    said = _said(run, id, everything)
    for folder in (run, *sorted(run.glob("undone-*"))):
        here = said if folder == run else said | _said(folder, id, everything)
        found |= any(here.values())
        undone = "" if folder == run else f"{folder.name}/"
        manifests = _manifests(folder)
        steps = {name: manifest["step"] for name, manifest in manifests.items()}
        if (folder / "export").is_dir():
            steps["export"] = max(here, default=0)
        for name, step in steps.items():
            ids = [i for update, some in here.items() if update <= step for i in some]
            checkpoints.append(
                Checkpoint(
                    name=f"{undone}{name}",
                    interactions_seen=manifests.get(name, {}).get("interactions_seen", 0),
                    read=dict.fromkeys(ids, 1),
                    usable=not undone and name.removeprefix("step-").isdigit(),
                )
            )
    if not found:
        return None
    where = str(run / "interactions")
    return RunTrace(
        run=str(run), data=where, trained_on_it=True, checkpoints=tuple(checkpoints), own=True
    )


def _said(folder: Path, id: str, everything: bool) -> dict[int, list[str]]:
    """Update -> ids of its interactions that are meant."""
    files = (folder / "interactions").glob("update-*.parquet")
    return {
        int(file.stem.removeprefix("update-")): [
            i.id for i in iter_interactions(str(file)) if everything or i.id == id
        ]
        for file in sorted(files)
    }


def _manifests(run: Path) -> dict[str, dict[str, Any]]:
    """Manifests by checkpoint, in the order of steps; also of those set aside as damaged, whose
    weights still exist."""
    paths = (run / "checkpoints").glob("step-*/manifest.json")
    names = {p.parent.name: _json(p) for p in paths if p.parent.suffix != ".partial"}
    return dict(sorted(names.items(), key=lambda item: item[1]["step"]))


def _drawn_from(data: str, manifest: dict[str, Any]) -> tuple[list[str], Stream]:
    """Ids of the interactions that the run draws from, in the file's order, and how it does."""
    select = SelectConfig(**_fields(manifest["config"].get("select") or {}))
    batch = BatchConfig(**_fields(manifest["config"]["batch"]))
    rows = [(i.id, unit_of(i, batch)) for i in iter_interactions(data)]
    if select.selects:
        if selection_sha256(select) != manifest["selection_sha256"]:
            raise DataError(f"{select.scores} have changed since")
        judge = Judge(select)
        rows = [row for row in rows if isinstance(judge(row[0]), float)]
    return [id for id, _ in rows], Stream((unit for _, unit in rows), batch)


def _fields(stored: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stored.items() if name != "kind"}


def _read_by(
    run: Path, manifests: dict[str, dict[str, Any]], stream: Stream, traced: dict[int, str]
) -> Iterator[Checkpoint]:
    """What each checkpoint of a run has read of the interactions traced."""
    seen = {name: manifest["interactions_seen"] for name, manifest in manifests.items()}
    if (run / "export").is_dir():  # written at a run's end
        seen["export"] = stream.total
    drawn = stream.places(0, max(seen.values()))
    for name, count in seen.items():
        times = {id: int((drawn[:count] == i).sum()) for i, id in traced.items()}
        yield Checkpoint(
            name=name,
            interactions_seen=count,
            read={id: n for id, n in times.items() if n},
            usable=name.removeprefix("step-").isdigit(),
        )


def descendants(runs: Sequence[Path], traces: Sequence[RunTrace]) -> dict[str, str]:
    """Runs that started from, or were taught by, an export that has read some of it -> its folder.

    Weights that were copied or exported out of a run's folder are not recognised.
    """
    tainted = {str(Path(t.run).resolve()) for t in traces if t.has_read}
    origins: dict[str, str] = {}
    while found := [
        (run, origin)
        for run in runs
        if str(run) not in origins and (origin := _origin(_json(run / "config.json"), tainted))
    ]:
        origins |= {str(run): origin for run, origin in found}
        tainted |= {str(run.resolve()) for run, _ in found}
    return origins


def _origin(config: dict[str, Any], tainted: set[str]) -> str | None:
    """The folder inside one of ``tainted`` whose weights a run began with or was taught by."""
    for folder in (config["model"], (config.get("teacher") or {}).get("folder")):
        if folder and any(str(p) in tainted for p in Path(folder).resolve().parents):
            return folder
    return None


def trace_command(
    id: tyro.conf.Positional[str],
    /,
    *,
    data: tuple[str, ...] = (),
    runs: tuple[str, ...] = (),
    json_out: Annotated[str | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Show where a conversation, interaction or user went, and which checkpoints have read it.

    Args:
        id: a conversation's or an interaction's id, a user (hashed IP or user id, or a name that
            ``sdpo users`` has), or "path:row".
        data: files of interactions that `sdpo data prepare` wrote, with their manifests; none: look
            in runs of ``sdpo online`` alone.
        runs: folders of runs, or folders that hold runs.
        json_out: JSON file to write the findings to.
    """
    hits = [hit for file in data for hit in find(file, id)]
    folders = find_runs(runs)
    talked = [run for run in folders if _talks(run, _json(run / "config.json"))]
    traces = [own for run in talked if (own := trace_own(run, id)) is not None]
    if not hits and not traces:
        places = [*(f"the manifest of {file}" for file in data), *runs]
        print(f"{id}: not in {', '.join(places) or 'nothing: give --data or --runs'}")
        raise SystemExit(1)
    for file in data:
        if wanted := [i for hit in hits if hit.data == file for i in hit.interactions]:
            digest = sha256(file)
            others = [run for run in folders if run not in talked]
            traces += [trace_run(run, file, digest, wanted) for run in others]
    inherited = descendants(folders, traces)
    if json_out is not None:
        told = [
            asdict(t) | {"newest_before": None if t.run in inherited else t.newest_before}
            for t in traces
        ]
        found = {"id": id, "hits": list(map(asdict, hits)), "runs": told, "inherited": inherited}
        with written_whole(json_out) as file:
            json.dump(found, file, indent=2, ensure_ascii=False)
    _show(id, hits, traces, inherited)


def _show(id: str, hits: list[Hit], traces: list[RunTrace], inherited: dict[str, str]) -> None:
    columns = ("source", "conversation", "user", "decision", "interactions", "found as")
    rows = [
        (h.source, h.conversation_id, h.user or "", h.decision, "\n".join(h.interactions), h.via)
        for h in hits
    ]
    if hits:
        _print_table(id, columns, rows)
    for trace in traces:
        _show_run(trace)
    for run, origin in inherited.items():
        _print(f"{run} began with, or was taught by, {origin}: it carries what that has read")
    if any(hit.interactions for hit in hits) or any(t.own for t in traces):
        _print("\n".join(["To remove it:", *_remedies(id, hits, traces, inherited)]))
    else:
        _print("None of it is in the data.")


def _show_run(trace: RunTrace) -> None:
    if trace.note:
        _print(f"{trace.run}: {trace.note}")
        return
    rows = [
        (
            c.name,
            f"{c.interactions_seen:,}",
            ", ".join(f"{id} ({n}x)" for id, n in c.read.items()) or "nothing",
        )
        for c in trace.checkpoints
    ]
    title = f"{trace.run}, trained on {trace.data}"
    _print_table(title, ("checkpoint", "drawn", "read of it"), rows)
    if trace.left_out:
        _print(f"left out by the run's selection: {', '.join(trace.left_out)}")
    if trace.probe:
        _print(f"the drift monitor reads, without training on it: {', '.join(trace.probe)}")


def _remedies(
    id: str, hits: list[Hit], traces: list[RunTrace], inherited: dict[str, str]
) -> Iterator[str]:
    # a user's request names the user; one for a conversation leaves the user's others alone
    named = [id if id == hit.user else hit.conversation_id for hit in hits]
    if hits:
        yield f"1. add to the opt-out list: {', '.join(dict.fromkeys(named))}"
        files = ", ".join(dict.fromkeys(hit.data for hit in hits))
        yield f"2. prepare the data again, in place of {files}"
    for t in (t for t in traces if t.has_read and t.run not in inherited):
        run = Path(t.run)
        if t.own and run.name == id:
            forget = f"sdpo users forget {run.parents[1]} {id}"
            yield f"3. {t.run}: `{forget}` removes it, adapters and all"
            continue
        if t.newest_before is None:
            remedy = "no checkpoint left is from before: train again from the run's own model"
        else:
            step = t.newest_before.removeprefix("step-")
            remedy = (
                f"the newest checkpoint from before is {t.newest_before}: `sdpo export {t.run} "
                f"--step {step} --out FOLDER`, then "
            )
            begin = (
                "another run from there" if t.own else "`sdpo train --model FOLDER` on the new data"
            )
            remedy += begin
        read = ", ".join(c.name for c in t.checkpoints if c.read)
        yield f"3. {t.run}: {remedy}. Delete {read}"
    for run, origin in inherited.items():
        yield f"3. {run}: train again from what replaces {origin}. Delete all of its weights"


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that folds long ids, so that they are whole on narrow terminals, too."""
    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _print(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
