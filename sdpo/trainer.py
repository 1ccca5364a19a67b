"""The training loop: wiring only.

    interactions -> cursor -> micro-batches -> two passes -> optimizer -> metrics, checkpoint

Every rank reads the interactions and takes every ``ranks``-th one of a step; all sums are over
ranks, so a run gives the same losses on any number of them. Method: step.py and objective.py.
"""

import hashlib
import math
import resource
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sdpo_parallel.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from sdpo_parallel.hf_folder import read_config

from .batching import (
    Batch,
    BatchConfig,
    Cursor,
    collate,
    micro_batches,
    steps_in,
    total_interactions,
)
from .conversations import DataError
from .hindsight import HindsightConfig, encode, load_tokenizer
from .interactions import Interaction, read_interactions
from .objective import JSD, ForwardKL, ReverseKL, SampledToken
from .run_folder import LogConfig, Logger, RunFolder
from .step import SUMS, metrics, two_pass_loss


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run."""

    model: str
    """Local Hugging Face folder to start from."""
    data: str
    """Interactions, as ``sdpo data prepare`` writes them."""
    out: str
    """The run's folder."""
    engine: Literal["torchtitan", "transformers"] = "torchtitan"
    """torchtitan: FSDP2 on any number of ranks; transformers: any causal LM, one device."""
    objective: SampledToken | ReverseKL | ForwardKL | JSD = field(default_factory=ReverseKL)
    hindsight: HindsightConfig = field(default_factory=HindsightConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def max_tokens(self) -> int:
        """The longest sequence that either pass may read."""
        h = self.hindsight
        longest_prompt = max(h.max_prompt_tokens, h.max_hindsight_prompt_tokens)
        return longest_prompt + h.max_response_tokens


class RunState:
    """What the checkpoint holds beside model and optimizer: step, place in the data, which data."""

    def __init__(self, cursor: Cursor, fingerprint: str):
        self.step, self.cursor, self.fingerprint = 0, cursor, fingerprint

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "step": self.step,
            "fingerprint": self.fingerprint,
            "cursor": self.cursor.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: the data is not what the checkpoint was trained on.
        """
        then = state_dict["fingerprint"]
        if then != self.fingerprint:
            raise ValueError(
                "cannot resume: the interactions file has changed since the checkpoint was written "
                f"(sha256 {then[:12]} then, {self.fingerprint[:12]} now)"
            )
        self.step = state_dict["step"]
        self.cursor.load_state_dict(state_dict["cursor"])


def load_data(config: TrainConfig) -> list[Interaction]:
    """The run's interactions, checked against what its objective needs.

    Raises:
        DataError: a row is not what training needs; file, line and field are named.
    """
    interactions = read_interactions(config.data)
    if not interactions:
        raise DataError(f"{config.data}: no interactions; did `sdpo data prepare` keep any?")
    if isinstance(config.objective, SampledToken) and config.objective.needs_old_logprobs:
        for i in interactions:
            if i.completion_logprobs is None:
                raise DataError(
                    f"{config.data}, interaction {i.id}, field completion_logprobs: missing, but "
                    "ppo_clip and importance_clip need them; unset the clip or log the "
                    "log-probabilities with the responses"
                )
    vocabulary = read_config(config.model)["vocab_size"]
    for i in interactions:
        if max(i.completion_token_ids or (0,)) >= vocabulary:
            raise DataError(
                f"{config.data}, interaction {i.id}, field completion_token_ids: an id of "
                f"{max(i.completion_token_ids or ())} is beyond the vocabulary of {config.model}, "
                f"{vocabulary}; were the rollouts sampled from another model?"
            )
    return interactions


def build_engine(config: TrainConfig, total_steps: int, state: RunState):
    """The engine that the config names, with nothing loaded yet."""
    if config.engine == "torchtitan":
        try:
            from sdpo_parallel.titan import TitanEngine as Engine
        except ImportError as error:
            raise ValueError(
                f"the torchtitan engine cannot be imported ({error}): pip install 'sdpo[train]', "
                "or use --engine transformers"
            ) from error
    else:
        from .transformers_engine import TransformersEngine as Engine
    return Engine(
        config.model,
        run_folder=config.out,
        total_steps=total_steps,
        max_tokens=config.max_tokens,
        state=state,
        optimizer=config.optimizer,
        parallel=config.parallel,
        checkpoint=config.checkpoint,
    )


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Run to the end; returns the exported Hugging Face folder, ``out/export``.

    Raises:
        ValueError: (DataError included) the config, model or data cannot be trained on; raised
            before the first step.
    """
    run = RunFolder(config.out, config, resume=resume)
    tokenizer = load_tokenizer(config.model)
    interactions = load_data(config)
    with open(config.data, "rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    total = steps_in(len(interactions), config.batch)
    state = RunState(Cursor(len(interactions), config.batch.seed), fingerprint)
    engine = build_engine(config, total, state)
    engine.load()
    if engine.is_main:
        run.open()
        run.cut_metrics(state.step)
    main = engine.is_main
    log = Logger(run, config.log, step=state.step, total=total) if main else nullcontext()
    with log as logger:
        while state.step < total:
            row = _step(engine, config, interactions, tokenizer, state)
            if logger:
                logger.write(state.step, row)
            engine.save(state.step, last=state.step == total)
    export = Path(config.out) / "export"
    engine.export(str(export))
    engine.close()
    return export


def _step(engine, config: TrainConfig, interactions, tokenizer, state: RunState) -> dict:
    """One optimizer step over the next ``interactions_per_step``; its metrics."""
    began = time.perf_counter()
    left = total_interactions(len(interactions), config.batch) - state.cursor.consumed
    drawn = state.cursor.take(min(config.batch.interactions_per_step, left))
    batches = _share(engine, config, [interactions[i] for i in drawn], tokenizer)
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=engine.device)
    for batch in batches:
        with engine.context():
            out = two_pass_loss(engine.policy, batch.to(engine.device), config.objective)
            out.loss.backward()
        sums += out.sums
    norm = engine.clip_gradients()
    if not math.isfinite(norm):
        raise ValueError(
            f"the gradient norm of step {state.step + 1} is {norm}: the weights are as the step "
            f"found them and nothing was saved; go on from the newest checkpoint in {config.out} "
            "with --resume, a lower learning rate (as another run), or without the data drawn here"
        )
    lr = engine.update()
    state.step += 1
    row = metrics(engine.sum_over_ranks(sums))
    seconds = time.perf_counter() - began
    return row | {
        "grad_norm": norm,
        "lr": lr,
        "seconds": seconds,
        "response_tokens_per_second": row["response/tokens"] / seconds,
        "peak_memory_gib": peak_memory_gib(engine.device),
    }


def _share(engine, config: TrainConfig, step: Sequence[Interaction], tokenizer) -> list[Batch]:
    """This rank's micro-batches. All ranks get as many, as each runs the same collectives."""
    total_weight = sum(i.weight for i in step) or 1.0
    mine = [
        (encode(i, tokenizer, config.hindsight), i.weight / total_weight)
        for i in step[engine.rank :: engine.ranks]
    ]
    batches = list(micro_batches(mine, config.batch))
    missing = engine.max_over_ranks(len(batches)) - len(batches)
    return batches + [collate([], config.batch.row_tokens)] * missing


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on an accelerator, resident on a CPU. In GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
