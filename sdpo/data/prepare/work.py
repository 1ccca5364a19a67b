"""How a preparation runs: its work folder, what it takes up again after a kill, its workers."""

import fcntl
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from ...errors import DataError, SdpoError
from .plan import FilePlan

PREPARATION_VERSION = 2
"""Raise it with every change of what a unit of work holds: units of other versions are dropped."""
_LIBRARIES = ("rensa", "pyarrow", "orjson", "numpy", "presidio-analyzer", "spacy")

T = TypeVar("T")
R = TypeVar("R")


# The work folder


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """The folder beside `out` for the units that are done, locked against other runs.

    It is removed when the run succeeds and, if this run has made it, when the data are bad; a kill
    or any other error leaves it for the next run.
    """
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


def units_folder(work: Path, plans: list[FilePlan], settings: tuple) -> Path:
    """Where the units of these settings on these files are; those of others are dropped."""
    folder = work / _resume_key(plans, settings)[:16]
    for other in work.iterdir():
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    if done := len(list(folder.glob("*.arrow"))):
        print(f"sdpo: goes on from {done} units that are done", file=sys.stderr)
    return folder


def _resume_key(plans: list[FilePlan], settings: tuple) -> str:
    """A hash of everything that decides what the units hold."""
    files = [(str(plan.path), plan.size, plan.mtime_ns, plan.chunks) for plan in plans]
    logs = [
        (log.file.container, log.format, sorted(log.knows)) for plan in plans if (log := plan.log)
    ]
    libraries = [(name, _version(name)) for name in _LIBRARIES]
    everything = files, logs, settings, libraries, sys.version_info[:3], PREPARATION_VERSION
    return sha256(repr(everything).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Workers


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # Arrow's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
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


def in_parallel(
    pool: ProcessPoolExecutor | None,
    function: Callable[[T], R],
    items: list[T],
    tell: Callable[[list[R]], None],
) -> list[R]:
    """Results in the order of `items`; `tell` sees those there are, whenever there is another.

    Raises the error of the first item that has one.
    """
    results = map(function, items) if pool is None else pool.map(function, items)
    done: list[R] = []
    try:
        for result in results:
            done.append(result)
            tell(done)
    except DataError as error:
        raise error from None  # without the worker's own traceback
    return done


def _end_with_parent() -> None:
    """Ends this worker when its parent ends, however that happens."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
