"""Who reads the hindsight prompt: the policy as it is, its average, its beginning, or a mixture.

A teacher is a model of its own, or the policy, or the policy with its adapters off. It gets no
gradient, is not in the optimizer, and is in the checkpoint where it changes or cannot be had again.
It is sharded as the policy is, and an average is formed shard by shard: nothing is gathered for it.

TrustRegion needs no kernel of its own: (1 - m) u + m v, with logits u = W g and v = W' g', is the
one matmul [W W'] [(1 - m) g; m g'], the logits of an lm_head of twice the width.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .config import EMA, Frozen, Live, Teacher, TrustRegion
from .errors import SdpoError
from .model import CausalModel, LMHead, ModuleModel, local
from .rows import Kept, Rows


def reshard(module: torch.nn.Module) -> None:
    """Free every gathered parameter. A model that ran no backward still holds its root group
    gathered: it would serve stale weights, and its parameters would not be the sharded ones."""
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()


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


class AdaptersOff(CausalModel):
    """The policy without its adapters: the weights it started from, at no memory.

    Args:
        switch: a context in which the adapters add nothing.
    """

    def __init__(
        self,
        policy: CausalModel,
        switch: Callable[[], contextlib.AbstractContextManager[object]],
    ):
        self.policy, self.switch = policy, switch
        self.reads_tries = policy.reads_tries

    def hidden_states(
        self, rows: Rows, *, keep: Kept | None = None, behind: Kept | None = None
    ) -> Tensor:
        with self.switch():
            return self.policy.hidden_states(rows, keep=keep, behind=behind)

    def lm_head(self) -> LMHead:
        """The policy's: adapters sit on the layers only."""
        return self.policy.lm_head()

    def own_responses(self, lengths: Sequence[int]) -> list[int] | None:
        return self.policy.own_responses(lengths)


class Mixture(CausalModel):
    """log q = (1 - mix) log live + mix log frozen, renormalised."""

    def __init__(self, live: CausalModel, frozen: CausalModel, mix: float):
        self.live, self.frozen, self.mix = live, frozen, mix
        self.reads_tries = live.reads_tries and frozen.reads_tries

    def hidden_states(
        self, rows: Rows, *, keep: Kept | None = None, behind: Kept | None = None
    ) -> Tensor:
        """(N, 2 D). Keys of two models are not kept."""
        assert keep is None and behind is None
        g, h = self.live.hidden_states(rows), self.frozen.hidden_states(rows)
        return torch.cat([(1 - self.mix) * g, self.mix * h], dim=1)

    def lm_head(self) -> LMHead:
        """(V, 2 D), or a shard's rows of it.

        Raises:
            SdpoError: the logits have a softcap, which a mixture of products cannot pass.
        """
        live, frozen = self.live.lm_head(), self.frozen.lm_head()
        if live.softcap is not None:
            raise SdpoError(
                f"a trust-region teacher mixes logits, and this model's have a softcap "
                f"({live.softcap}): choose another teacher"
            )
        weight = torch.cat([live.weight.detach(), frozen.weight.detach()], dim=1)
        return live._replace(weight=weight)

    def own_responses(self, lengths: Sequence[int]) -> list[int] | None:
        return self.live.own_responses(lengths)


class TeacherState:
    """A run's teacher: the model that ``two_pass_loss`` takes, its update, its checkpoint state.

    Args:
        copy: builds a second model, weights not yet set; for ``Frozen(folder)``, of that folder.
        adapters_off: a context in which the policy's adapters add nothing; None: it has none.

    Attributes:
        model: reads the hindsight prompt; None: the policy does.
        copy: the second model, where the teacher is one.
    """

    def __init__(
        self,
        config: Teacher,
        policy: ModuleModel,
        copy: Callable[[], ModuleModel],
        adapters_off: Callable[[], contextlib.AbstractContextManager[object]] | None = None,
    ):
        self.config, self.policy = config, policy
        self.copy: ModuleModel | None = None
        self.model: CausalModel | None = None
        if isinstance(config, Live):
            return
        starts_as_policy = config == Frozen() or isinstance(config, TrustRegion)
        if adapters_off is not None and starts_as_policy:
            other = AdaptersOff(policy, adapters_off)
        else:
            other = self.copy = copy()
            self.copy.module.requires_grad_(False).eval()
        mixes = isinstance(config, TrustRegion)
        self.model = Mixture(policy, other, config.mix) if mixes else other

    def start(self) -> None:
        """Called with the policy's first weights in place, before any checkpoint is read."""
        outside = isinstance(self.config, Frozen) and self.config.folder
        if self.copy is not None and not outside:
            lerp(self.copy.module, self.policy.module, 1.0)

    def update(self) -> None:
        """Called after an optimizer step."""
        if isinstance(self.config, EMA):
            assert self.copy is not None
            lerp(self.copy.module, self.policy.module, 1 - self.config.decay)
        self.release()

    def release(self) -> None:
        """Free what the teacher's passes left gathered."""
        if self.copy is not None:
            reshard(self.copy.module)

    def state_dict(self) -> dict[str, object]:
        """For the checkpoint; empty where the teacher is the policy."""
        self.release()
        return {} if self.copy is None else self.copy.module.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Restore the teacher's weights from a checkpoint."""
        if self.copy is not None:
            self.copy.module.load_state_dict(state_dict)
