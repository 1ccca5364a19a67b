"""Engines by name."""

from typing import Literal

from torch.distributed.checkpoint.stateful import Stateful

from .engine import Engine, EngineConfig
from .errors import SdpoError
from .transformers.engine import TransformersEngine
from .transformers.engine import export_checkpoint as export_with_transformers

EngineName = Literal["torchtitan", "transformers"]


def build_engine(name: EngineName, config: EngineConfig, state: Stateful) -> Engine:
    """An engine with no weights loaded yet.

    Args:
        state: saved and restored with the model (step, place in the data).

    Raises:
        SdpoError: the engine is not installed, or the config does not fit the model or the ranks.
    """
    if name == "transformers":
        return TransformersEngine(config, state)
    return _torchtitan().TorchtitanEngine(config, state)


def export_checkpoint(
    name: EngineName, config: EngineConfig, step: int | None, out: str, *, adapters: bool = False
) -> None:
    """Write a checkpoint as a Hugging Face folder: the weights alone are loaded, no optimizer and
    no teacher.

    Args:
        step: which checkpoint of ``config.run_folder``; None: the newest undamaged one.
        adapters: write a PEFT folder of the adapters alone.

    Raises:
        SdpoError: there is no such checkpoint, it is damaged, or there are no adapters.
    """
    if name == "transformers":
        export_with_transformers(config, step, out, adapters=adapters)
    else:
        _torchtitan().export_checkpoint(config, step, out, adapters=adapters)


def _torchtitan():
    try:  # the optional extra
        from .torchtitan import engine
    except ImportError as error:
        raise SdpoError(
            f"the torchtitan engine cannot be imported ({error}): pip install 'sdpo[train]', or "
            "use --engine transformers"
        ) from error
    return engine
