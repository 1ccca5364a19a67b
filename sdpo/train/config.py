"""A run's settings, as dataclasses and as files: TOML written by hand, JSON in a run's folder."""

import json
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from sdpo_parallel.config import (
    TEACHERS,
    CheckpointConfig,
    Frozen,
    Live,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    Teacher,
    parse_teacher,
    write_teacher,
)
from sdpo_parallel.huggingface import resolve_model

from ..batching import BatchConfig
from ..errors import SdpoError
from ..hindsight import ALONE, HindsightConfig
from ..objective import AnyObjective, ReverseKL
from .safeguards import SafeguardConfig
from .selection import SelectConfig


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go. JSONL and TensorBoard are always written."""

    every: int = 10
    """Steps between lines on the console where it is not a terminal."""
    wandb: str | None = None
    """Project to log to on Weights & Biases; needs the ``wandb`` extra."""

    def __post_init__(self):
        if self.every < 1:
            raise SdpoError(f"log.every must be at least 1 step, got {self.every}")


TEACHER = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar=TEACHERS,
    instance_from_str=lambda words: parse_teacher(words[0]),
    is_instance=lambda value: isinstance(value, Teacher),
    str_from_instance=lambda teacher: [write_teacher(teacher)],
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run that trains is told, wherever its interactions come from."""

    model: str
    """Model to start from: a local Hugging Face folder, or a name on the hub such as
    Qwen/Qwen3-0.6B or Qwen/Qwen3-0.6B@revision."""
    out: str
    """Folder of the run: config, metrics, checkpoints and the exported model."""
    engine: Literal["torchtitan", "transformers"] = "torchtitan"
    """torchtitan: any layout of any number of ranks; transformers: any causal LM, one device."""
    objective: AnyObjective = field(default_factory=ReverseKL)
    teacher: Annotated[Teacher, TEACHER] = field(default_factory=Live)
    """Model that reads the hindsight prompt: the policy as it is, its moving average, the weights
    it started from, another model, or the policy held near its start. DPO's reference."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    hindsight: HindsightConfig = field(default_factory=HindsightConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safeguard: SafeguardConfig = field(default_factory=SafeguardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        name, reading = type(self.objective).__name__, self.objective.reading
        if reading in ALONE and not isinstance(self.teacher, Live):
            raise SdpoError(f"{name} has no second pass, and so no teacher: leave it out, or live")
        if reading == "pair" and not isinstance(self.teacher, Frozen):
            raise SdpoError(
                f"{name} compares with a reference that stays as it is: set teacher to frozen, or "
                "frozen:FOLDER"
            )

    @property
    def max_tokens(self) -> int:
        """The longest sequence that either pass may read."""
        if self.objective.reading == "hindsight":
            return self.hindsight.max_tokens
        return self.hindsight.max_prompt_tokens + self.hindsight.max_response_tokens


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that decides what a run on recorded interactions computes."""

    data: str
    """Interactions to train on, as ``sdpo data prepare`` writes them."""
    select: SelectConfig = field(default_factory=SelectConfig)


AnyRun = TypeVar("AnyRun", bound=RunConfig)
AnyTable = TypeVar("AnyTable")


def local_models(config: AnyRun) -> AnyRun:
    """The same run with every model as a local folder; names are looked up on the hub.

    Call it once, and keep the config as given for the run's folder.
    """
    config = replace(config, model=resolve_model(config.model))
    if isinstance(config.teacher, Frozen) and config.teacher.folder is not None:
        config = replace(config, teacher=Frozen(folder=resolve_model(config.teacher.folder)))
    return config


def to_json(config: Any) -> Any:
    """A config as JSON values: each dataclass has the name of its class under "kind"."""
    if is_dataclass(config):
        values = {f.name: to_json(getattr(config, f.name)) for f in fields(config)}
        return {"kind": type(config).__name__, **values}
    return list(config) if isinstance(config, tuple) else config


ADDED_TO_ALL: dict[str, Any] = {
    "hindsight": {"truncation": "paper", "thinking": "strip", "date": None},
    "objective": {"hindsight_temperature": 1.0},
    "batch": {"unit": "interaction", "share_prefix": "auto"},  # equal but for rounding
    "checkpoint": {"export_rounding": "nearest"},
}
ADDED_LATER: dict[str, dict[str, Any]] = {
    "TrainConfig": ADDED_TO_ALL | {"select": to_json(SelectConfig())},
    "OnlineConfig": ADDED_TO_ALL
    | {
        "users": [],
        "sampler": {"kind": "InProcess"},
        "evaluate": {"tasks": [], "limit": 100, "data": [], "regression": "report"},
    },
}
"""Settings that runs of earlier versions lack, by kind of run, as those runs behaved."""


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run's config.json says, with the settings that an earlier version did not know."""
    return _filled(settings, ADDED_LATER.get(str(settings.get("kind")), {}))


def _filled(settings: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    groups = {
        name: _filled(settings[name], value)
        for name, value in by.items()
        if isinstance(value, dict) and isinstance(settings.get(name), dict)
    }
    return by | settings | groups


def read_config(run: str | Path) -> TrainConfig:
    """The config that a run of ``sdpo train`` was started with.

    Raises:
        SdpoError: the folder holds no run, or one of another version of this program.
    """
    path = _config_file(run)
    return with_settings(None, read_settings(path), str(path))


def read_run_config(run: str | Path) -> RunConfig:
    """What the config of any kind of run says of what all have.

    Raises:
        SdpoError: as `read_config` does.
    """
    path, types = _config_file(run), get_type_hints(RunConfig)
    settings = {name: v for name, v in completed(read_settings(path)).items() if name in types}
    return _built(RunConfig, settings | {"kind": "RunConfig"}, None, str(path))


def _config_file(run: str | Path) -> Path:
    path = Path(run) / "config.json"
    if not path.is_file():
        raise SdpoError(f"{run}: no config.json; give the folder of a run")
    return path


def read_settings(path: str | Path) -> dict[str, Any]:
    """What a config file says: TOML, or JSON where its name ends in ``.json``.

    Raises:
        SdpoError: there is no such file, or it cannot be parsed.
    """
    path = Path(path)
    language, parse = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        settings = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SdpoError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise SdpoError(f"{path}: not valid {language} ({error})") from error
    if not isinstance(settings, dict):
        raise SdpoError(f"{path}: not an object of settings")
    return settings


def with_settings(
    base: AnyRun | None, settings: dict[str, Any], where: str, kind: type[AnyRun] = TrainConfig
) -> AnyRun:
    """``base`` with what a config file says. Without a base the file says everything, as that of a
    run's folder does.

    Args:
        kind: of the config, where there is no base.

    Raises:
        SdpoError: a field is missing, unknown, or holds no value of its kind; names ``where`` and
            the field.
    """
    kind = kind if base is None else type(base)
    return _built(kind, settings if base else completed(settings), base, where)


def with_table(base: AnyTable, settings: Any, where: str, table: str) -> AnyTable:
    """``base`` with what a config file says in one of its tables.

    Raises:
        SdpoError: as `with_settings` does.
    """
    return _built(type(base), settings, base, where, table)


def _built(kind: Any, value: Any, base: Any, where: str, *path: str) -> Any:
    """What a file says under a field, as a ``kind``.

    Args:
        base: the value that the file changes; None: the file says all of it.
        where: the file, and ``path`` the field in it, for errors.
    """

    def wrong(problem: object, *inner: str) -> SdpoError:
        field = ".".join((*path, *inner))
        return SdpoError(f"{where}, field {field}: {problem}" if field else f"{where}: {problem}")

    kinds = get_args(kind) or (kind,)
    classes = {c.__name__: c for c in kinds if isinstance(c, type) and is_dataclass(c)}
    if not classes:
        if not _fits(value, kind):
            raise wrong(f"expected {_name(kind)}, found {value!r}")
        return tuple(value) if isinstance(value, list) else value
    if kind == Teacher and isinstance(value, str):
        make = partial(parse_teacher, value)
    elif isinstance(value, dict):
        settings = dict(value)
        name = settings.pop("kind", None if base is None else type(base).__name__)
        if name not in classes:
            raise wrong(f"kind {name!r} unknown; expected one of {', '.join(classes)}")
        types = get_type_hints(classes[name])
        if unknown := settings.keys() - types.keys():
            raise wrong("unknown; is it misspelt, or from a newer sdpo?", min(unknown))
        if base is None and (missing := types.keys() - settings.keys()):
            raise wrong("missing; was it written by this version of sdpo?", min(missing))
        old = vars(base) if isinstance(base, classes[name]) else {}
        new = {n: _built(types[n], v, old.get(n), where, *path, n) for n, v in settings.items()}
        make = partial(classes[name], **old | new)
    else:
        raise wrong(f"expected an object of settings, found {value!r}")
    try:
        return make()
    except SdpoError as error:
        raise wrong(error) from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as it is; "no" is not a number of steps, nor is 1.5."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return value in arguments
    if get_origin(kind) is UnionType:
        return any(_fits(value, k) for k in arguments)
    if get_origin(kind) is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return kind.__name__ if isinstance(kind, type) else str(kind)
