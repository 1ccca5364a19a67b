"""A model that is read and not trained, on any layout that trains: what commands which score need
of an engine.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch

from .config import ParallelConfig
from .engine import ROW_MULTIPLE, Ranks, refuse_disagreement
from .errors import SdpoError
from .model import CausalModel

T = TypeVar("T")
Dtype = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """What a model is loaded from that is only read.

    Args:
        model: local Hugging Face folder.
        max_tokens: longest sequence.
        dtype: of the weights; ``auto``: bfloat16 on an accelerator, float32 on a CPU.
        parallel: the layout. Its ``compute_dtype`` is that of the passes, ``auto`` that of the
            weights.
    """

    model: str
    max_tokens: int
    dtype: Dtype = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def layout(self) -> ParallelConfig:
        """``parallel``, with the passes' dtype decided as far as that of the weights is."""
        if self.parallel.compute_dtype != "auto":
            return self.parallel
        return replace(self.parallel, compute_dtype=self.dtype)

    def dtypes(self, device_type: str) -> tuple[str, str]:
        """Dtypes of the weights and of the passes on a device of this type."""
        weights = replace(self.parallel, compute_dtype=self.dtype).resolve_dtype(device_type)
        return weights, self.layout.resolve_dtype(device_type)


class Inference:
    """A model for inference, and this process among those that read with it.

    All ranks call the same methods in the same order. The methods here are those of a single rank.

    Attributes:
        model: what reads.
        device: where micro-batches belong.
        ranks: this process among the command's.
        row_multiple: widths of packed rows must be multiples of it.
    """

    ranks = Ranks()
    row_multiple = ROW_MULTIPLE

    def __init__(self, model: CausalModel, device: torch.device):
        self.model, self.device = model, device

    def context(self) -> contextlib.AbstractContextManager[object]:
        """What passes run in."""
        return contextlib.nullcontext()

    def load(self) -> None:
        """Put the weights in place."""

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order, on every rank."""
        return [value]

    def check_agreement(self, what: str, value: Any) -> None:
        """Refuse to read where ranks were started with different things.

        Raises:
            SdpoError: ``value`` is not the same on all ranks; the first that differs is named.
        """
        refuse_disagreement(what, self.gather(value))

    def on_main(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on the main rank, which alone calls it.

        Raises:
            SdpoError: the one that ``action`` raised, on every rank, so that none waits for others.
        """
        result: Any = None
        error: SdpoError | None = None
        if self.ranks.is_main:
            try:
                result = action()
            except SdpoError as raised:
                error = raised
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """Free gathered weights and leave the process group."""
