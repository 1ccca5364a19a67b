"""Inputs in the regime of training, the shapes of well-known heads, and the float64 truth.

Shapes: N response tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.models import QWEN3
from sdpo_kernels import reference

Kind = Literal["reverse_kl", "forward_kl", "jsd", "logprob"]
HEADS = {name: (c["vocab_size"], c["hidden_size"]) for name, c in QWEN3.items()} | {
    "llama-3.2-1b": (128_256, 2048),
    "llama-3-8b": (128_256, 4096),
    "gemma-3-1b": (262_144, 1152),
    "gemma-3-4b": (262_208, 2560),
    "gemma-3-27b": (262_208, 5376),
}
"""V and D, as the models' config.json have them."""
LOGIT_STD = 3.0
TRUTH_ELEMENTS = 2**28
"""float64 logits alive at once while the truth is computed."""


class Problem(NamedTuple):
    """One call's inputs; the loss is the mean over tokens."""

    hidden: Tensor
    """(N, D) the student's, requires a gradient."""
    weight: Tensor
    """(V, D), requires a gradient."""
    teacher: Tensor
    """(N, D) the teacher's."""
    targets: Tensor
    """(N,)"""

    @property
    def gradient_bytes(self) -> int:
        """Size of the gradients that a backward leaves behind."""
        return sum(t.numel() * t.element_size() for t in (self.hidden, self.weight))

    def token_weights(self) -> Tensor:
        """(N,) those of the mean."""
        n = self.hidden.shape[0]
        return torch.full((n,), 1 / n, device=self.hidden.device)

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None


class Truth(NamedTuple):
    """The mean over tokens, and its gradients; float64."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


def head(name: str) -> tuple[int, int]:
    """V and D of a model in ``HEADS``, or of ``VxD``.

    Raises:
        ValueError: it is neither.
    """
    if name in HEADS:
        return HEADS[name]
    v, x, d = name.partition("x")
    if not (x and v.isdigit() and d.isdigit()):
        raise ValueError(f"--heads: {name!r} is neither VxD nor one of {', '.join(HEADS)}")
    return int(v), int(d)


def problem(
    n: int, v: int, d: int, distance: float, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Logits of standard deviation 3, and a teacher's that are ``distance`` away: 0.1 is where
    training spends its time, as student and teacher are one model."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    weight = normal(v, d).mul_(LOGIT_STD / d**0.5).to(dtype)
    hidden = normal(n, d)
    teacher = (hidden + normal(n, d).mul_(distance / LOGIT_STD)).to(dtype)
    targets = torch.randint(v, (n,), device=device, generator=generator)
    return Problem(hidden.to(dtype).requires_grad_(), weight.requires_grad_(), teacher, targets)


DEFINITIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "reverse_kl": lambda logp, logq, _: reference.reverse_kl(logp, logq),
    "forward_kl": lambda logp, logq, _: reference.forward_kl(logp, logq),
    "jsd": lambda logp, logq, _: reference.jsd(logp, logq, 0.5),
    "logprob": lambda logp, _, targets: -reference.logprob(logp, targets),
}
"""(N,) from log p, log q (N, V) and targets (N,)."""


def truth(kind: Kind, x: Problem) -> Truth:
    """The loss of the inputs as they are, rounded already, by definition and in float64."""
    n, v = x.hidden.shape[0], x.weight.shape[0]
    weight = x.weight.detach().double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    rows = []
    for c in torch.arange(n, device=weight.device).split(max(1, TRUTH_ELEMENTS // v)):
        hidden = x.hidden.detach()[c].double().requires_grad_()
        logp = reference.log_softmax(hidden, weight)
        logq = logp.detach()
        if kind != "logprob":
            logq = reference.log_softmax(x.teacher[c].double(), weight.detach())
        part = DEFINITIONS[kind](logp, logq, x.targets[c]).sum() / n
        part.backward()
        loss += part.detach()
        assert hidden.grad is not None
        rows.append(hidden.grad)
    assert weight.grad is not None
    return Truth(loss, torch.cat(rows), weight.grad)
