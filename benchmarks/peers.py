"""Everybody who computes these losses, each behind one adapter: ``Problem`` -> the mean loss.

A contender that cannot run here says why, by name; see ``Contender.missing``. The floor is no
contender: it is the matmuls that none can do without.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import DEFINITIONS, Kind, Problem
from sdpo_kernels import linear_forward_kl, linear_jsd, linear_logprob, linear_reverse_kl

Loss = Callable[[Problem], Tensor]
DIVERGENCES: tuple[Kind, ...] = ("reverse_kl", "forward_kl", "jsd")
BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
"""As Liger, TRL and verl number the divergences; jsd is GKD's at beta = 0.5."""
OURS = "sdpo"
"""How the names of our own paths begin."""
OUR_FUNCTIONS = {
    "reverse_kl": linear_reverse_kl,
    "forward_kl": linear_forward_kl,
    "jsd": linear_jsd,
}
PACKAGES = {"fla": "flash-linear-attention", "quack": "quack-kernels"}
"""Packages whose module has another name."""


def lacking(module: str | None) -> str | None:
    """Name for pip of the package that a module is missing from; None: it is there."""
    if module is None or find_spec(module) is not None:
        return None
    return PACKAGES.get(module, module.replace("_", "-"))


@dataclass(frozen=True)
class Contender:
    """One implementation of some of the losses."""

    name: str
    kinds: tuple[Kind, ...]
    make: Callable[[Kind], Loss]
    """The adapter: given a kind, a function of a problem. It imports what it needs."""
    package: str | None = None
    """Module that must be importable."""
    gpu: bool = False
    """The contender has no CPU path."""

    def missing(self, kind: Kind, device: torch.device) -> str | None:
        """Why it cannot compute ``kind`` on ``device``; None: it can."""
        if kind not in self.kinds:
            return f"has no {kind}"
        if self.gpu and device.type != "cuda":
            return "needs a GPU"
        absent = lacking(self.package)
        return absent and f"is not installed: pip install {absent}"


def ours(kind: Kind, impl: str = "auto", known: bool = True) -> Loss:
    """The mean by our kernels. ``known``: token weights are given up front, as in training; if not,
    an upstream gradient."""

    def loss(x: Problem) -> Tensor:
        options = dict(token_weights=x.token_weights() if known else None, impl=impl)
        if kind == "logprob":
            out = linear_logprob(x.hidden, x.weight, x.targets, **options)
            return -(out.logp.mean() if out.loss is None else out.loss)
        out = OUR_FUNCTIONS[kind](x.hidden, x.weight, x.teacher, **options)
        return out.value.mean() if out.loss is None else out.loss

    return loss


def _plain(kind: Kind, *, upcast: bool) -> Loss:
    """Full logits and autograd. ``upcast``: the operands are cast to float32, not the logits."""

    def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden.float() @ weight.float().T if upcast else (hidden @ weight.T).float()
        return logits.log_softmax(-1)

    def loss(x: Problem) -> Tensor:
        logp = log_softmax(x.hidden, x.weight)
        if kind == "logprob":
            return F.nll_loss(logp, x.targets)
        with torch.no_grad():
            logq = log_softmax(x.teacher, x.weight)
        if kind == "jsd":
            return DEFINITIONS[kind](logp, logq, x.targets).mean()
        p, q = (logp, logq) if kind == "reverse_kl" else (logq, logp)
        return (p.exp() * (p - q)).sum(-1).mean()

    return loss


def _compiled(kind: Kind) -> Loss:
    return torch.compile(_plain(kind, upcast=False), dynamic=False)


def _liger_fused(kind: Kind) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=BETA[kind])
    return lambda x: module(x.hidden, x.weight, x.teacher, x.weight.detach(), None)


def _liger_chunked(kind: Kind) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # without a compiler it is the same computation, operator by operator
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETA[kind],
        compiled=torch.cuda.is_available(),
    )
    return lambda x: module(x.hidden, x.weight, x.teacher, x.weight.detach(), x.targets)


def _liger_cross_entropy(_: Kind) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda x: module(x.weight, x.hidden, x.targets)


def _fla(_: Kind) -> Loss:
    function = importlib.import_module("fla.modules.fused_kl_div").fused_kl_div_loss
    return lambda x: function(x.hidden, x.teacher, x.weight, x.weight.detach())


def _trl(kind: Kind) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x: Problem) -> Tensor:
        heads = x.hidden, x.weight, None, x.teacher, x.weight.detach(), None
        value, _ = ChunkedDivergenceFunction.apply(*heads, BETA[kind])
        return value.mean()

    return loss


def _trl_logprob(_: Kind) -> Loss:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss(x: Problem) -> Tensor:
        heads = x.hidden, x.weight, None, x.targets
        logp, *_ = ChunkedLogProbFunction.apply(*heads, 1.0, 32_768, None, 1.0, ("entropy",))
        return -logp.mean()

    return loss


def _cce(_: Kind) -> Loss:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda x: function(x.hidden, x.weight, x.targets)


def _quack(_: Kind) -> Loss:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda x: function(x.hidden, x.weight, x.targets)


def _torch_chunked(_: Kind) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x: F.linear_cross_entropy(x.hidden, x.weight, x.targets, options=options)


ALL: tuple[Kind, ...] = (*DIVERGENCES, "logprob")
CONTENDERS = (
    Contender(OURS, ALL, ours),
    Contender("sdpo, any upstream", ALL, partial(ours, known=False)),
    Contender("sdpo torch", ALL, partial(ours, impl="torch")),
    Contender("sdpo triton", ALL, partial(ours, impl="triton"), "triton", gpu=True),
    Contender("sdpo fused", ("logprob",), partial(ours, impl="fused"), "triton", gpu=True),
    Contender("torch", ALL, partial(_plain, upcast=False)),
    Contender("torch, float32 operands", ALL, partial(_plain, upcast=True)),
    Contender("torch.compile", ALL, _compiled),
    Contender("Liger fused JSD", DIVERGENCES, _liger_fused, "liger_kernel", gpu=True),
    Contender("Liger chunked JSD", DIVERGENCES, _liger_chunked, "liger_kernel"),
    Contender("Liger cross-entropy", ("logprob",), _liger_cross_entropy, "liger_kernel", gpu=True),
    Contender("fla fused KL", ("forward_kl",), _fla, "fla", gpu=True),
    Contender("TRL chunked divergence", DIVERGENCES, _trl, "trl"),
    Contender("TRL chunked logprob", ("logprob",), _trl_logprob, "trl"),
    Contender("Apple CCE", ("logprob",), _cce, "cut_cross_entropy", gpu=True),
    Contender("QuACK", ("logprob",), _quack, "quack", gpu=True),
    Contender("torch linear_cross_entropy", ("logprob",), _torch_chunked),
)


def chosen(only: tuple[str, ...], kind: Kind) -> list[Contender]:
    """Those that compute ``kind``, or another divergence where that is one, and are asked for: by
    their name, or by a part of several names. Nothing asked for: all."""
    relatives = {kind} if kind == "logprob" else set(DIVERGENCES)
    names = [c.name for c in CONTENDERS]

    def asked(c: Contender) -> bool:
        return not only or any(c.name == o if o in names else o in c.name for o in only)

    return [c for c in CONTENDERS if relatives & set(c.kinds) and asked(c)]


def floor(kind: Kind, x: Problem) -> Callable[[], None]:
    """The bare matmuls in the inputs' dtype: both logits (log p(y): one), dH and dW; their outputs
    are there before."""
    h, w, g = x.hidden.detach(), x.weight.detach(), x.teacher
    z_NV = h.new_empty((h.shape[0], w.shape[0]))
    dh_ND, dw_VD = torch.empty_like(h), torch.empty_like(w)

    def matmuls() -> None:
        if kind != "logprob":
            torch.mm(g, w.T, out=z_NV)
        torch.mm(h, w.T, out=z_NV)
        torch.mm(z_NV, w, out=dh_ND)
        torch.mm(z_NV.T, h, out=dw_VD)

    return matmuls
