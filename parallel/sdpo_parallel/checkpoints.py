"""Checkpoints that are whole or absent, and verified before they are read. For both engines.

torch.distributed.checkpoint (DCP) writes ``step-N.partial``; every rank notes length and CRC-32 of
its files; when all are on disk the coordinator writes ``manifest.json`` and renames the folder to
``step-N``. Reading checks every file first, each rank its share of them; a damaged checkpoint is
set aside as ``step-N.damaged`` and the next older one is taken. DCP reshards: any number of ranks
and any layout may read what another wrote.
"""

import json
import os
import shutil
import sys
import zlib
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.stateful import Stateful

from .config import CheckpointConfig
from .errors import SdpoError

MANIFEST = "manifest.json"
PATIENCE = timedelta(hours=4)
"""How long ranks wait for the slowest to write, or verify, its part."""
BLOCK = 1 << 24
"""Bytes read at a time while summing."""
FAILURES = (Exception, CheckpointException)
"""What a save may raise; DCP's own error is not an ``Exception``."""


class CheckpointError(SdpoError):
    """A checkpoint could not be written; the newest one before it is untouched."""


def summed(path: Path) -> dict[str, int]:
    """Length and CRC-32 of a file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


class SummedWriter(FileSystemWriter):
    """DCP's writer; sums beside each file, the manifest and the final name at the end."""

    def __init__(self, final: Path, manifest: Mapping[str, Any]):
        self.final, self.partial = final, Path(f"{final}.partial")
        self.manifest = manifest
        super().__init__(self.partial, sync_files=True)

    def write_data(self, plan, planner):
        """Runs on every rank."""
        future = super().write_data(plan, planner)
        results = future.wait()
        for name in {r.storage_data.relative_path for r in results}:
            sums = json.dumps(summed(self.partial / name))
            (self.partial / f"{name}.sum").write_text(sums, encoding="utf-8")
        return future

    def finish(self, metadata, results) -> None:
        """Runs on the coordinator, when every rank has written."""
        super().finish(metadata, results)
        files = {}
        for path in sorted(self.partial.glob("*.sum")):
            files[path.name.removesuffix(".sum")] = json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
        files[".metadata"] = summed(self.partial / ".metadata")
        with (self.partial / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({**self.manifest, "files": files}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(self.final, ignore_errors=True)
        os.rename(self.partial, self.final)
        folder = os.open(self.final.parent, os.O_RDONLY)
        os.fsync(folder)  # before older ones are removed
        os.close(folder)


class Checkpoints:
    """The checkpoints of one run. Every rank of the process group takes part, where there is one.

    Args:
        run_folder: the checkpoints are ``run_folder/checkpoints/step-N``.
        state: what a checkpoint holds, by name; DCP asks each for its state, and gives it back.
    """

    def __init__(
        self,
        run_folder: str | Path,
        config: CheckpointConfig,
        state: Mapping[str, Stateful | torch.nn.Module],
    ):
        self.folder, self.config = Path(run_folder) / "checkpoints", config
        self.state: dict[str, Any] = dict(state)
        self.distributed = distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        # of its own: a background save must not mix its messages with training's
        self.group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if distributed else None
        self._saving: tuple[int, Future] | None = None
        self.pinned = set[int]()
        """Steps whose checkpoints stay, however old."""

    def turn_to(self, run_folder: str | Path, state: Stateful) -> None:
        """Keep those of another run, with its own ``run`` state, from here on. None is pinned."""
        self.folder = Path(run_folder) / "checkpoints"
        self.state["run"], self.pinned = state, set()

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        names = [f.name.removeprefix("step-") for f in self.folder.glob("step-*")]
        return sorted(int(n) for n in names if n.isdigit())

    def newest(self, *, set_aside: bool = True) -> int | None:
        """The newest undamaged checkpoint, as the first rank's file system shows it.

        Args:
            set_aside: rename damaged ones newer than it, and remove what a killed run left
                half-written; False where another process may be writing.
        """
        if self.rank == 0 and set_aside:
            for partial in self.folder.glob("step-*.partial"):
                shutil.rmtree(partial)
        for step in reversed(self.gather(self.steps())[0]):
            problems = self._verify(step)
            if not problems:
                return step
            told = f"checkpoint {self.folder}/step-{step} is damaged ({'; '.join(problems)})"
            if self.rank == 0:
                if set_aside:
                    aside = self.folder / f"step-{step}.damaged"
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(self.folder / f"step-{step}", aside)
                    told += f"; set aside as {aside.name}"
                print(f"sdpo: {told}", file=sys.stderr)
        return None

    def undamaged(self, step: int | None) -> int:
        """``step`` itself, verified; None: the newest undamaged checkpoint's. Renames nothing.

        Raises:
            SdpoError: names the checkpoint, its files and what is wrong with them.
        """
        if step is None:
            step = self.newest(set_aside=False)
            if step is None:
                raise SdpoError(f"{self.folder}: no undamaged checkpoint")
            return step
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise SdpoError(f"{self.folder}: no checkpoint of step {step}; there are: {there}")
        if problems := self._verify(step):
            raise SdpoError(f"{self.folder}/step-{step} is damaged ({'; '.join(problems)})")
        return step

    def load(self, step: int) -> None:
        """Bring the state to where a verified checkpoint has it; what the checkpoint holds beside
        ``state`` is not read."""
        reader = FileSystemReader(self.folder / f"step-{step}")
        load(self.state, storage_reader=reader, process_group=self.group)

    def due(self, step: int) -> bool:
        """``step`` ends an interval."""
        return step % self.config.interval == 0

    def save(self, step: int, manifest: Mapping[str, Any], *, wait: bool = False) -> None:
        """Write ``step-N``; with ``wait``, or where saves are not asynchronous, before returning.

        Raises:
            CheckpointError: it, or the one before it that was still under way, failed.
        """
        self.finish()
        writer = SummedWriter(self.folder / f"step-{step}", {"step": step, **manifest})
        if self.config.asynchronous and self.distributed and not wait:
            future = async_save(self.state, storage_writer=writer, process_group=self.group)
            assert isinstance(future, Future)
            self._saving = step, future
            return
        try:
            save(self.state, storage_writer=writer, process_group=self.group)
        except FAILURES as error:
            raise self._failed(step, error) from error
        self._saved()

    @property
    def failed(self) -> bool:
        """A background save has failed on this rank; ``finish`` raises the reason. Ranks notice at
        different times, so they must agree before one of them raises."""
        if self._saving is None or not self._saving[1].done():
            return False
        return self._saving[1].exception() is not None

    def finish(self) -> None:
        """Wait for a background save.

        Raises:
            CheckpointError: it failed.
        """
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except FAILURES as error:
            raise self._failed(step, error) from error
        self._saved()

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        reason = getattr(error, "failures", None)  # DCP's: by rank
        told = "; ".join(f"rank {r}: {e[0]}" for r, e in reason.items()) if reason else str(error)
        partial = self.folder / f"step-{step}.partial"
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free / 2**20  # torch.save hides a full disk
        # every rank deletes: writing has stopped everywhere, and the first rank to raise stops the
        # rest
        shutil.rmtree(partial, ignore_errors=True)
        done = self.steps()
        newest = f"step-{done[-1]} is the newest" if done else "there is none before it"
        return CheckpointError(
            f"{self.folder}/step-{step} could not be written ({told}; {free:,.1f} MiB are free "
            f"there); {newest}: make room, then go on with --resume"
        )

    def _saved(self) -> None:
        if self.rank == 0 and self.config.keep:
            for old in set(self.steps()[: -self.config.keep]) - self.pinned:
                shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)

    def _verify(self, step: int) -> list[str]:
        """The problems of a checkpoint, by file; the same on every rank."""
        folder = self.folder / f"step-{step}"
        files, problems = {}, []
        try:
            files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{MANIFEST}: {error}")
        files = self.gather(files)[0]
        for name in sorted(files)[self.rank :: self.world_size]:
            try:
                found = summed(folder / name)
            except OSError as error:
                problems.append(f"{name}: {error.strerror}")
                continue
            for what, then in files[name].items():
                if found[what] != then:
                    problems.append(f"{name}: {what} {found[what]}, was {then}")
        return [p for ps in self.gather(problems) for p in ps]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order, on every rank."""
        values = [value] * self.world_size
        if self.distributed:
            dist.all_gather_object(values, value, group=self.group)
        return values
