"""A run's settings, and their JSON: what ``config.json`` in its folder holds."""

import json
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from sdpo_parallel.config import (
    TEACHERS,
    CheckpointConfig,
    Live,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    Teacher,
    parse_teacher,
    write_teacher,
)

from ..batching import BatchConfig
from ..hindsight import HindsightConfig
from ..objective import AnyObjective, ReverseKL
from .safeguards import SafeguardConfig
from .selection import SelectConfig


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is told of a run, and where. JSONL and TensorBoard are always written."""

    every: int = 10
    """Steps between lines on the console where it is not a terminal."""
    wandb: str | None = None
    """Project to log to on Weights & Biases; needs the ``wandb`` extra."""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"log.every must be at least 1 step, got {self.every}")


TEACHER = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar=TEACHERS,
    instance_from_str=lambda words: parse_teacher(words[0]),
    is_instance=lambda value: isinstance(value, Teacher),
    str_from_instance=lambda teacher: [write_teacher(teacher)],
)


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
    """torchtitan: any layout of any number of ranks; transformers: any causal LM, one device."""
    objective: AnyObjective = field(default_factory=ReverseKL)
    teacher: Annotated[Teacher, TEACHER] = field(default_factory=Live)
    """Who reads the hindsight prompt: the policy as it is, its moving average, the weights it
    started from or another folder's, or the policy held near its start."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    hindsight: HindsightConfig = field(default_factory=HindsightConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safeguard: SafeguardConfig = field(default_factory=SafeguardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def max_tokens(self) -> int:
        """The longest sequence that either pass may read."""
        h = self.hindsight
        longest_prompt = max(h.max_prompt_tokens, h.max_hindsight_prompt_tokens)
        return longest_prompt + h.max_response_tokens


def to_json(config: Any) -> Any:
    """A dataclass as JSON; unions keep the name of the class they hold."""
    if not is_dataclass(config) or isinstance(config, type):
        return config
    values = {f.name: to_json(getattr(config, f.name)) for f in fields(config)}
    return {"kind": type(config).__name__, **values}


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
    if unknown := stored.keys() - {f.name for f in fields(kind)} - {"kind"}:
        raise ValueError(f"{where}, field {min(unknown)}: unknown; is the run of a newer sdpo?")
    for f in fields(kind):
        if f.name not in stored:
            if f.name in _ADDED_LATER:
                continue
            raise ValueError(f"{where}, field {f.name}: missing; was it written by this sdpo?")
        value, hint = stored[f.name], hints[f.name]
        if isinstance(value, dict):
            options: dict[str, Any] = {
                c.__name__: c
                for c in (hint, *get_args(hint))
                if isinstance(c, type) and is_dataclass(c)
            }
            if value.get("kind") not in options:
                raise ValueError(f"{where}, field {f.name}.kind: {value.get('kind')!r} unknown")
            value = _build(options[value["kind"]], value, f"{where}, {f.name}")
        values[f.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
