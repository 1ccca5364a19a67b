"""How far the policy has moved from its first weights, on a few fixed interactions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdpo_kernels import linear_reverse_kl
from sdpo_parallel.engine import Engine

from ..batching import Batch
from ..step import own_share


class DriftMonitor:
    """KL(policy || first policy) and the policy's entropy, exact.

    The first policy is kept as its hidden states at the responses and its lm_head, in host memory:
    logits are formed again when the two are compared.

    Args:
        batches: this rank's micro-batches of the fixed interactions; as many on all ranks.
    """

    def __init__(self, engine: Engine, batches: Sequence[Batch]):
        self.engine, self.batches = engine, batches
        with torch.no_grad(), engine.context():
            self.first = [self._read(b)[1].cpu() for b in batches]
            # a copy, as on a CPU it would follow the policy
            self.head = engine.policy.lm_head().weight.detach().to("cpu", copy=True)
        engine.release()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """``drift/kl`` and ``drift/entropy``: means over the response tokens, in nats."""
        device = self.engine.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        head = self.head.to(device)
        with self.engine.context():
            for batch, first in zip(self.batches, self.first, strict=True):
                own, hidden_ND = self._read(batch)
                now = self.engine.policy.lm_head()
                kl = linear_reverse_kl(
                    hidden_ND,
                    now.weight,
                    first.to(device),
                    head,
                    targets=own.targets_N,
                    **now.options,
                )
                sums[0] += kl.value.double().sum()
                sums[1] += kl.stats.entropy_student.double().sum()
                sums[2] += own.targets_N.numel()
        self.engine.release()
        kl, entropy, tokens = self.engine.sum_over_ranks(sums).tolist()
        return {"drift/kl": kl / max(tokens, 1), "drift/entropy": entropy / max(tokens, 1)}

    def _read(self, batch: Batch) -> tuple[Batch, Tensor]:
        batch = batch.to(self.engine.device)
        policy = self.engine.policy
        hidden_ND = policy.hidden_states(batch.policy)
        if (kept := own_share(policy, batch)) is None:
            return batch, hidden_ND
        batch, kept_N = kept
        return batch, hidden_ND[kept_N]


def drift_places(n: int, count: int) -> list[int]:
    """Indices of the ``count`` interactions, evenly spread over ``n``, on which drift is
    measured."""
    count = min(count, n)
    return [i * n // count for i in range(count)]
