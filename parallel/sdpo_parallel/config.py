"""Settings of the engines. No torchtitan here: a config can be written and read anywhere."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and a decay to zero."""

    lr: float = 2e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_fraction: float = 0.05
    """Of all steps; the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float = 10.0

    def __post_init__(self):
        for name in ("lr", "eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must lie in [0, 1], got {self.warmup_fraction}")

    def factor(self, step: int, total: int) -> float:
        """Learning rate of step ``step`` (from 0) over ``lr``."""
        warmup = round(self.warmup_fraction * total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        progress = (step - warmup) / max(1, total - warmup)
        return 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over the ranks that torchrun starts."""

    replicate: int = 1
    """Copies of the sharded model (HSDP); the other ranks shard it (FSDP2)."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of parameters and activations in the passes; master weights, gradients reduced across ranks
    and optimizer state are float32. ``auto``: bfloat16 on an accelerator, float32 on a CPU."""
    activation_checkpoint: Literal["none", "selective", "full"] = "selective"

    def __post_init__(self):
        if self.replicate < 1:
            raise ValueError(f"replicate must be at least 1, got {self.replicate}")

    def resolve_dtype(self, device_type: str) -> Literal["bfloat16", "float32"]:
        """``compute_dtype`` with ``auto`` decided."""
        if self.compute_dtype == "auto":
            return "float32" if device_type == "cpu" else "bfloat16"
        return self.compute_dtype


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run leaves on disk to go on from."""

    interval: int = 100
    """Steps between checkpoints; the last step always leaves one."""
    keep: int = 3
    """Newest checkpoints kept, at least 2; 0 keeps all."""
    export_dtype: Literal["source", "float32", "bfloat16"] = "source"
    """Of the exported weights; ``source``: that of the folder the run started from."""

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError(f"checkpoint interval must be at least 1, got {self.interval}")
        if self.keep == 1 or self.keep < 0:
            raise ValueError(
                "keep must be 0 (all) or at least 2, as the newest may be unfinished; "
                f"got {self.keep}"
            )
