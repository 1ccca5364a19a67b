"""`sdpo export RUN`: a Hugging Face folder from any checkpoint of a run.

One process does, whatever layout wrote the checkpoint; under torchrun, the ranks share the work.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from sdpo_parallel.config import Live, ParallelConfig

from .batching import Cursor
from .trainer import RunState, TrainConfig, build_engine


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


def read_config(run: str) -> TrainConfig:
    """The config that a run was started with.

    Raises:
        ValueError: the folder holds no run, or one of another version of this program.
    """
    path = Path(run) / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{run}: no config.json; give the folder of a run") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    return _build(TrainConfig, stored, str(path))


_ADDED_LATER = ("select",)
"""Settings that runs of earlier versions lack, and which they had as the defaults are."""


def _build(kind: type, stored: dict[str, Any], where: str) -> Any:
    """A dataclass from what ``run_folder.to_json`` made of it."""
    hints, values = get_type_hints(kind), {}
    if unknown := stored.keys() - {field.name for field in fields(kind)} - {"kind"}:
        raise ValueError(f"{where}, field {min(unknown)}: unknown; is the run of a newer sdpo?")
    for field in fields(kind):
        if field.name not in stored:
            if field.name in _ADDED_LATER:
                continue
            raise ValueError(f"{where}, field {field.name}: missing; was it written by this sdpo?")
        value, hint = stored[field.name], hints[field.name]
        if isinstance(value, dict):
            options: dict[str, Any] = {
                c.__name__: c
                for c in (hint, *get_args(hint))
                if isinstance(c, type) and is_dataclass(c)
            }
            if value.get("kind") not in options:
                raise ValueError(f"{where}, field {field.name}.kind: {value.get('kind')!r} unknown")
            value = _build(options[value["kind"]], value, f"{where}, {field.name}")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


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
    from .cli import run

    run(main)
