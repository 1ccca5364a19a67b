"""What the trainer needs of an engine, and what both engines do alike.

``torchtitan`` is for any layout of any number of ranks, ``transformers`` for any causal LM on one
device.
"""

import abc
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from .checkpoints import Checkpoints
from .config import (
    CheckpointConfig,
    ExportDtype,
    Frozen,
    Live,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    Teacher,
)
from .errors import SdpoError
from .huggingface import check_finite
from .model import ModuleModel, local
from .rows import Sharing
from .teacher import TeacherState, reshard

if TYPE_CHECKING:
    from .inference import Inference, InferenceConfig

T = TypeVar("T")
ROW_MULTIPLE = 128
"""Row widths are rounded up to it: the block of flex attention's masks, and few enough shapes for
compiled kernels. Layouts that split rows need a multiple of it."""


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
        share_prefix: what sequences begin with alike is to be read once, where that is possible.
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
    share_prefix: bool = True

    @property
    def teacher_folder(self) -> str | None:
        """The folder of a teacher that does not start as the policy; None: it does."""
        return self.teacher.folder if isinstance(self.teacher, Frozen) else None


def refuse_disagreement(what: str, values: Sequence[Any]) -> None:
    """Refuse to go on where ranks were started with different things.

    Args:
        values: every rank's, in their order.

    Raises:
        SdpoError: they are not all the same; the first that differs is named.
    """
    for rank, other in enumerate(values):
        if other != values[0]:
            raise SdpoError(
                f"{what} differs between ranks: rank {rank} has {other!r}, rank 0 "
                f"{values[0]!r}; put it where all nodes read the same, or copy it to each again"
            )


@dataclass(frozen=True)
class Seat:
    """One user's part of a model that many share, on the CPU: what is trained, such as adapters,
    and what the optimizer has gathered of it; this rank's shards. A teacher that is an average of
    the policy is no part of it.

    Args:
        weights: in the order of the module's parameters.
        memory: of each, the optimizer's state by name; empty before its first update.
    """

    weights: list[Tensor]
    memory: list[dict[str, Any]]

    @property
    def bytes(self) -> int:
        """Of this rank's."""
        held = [t for memory in self.memory for t in memory.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in (*self.weights, *held))


def _apart(value: Any) -> Any:
    """This rank's part of a tensor on the CPU; a number stays where it is."""
    if not isinstance(value, Tensor):
        return value
    return local(value).to("cpu", copy=True) if value.dim() else value.clone()


def _beside(value: Any, p: Tensor) -> Any:
    """The inverse, laid out as a parameter is."""
    if not isinstance(value, Tensor):
        return value
    if not value.dim():
        return value.clone()
    shard = value.to(local(p).device, copy=True)
    if not isinstance(p, DTensor):
        return shard
    mesh, placements = p.device_mesh, p.placements
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=p.shape, stride=p.stride()
    )


class Engine(abc.ABC):
    """Training of one model: parameters, optimizer, teacher, checkpoints, export.

    A step is, for every micro-batch, ``with engine.context(): engine.backward(loss, last=...)``,
    then ``clip_gradients`` and either ``update`` or ``discard``. All ranks call the same methods in
    the same order. The methods here are those of a single rank.

    Args:
        optimizer_state: what a checkpoint holds of ``optimizer``.
        state: saved and restored with the model (step, place in the data).

    Attributes:
        policy: the model in training.
        teacher: the model that reads the hindsight prompt; None: the policy itself.
        device: where micro-batches belong.
        ranks: this process among the run's.
        row_multiple: widths of packed rows must be multiples of it.
        sharing: what rows share of their sequences' prefixes.
        checkpoints: the run's checkpoints.
    """

    device: torch.device
    ranks = Ranks()
    row_multiple = ROW_MULTIPLE

    def __init__(
        self,
        config: EngineConfig,
        policy: ModuleModel,
        teacher: TeacherState,
        optimizer: torch.optim.Optimizer,
        optimizer_state: Stateful,
        state: Stateful,
    ):
        self.config, self.policy, self.module = config, policy, policy.module
        self.teacher_state, self.teacher = teacher, teacher.model
        self.optimizer = optimizer
        self.sharing: Sharing = self._sharing()
        parts = {"model": self.checkpointed(policy, config), "optimizer": optimizer_state}
        parts |= {"teacher": teacher, "run": state}
        self.checkpoints = Checkpoints(config.run_folder, config.checkpoint, parts)

    def _sharing(self) -> Sharing:
        """With a live teacher hindsight reads on the policy's keys; another's keys differ."""
        if not self.config.share_prefix:
            return "none"
        readers = [m for m in (self.policy, self.teacher) if m is not None]
        if all(reader.reads_tries for reader in readers):
            return "keys" if self.teacher is None else "tries"
        if self.ranks.is_main:
            print(f"sdpo: prefixes are not shared: {self._why_not()}", file=sys.stderr)
        return "none"

    def _why_not(self) -> str:
        """Why prefixes cannot be shared."""
        return "this model cannot read them"

    @staticmethod
    @abc.abstractmethod
    def build_policy(config: EngineConfig) -> ModuleModel:
        """The model to train; ``load`` completes its weights."""

    @staticmethod
    @abc.abstractmethod
    def build_inference(config: "InferenceConfig") -> "Inference":
        """See `sdpo_parallel.build.build_inference`."""

    @staticmethod
    @abc.abstractmethod
    def export_policy(
        policy: Any, config: EngineConfig, folder: str, *, adapters: bool = False
    ) -> None:
        """See ``export``."""

    @staticmethod
    def checkpointed(policy: Any, config: EngineConfig, *, alone: bool = False) -> Stateful:
        """What a checkpoint holds of the policy.

        Args:
            alone: nothing else has put weights in place: what a checkpoint does not hold is to be.
        """
        return policy.module

    @classmethod
    def export_checkpoint(
        cls, config: EngineConfig, step: int | None, folder: str, *, adapters: bool = False
    ) -> None:
        """See `sdpo_parallel.build.export_checkpoint`."""
        policy = cls.build_policy(config)
        parts = {"model": cls.checkpointed(policy, config, alone=True)}
        checkpoints = Checkpoints(config.run_folder, config.checkpoint, parts)
        checkpoints.load(checkpoints.undamaged(step))
        cls.export_policy(policy, config, folder, adapters=adapters)

    def export(
        self, folder: str, *, adapters: bool = False, dtype: ExportDtype | None = None
    ) -> None:
        """Write a Hugging Face folder that transformers loads: weights (adapters merged), configs,
        tokenizer; or, with ``adapters``, a PEFT folder of the adapters alone.

        Args:
            dtype: of the weights, rounded to the nearest as the passes round them; None: as
                ``checkpoint`` says.
        """
        checkpoint = self.config.checkpoint
        if dtype is not None:
            checkpoint = replace(checkpoint, export_dtype=dtype, export_rounding="nearest")
        config = replace(self.config, checkpoint=checkpoint)
        self.export_policy(self.policy, config, folder, adapters=adapters)

    @abc.abstractmethod
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights one after the other, whole, under Hugging Face's names and with
        adapters merged. All ranks must take all of them."""

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    @torch.no_grad()
    def seat(self) -> Seat:
        """A copy of what is trained as it is now, and of the optimizer's memory of it."""
        self.release()
        trained = self._trained()
        memory = [
            {name: _apart(value) for name, value in self.optimizer.state.get(p, {}).items()}
            for p in trained
        ]
        return Seat([_apart(p) for p in trained], memory)

    @torch.no_grad()
    def take(self, seat: Seat) -> None:
        """Train on from there, with a copy of it."""
        self.release()
        self.discard()
        self.optimizer.state.clear()
        for p, weight, memory in zip(self._trained(), seat.weights, seat.memory, strict=True):
            local(p).copy_(weight)
            if memory:
                kept = {name: _beside(value, p) for name, value in memory.items()}
                self.optimizer.state[p] = kept

    def turn_to(self, run_folder: str, total_steps: int, state: Stateful) -> None:
        """Keep another run's checkpoints from here on, and go by its schedule.

        Args:
            run_folder, total_steps: as `EngineConfig` has them.
            state: of that run, in the place of the one that the engine was built with.
        """
        self.checkpoints.finish()
        self.config = replace(self.config, run_folder=run_folder, total_steps=total_steps)
        self.checkpoints.turn_to(run_folder, state)

    def restart_optimizer(self) -> None:
        """Forget what the optimizer has gathered of past gradients."""
        self.optimizer.state.clear()

    def context(self) -> contextlib.AbstractContextManager[object]:
        """What both passes and their backward run in."""
        return contextlib.nullcontext()

    def load(self) -> None:
        """Put the starting weights in place, the teacher's too."""
        self.teacher_state.start()

    def resume(self) -> None:
        """Go on from the newest undamaged checkpoint, where there is one."""
        step = self.checkpoints.newest()
        if step is not None:
            self.checkpoints.load(step)
            check_finite(self.module, f"{self.checkpoints.folder}/step-{step}")

    def save(self, step: int, manifest: Mapping[str, Any], *, wait: bool = False) -> None:
        """Write a checkpoint, in the background where possible unless ``wait``."""
        self.checkpoints.save(step, manifest, wait=wait)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a micro-batch; ``last``: it is the step's last."""
        loss.backward()

    def clip_gradients(self) -> float:
        """Clip the gradients' norm, over all ranks; returns the norm before clipping."""
        limit = self.config.optimizer.max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit))

    def update(self, step: int) -> float:
        """Update weights and teacher with the gradients of step ``step`` (from 0), and drop them;
        returns the learning rate used."""
        lr = self.config.optimizer.lr_at(step, self.config.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard()
        self.teacher_state.update()
        return lr

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def release(self) -> None:
        """Free the weights that passes without a backward left gathered."""
        reshard(self.module)

    def check_agreement(self, what: str, value: str) -> None:
        """Refuse to train where ranks were started with different things.

        Raises:
            SdpoError: ``value`` is not the same on all ranks; the first that differs is named.
        """
        refuse_disagreement(what, self.checkpoints.gather(value))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, any that can be pickled, in their order, on every rank."""
        return [value]

    def on_main(self, make: Callable[[], T]) -> T:
        """What the main rank makes, or its `SdpoError`, on all ranks."""
        made: Any = None
        if self.ranks.is_main:
            try:
                made = make()
            except SdpoError as error:
                made = error
        made = self.gather(made)[0]
        if isinstance(made, SdpoError):
            raise made
        return made

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over ranks with tokens of their own: tensor ranks count once."""
        return x

    def close(self) -> None:
        """Finish what runs in the background and leave the process group."""
        self.checkpoints.finish()
