"""The training loop: wiring only.

    interactions -> cursor -> micro-batches -> two passes -> optimizer -> metrics, checkpoint

Every rank reads and tokenizes the interactions of a step and computes its share of them
(``batching.deal``); all sums are over ranks, so a run gives the same losses on any layout. Method:
step.py and objective.py.
"""

import math
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sdpo_parallel.huggingface import read_config

from ..batching import (
    Batch,
    Cursor,
    Item,
    collate,
    deal,
    steps_in,
    total_interactions,
)
from ..conversations import DataError
from ..hindsight import encode, load_tokenizer
from ..interactions import Interaction, iter_interactions
from ..io.files import sha256
from ..objective import SampledToken
from ..step import SUMS, metrics, two_pass_loss
from .config import TrainConfig, to_json
from .run_folder import Logger, RunFolder
from .safeguards import Probe, SafeguardConfig, StopRequest, Watch, check_drift
from .selection import choose, selection_sha256


class RunState:
    """What the checkpoint holds beside model and optimizer: step, place in the data, which data."""

    def __init__(self, cursor: Cursor, fingerprint: str):
        self.step, self.cursor, self.fingerprint = 0, cursor, fingerprint
        self.skipped = self.skipped_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "fingerprint": self.fingerprint,
            "cursor": self.cursor.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: the data is not what the checkpoint was trained on.
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
    raise ValueError(
        f"cannot resume: the {what} has changed since the checkpoint was written "
        f"(sha256 {old[:12] or 'none'} then, {new[:12] or 'none'} now)"
    )


def fingerprint(config: TrainConfig) -> str:
    """SHA-256 of the interactions file; with a selection, "+" and that of settings and scores."""
    data = sha256(config.data)
    return f"{data}+{selection_sha256(config.select)}" if config.select.selects else data


def load_data(config: TrainConfig) -> tuple[list[Interaction], str]:
    """The run's interactions, checked against what its objective needs, and in words what was
    selected; "" where nothing was to be.

    Raises:
        DataError: a row is not what training needs; file, line and field are named.
    """
    selection = choose(iter_interactions(config.data), config.select)
    interactions = selection.interactions
    if not interactions:
        raise DataError(f"{config.data}: no interactions; did `sdpo data prepare` keep any?")
    if isinstance(config.objective, SampledToken) and config.objective.needs_old_logprobs:
        for i in interactions:
            if i.response_logprobs is None:
                raise DataError(
                    f"{config.data}, interaction {i.id}, field completion_logprobs: missing, but "
                    "ppo_clip and importance_clip need them; unset the clip or log the "
                    "log-probabilities with the responses"
                )
    vocabulary = read_config(config.model)["vocab_size"]
    for i in interactions:
        if max(i.response_token_ids or (0,)) >= vocabulary:
            raise DataError(
                f"{config.data}, interaction {i.id}, field completion_token_ids: an id of "
                f"{max(i.response_token_ids or ())} is beyond the vocabulary of {config.model}, "
                f"{vocabulary}; were the rollouts sampled from another model?"
            )
    return interactions, str(selection) if config.select.selects else ""


def build_engine(config: TrainConfig, total_steps: int, state: RunState):
    """The engine that the config names, with nothing loaded yet."""
    if config.engine == "torchtitan":
        try:
            from sdpo_parallel.torchtitan.engine import TitanEngine as Engine
        except ImportError as error:
            raise ValueError(
                f"the torchtitan engine cannot be imported ({error}): pip install 'sdpo[train]', "
                "or use --engine transformers"
            ) from error
    else:
        from sdpo_parallel.transformers.engine import TransformersEngine as Engine
    return Engine(
        config.model,
        run_folder=config.out,
        total_steps=total_steps,
        max_tokens=config.max_tokens,
        state=state,
        optimizer=config.optimizer,
        parallel=config.parallel,
        checkpoint=config.checkpoint,
        teacher=config.teacher,
        lora=config.lora,
    )


class Steps:
    """The interactions of each step, tokenized one step ahead while the devices compute."""

    def __init__(self, config: TrainConfig, interactions, tokenizer, cursor: Cursor):
        self.config, self.interactions, self.tokenizer = config, interactions, tokenizer
        self.cursor, self.total = cursor, total_interactions(len(interactions), config.batch)
        self._pool = ThreadPoolExecutor(1)
        self._next = None

    def take(self) -> list[Item]:
        """Of the next step, with weights normalised over it."""
        count = min(self.config.batch.interactions_per_step, self.total - self.cursor.consumed)
        ready, self._next = self._next, None
        drawn = self.cursor.take(count)
        items = ready.result() if ready is not None else self.encode(drawn)
        after = min(count, self.total - self.cursor.consumed)
        if after:
            self._next = self._pool.submit(self.encode, self.cursor.peek(after))
        return items

    def encode(self, drawn: list[int]) -> list[Item]:
        """Items of the interactions at these places in the data."""
        step = [self.interactions[i] for i in drawn]
        total = sum(i.weight for i in step) or 1.0
        return [(encode(i, self.tokenizer, self.config.hindsight), i.weight / total) for i in step]


def train(config: TrainConfig, *, resume: bool = False) -> Path | None:
    """Run to the end; returns the exported Hugging Face folder, ``out/export``, or None where a
    signal asked for an early, resumable end.

    Raises:
        ValueError: (DataError included) the config, model or data cannot be trained on; raised
            before the first step. Later: too many non-finite steps, a collapse, a full disk.
    """
    run = RunFolder(config.out, config, resume=resume)
    tokenizer = load_tokenizer(config.model)
    interactions, selected = load_data(config)
    total = steps_in(len(interactions), config.batch)
    state = RunState(Cursor(len(interactions), config.batch.seed), fingerprint(config))
    engine = build_engine(config, total, state)
    steps = Steps(config, interactions, tokenizer, state.cursor)
    engine.check_agreement(config.data, state.fingerprint)
    engine.load()
    probe = _probe(engine, config, steps)
    engine.resume()
    if engine.is_main:
        if selected:
            print(f"sdpo: {config.data}: {selected}", file=sys.stderr)
        _tell_loss(run, state)
        run.open()
        run.stopped.unlink(missing_ok=True)
        run.cut_metrics(state.step)
    stopped = _loop(engine, config, run, steps, state, probe, total)
    if stopped:
        engine.close()
        return None
    export = Path(config.out) / "export"
    engine.export(str(export))
    engine.close()
    return export


def _loop(
    engine, config: TrainConfig, run: RunFolder, steps: Steps, state: RunState, probe, total: int
) -> bool:
    """Steps until the end, or until a signal asks to stop: then True."""
    guard = config.safeguard
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        watch = stack.enter_context(Watch(guard.stall_seconds, engine.world_rank, engine.world))
        logger = None
        if engine.is_main:
            logger = Logger(run, config.log, step=state.step, total=total)
            stack.enter_context(logger)
        asked = False
        while state.step < total and not asked:
            row, asked, failed = _step(engine, config, steps, state, watch, stop)
            if failed:
                engine.checkpoints.finish()
            if probe is not None and state.step % guard.probe_every == 0:
                row |= probe.measure()
            if logger:
                logger.write(state.step, row)
            watch.beat(state.step, "checkpoint")
            end = state.step == total or asked
            alarm = _alarm(guard, state, row)
            if end or alarm or engine.checkpoints.due(state.step):
                engine.save(state.step, _manifest(config, state, row), wait=end or bool(alarm))
            if alarm:
                raise alarm
        engine.checkpoints.finish()
        if asked and state.step < total and engine.is_main:
            run.stopped.touch()
            print(
                f"sdpo: asked to stop; step {state.step} of {total} is saved in {config.out}, "
                "go on with --resume",
                file=sys.stderr,
            )
    return asked and state.step < total


def _alarm(guard: SafeguardConfig, state: RunState, row: dict) -> ValueError | None:
    """Why the run must end after this step, if it must."""
    if state.skipped_in_a_row >= guard.max_nonfinite:
        return ValueError(
            f"step {state.step}: {state.skipped_in_a_row} steps in a row had gradients that were "
            "not finite; their updates were skipped, and a checkpoint holds the weights as they "
            "were. Lower the learning rate (as another run), or leave out the data drawn here"
        )
    try:
        check_drift(guard, row, state.step)
    except ValueError as error:
        return error
    return None


def _step(
    engine, config: TrainConfig, steps: Steps, state: RunState, watch: Watch, stop: StopRequest
) -> tuple[dict, bool, bool]:
    """One optimizer step over the next ``interactions_per_step``; its metrics, whether any rank was
    asked to stop, and whether any rank's background save failed."""
    began = time.perf_counter()
    watch.beat(state.step, "data")
    dealt = deal(steps.take(), engine.ranks, config.batch, _row_multiple(engine, config))
    mine = [_collate(engine, config, items) for items in dealt.of(engine.rank)]
    watch.beat(state.step, "passes")
    sums = torch.zeros(len(SUMS) + 3, dtype=torch.float64, device=engine.device)
    for m, batch in enumerate(mine):
        with engine.context():
            batch = batch.to(engine.device)
            out = two_pass_loss(engine.policy, batch, config.objective, engine.teacher)
            engine.backward(out.loss, last=m == len(mine) - 1)
        sums[:-3] += out.sums
    sums[-3] = sum(batch.slots for batch in mine)
    sums[-2], sums[-1] = stop.asked, engine.checkpoints.failed
    watch.beat(state.step, "update")
    norm = engine.clip_gradients()
    sums = engine.sum_over_ranks(sums)
    finite = math.isfinite(norm) and math.isfinite(float(sums[0]))
    lr = _update(engine, state, finite)
    seconds = time.perf_counter() - began
    row = metrics(sums[:-3])
    tokens = dealt.tokens
    slots = float(sums[-3]) / engine.copies
    row |= {
        "grad_norm": norm,
        "lr": lr,
        "skipped": state.skipped,
        "balance/idle": dealt.idle,
        "balance/padding": 1 - sum(tokens) / slots,
        "balance/tokens_per_rank": sum(tokens) / len(tokens),
        "balance/tokens_per_rank_max": max(tokens),
        "seconds": seconds,
        "response_tokens_per_second": row["response/tokens"] / seconds,
        "tokens_per_second": sum(tokens) / seconds,
        "peak_memory_gib": peak_memory_gib(engine.device),
    }
    return row, bool(sums[-2]), bool(sums[-1])


def _update(engine, state: RunState, finite: bool) -> float:
    """Apply the gradients, or drop what is not finite; returns the learning rate used."""
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


def _collate(engine, config: TrainConfig, items: list[Item]) -> Batch:
    return collate(items, config.batch.row_tokens, _row_multiple(engine, config))


def _row_multiple(engine, config: TrainConfig) -> int:
    """What row widths are rounded up to; compiled blocks see one width, whatever the padding."""
    multiple: int = engine.row_multiple
    if config.parallel.compile == "none":
        return multiple
    return -(-config.batch.row_tokens // multiple) * multiple


def _probe(engine, config: TrainConfig, steps: Steps) -> Probe | None:
    """Fixed interactions, evenly from the data, dealt over the ranks."""
    places = probe_places(len(steps.interactions), config.safeguard.probe_interactions)
    if not places:
        return None
    items = steps.encode(places)
    dealt = deal(items, engine.ranks, config.batch, _row_multiple(engine, config))
    return Probe(engine, [_collate(engine, config, items) for items in dealt.of(engine.rank)])


def probe_places(n: int, count: int) -> list[int]:
    """Which of ``n`` interactions a probe of ``count`` reads."""
    count = min(count, n)
    return [i * n // count for i in range(count)]


def _tell_loss(run: RunFolder, state: RunState) -> None:
    """Say where the run goes on, and which steps of it are done again."""
    if not state.step and not (run.path / "metrics.jsonl").is_file():
        return
    seen = run.last_step()
    lost = f"; steps {state.step + 1} to {seen} are done again" if seen > state.step else ""
    where = f"checkpoint step-{state.step}" if state.step else "the start (no checkpoint)"
    print(f"sdpo: resumed {run.path} from {where}{lost}", file=sys.stderr)


def _manifest(config: TrainConfig, state: RunState, row: Mapping) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    data, _, selection = state.fingerprint.partition("+")
    return {
        "config": to_json(config),
        "data_sha256": data,
        "selection_sha256": selection or None,
        "interactions_seen": state.cursor.consumed,
        "commit": code_commit(),
        "metrics": {name: value for name, value in row.items() if math.isfinite(value)},
    }


@lru_cache(maxsize=1)
def code_commit() -> str:
    """The commit that this code was checked out at; "" outside a git checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on an accelerator, resident on a CPU. In GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
