"""A run's folder: config.json, inputs.json, metrics.jsonl, tensorboard/, checkpoints/, export/.

Files appear whole (written beside, then renamed); metrics.jsonl grows by whole lines and is cut
back to the checkpoint that a resumed run goes on from.
"""

import json
import math
import os
import sys
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ..errors import SdpoError
from ..io.files import write_text
from .config import AnyRun, LogConfig, completed, read_settings, to_json


def read_metrics(folder: str | Path) -> list[dict]:
    """The rows of ``metrics.jsonl``, in order of their steps."""
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class RunFolder(Generic[AnyRun]):
    """A new run's folder, or one to resume; as a context, closed to other jobs until it ends.

    Raises:
        SdpoError: the folder already holds a run and ``resume`` is not set, the run in it was made
            with another config (the message names the fields), or another job is training in it.
    """

    def __init__(self, folder: str, config: AnyRun, *, resume: bool):
        self.path, self.config = Path(folder), config
        self.inputs: dict[str, str] = {}
        stored = self.path / "config.json"
        if stored.is_file() and not resume:
            raise SdpoError(f"{folder} already holds a run: pass --resume, or another --out")
        if not resume and list((self.path / "checkpoints").glob("step-*")):
            raise SdpoError(
                f"{folder}/checkpoints holds a run's checkpoints, but {stored} is gone: pass "
                "--resume to go on from them, or another --out"
            )
        if resume and stored.is_file():
            old = completed(read_settings(stored))
            if config.hindsight.date is None:  # the run's day is that of its start
                self._tell_date(old["hindsight"]["date"])
            _refuse_changes(stored, old, to_json(self.config))
        self._lock = FileLock(self.path / "lock", blocking=False)

    def __enter__(self) -> "RunFolder[AnyRun]":
        if os.environ.get("RANK", "0") != "0":  # the main rank's lock is the job's
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise SdpoError(
                f"{self.path}: another job is training in this folder; wait for it, stop it, or "
                "use another --out"
            ) from None
        except NotImplementedError:  # a file system without locks
            print(f"sdpo: {self.path} cannot be locked: keep other jobs out of it", file=sys.stderr)
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._lock.is_locked:
            return
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()
        if not any(self.path.iterdir()):  # the run ended before it began
            self.path.rmdir()

    def use(self, date: str, inputs: Mapping[str, str]) -> None:
        """Train with this day and these files, which are written down by `open`.

        Args:
            date: what chat templates are told that read the clock.
            inputs: what the run reads -> a digest of it.

        Raises:
            SdpoError: the run in the folder began with other files; names them.
        """
        self._tell_date(date)
        self.inputs = dict(inputs)
        stored = self.path / "inputs.json"
        old = read_settings(stored) if stored.is_file() else self.inputs
        changed = [
            f"{name} ({then[:12]} then, {now[:12]} now)"
            for name in sorted(old.keys() | inputs.keys())
            if (then := old.get(name, "none")) != (now := inputs.get(name, "none"))
        ]
        if changed:
            raise SdpoError(
                f"cannot resume {self.path}: changed since the run began: {', '.join(changed)}; "
                "put back what was there, or start a new run with another --out"
            )

    def _tell_date(self, date: str | None) -> None:
        hindsight = replace(self.config.hindsight, date=date)
        self.config = replace(self.config, hindsight=hindsight)

    def open(self, step: int) -> None:
        """Write the config and go back to where a checkpoint of ``step`` is (0: the start). Main
        rank only."""
        self._tell_loss(step)
        write_text(self.path / "config.json", json.dumps(to_json(self.config), indent=2))
        write_text(self.path / "inputs.json", json.dumps(self.inputs, indent=2))
        self.stopped.unlink(missing_ok=True)
        rows = [line for line in self._metrics() if json.loads(line)["step"] <= step]
        if rows or (self.path / "metrics.jsonl").is_file():
            write_text(self.path / "metrics.jsonl", "".join(rows))

    @property
    def stopped(self) -> Path:
        """A file that is there while the run waits to be resumed after a signal stopped it."""
        return self.path / "stopped"

    def note_stop(self, step: int, total: int) -> None:
        """Leave ``stopped``, and say so."""
        self.stopped.touch()
        print(
            f"sdpo: asked to stop; step {step} of {total} is saved in {self.path}, go on with "
            "--resume",
            file=sys.stderr,
        )

    def wandb_id(self) -> str:
        """The run's id on W&B, the same when it is resumed."""
        path = self.path / "wandb_id"
        if not path.is_file():
            write_text(path, uuid.uuid4().hex[:8])
        return path.read_text(encoding="utf-8")

    def _metrics(self) -> list[str]:
        """The whole lines of metrics.jsonl: a killed run may leave half of one at the end."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def _tell_loss(self, step: int) -> None:
        """Say where the run goes on, and which steps of it are done again."""
        rows = self._metrics()
        if not step and not rows:
            return
        seen = json.loads(rows[-1])["step"] if rows else 0
        lost = f"; steps {step + 1} to {seen} are done again" if seen > step else ""
        where = f"checkpoint step-{step}" if step else "the start (no checkpoint)"
        print(f"sdpo: resumed {self.path} from {where}{lost}", file=sys.stderr)


RESUMABLE = (
    "checkpoint",
    "log",
    "out",
    "data",  # its content is compared instead
    "prompts",  # so is theirs
    "safeguard",
    "brakes",
    "evaluate.data",  # its content is compared instead
    "evaluate.regression",
    "sampling.batch",
    "sampling.max_gap",
    "sampler.urls",
    "sampler.folder",
    "sampler.concurrency",
    "sampler.timeout",
    "sampler.patience",
    "sampler.key_variable",
    "parallel.replicate",
    "parallel.tensor",
    "parallel.sequence_parallel",
    "parallel.context",
    "parallel.activation_checkpoint",
    "parallel.compile",
    "parallel.cpu_offload",
    "parallel.attention",
    "parallel.liger",
    "batch.row_tokens",
    "batch.micro_batch_tokens",
    "batch.share_prefix",
    "objective.chunk_bytes",
)
"""Settings, or groups of them, that do not change what a run computes: free on resumption."""


def _refuse_changes(stored: Path, then: Mapping, now: Mapping) -> None:
    old, new = _flat(then), _flat(now)
    free = tuple(f"{name}." for name in RESUMABLE)
    if _only_added(old.get("phases"), new.get("phases")):
        steady = new["optimizer.schedule"] == "constant" and not new["optimizer.warmup_fraction"]
        if not steady:
            raise SdpoError(
                f"cannot resume {stored.parent} with more phases: its learning rate depends on how "
                "long the run is (optimizer.schedule, optimizer.warmup_fraction); start another "
                "run from its export"
            )
        free += ("phases.",)
    changed = [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not f"{name}.".startswith(free)
    ]
    if changed:
        raise SdpoError(
            f"cannot resume {stored.parent}: the config differs from the run's "
            f"({'; '.join(changed)}); use the same settings, or another --out"
        )


def _only_added(then: list[str] | None, now: list[str] | None) -> bool:
    """An online run goes on with phases behind those that it had."""
    return bool(then and now and len(now) > len(then) and now[: len(then)] == then)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {prefix: config}
    parts = (_flat(value, f"{prefix}.{name}".lstrip(".")) for name, value in config.items())
    return {name: value for part in parts for name, value in part.items()}


class Logger(ExitStack):
    """Metrics of each step to console, JSONL, TensorBoard and, where asked, W&B."""

    def __init__(self, run: RunFolder, log: LogConfig, *, step: int, total: int):
        super().__init__()
        self.log_every, self.total = log.every, total
        self._file = self.enter_context((run.path / "metrics.jsonl").open("a", encoding="utf-8"))
        self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)
        self.callback(self._board.close)
        self._wandb = None
        if log.wandb:
            import wandb  # the optional extra

            where: dict[str, Any] = {
                "project": log.wandb,
                "id": run.wandb_id(),
                "dir": str(run.path),
            }
            self._wandb = self.enter_context(
                wandb.init(**where, config=to_json(run.config), resume="allow")
            )
        self.console = Console()
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.enter_context(self._progress)
        self._task = self._progress.add_task("", total=total, completed=step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's metrics, to everywhere."""
        finite = {n: v if math.isfinite(v) else None for n, v in metrics.items()}  # JSON has no NaN
        try:
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        except OSError as error:
            raise SdpoError(
                f"{self._file.name} cannot be written ({error.strerror}): make room, then go on "
                "with --resume"
            ) from error
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(metrics), step=step)
        shown = {"|A|": "advantage/mean_abs", "preferred": "preference/accuracy"}
        own = [f"{name} {metrics[at]:.3f}  " for name, at in shown.items() if at in metrics]
        line = (
            f"loss {metrics['loss']:.4f}  {''.join(own)}"
            f"H {metrics['entropy/policy']:.2f}  grad {metrics['grad_norm']:.2f}  "
            f"lr {metrics['lr']:.1e}  {metrics['response_tokens_per_second']:,.0f} tok/s  "
            f"{metrics['peak_memory_gib']:.2f} GiB"
        )
        cut = sum(metrics[f"truncated/{part}"] for part in ("policy", "hindsight", "response"))
        line += f"  [yellow]{cut:.0f} truncated[/]" if cut else ""
        self._progress.update(self._task, completed=step, description=line)
        if not self.console.is_terminal and (step % self.log_every == 0 or step == self.total):
            self.console.print(f"step {step}/{self.total}  {line}", soft_wrap=True, highlight=False)
