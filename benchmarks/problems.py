"""Inputs in the regime of training, the shapes of well-known heads, and the float64 truth.

Two problems: Gaussian logits, whose entropy of some 7 nats at real sizes no trained model has, and
peaked ones of 1.5 nats, where most of a row's gradient is in a few words, as in real conversations.

Shapes: N response tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.models import QWEN3
from sdpo_kernels import reference

Kind = Literal["reverse_kl", "forward_kl", "jsd", "logprob"]
Shape = Literal["gaussian", "peaked"]
"""How a token's distribution looks; see ``problem``."""
HEADS = {name: (c["vocab_size"], c["hidden_size"]) for name, c in QWEN3.items()} | {
    "llama-3.2-1b": (128_256, 2048),
    "llama-3-8b": (128_256, 4096),
    "gemma-3-1b": (262_144, 1152),
    "gemma-3-4b": (262_208, 2560),
    "gemma-3-27b": (262_208, 5376),
}
"""V and D, as the models' config.json have them."""
LOGIT_STD = 3.0
PEAKED_NATS = 1.5
"""Mean entropy of the peaked problem before its inputs are rounded; SmolLM2 has 1.7 nats on real
conversations (LOG.md)."""
SAMPLE = 256
"""Tokens whose entropy decides how high the peaks are."""
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
    n: int,
    v: int,
    d: int,
    distance: float,
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape = "gaussian",
) -> Problem:
    """Logits of standard deviation 3, and a teacher's that are ``distance`` away: 0.1 is where
    training spends its time, as student and teacher are one model.

    Peaked: besides, each hidden state is moved along its target's row of the lm_head, some tokens
    three times as far as others, all by as much as makes the mean entropy ``PEAKED_NATS``.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    weight = normal(v, d).mul_(LOGIT_STD / d**0.5)
    hidden, noise = normal(n, d), normal(n, d).mul_(distance / LOGIT_STD)
    targets = torch.randint(v, (n,), device=device, generator=generator)
    if shape == "peaked":
        share = 0.5 + torch.rand((n, 1), device=device, generator=generator)
        toward = share * weight[targets] / weight[targets].square().sum(-1, keepdim=True)
        hidden += _height(hidden[:SAMPLE], toward[:SAMPLE], weight) * toward
    weight = weight.to(dtype).requires_grad_()
    teacher = (hidden + noise).to(dtype)
    return Problem(hidden.to(dtype).requires_grad_(), weight, teacher, targets)


def _height(hidden: Tensor, toward: Tensor, weight: Tensor) -> float:
    """How far to go for a mean entropy of ``PEAKED_NATS``, in nats of a target's logit; by
    bisection, as entropy falls on the way. 0 where it is no higher to begin with."""
    start, slope = hidden @ weight.T, toward @ weight.T
    low, high = 0.0, 64.0
    for _ in range(20):
        middle = (low + high) / 2
        nats = reference.entropy((start + middle * slope).log_softmax(-1)).mean()
        low, high = (middle, high) if nats > PEAKED_NATS else (low, middle)
    return low


def entropy(x: Problem) -> float:
    """Mean over tokens of the student's entropy in nats, of the inputs as they are."""
    rows = x.hidden.detach().split(max(1, TRUTH_ELEMENTS // len(x.weight)))
    weight = x.weight.detach().float()
    nats = [reference.entropy(reference.log_softmax(h.float(), weight)) for h in rows]
    return float(torch.cat(nats).mean())


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
