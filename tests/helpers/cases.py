"""Every public function as one call, its inputs, and its oracle: full logits in float64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from helpers import interpreter
from helpers.oracle import assert_as_good_as
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
        streams = [t.to(dtype) for t in self[:3]]
        wide = torch.promote_types(dtype, torch.float32)
        return Problem(*streams, self.targets, self.upstream.to(wide), self.old_logp.to(wide))

    def rows(self, index: Tensor) -> "Problem":
        """These tokens alone."""
        return Problem(*(t if t is self.weight else t[index] for t in self))


def problem(n: int, v: int, d: int, distance: float, dtype=torch.float32) -> Problem:
    """Logits of std 3; teacher = student + noise of ``distance`` in the logits."""
    weight = torch.randn(v, d) * 3 / d**0.5
    hidden = torch.randn(n, d)
    teacher = hidden + torch.randn(n, d) * distance / 3
    targets = torch.randint(v, (n,))
    old_logp = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    upstream, old_logp = torch.rand(n) + 0.5, old_logp + 0.3 * torch.randn(n)
    return Problem(hidden, weight, teacher, targets, upstream, old_logp).to(dtype)


def _pair(function: Callable, old_logp: bool = False, **own) -> Callable:
    def call(p: Problem, w: Tensor | None, **options):
        streams = (p.hidden, p.weight, p.teacher)
        given = dict(old_logp=p.old_logp) if old_logp else {}
        return function(*streams, targets=p.targets, token_weights=w, **given, **own | options)

    return call


def _centred(p: Problem, w: Tensor | None, **options):
    at = torch.arange(len(p.targets), device=p.targets.device)
    return _pair(linear_sampled_token, centre=at // 4, counted=at % 4 > 0)(p, w, **options)


FUNCTIONS: dict[str, Callable] = {
    "logprob": lambda p, w, **options: linear_logprob(
        p.hidden, p.weight, p.targets, token_weights=w, **options
    ),
    "reverse_kl": _pair(linear_reverse_kl),
    "forward_kl": _pair(linear_forward_kl),
    "jsd": _pair(linear_jsd),
    "jsd_0.9": _pair(linear_jsd, beta=0.9),
    "sampled_token": _pair(linear_sampled_token),
    "sampled_token, PPO clip": _pair(linear_sampled_token, old_logp=True, ppo_clip=0.2),
    "sampled_token, importance clip": _pair(
        linear_sampled_token, old_logp=True, importance_clip=1.1
    ),
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
    at = p._replace(hidden=leaves["hidden"], weight=leaves["weight"])
    out = FUNCTIONS[name](at, p.upstream if known else None, bias=leaves.get("bias"), **options)
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


def loss_of(name: str, p: Problem, *, known: bool, **options) -> Tensor:
    """sum upstream * value."""
    out = FUNCTIONS[name](p, p.upstream if known else None, **options)
    return out.loss if known else (out[0] * p.upstream).sum()


def oracle(name: str, p: Problem, dtype: torch.dtype = torch.float64, **options):
    """The definition on the very same inputs, in ``dtype``."""
    options = {**options, "impl": "reference"}
    return evaluate(name, p.to(dtype), known=False, **options)


def assert_matches_the_oracle(
    name: str, p: Problem, *results: dict[str, Tensor], k: float = 2.0, mutants=None, **options
) -> None:
    """Each result of ``evaluate``, or what is left of it, against the definition."""
    truth, baseline = oracle(name, p, **options), oracle(name, p, torch.float32, **options)
    for got in results:
        for what, ours in got.items():
            wrong = (mutants or {}).get(what, ())
            assert_as_good_as(ours, truth[what], baseline[what], k=k, mutants=wrong)


def statistics(name: str, p: Problem, **options) -> dict[str, Tensor]:
    """Everything that a call returns besides its value and loss, by name."""
    with torch.no_grad():
        out = FUNCTIONS[name](p, None, **options)
    if name == "logprob":
        return {"entropy": out.entropy, "lse": out.lse}
    return out.stats._asdict()


def assert_statistics_match_the_oracle(
    name: str, p: Problem, *, impl: str, chunk_bytes: int | None = None, k: float = 2.0, **options
) -> None:
    truth, baseline = (
        statistics(name, p.to(dtype), impl="reference", **options)
        for dtype in (torch.float64, torch.float32)
    )
    for what, ours in statistics(name, p, impl=impl, chunk_bytes=chunk_bytes, **options).items():
        assert not ours.requires_grad
        assert_as_good_as(ours, truth[what], baseline[what], k=k)
