"""Every public function as one call, its inputs, and its oracle: full logits in float64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from helpers import interpreter
from sdpo_kernels import (
    linear_forward_kl,
    linear_jsd,
    linear_logprob,
    linear_reverse_kl,
    linear_sampled_token,
    linear_topk_divergence,
)

interpreter.mend()


class Problem(NamedTuple):
    """Inputs of every function."""

    hidden: Tensor
    weight: Tensor
    teacher: Tensor
    targets: Tensor
    upstream: Tensor
    """(N,): token weights, or upstream gradients, of the values."""
    old_logp: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        hidden, weight, teacher = (t.to(dtype) for t in self[:3])
        wide = torch.promote_types(dtype, torch.float32)
        return Problem(
            hidden, weight, teacher, self.targets, self.upstream.to(wide), self.old_logp.to(wide)
        )


def problem(n: int, v: int, d: int, distance: float, dtype=torch.float32) -> Problem:
    """Logits of std 3; teacher = student + noise of ``distance`` in the logits."""
    weight = torch.randn(v, d) * 3 / d**0.5
    hidden = torch.randn(n, d)
    teacher = hidden + torch.randn(n, d) * distance / 3
    targets = torch.randint(v, (n,))
    old_logp = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    return Problem(
        hidden, weight, teacher, targets, torch.rand(n) + 0.5, old_logp + 0.3 * torch.randn(n)
    ).to(dtype)


def _pair(function: Callable, **own) -> Callable:
    return lambda p, w, **options: function(
        p.hidden, p.weight, p.teacher, targets=p.targets, token_weights=w, **own, **options
    )


def _clipped(**own) -> Callable:
    return lambda p, w, **options: linear_sampled_token(
        p.hidden,
        p.weight,
        p.teacher,
        targets=p.targets,
        old_logp=p.old_logp,
        token_weights=w,
        **own,
        **options,
    )


def _centred(p: Problem, w: Tensor | None, **options):
    sequence = torch.arange(len(p.targets), device=p.targets.device) // 4
    counted = torch.arange(len(p.targets), device=p.targets.device) % 4 > 0
    return linear_sampled_token(
        p.hidden,
        p.weight,
        p.teacher,
        targets=p.targets,
        centre=sequence,
        counted=counted,
        token_weights=w,
        **options,
    )


FUNCTIONS: dict[str, Callable] = {
    "logprob": lambda p, w, **options: linear_logprob(
        p.hidden, p.weight, p.targets, token_weights=w, **options
    ),
    "reverse_kl": _pair(linear_reverse_kl),
    "forward_kl": _pair(linear_forward_kl),
    "jsd": _pair(linear_jsd),
    "jsd_0.9": _pair(linear_jsd, beta=0.9),
    "sampled_token": _pair(linear_sampled_token),
    "sampled_token, PPO clip": _clipped(ppo_clip=0.2),
    "sampled_token, importance clip": _clipped(importance_clip=1.1),
    "sampled_token, centred": _centred,
    "topk": _pair(linear_topk_divergence, k=5),
    "topk, teacher's, jsd": _pair(
        linear_topk_divergence, k=5, support="teacher", divergence="jsd", beta=0.3
    ),
    "topk, forward_kl": _pair(linear_topk_divergence, k=5, divergence="forward_kl"),
}
"""(problem, token weights or None, **options) -> a named tuple that begins with the value (N,)."""


def evaluate(
    name: str, p: Problem, *, known: bool, bias: Tensor | None = None, **options
) -> dict[str, Tensor]:
    """The value and all gradients of sum upstream * value, the weights known up front or not."""
    leaves = {"hidden": p.hidden, "weight": p.weight}
    if bias is not None:
        leaves["bias"] = bias.to(p.hidden.dtype)
    leaves = {k: t.detach().clone().requires_grad_() for k, t in leaves.items()}
    if bias is not None:
        options["bias"] = leaves["bias"]
    at = p._replace(hidden=leaves["hidden"], weight=leaves["weight"])
    out = FUNCTIONS[name](at, p.upstream if known else None, **options)
    if known:
        assert not out[0].requires_grad
        out.loss.backward()
    else:
        assert out.loss is None
        out[0].backward(p.upstream)
    got = {"value": out[0].detach()}
    for k, t in leaves.items():
        assert t.grad is not None and t.grad.dtype == t.dtype
        got[k] = t.grad
    return got


def oracle(name: str, p: Problem, dtype: torch.dtype = torch.float64, **options):
    """The definition on the very same inputs, in ``dtype``."""
    options = {**options, "impl": "reference"}
    return evaluate(name, p.to(dtype), known=False, **options)


def statistics(name: str, p: Problem, **options) -> dict[str, Tensor]:
    """Everything that a call returns besides its value and loss, by name."""
    with torch.no_grad():
        out = FUNCTIONS[name](p, None, **options)
    if name == "logprob":
        return {"entropy": out.entropy, "lse": out.lse}
    return out.stats._asdict()
