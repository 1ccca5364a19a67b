"""The seam between the method and what computes it: a model of the two passes, and its training.

``two_pass_loss`` needs a `CausalModel`; the trainer needs an `Engine`. Both engines of this package
are built from one `EngineConfig`: ``torchtitan`` for any layout of any number of ranks,
``transformers`` for any causal LM on one device.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sdpo_kernels import VocabShard

from .checkpoints import Checkpoints
from .config import (
    CheckpointConfig,
    Live,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    Teacher,
)

ROW_MULTIPLE = 128
"""Row widths are rounded up to it: the block of flex attention's masks, and few enough shapes for
compiled kernels. Layouts that split rows need a multiple of it."""


class LMHead(NamedTuple):
    """``weight``: (V, D), or with a ``shard`` this rank's rows of it."""

    weight: Tensor
    shard: VocabShard | None = None


class CausalModel(Protocol):
    """A language model as the two passes read it."""

    def hidden_states(self, tokens_BT: Tensor, positions_BT: Tensor, index_N: Tensor) -> Tensor:
        """(N, D): what the lm_head reads at the flat slots ``index_N``. Documents begin wherever
        ``positions_BT`` restarts at 0 and do not see each other."""
        ...

    def lm_head(self) -> LMHead:
        """The weight, (V, D) or this rank's rows of it; its gradient reaches the parameter."""
        ...

    def own_responses(self, lengths: Sequence[int]) -> list[int] | None:
        """Indices of the responses whose loss this rank computes, where several ranks read the
        same micro-batch with responses of these lengths; None: all of them."""
        ...


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int = 0
    world_size: int = 1
    dp_rank: int = 0
    """Which of the ``dp_degree`` data-parallel groups: each reads micro-batches of its own."""
    dp_degree: int = 1
    cp_degree: int = 1
    """Context-parallel ranks read the same micro-batch, and each computes the loss of some of its
    responses."""

    @property
    def is_main(self) -> bool:
        """This rank writes the run's files."""
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is built from.

    Args:
        model: local Hugging Face folder to start from.
        run_folder: checkpoints go to ``run_folder/checkpoints/step-N``.
        total_steps: length of the whole run, for the learning rate's schedule.
        max_tokens: longest sequence of either pass.
    """

    model: str
    run_folder: str
    total_steps: int
    max_tokens: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    teacher: Teacher = field(default_factory=Live)
    lora: LoraConfig = field(default_factory=LoraConfig)


class Engine(Protocol):
    """Training of one model: parameters, optimizer, teacher, checkpoints, export.

    A step is, for every micro-batch, ``with engine.context(): engine.backward(loss, last=...)``,
    then ``clip_gradients`` and either ``update`` or ``discard``. All ranks call the same methods in
    the same order.
    """

    @property
    def policy(self) -> CausalModel:
        """The model in training."""
        ...

    @property
    def teacher(self) -> CausalModel | None:
        """The model that reads the hindsight prompt; None: the policy itself."""
        ...

    @property
    def device(self) -> torch.device:
        """Where micro-batches belong."""
        ...

    @property
    def ranks(self) -> Ranks:
        """This process among the run's."""
        ...

    @property
    def row_multiple(self) -> int:
        """Widths of packed rows must be multiples of it."""
        ...

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        ...

    def context(self) -> contextlib.AbstractContextManager[object]:
        """What both passes and their backward run in."""
        ...

    def load(self) -> None:
        """Put the starting weights in place, the teacher's too."""
        ...

    def resume(self) -> None:
        """Go on from the newest undamaged checkpoint, where there is one."""
        ...

    def save(self, step: int, manifest: Mapping[str, Any], *, wait: bool = False) -> None:
        """Write a checkpoint, in the background where possible unless ``wait``."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a micro-batch; ``last``: it is the step's last."""
        ...

    def clip_gradients(self) -> float:
        """Clip the gradients' norm, over all ranks; returns the norm before clipping."""
        ...

    def update(self, step: int) -> float:
        """Update weights and teacher with the gradients of step ``step`` (from 0), and drop them;
        returns the learning rate used."""
        ...

    def discard(self) -> None:
        """Drop the gradients."""
        ...

    def release(self) -> None:
        """Free the weights that passes without a backward left gathered."""
        ...

    def check_agreement(self, what: str, value: str) -> None:
        """Refuse to train where ranks were started with different things.

        Raises:
            SdpoError: ``value`` is not the same on all ranks; the first that differs is named.
        """
        ...

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over ranks with tokens of their own: tensor ranks count once."""
        ...

    def export(self, folder: str, *, adapters: bool = False) -> None:
        """Write a Hugging Face folder that transformers loads: weights (adapters merged), configs,
        tokenizer; or, with ``adapters``, a PEFT folder of the adapters alone."""
        ...

    def close(self) -> None:
        """Finish what runs in the background and leave the process group."""
        ...
