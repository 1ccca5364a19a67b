"""`sdpo export RUN`: a Hugging Face folder from any checkpoint of a run.

One process does, whatever layout wrote the checkpoint; under torchrun, the ranks share the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from sdpo_parallel.config import Live, ParallelConfig

from ..batching import Cursor
from .config import read_config
from .trainer import RunState, build_engine


@dataclass(frozen=True)
class ExportCommand:
    """Write a checkpoint as a folder that transformers loads."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder, ``--out`` of ``sdpo train``."""
    out: str
    """Folder to write; replaced only when the new one is complete."""
    step: int | None = None
    """Of the checkpoint; None: the newest undamaged one."""
    adapters: bool = False
    """A PEFT folder of the adapters alone, of a run with ``lora.rank``."""
    model: str | None = None
    """The folder that the run started from, where it has moved."""
    dtype: Literal["source", "float32", "bfloat16"] | None = None
    """Of the weights; None: as the run's config says."""


def export(command: ExportCommand) -> None:
    """Load and write.

    Raises:
        ValueError: no run, no undamaged checkpoint, or no adapters where they were asked for.
    """
    stored = read_config(command.run)
    if command.adapters and not stored.lora.rank:
        raise ValueError(f"{command.run}: its lora.rank is 0, there are no adapters to export")
    checkpoint = stored.checkpoint
    if command.dtype is not None:
        checkpoint = replace(checkpoint, export_dtype=command.dtype)
    config = replace(
        stored,
        model=command.model or stored.model,
        out=command.run,
        checkpoint=checkpoint,
        parallel=ParallelConfig(compute_dtype=stored.parallel.compute_dtype),
        teacher=Live(),  # of no use here
    )
    engine = build_engine(config, 1, RunState(Cursor(1, 0), ""))
    step = command.step
    if step is not None:
        engine.checkpoints.check(step)
    elif (step := engine.checkpoints.newest(set_aside=False)) is None:
        raise ValueError(f"{command.run}: no undamaged checkpoint")
    engine.checkpoints.load(step, "model")
    engine.export(command.out, adapters=command.adapters)
    engine.close()


def main(args: Sequence[str] | None = None) -> None:
    """Parse and run."""
    export(tyro.cli(ExportCommand, prog="sdpo export", args=args))


if __name__ == "__main__":
    from ..cli import run

    run(main)
