"""Settings of the engines. No torchtitan here: a config can be written and read anywhere."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from .errors import SdpoError

Attention = Literal["auto", "flex", "flex_flash", "varlen", "branches", "dense"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and a decay to zero."""

    lr: float = 2e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_fraction: float = 0.05
    """Share of all steps over which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float = 10.0

    def __post_init__(self):
        for name in ("lr", "eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise SdpoError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup_fraction <= 1:
            raise SdpoError(f"warmup_fraction must lie in [0, 1], got {self.warmup_fraction}")

    def adamw(self) -> dict[str, Any]:
        """Arguments of torch.optim.AdamW."""
        names = ("lr", "betas", "eps", "weight_decay")
        return {name: getattr(self, name) for name in names}

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate of step ``step`` (from 0) of ``total``."""
        warmup = round(self.warmup_fraction * total)
        if step < warmup:
            return self.lr * ((step + 1) / (warmup + 1))
        if self.schedule == "constant":
            return self.lr
        progress = (step - warmup) / max(1, total - warmup)
        if self.schedule == "linear":
            return self.lr * (1 - progress)
        return self.lr * ((1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over the ranks that torchrun starts.

    ranks = replicate x (FSDP2 shards) x context x tensor; the shards are what is left over.
    """

    replicate: int = 1
    """Copies of the sharded model (HSDP); the other ranks shard it (FSDP2)."""
    tensor: int = 1
    """Ranks that split every matrix, the lm_head by rows of the vocabulary (TP)."""
    sequence_parallel: bool = True
    """With ``tensor``: norms and residuals are split over its ranks by position, too."""
    context: int = 1
    """Ranks that split every row of tokens (CP); FSDP2 shards over them as well."""
    pipeline: int = 1
    """Only 1: a pipeline schedule runs one pass of a step, and there are two."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of parameters and activations in the passes; master weights, gradients reduced across
    ranks and optimizer state are float32. ``auto``: bfloat16 on an accelerator, float32 on a
    CPU."""
    activation_checkpoint: Literal["none", "selective", "full"] = "selective"
    compile: Literal["none", "inductor", "aot_eager"] = "none"
    """torch.compile of every transformer block, by this backend; all rows are then padded to
    ``batch.row_tokens``, so that few versions are compiled."""
    cpu_offload: bool = False
    """Parameters, gradients and optimizer state live in host memory between their uses."""
    attention: Attention = "auto"
    """Attention of the torchtitan engine; ``auto``: chosen by device and what is installed."""
    liger: bool = False
    """RMSNorm, SwiGLU and rotary embeddings by Liger's Triton kernels; needs the liger extra."""

    def __post_init__(self):
        for name in ("replicate", "tensor", "context", "pipeline"):
            if getattr(self, name) < 1:
                raise SdpoError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.pipeline > 1:
            raise SdpoError(
                f"pipeline={self.pipeline}: pipeline parallelism is not supported: its schedules "
                "run one pass per micro-batch and SDPO needs two (the hindsight pass feeds the "
                "policy's loss); use FSDP2 with tensor or context parallelism instead"
            )

    def shards(self, ranks: int) -> int:
        """FSDP2's data-parallel shards (context ranks not counted) on ``ranks`` ranks.

        Raises:
            SdpoError: the degrees do not divide ``ranks``.
        """
        degrees = self.replicate * self.tensor * self.context
        if ranks % degrees:
            raise SdpoError(
                f"replicate={self.replicate} x tensor={self.tensor} x context={self.context} = "
                f"{degrees} does not divide {ranks} ranks"
            )
        return ranks // degrees

    def resolve_dtype(self, device_type: str) -> Literal["bfloat16", "float32"]:
        """``compute_dtype`` with ``auto`` decided."""
        if self.compute_dtype == "auto":
            return "float32" if device_type == "cpu" else "bfloat16"
        return self.compute_dtype


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train low-rank adapters beside frozen weights; ``rank`` 0 trains the weights themselves."""

    rank: int = 0
    alpha: float = 16.0
    """Adapters add ``alpha / rank * B A x``."""
    targets: tuple[str, ...] = ("wq", "wkv", "wo", "w1", "w2", "w3")
    """torchtitan's names of the linear layers that get one; ``wkv`` is both wk and wv."""

    def __post_init__(self):
        if self.rank < 0:
            raise SdpoError(f"lora rank must not be negative, got {self.rank}")
        if self.rank and not self.targets:
            raise SdpoError("lora targets is empty: name at least one linear layer")


@dataclass(frozen=True, kw_only=True)
class Live:
    """The teacher is the policy itself, as it is now."""


@dataclass(frozen=True, kw_only=True)
class EMA:
    """The teacher is an exponential moving average of the policy's weights."""

    decay: float = 0.99
    """After each step: teacher = decay x teacher + (1 - decay) x policy."""

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise SdpoError(f"decay must lie in [0, 1), got {self.decay}")


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The teacher never changes."""

    folder: str | None = None
    """Hugging Face folder with the policy's tokenizer; None: the weights the run started from."""


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """log teacher = (1 - mix) log policy + mix log frozen, renormalised: the live teacher, held
    near the weights the run started from."""

    mix: float = 0.5

    def __post_init__(self):
        if not 0 < self.mix < 1:
            raise SdpoError(
                f"mix must lie strictly between 0 and 1, got {self.mix}: its limits are the "
                "teachers live (0) and frozen (1)"
            )


Teacher = Live | EMA | Frozen | TrustRegion

TEACHERS = "live|ema:DECAY|frozen|frozen:FOLDER|trust-region:MIX"
"""How a teacher is written on the command line."""


def parse_teacher(text: str) -> Teacher:
    """A teacher as ``TEACHERS`` writes them.

    Raises:
        SdpoError: it is none of them.
    """
    kind, _, value = text.partition(":")
    try:
        match kind, value:
            case "live", "":
                return Live()
            case "ema", _:
                return EMA(decay=float(value)) if value else EMA()
            case "frozen", _:
                return Frozen(folder=value or None)
            case "trust-region", _:
                return TrustRegion(mix=float(value)) if value else TrustRegion()
    except ValueError as error:
        raise SdpoError(f"teacher {text!r}: {error}") from error
    raise SdpoError(f"teacher {text!r} is none of {TEACHERS}")


def write_teacher(teacher: Teacher) -> str:
    """The inverse of ``parse_teacher``."""
    match teacher:
        case EMA(decay=decay):
            return f"ema:{decay}"
        case Frozen(folder=folder):
            return f"frozen:{folder}" if folder else "frozen"
        case TrustRegion(mix=mix):
            return f"trust-region:{mix}"
    return "live"


ExportDtype = Literal["source", "float32", "bfloat16"]
Rounding = Literal["stochastic", "nearest"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run leaves on disk to resume from."""

    interval: int = 100
    """Steps between checkpoints; the last step always leaves one."""
    keep: int = 3
    """Newest checkpoints kept, at least 2; 0 keeps all."""
    asynchronous: bool = True
    """Write in the background while training goes on; the weights are copied first."""
    export_dtype: ExportDtype = "source"
    """Dtype of the exported weights; ``source``: that of the folder the run started from."""
    export_rounding: Rounding = "stochastic"
    """How float32 weights become bfloat16. stochastic: with a mean that is exact; nearest: as the
    passes round them, which loses updates smaller than half of a weight's last digit."""

    def __post_init__(self):
        if self.interval < 1:
            raise SdpoError(f"checkpoint interval must be at least 1, got {self.interval}")
        if self.keep == 1 or self.keep < 0:
            raise SdpoError(
                "keep must be 0 (all) or at least 2, as the newest may turn out damaged; "
                f"got {self.keep}"
            )
