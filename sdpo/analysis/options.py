"""Options that all commands share which read a model's advantages."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from sdpo_parallel.config import ParallelConfig

from ..hindsight import HindsightConfig


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """How a model is loaded, and how it reads interactions."""

    hindsight: Annotated[HindsightConfig, tyro.conf.arg(name="")] = field(
        default_factory=HindsightConfig
    )
    engine: Literal["transformers", "torchtitan"] = "transformers"
    """transformers: any causal LM, one device; torchtitan: any layout of the ranks that torchrun
    starts."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch_tokens: int = 8192
    """Tokens that a rank computes at a time in one pass."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the weights, and of the passes unless parallel.compute_dtype names theirs; auto
    is bfloat16 on a GPU and float32 on a CPU."""
