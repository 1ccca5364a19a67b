"""Options that all commands share which read a model's advantages."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ..hindsight import HindsightConfig


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """How a model is loaded, and how it reads interactions."""

    hindsight: Annotated[HindsightConfig, tyro.conf.arg(name="")] = field(
        default_factory=HindsightConfig
    )
    batch_tokens: int = 8192
    """Tokens computed at a time in one pass."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the weights; auto is bfloat16 on a GPU and float32 on a CPU."""
