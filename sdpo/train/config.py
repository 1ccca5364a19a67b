"""A run's settings, as dataclasses and as files: TOML written by hand, JSON in a run's folder."""

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import cattrs
import tyro
from cattrs.errors import BaseValidationError, ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn

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
from ..hindsight import HindsightConfig
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
class TrainConfig:
    """Everything that decides what a run computes and where it is kept."""

    model: str
    """Model to start from: a local Hugging Face folder, or a name on the hub such as
    Qwen/Qwen3-0.6B or Qwen/Qwen3-0.6B@revision."""
    data: str
    """Interactions to train on, as ``sdpo data prepare`` writes them."""
    out: str
    """Folder of the run: config, metrics, checkpoints and the exported model."""
    engine: Literal["torchtitan", "transformers"] = "torchtitan"
    """torchtitan: any layout of any number of ranks; transformers: any causal LM, one device."""
    objective: AnyObjective = field(default_factory=ReverseKL)
    teacher: Annotated[Teacher, TEACHER] = field(default_factory=Live)
    """Model that reads the hindsight prompt: the policy as it is, its moving average, the weights
    it started from, another model, or the policy held near its start."""
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


def local_models(config: TrainConfig) -> TrainConfig:
    """The same run with every model as a local folder; names are looked up on the hub.

    Call it once, and keep the config as given for the run's folder.
    """
    config = replace(config, model=resolve_model(config.model))
    if isinstance(config.teacher, Frozen) and config.teacher.folder is not None:
        config = replace(config, teacher=Frozen(folder=resolve_model(config.teacher.folder)))
    return config


# Stored configs: every dataclass carries the name of its class under "kind", which also decides
# what a union holds.


def to_json(config: Any) -> Any:
    """A config as JSON values."""
    return _converter.unstructure(config)


def read_config(run: str | Path) -> TrainConfig:
    """The config that a run was started with.

    Raises:
        SdpoError: the folder holds no run, or one of another version of this program.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        raise SdpoError(f"{run}: no config.json; give the folder of a run")
    return whole_config(read_settings(path), str(path))


def read_settings(path: str | Path) -> dict[str, Any]:
    """What a config file says: TOML, or JSON where its name ends in ``.json``.

    Raises:
        SdpoError: there is no such file, or it cannot be parsed.
    """
    path = Path(path)
    parse = json.loads if path.suffix == ".json" else tomllib.loads
    try:
        settings = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SdpoError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        language = "JSON" if path.suffix == ".json" else "TOML"
        raise SdpoError(f"{path}: not valid {language} ({error})") from error
    if not isinstance(settings, dict):
        raise SdpoError(f"{path}: not an object of settings")
    return settings


def with_settings(config: TrainConfig, settings: dict[str, Any], where: str) -> TrainConfig:
    """``config`` with what a config file says; the file may leave out whatever it does not change.

    Raises:
        SdpoError: a field is unknown or its value is not one; names ``where`` and the field.
    """
    return _built(_merged(to_json(config), settings), where)


def _merged(base: Any, settings: Any) -> Any:
    """``settings`` over ``base``; an object of another kind replaces all of what was there."""
    if not (isinstance(base, dict) and isinstance(settings, dict)):
        return settings
    if settings.get("kind", base["kind"]) != base["kind"]:
        return settings
    return base | {name: _merged(base.get(name), value) for name, value in settings.items()}


_ADDED_LATER = ("select",)
"""Settings that runs of earlier versions lack; those runs behaved as the defaults do."""


def whole_config(stored: dict[str, Any], where: str) -> TrainConfig:
    """The config of a run's folder, of which nothing may be missing.

    Raises:
        SdpoError: a field is missing, unknown, or holds no value of its kind.
    """
    config = _built(stored, where)
    missing = [p for p in _paths(to_json(config)) if p not in _paths(stored)]
    if missing := [p for p in missing if not p.startswith(_ADDED_LATER)]:
        problem = "missing; was it written by this version of sdpo?"
        raise SdpoError(f"{where}, field {missing[0]}: {problem}")
    return config


def _paths(values: Any, prefix: str = "") -> list[str]:
    """Every name in nested objects, joined by dots."""
    if not isinstance(values, dict):
        return []
    return [p for n, v in values.items() for p in (prefix + n, *_paths(v, f"{prefix}{n}."))]


def _built(settings: dict[str, Any], where: str) -> TrainConfig:
    try:
        return _converter.structure(settings, TrainConfig)
    except (BaseValidationError, SdpoError) as error:
        path, problem = _first_fault(error)
        place = f"{where}, field {'.'.join(path)}" if path else where
        raise SdpoError(f"{place}: {problem}") from error


def _first_fault(error: Exception) -> tuple[list[str], str]:
    """Where cattrs found something wrong, as names from the outside in, and what it was."""
    if isinstance(error, ForbiddenExtraKeysError):
        return [min(error.extra_fields)], "unknown; is it misspelt, or from a newer sdpo?"
    if not isinstance(error, ClassValidationError):
        return [], str(error)
    of_fields, of_the_class = error.group_exceptions()
    if not of_fields:
        return _first_fault(of_the_class[0])
    inner, note = of_fields[0]
    path, problem = _first_fault(inner)
    return [note.name, *path], problem


def _as_is(value: Any, kind: type) -> Any:
    """A plain value of the right type; nothing is converted, as "no" is not a number of steps."""
    allowed = (int, float) if kind is float else (kind,)
    if type(value) in allowed or value is tyro.MISSING:
        return value
    raise SdpoError(f"expected {kind.__name__}, found {value!r}")


def _structure_literal(kind: Any) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if value not in get_args(kind):
            raise SdpoError(f"{value!r} is none of {', '.join(map(str, get_args(kind)))}")
        return value

    return structure


def _structure_tuple(kind: Any) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise SdpoError(f"expected a list, found {value!r}")
        first, *rest = get_args(kind)
        kinds = [first] * len(value) if rest == [...] else [first, *rest]
        if len(kinds) != len(value):
            raise SdpoError(f"expected {len(kinds)} values, found {value!r}")
        return tuple(_converter.structure(v, k) for v, k in zip(value, kinds, strict=True))

    return structure


def _unstructure_dataclass(kind: type) -> Callable[[Any], dict[str, Any]]:
    fields_of = make_dict_unstructure_fn(kind, _converter)
    return lambda value: {"kind": kind.__name__, **fields_of(value)}


def _structure_dataclass(kind: type) -> Callable[[Any, Any], Any]:
    from_fields = make_dict_structure_fn(kind, _converter)

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise SdpoError(f"expected an object of settings, found {value!r}")
        values = dict(value)
        if (found := values.pop("kind", kind.__name__)) != kind.__name__:
            raise SdpoError(f"kind {found!r} unknown; expected {kind.__name__}")
        return from_fields(values, kind)

    return structure


def _structure_union(union: Any) -> Callable[[Any, Any], Any]:
    kinds = {kind.__name__: kind for kind in get_args(union)}

    def structure(value: Any, _: Any) -> Any:
        if union == Teacher and isinstance(value, str):
            return parse_teacher(value)
        kind = value.get("kind") if isinstance(value, dict) else value
        if kind not in kinds:
            raise SdpoError(f"kind {kind!r} unknown; expected one of {', '.join(kinds)}")
        return _converter.structure(value, kinds[kind])

    return structure


def _is_union_of_dataclasses(kind: Any) -> bool:
    return isinstance(kind, UnionType) and all(map(is_dataclass, get_args(kind)))


_converter = cattrs.Converter(forbid_extra_keys=True)
for _plain in (str, int, float, bool):
    _converter.register_structure_hook(_plain, _as_is)
_converter.register_structure_hook_factory(lambda t: get_origin(t) is Literal, _structure_literal)
_converter.register_structure_hook_factory(lambda t: get_origin(t) is tuple, _structure_tuple)
_converter.register_unstructure_hook_factory(is_dataclass, _unstructure_dataclass)
_converter.register_structure_hook_factory(is_dataclass, _structure_dataclass)
_converter.register_structure_hook_factory(_is_union_of_dataclasses, _structure_union)
