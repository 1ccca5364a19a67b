"""`sdpo export RUN`: a Hugging Face folder from any checkpoint of a run.

One process does, whatever layout wrote the checkpoint; under torchrun, the ranks share the work.
"""

from dataclasses import replace
from typing import Literal

import tyro

from sdpo_parallel.build import export_checkpoint
from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.huggingface import resolve_model

from ..errors import SdpoError
from .config import read_run_config
from .trainer import engine_config


def export(
    run: tyro.conf.Positional[str],
    /,
    *,
    out: str,
    step: int | None = None,
    adapters: bool = False,
    model: str | None = None,
    dtype: Literal["source", "float32", "bfloat16"] | None = None,
) -> None:
    """Write a checkpoint as a folder that transformers loads.

    Args:
        run: the run's folder, ``--out`` of ``sdpo train``.
        out: folder to write; replaced only when the new one is complete.
        step: step of the checkpoint; None: the newest undamaged one.
        adapters: write a PEFT folder of the adapters alone; for runs with ``lora.rank``.
        model: the folder that the run started from, where it has moved.
        dtype: dtype of the weights; None: as the run's config says.

    Raises:
        SdpoError: no run, no undamaged checkpoint, or no adapters where they were asked for.
    """
    stored = read_run_config(run)
    if adapters and not stored.lora.rank:
        raise SdpoError(f"{run}: its lora.rank is 0, there are no adapters to export")
    config = replace(
        stored,
        model=resolve_model(model or stored.model),
        out=run,
        checkpoint=replace(stored.checkpoint, export_dtype=dtype or stored.checkpoint.export_dtype),
        parallel=ParallelConfig(compute_dtype=stored.parallel.compute_dtype),
    )
    export_checkpoint(
        config.engine, engine_config(config, total_steps=1), step, out, adapters=adapters
    )
