"""`sdpo export RUN`: a Hugging Face folder from any checkpoint of a run.

One process does, whatever layout wrote the checkpoint; under torchrun, the ranks share the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from sdpo_parallel.build import export_checkpoint
from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.huggingface import resolve_model

from ..errors import SdpoError
from .config import read_config
from .trainer import engine_config


@dataclass(frozen=True)
class ExportCommand:
    """Write a checkpoint as a folder that transformers loads."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder, ``--out`` of ``sdpo train``."""
    out: str
    """Folder to write; replaced only when the new one is complete."""
    step: int | None = None
    """Step of the checkpoint; None: the newest undamaged one."""
    adapters: bool = False
    """Write a PEFT folder of the adapters alone; for runs with ``lora.rank``."""
    model: str | None = None
    """The folder that the run started from, where it has moved."""
    dtype: Literal["source", "float32", "bfloat16"] | None = None
    """Dtype of the weights; None: as the run's config says."""


def export(command: ExportCommand) -> None:
    """Load the weights and write them.

    Raises:
        SdpoError: no run, no undamaged checkpoint, or no adapters where they were asked for.
    """
    stored = read_config(command.run)
    if command.adapters and not stored.lora.rank:
        raise SdpoError(f"{command.run}: its lora.rank is 0, there are no adapters to export")
    checkpoint = stored.checkpoint
    if command.dtype is not None:
        checkpoint = replace(checkpoint, export_dtype=command.dtype)
    config = replace(
        stored,
        model=resolve_model(command.model or stored.model),
        out=command.run,
        checkpoint=checkpoint,
        parallel=ParallelConfig(compute_dtype=stored.parallel.compute_dtype),
    )
    export_checkpoint(
        config.engine,
        engine_config(config, total_steps=1),
        command.step,
        command.out,
        adapters=command.adapters,
    )


def main(args: Sequence[str] | None = None) -> None:
    """Parse and run."""
    export(tyro.cli(ExportCommand, prog="sdpo export", args=args))
