"""Conversation logs into interactions: in parallel, in flat memory, the same every time.

    plan      every file is looked through once: its format, its rows, the units of work
    process   workers make of each unit its rendered rows, and a table of what became of each row
    merge     over all tables: duplicates, caps, where to stop, unique ids
    write     interactions, manifest and report, each beside its place and then renamed

Nothing depends on the number of workers or on when a run was killed: the units are the same, and
those that are done are found again by the next run of the same command.

The order is that of the files and their rows or, with a `shuffle_seed`, that of Hugging Face's
`Dataset.shuffle(seed)` over all rows. Ready interactions come first; the guardrails apply to them,
the rules do not. Where the rules stop early, only as many places of that order are processed as may
be needed.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import DataError
from ...io.paths import resolve_paths
from ..filters.guardrails import GuardrailConfig, read_opt_out, resolve
from ..filters.pii import presidio_finder
from ..manifest import manifest_path, report_path
from .config import PrepareConfig
from .merge import Choice, merge
from .plan import FilePlan, order_of, plan_file, units_of
from .process import Job, Shard, process
from .report import Report
from .rules import ExtractionRules
from .work import in_parallel, units_folder, work_folder, worker_pool
from .write import write

_PLACES_PER_CONVERSATION = 8
"""Places processed first for each conversation that is wanted; twice as many each time after."""
_WORTH_WORKERS = 1 << 23
"""Bytes of input from which starting processes pays."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


def prepare(
    config: PrepareConfig, rules: ExtractionRules | None = None, progress: Progress | None = None
) -> Report:
    """Prepares interactions; see the module's docstring.

    Args:
        rules: in place of the preset's.
        progress: called as files and rows are done.

    Raises:
        DataError: an input cannot be read; nothing is left behind.
        SdpoError: another run writes to the same file, or a worker died.
    """
    rules = rules or config.rules()
    guardrails = resolve(config.guardrails, config.preset)
    opted_out = read_opt_out(guardrails.opt_out) if guardrails.opt_out else frozenset()
    if guardrails.pii == "presidio":
        presidio_finder()  # says at once that it is not installed
    files = resolve_paths(config.inputs)
    _check_out(Path(config.out), files)
    tell = progress or (lambda *_: None)
    lenient = config.bad_rows == "skip"
    is_small = sum(file.stat().st_size for file in files) < _WORTH_WORKERS
    workers = 1 if is_small else config.workers or os.cpu_count() or 1
    with work_folder(Path(config.out)) as work, worker_pool(workers) as pool:
        plan = partial(plan_file, forced=config.format, lenient=lenient)
        plans = in_parallel(pool, plan, files, lambda done: tell("files", len(done), len(files)))
        plans.sort(key=lambda plan: not plan.is_ready)  # ready interactions come first
        job = _job(plans, rules, guardrails, opted_out, lenient, work)
        shards, choice = _process_and_merge(pool, plans, job, tell)
        return write(config, job, plans, shards, choice)


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


def _job(
    plans: list[FilePlan],
    rules: ExtractionRules,
    guardrails: GuardrailConfig,
    opted_out: frozenset[str],
    lenient: bool,
    work: Path,
) -> Job:
    settings = asdict(rules), asdict(guardrails), sorted(opted_out), lenient
    folder, order = units_folder(work, plans, settings), None
    if (places := order_of(plans, rules.shuffle_seed)) is not None:
        unfinished, order = folder / "order.partial.npy", folder / "order.npy"
        np.save(unfinished, places)
        os.replace(unfinished, order)
    return Job(
        folder=folder,
        rules=rules,
        guardrails=guardrails,
        opted_out=opted_out,
        lenient=lenient,
        order=order,
        places=(0, 0),
    )


def _process_and_merge(
    pool: ProcessPoolExecutor | None, plans: list[FilePlan], job: Job, tell: Progress
) -> tuple[list[Shard], Choice]:
    """Processes as many places as the rules need: all, unless they stop early."""
    units = units_of(plans)
    n_rows = sum(plan.rows for plan in plans)
    n_ready = sum(plan.rows for plan in plans if plan.is_ready)
    most = job.rules.max_conversations
    start, end = 0, n_rows
    if most is not None:
        end = min(n_rows, n_ready + most * _PLACES_PER_CONVERSATION)
    shards: list[Shard] = []
    while True:
        job = replace(job, places=(start, end))
        tell("rows", 0, n_rows)
        work = partial(process, job=job)
        in_parallel(pool, work, units, lambda done: tell("rows", sum(done), n_rows))
        shards += [Shard.of(job, unit) for unit in units]
        choice = merge(shards, job.load_order(), job.rules, job.guardrails)
        if choice.stopped or end >= n_rows:
            return shards, choice
        start, end = end, min(n_rows, 2 * end)
