"""Conversation logs into interactions: in parallel, in flat memory, the same every time.

    plan     every file is looked through once: format, rows, units of work
    process  workers make of each unit its rendered rows and a table (worker.py), in a work folder
    choose   duplicates, caps, the stopping rule, over all tables (choose.py)
    write    interactions, manifest and report, beside and then renamed (write.py)

Nothing depends on the number of workers or on when a run was killed: units are the same, and those
that are done are found again by the next run of the same command.

Order: that of the files and their rows, or with a `shuffle_seed` that of Hugging Face's
`Dataset.shuffle(seed)` over all rows. Ready triples come before all else; no rule applies to them,
but the guardrails do. Where the rules stop early, only so many places of that order are processed
as may be needed.
"""

import fcntl
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from ...errors import DataError, SdpoError
from ...io.containers import resolve_paths
from ...io.fields import listed
from ..arrow import pc
from ..filters.guardrails import GuardrailConfig, read_opt_out, resolve, states
from ..filters.pii import presidio_finder
from ..manifest import manifest_path, report_path
from ..read.formats import FORMATS, Format
from .merge import DECISIONS, Choice, choose
from .plan import FilePlan, plan_file, units_of
from .process import Job, Shard, end_with_parent, process, total, whole_table
from .rules import PRESETS, ExtractionRules
from .write import write_json, write_manifest, write_rows

VERSION = 1
"""Of the report's fields."""
_PLACES_PER_CONVERSATION = 8
"""Places processed first for each conversation that is wanted; twice as many each time after."""
_WORTH_WORKERS = 1 << 23
"""Bytes from which reading in parallel pays for starting processes."""
_SHOWN = 20
"""Bad rows that the report names."""

Preset = Literal["strict", "paper-wildchat", "paper-wildfeedback", "all-turns"]
assert set(Preset.__args__) == set(PRESETS)
T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, int], None]
"""Called with what is done, how many rows of it are, and of how many."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to make of which logs."""

    inputs: tuple[str, ...]
    """Files, folders, globs and names of data sets on the Hugging Face hub."""
    out: str
    """The file to write, .jsonl or .parquet; its manifest and report come to stand beside it."""
    preset: Preset = "strict"
    """Which conversations and turns are kept: sdpo.data.prepare.rules says what each does."""
    format: Format | Literal["auto"] = "auto"
    """Of all inputs; auto: recognised, file by file."""
    languages: tuple[str, ...] | None = None
    """Languages to keep, as the log names them; "any" for all; None: as the preset says."""
    shuffle_seed: int | None = None
    """Shuffles; None: as the preset says."""
    max_conversations: int | None = None
    """Stop at so many; None: as the preset says."""
    guardrails: GuardrailConfig = field(default_factory=GuardrailConfig)
    bad_rows: Literal["stop", "skip"] = "stop"
    """Skip: leave out, and count, rows and files that cannot be read."""
    workers: int = 0
    """Processes; 0: one a core."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix not in (".jsonl", ".parquet"):
            raise SdpoError(f"out is {self.out}: name a file that ends in .jsonl or .parquet")
        allowed = {"preset": PRESETS, "format": ("auto", *FORMATS), "bad_rows": ("stop", "skip")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise SdpoError(f"{name} is {getattr(self, name)!r}: use one of {listed(values)}")
        if self.languages == ():
            raise SdpoError("languages: none named. Name some, or any, or leave it out.")
        if self.workers < 0:
            raise SdpoError(f"workers is {self.workers}: use 1 or more, or 0 for one a core")

    def rules(self) -> ExtractionRules:
        """The preset's, with what was asked for in their place."""
        asked: dict[str, Any] = {
            "shuffle_seed": self.shuffle_seed,
            "max_conversations": self.max_conversations,
        }
        rules = replace(PRESETS[self.preset], **{k: v for k, v in asked.items() if v is not None})
        if self.languages is None:
            return rules
        names = tuple(name.strip().lower() for name in self.languages)
        return replace(rules, languages=None if "any" in names else names)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was read, dropped and kept. rows = conversations_examined + those after the stop;
    conversations_examined = conversations_kept + the drops (but unreadable files)."""

    out: str
    sha256: str
    preset: str
    rules: dict[str, Any]
    guardrails: dict[str, Any]
    inputs: list[dict[str, Any]]
    counts: dict[str, int]
    drops: dict[str, int]
    interaction_drops: dict[str, int]
    pii: dict[str, int]
    guards: dict[str, str]
    bad_rows: list[str]
    version: int = VERSION


def prepare(
    config: PrepareConfig, rules: ExtractionRules | None = None, progress: Progress | None = None
) -> Report:
    """Prepares interactions; see the module's docstring.

    Args:
        rules: in place of the preset's.
        progress: called as rows are done.

    Raises:
        DataError: an input cannot be read; nothing is left behind.
        SdpoError: another run writes to the same file, or a worker died.
    """
    rules = rules or config.rules()
    guardrails = resolve(config.guardrails, config.preset)
    opted_out = read_opt_out(guardrails.opt_out) if guardrails.opt_out else frozenset()
    if guardrails.pii == "presidio":
        presidio_finder()  # says at once that it is not installed
    out = Path(config.out)
    files = resolve_paths(config.inputs)
    _check_out(out, files)
    workers = config.workers or os.cpu_count() or 1
    if sum(file.stat().st_size for file in files) < _WORTH_WORKERS:
        workers = 1
    lenient = config.bad_rows == "skip"
    with _work_folder(out) as work, _pool(workers) as pool:
        plan = partial(plan_file, forced=config.format, lenient=lenient)
        tell = progress or (lambda *_: None)
        plans = _in_parallel(pool, plan, files, lambda done: tell("files", len(done), len(files)))
        plans.sort(key=lambda plan: not plan.is_ready)
        settings = asdict(rules), asdict(guardrails), sorted(opted_out), lenient
        folder = _units_folder(work, _fingerprint(plans, settings))
        order = _order(plans, rules, folder)
        job = Job(
            folder=folder,
            rules=rules,
            guardrails=guardrails,
            opted_out=opted_out,
            lenient=lenient,
            order=order,
            places=(0, 0),
        )
        shards, choice = _process_and_choose(pool, plans, job, tell)
        report = _write(config, job, plans, shards, choice)
    return report


def _check_out(out: Path, files: list[Path]) -> None:
    if out.is_dir():
        raise DataError("is a folder", file=str(out), hint="Name a file")
    for path in (out, manifest_path(out), report_path(out)):
        if path.exists() and any(file.samefile(path) for file in files):
            hint = "Write to another folder"
            raise DataError("is one of the inputs", file=str(path), hint=hint)
    other = out.with_suffix(".parquet" if out.suffix == ".jsonl" else ".jsonl")
    if other.exists() and manifest_path(out).exists():
        raise DataError(
            f"stands there with the manifest that {out.name} would have",
            file=str(other),
            hint="Choose another name, or move it away together with its manifest and report",
        )


# Planning


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """The folder beside `out` where the units are made. It goes with the run's success, and if this
    run has made it, with bad data; what an earlier run had done stays."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.stem}.work")
    with _locked(out):
        is_new = not folder.exists()
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        except DataError:
            if is_new:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    path = out.with_name(f".{out.stem}.lock")
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SdpoError(
                    f"{out}: another run is writing it; wait for it, or choose another --out"
                ) from None
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                continue  # the run that held it has just ended, and removed it
            try:
                yield
            finally:
                path.unlink()
            return


def _fingerprint(plans: list[FilePlan], settings: tuple) -> str:
    """Of all that decides what the units hold: inputs, settings, this code and its libraries."""
    files = [(str(plan.path), plan.size, plan.mtime_ns, plan.pieces) for plan in plans]
    logs = [(log.container, log.format, sorted(log.knows)) for plan in plans if (log := plan.log)]
    used = ("rensa", "pyarrow", "orjson", "numpy", "presidio-analyzer", "spacy")
    libraries = [(name, _version(name)) for name in used]
    here = Path(__file__).parent
    code = [path.read_bytes() for path in sorted([*here.glob("*.py"), *here.parent.glob("*.py")])]
    everything = files, logs, settings, libraries, sys.version_info[:3], code
    return sha256(repr(everything).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _units_folder(work: Path, fingerprint: str) -> Path:
    """Where the units of this command on this data are; those of another are dropped."""
    folder = work / fingerprint[:16]
    for other in work.iterdir():
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    if done := len(list(folder.glob("*.arrow"))):
        print(f"sdpo: goes on from {done} units that are done", file=sys.stderr)
    return folder


def _order(plans: list[FilePlan], rules: ExtractionRules, folder: Path) -> Path | None:
    """Every row's place, as `datasets.Dataset.shuffle(seed)` would draw it, in a file that workers
    map into memory."""
    if rules.shuffle_seed is None:
        return None
    n_ready = sum(plan.rows for plan in plans if plan.is_ready)
    n_logged = sum(plan.rows for plan in plans) - n_ready
    permutation = np.random.default_rng(rules.shuffle_seed).permutation(n_logged)
    places = np.arange(n_ready + n_logged)
    places[n_ready + permutation] = np.arange(n_ready, n_ready + n_logged)
    partial, order = folder / "order.partial.npy", folder / "order.npy"
    np.save(partial, places)
    os.replace(partial, order)
    return order


# Processing


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # Arrow's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise SdpoError(
            "a worker died, perhaps for lack of memory: run the same command again to go on from "
            "what is done, with fewer --workers (in a script, `prepare` must be called below "
            "`if __name__ == '__main__'`, as workers import it)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_parallel(
    pool: ProcessPoolExecutor | None,
    function: Callable[[T], R],
    items: list[T],
    tell: Callable[[list[R]], None],
) -> list[R]:
    """Results in the order of `items`; `tell` sees those there are, whenever there is another.

    Raises the error of the first item that has one.
    """
    done: list[R] = []
    if pool is None:
        for item in items:
            done.append(function(item))
            tell(done)
        return done
    futures: list[Future[R]] = [pool.submit(function, item) for item in items]
    for future in futures:
        try:
            done.append(future.result())
        except DataError as error:
            raise error from None  # without the worker's own traceback
        tell(done)
    return done


def _process_and_choose(
    pool: ProcessPoolExecutor | None, plans: list[FilePlan], job: Job, tell: Progress
) -> tuple[list[Shard], Choice]:
    """Processes as many places as the rules need: all, unless they stop early."""
    units = units_of(plans)
    n_rows = sum(plan.rows for plan in plans)
    order = np.load(job.order, mmap_mode="r") if job.order else None
    most = job.rules.max_conversations
    n_ready = sum(plan.rows for plan in plans if plan.is_ready)
    start, end = 0, n_rows
    if most is not None:
        end = min(n_rows, n_ready + most * _PLACES_PER_CONVERSATION)
    shards: list[Shard] = []
    while True:
        job = replace(job, places=(start, end))
        work = partial(process, job=job)
        tell("rows", 0, n_rows)
        _in_parallel(pool, work, units, lambda done: tell("rows", sum(done), n_rows))
        shards += [Shard.of(job, unit) for unit in units]
        choice = choose(shards, order, job.rules, job.guardrails)
        if choice.stopped or end >= n_rows:
            return shards, choice
        start, end = end, min(n_rows, 2 * end)


# Results


def _write(
    config: PrepareConfig,
    job: Job,
    plans: list[FilePlan],
    shards: list[Shard],
    choice: Choice,
) -> Report:
    out = Path(config.out)
    manifest, told = manifest_path(out), report_path(out)
    partials = {path: path.with_name(f".{path.name}.partial") for path in (manifest, told, out)}
    try:
        digest = write_rows(partials[out], shards, choice)
        write_manifest(partials[manifest], shards, plans, choice)
        report = _report(config, job, plans, shards, choice, digest)
        write_json(partials[told], asdict(report))
        for path, written in partials.items():
            os.replace(written, path)
    except BaseException:
        for written in partials.values():
            written.unlink(missing_ok=True)
        raise
    return report


def _report(
    config: PrepareConfig,
    job: Job,
    plans: list[FilePlan],
    shards: list[Shard],
    choice: Choice,
    digest: str,
) -> Report:
    examined = Counter(choice.decisions[choice.examined].tolist())
    drops = {DECISIONS[code]: n for code, n in sorted(examined.items()) if code}
    if unread := [plan.error for plan in plans if plan.error]:
        drops["unreadable file"] = len(unread)
    table = whole_table(shards)
    summed = ["ready", "without_history", "blank", "injections", "opted_out"]
    kept = table.select([*summed, "pii"]).take(pa.array(choice.kept))
    sums = {name: pc.sum(kept[name]).as_py() or 0 for name in summed}
    errors = table["error"].filter(pa.array(choice.examined)).drop_null()[:_SHOWN].to_pylist()
    gone = {
        "opted out": sums["opted_out"],
        "prompt injection": sums["injections"],
        "blank answer or follow-up": sums["blank"],
    }
    knows = frozenset[str]().union(*(plan.log.knows for plan in plans if plan.log))
    return Report(
        out=out_name(config),
        sha256=digest,
        preset=config.preset,
        rules=_plain(job.rules),
        guardrails=_plain(job.guardrails),
        inputs=[_input(plan) for plan in plans],
        counts={
            "rows": sum(plan.rows for plan in plans),
            "conversations_examined": int(choice.examined.sum()),
            "conversations_kept": len(choice.kept),
            "interactions": int(choice.counts[choice.kept].sum()),
            "answers_without_history": sums["without_history"],
            "ready_interactions": sums["ready"],
            "renamed_ids": len(choice.renamed),
        },
        drops=drops,
        interaction_drops={reason: n for reason, n in gone.items() if n},
        pii=total(kept["pii"].drop_null().to_pylist()),
        guards=states(job.guardrails, knows),
        bad_rows=[*unread, *errors][:_SHOWN],
    )


def out_name(config: PrepareConfig) -> str:
    """Of the file, without the folder: it may move, with what stands beside it."""
    return Path(config.out).name


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def _input(plan: FilePlan) -> dict[str, Any]:
    return {
        "path": str(plan.path),
        "format": plan.log.format if plan.log else None,
        "container": plan.log.container if plan.log else None,
        "bytes": plan.size,
        "rows": plan.rows,
    }
