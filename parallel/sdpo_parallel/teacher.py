"""Who reads the hindsight prompt: the policy as it is, its average, its beginning, a mixture.

A teacher is a model of its own (or the policy, or the policy with its adapters off): no gradient,
not in the optimizer, in the checkpoint where it changes or cannot be had again. It is sharded as
the policy is, and an average is formed shard by shard: nothing is gathered for it.

TrustRegion needs no kernel of its own: (1 - m) u + m v, u = W g and v = W' g', is one product
[W W'] [(1 - m) g; m g'], the logits of a head of twice the width.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .config import EMA, Frozen, Live, Teacher, TrustRegion
from .torchtitan.lm_head import LMHead


def reshard(module: torch.nn.Module) -> None:
    """Free every gathered parameter. A model that ran no backward still holds its root group
    gathered: it would serve stale weights, and its parameters would not be the sharded ones."""
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()


def local(p: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p


@torch.no_grad()
def lerp(teacher: torch.nn.Module, policy: torch.nn.Module, weight: float) -> None:
    """teacher += weight (policy - teacher), on each rank's shards alone."""
    reshard(teacher)
    reshard(policy)
    theirs = [local(p) for p in teacher.parameters()]
    ours = [local(p) for p in policy.parameters()]
    assert [t.shape for t in theirs] == [p.shape for p in ours]
    if theirs[0].dtype != ours[0].dtype:
        ours = [p.to(t.dtype) for p, t in zip(ours, theirs, strict=True)]
    torch._foreach_lerp_(theirs, ours, weight)  # pyright: ignore[reportPrivateImportUsage]


class AdaptersOff:
    """The policy without its adapters: the weights it started from, at no memory.

    Args:
        switch: a context in which the adapters add nothing.
    """

    def __init__(self, policy: Any, switch: Callable[[], contextlib.AbstractContextManager]):
        self.policy, self.switch = policy, switch

    def hidden_states(self, tokens_BT: Tensor, positions_BT: Tensor, index_N: Tensor) -> Tensor:
        """As the model's own."""
        with self.switch():
            return self.policy.hidden_states(tokens_BT, positions_BT, index_N)

    def lm_head(self) -> LMHead:
        """The policy's: adapters sit on the layers only."""
        return self.policy.lm_head()


class Mixture:
    """log q = (1 - mix) log live + mix log frozen, renormalised."""

    def __init__(self, live: Any, frozen: Any, mix: float):
        self.live, self.frozen, self.mix = live, frozen, mix

    def hidden_states(self, tokens_BT: Tensor, positions_BT: Tensor, index_N: Tensor) -> Tensor:
        """(N, 2 D)."""
        g = self.live.hidden_states(tokens_BT, positions_BT, index_N)
        h = self.frozen.hidden_states(tokens_BT, positions_BT, index_N)
        return torch.cat([(1 - self.mix) * g, self.mix * h], dim=1)

    def lm_head(self) -> LMHead:
        """(V, 2 D), or a shard's rows of it."""
        live, frozen = self.live.lm_head(), self.frozen.lm_head()
        weight = torch.cat([live.weight.detach(), frozen.weight.detach()], dim=1)
        return LMHead(weight, live.shard)


class Teaching:
    """A run's teacher: the model that ``two_pass_loss`` takes, its update, its state.

    Args:
        config: which.
        policy: a model of the two passes.
        module: its torch module.
        copy: builds a second model and its module, weights not yet set; for Frozen(folder), of
            that folder.
        adapters_off: as of ``AdaptersOff``; None: the policy has no adapters.
    """

    def __init__(
        self,
        config: Teacher,
        policy: Any,
        module: torch.nn.Module,
        copy: Callable[[], tuple[Any, torch.nn.Module]],
        adapters_off: Callable[[], contextlib.AbstractContextManager] | None = None,
    ):
        self.config, self.policy_module = config, module
        self.module: torch.nn.Module | None = None
        other = None
        from_the_start = config == Frozen() or isinstance(config, TrustRegion)
        if adapters_off is not None and from_the_start:
            other = AdaptersOff(policy, adapters_off)
        elif not isinstance(config, Live):
            other, self.module = copy()
            self.module.requires_grad_(False).eval()
        self.model: Any = other
        if isinstance(config, TrustRegion):
            self.model = Mixture(policy, other, config.mix)

    def start(self) -> None:
        """Called with the policy's first weights in place, before any checkpoint is read."""
        outside = isinstance(self.config, Frozen) and self.config.folder is not None
        if self.module is not None and not outside:
            lerp(self.module, self.policy_module, 1.0)

    def update(self) -> None:
        """After an optimizer step."""
        if isinstance(self.config, EMA):
            assert self.module is not None
            lerp(self.module, self.policy_module, 1 - self.config.decay)
        self.release()

    def release(self) -> None:
        """Free what its passes left gathered."""
        if self.module is not None:
            reshard(self.module)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: empty where the teacher is the policy."""
        self.release()
        return {} if self.module is None else self.module.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        if self.module is not None:
            self.module.load_state_dict(state_dict)
