"""The training loop: wiring only.

    file -> loader -> micro-batches -> two passes -> optimizer -> metrics, checkpoint

`sdpo online` has the same loop: its steps come from a model that is talked to meanwhile.

All sums are over ranks, so a run gives the same losses on any layout. Method: step.py and
objective.py.
"""

import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from sdpo_parallel.build import build_engine
from sdpo_parallel.engine import Engine, EngineConfig
from sdpo_parallel.huggingface import load_tokenizer

from ..batching import Cursor
from ..chat import today
from ..errors import SdpoError
from ..step import SUMS, metrics, two_pass_loss
from .config import RunConfig, TrainConfig, local_models, to_json
from .drift import DriftMonitor, drift_places
from .loader import Loader, Step, fingerprint, load_interactions, run_inputs
from .run_folder import Logger, RunFolder
from .safeguards import alarm
from .watchdog import StopRequest, Watchdog


class RunState:
    """What a checkpoint holds beside model and optimizer: step, place in the data, which data."""

    def __init__(self, cursor: Cursor, fingerprint: str):
        self.step, self.cursor, self.fingerprint = 0, cursor, fingerprint
        self.skipped = self.skipped_in_a_row = 0

    def state_dict(self) -> dict[str, object]:
        """For the checkpoint."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "fingerprint": self.fingerprint,
            "cursor": self.cursor.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a checkpoint.

        Raises:
            SdpoError: the data is not what the checkpoint was trained on.
        """
        _refuse_other_data(state_dict["fingerprint"], self.fingerprint)
        self.step = state_dict["step"]
        self.skipped = state_dict["skipped"]
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]
        self.cursor.load_state_dict(state_dict["cursor"])


def _refuse_other_data(then: str, now: str) -> None:
    if then == now:
        return
    (data, selection), (data_now, selection_now) = (x.partition("+")[::2] for x in (then, now))
    what, old, new = "interactions file", data, data_now
    if data == data_now:
        what, old, new = "selection, or its file of scores,", selection, selection_now
    raise SdpoError(
        f"cannot resume: the {what} has changed since the checkpoint was written "
        f"(sha256 {old[:12] or 'none'} then, {new[:12] or 'none'} now)"
    )


def engine_config(config: RunConfig, total_steps: int) -> EngineConfig:
    """The part of a run's config that its engine is built from."""
    return EngineConfig(
        model=config.model,
        run_folder=config.out,
        total_steps=total_steps,
        max_tokens=config.max_tokens,
        optimizer=config.optimizer,
        parallel=config.parallel,
        checkpoint=config.checkpoint,
        teacher=config.teacher,
        lora=config.lora,
        share_prefix=config.batch.share_prefix == "auto",
    )


class Steps(Protocol):
    """Where a run's steps come from: each is asked for when the one before it has been taken."""

    steps: int
    """Length of the whole run."""

    def __iter__(self) -> Iterator[Step]: ...


class Looked(NamedTuple):
    """What was seen between two steps."""

    metrics: Mapping[str, float]
    keep: bool = False
    """A checkpoint is to be written."""
    why_end: SdpoError | None = None
    """Why the run must end here."""


class Look(Protocol):
    """What a run does between its steps, such as trying the model on held-out prompts. Ranks call
    it together, and it sees the same on all."""

    def __call__(self, step: int, row: Mapping[str, float]) -> Looked:
        """After step ``step``, whose metrics are ``row``."""
        ...


def no_look(step: int, row: Mapping[str, float]) -> Looked:
    """Nothing between the steps."""
    return Looked({})


@dataclass
class Trainer:
    """A run, ready to take its next step."""

    config: RunConfig
    engine: Engine
    loader: Steps
    state: RunState
    drift: DriftMonitor | None
    run: RunFolder
    look: Look = no_look


def train(config: TrainConfig, *, resume: bool = False) -> Path | None:
    """Run to the end; returns the exported Hugging Face folder, ``out/export``, or None where a
    signal asked for an early, resumable end.

    Raises:
        SdpoError: the config, model or data cannot be trained on; raised before the first step.
            Later: too many non-finite steps, a collapse, a full disk.
    """
    with RunFolder(config.out, config, resume=resume) as run:
        return to_the_end(prepare(run))


def to_the_end(t: Trainer) -> Path | None:
    """All steps and the export; returns and raises as `train` does."""
    export = Path(t.config.out) / "export"
    finished = take_steps(t)
    if finished:
        t.engine.export(str(export))
    t.engine.close()
    return export if finished else None


def prepare(run: RunFolder[TrainConfig]) -> Trainer:
    """Load data and weights, and go to where the newest checkpoint is."""
    local = local_models(run.config)  # the run's files keep the names as given
    inputs = run_inputs(local)
    run.use(local.hindsight.date or today(), inputs)
    config = run.config
    local = replace(local, hindsight=config.hindsight)
    tokenizer = load_tokenizer(local.model)
    selection = load_interactions(local, tokenizer)
    settings = config.hindsight, config.batch, config.objective.reading
    loader = Loader(selection.interactions, tokenizer, *settings)
    state = RunState(loader.cursor, fingerprint(config))
    engine = build_engine(config.engine, engine_config(local, loader.steps), state)
    loader.assign_to(engine, fixed_width=config.parallel.compile != "none")
    engine.check_agreement(config.data, state.fingerprint)
    engine.check_agreement("the list of the model's files", ", ".join(inputs))
    for name, digest in inputs.items():
        engine.check_agreement(name, digest)
    # where it is already tomorrow for a rank, all go by the main one's day
    run.use(engine.checkpoints.gather(config.hindsight.date)[0], inputs)
    loader.hindsight = run.config.hindsight
    engine.load()
    drift = None
    places = drift_places(len(selection.interactions), config.safeguard.probe_interactions)
    if places:  # before resuming: drift is from the weights that the run started from
        drift = DriftMonitor(engine, loader.step(places).micro_batches)
    engine.resume()
    if state.step == 0:  # a checkpoint of it holds an optimizer that has taken an empty step
        engine.restart_optimizer()
    if engine.ranks.is_main:
        if config.select.selects:
            print(f"sdpo: {config.data}: {selection}", file=sys.stderr)
        run.open(state.step)
    return Trainer(run.config, engine, loader, state, drift, run)


def take_steps(t: Trainer) -> bool:
    """Steps until the end of the data: True; or until a signal asks to stop: False."""
    with watched(t.config, t.engine) as watch:
        for _ in steps(t, watch):
            pass
    return t.state.step == t.loader.steps


class Watch(NamedTuple):
    """What looks after a process while it trains."""

    stop: StopRequest
    watchdog: Watchdog


@contextmanager
def watched(config: RunConfig, engine: Engine) -> Iterator[Watch]:
    """Heeds signals, and tells of stalls."""
    ranks, seconds = engine.ranks, config.safeguard.stall_seconds
    with StopRequest() as stop, Watchdog(seconds, ranks.rank, ranks.world_size) as watchdog:
        yield Watch(stop, watchdog)


def steps(t: Trainer, watch: Watch) -> Iterator[int]:
    """One step after the other, their numbers, each when it is asked for; up to the end of the
    data or until a signal asks to stop."""
    guard, engine, state = t.config.safeguard, t.engine, t.state
    stop, watchdog = watch
    with ExitStack() as stack:
        ranks = engine.ranks
        logger = None
        if ranks.is_main:
            logger = Logger(t.run, t.config.log, step=state.step, total=t.loader.steps)
            stack.enter_context(logger)
        began = time.perf_counter()
        watchdog.beat(state.step, "data")
        for step in t.loader:
            row, asked, failed = _step(t, step, began, watchdog, stop)
            if failed:
                engine.checkpoints.finish()
            if t.drift is not None and state.step % guard.probe_every == 0:
                row |= t.drift.measure()
            seen = t.look(state.step, row)
            row |= seen.metrics
            if logger:
                logger.write(state.step, row)
            watchdog.beat(state.step, "checkpoint")
            end = state.step == t.loader.steps or asked
            why = alarm(guard, row, step=state.step, skipped_in_a_row=state.skipped_in_a_row)
            why = why or seen.why_end
            if end or why or seen.keep or engine.checkpoints.due(state.step):
                engine.save(state.step, checkpoint_manifest(t, row), wait=end or why is not None)
            if why:
                raise why
            if asked:
                break
            yield state.step
            began = time.perf_counter()
            watchdog.beat(state.step, "data")
        engine.checkpoints.finish()
        if state.step < t.loader.steps and ranks.is_main:
            t.run.note_stop(state.step, t.loader.steps)


def _step(
    t: Trainer, step: Step, began: float, watchdog: Watchdog, stop: StopRequest
) -> tuple[dict[str, float], bool, bool]:
    """One optimizer step: its metrics, whether any rank was asked to stop, and whether any rank's
    background save failed."""
    engine, state, mine = t.engine, t.state, step.micro_batches
    watchdog.beat(state.step, "passes")
    sums = torch.zeros(len(SUMS) + 5, dtype=torch.float64, device=engine.device)
    for m, batch in enumerate(mine):
        with engine.context():
            batch = batch.to(engine.device)
            out = two_pass_loss(engine.policy, batch, t.config.objective, engine.teacher)
            engine.backward(out.loss, last=m == len(mine) - 1)
        sums[:-5] += out.sums
    for i, name in enumerate(("slots", "tokens", "unshared"), start=-5):
        sums[i] = sum(getattr(batch, name) for batch in mine)
    sums[-2], sums[-1] = stop.asked, engine.checkpoints.failed
    watchdog.beat(state.step, "update")
    norm = engine.clip_gradients()
    sums = engine.sum_over_ranks(sums)
    finite = math.isfinite(norm) and math.isfinite(float(sums[0]))
    row, per_rank = metrics(sums[:-5], t.config.objective.reading), step.tokens
    lr = _update(engine, state, finite) if row["response/tokens"] else _no_update(engine, state)
    seconds = time.perf_counter() - began
    slots, tokens, unshared = (sums[-5:-2] / engine.ranks.cp_degree).tolist()
    row |= {
        "grad_norm": norm,
        "lr": lr,
        "skipped": state.skipped,
        "balance/idle": step.idle,
        "balance/padding": 1 - tokens / slots if slots else 0.0,
        "balance/shared": 1 - tokens / unshared if unshared else 0.0,
        "balance/tokens_per_rank": sum(per_rank) / len(per_rank),
        "balance/tokens_per_rank_max": max(per_rank),
        "seconds": seconds,
        "response_tokens_per_second": row["response/tokens"] / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": peak_memory_gib(engine.device),
        **step.metrics,
    }
    return row, bool(sums[-2]), bool(sums[-1])


def _update(engine: Engine, state: RunState, finite: bool) -> float:
    """Apply the gradients, or drop them if they are not finite; returns the learning rate used."""
    if finite:
        lr = engine.update(state.step)
        state.skipped_in_a_row = 0
    else:
        engine.discard()
        lr = 0.0
        state.skipped += 1
        state.skipped_in_a_row += 1
    state.step += 1
    return lr


def _no_update(engine: Engine, state: RunState) -> float:
    """Nothing was said: momentum and weight decay alone must not move the weights."""
    engine.discard()
    state.step += 1
    return 0.0


def checkpoint_manifest(t: Trainer, row: Mapping[str, float]) -> dict[str, object]:
    """What a checkpoint says about itself."""
    data, _, selection = t.state.fingerprint.partition("+")
    return {
        "config": to_json(t.config),
        "data_sha256": data,
        "selection_sha256": selection or None,
        "interactions_seen": t.state.cursor.consumed,
        "commit": code_commit(),
        "metrics": {name: value for name, value in row.items() if math.isfinite(value)},
    }


@lru_cache(maxsize=1)
def code_commit() -> str:
    """The commit that this code was checked out at; "" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far, in GiB: allocated on an accelerator, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
