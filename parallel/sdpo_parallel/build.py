"""Engines by name."""

from typing import Literal

from torch.distributed.checkpoint.stateful import Stateful

from .engine import Engine, EngineConfig
from .errors import SdpoError
from .inference import Inference, InferenceConfig
from .transformers.engine import TransformersEngine

EngineName = Literal["torchtitan", "transformers"]


def build_engine(name: EngineName, config: EngineConfig, state: Stateful) -> Engine:
    """An engine with no weights loaded yet.

    Args:
        state: saved and restored with the model (step, place in the data).

    Raises:
        SdpoError: the engine is not installed, or the config does not fit the model or the ranks.
    """
    return _engine(name)(config, state)


def build_inference(name: EngineName, config: InferenceConfig) -> Inference:
    """A model that is only read; ``load`` completes its weights.

    Raises:
        SdpoError: the engine is not installed, or the config does not fit the model or the ranks.
    """
    return _engine(name).build_inference(config)


def check_support(name: EngineName, config: EngineConfig, ranks: int) -> None:
    """Refuse what the engine would refuse on so many ranks; of the model config.json is read alone.

    Raises:
        SdpoError: the engine is not installed, or the config does not fit the model or the ranks.
    """
    _engine(name).check_support(config, ranks)


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
    _engine(name).export_checkpoint(config, step, out, adapters=adapters)


def _engine(name: EngineName):
    if name == "transformers":
        return TransformersEngine
    try:  # the optional extra
        from .torchtitan.engine import TorchtitanEngine
    except ImportError as error:
        raise SdpoError(
            f"the torchtitan engine cannot be imported ({error}): pip install 'sdpo[train]', or "
            "use --engine transformers"
        ) from error
    return TorchtitanEngine
