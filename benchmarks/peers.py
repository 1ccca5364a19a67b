"""Everybody who computes these losses, each behind one adapter: ``Problem`` -> the mean loss.

A contender that cannot run here says why, by name; see ``Contender.missing``. The floors are no
contenders: they are the matmuls that none can do without.
"""

import contextlib
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
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
LIGER_SM90 = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
NEMO = "nemo_rl.distributed"
NEMO_CHUNK = 1024
"""Tokens of NeMo-RL's chunks of float32 log-probabilities."""
PACKAGES = {
    "fla": "flash-linear-attention",
    "quack": "quack-kernels",
    "cutlass": "nvidia-cutlass-dsl[cu13]",
    NEMO: "git+https://github.com/NVIDIA-NeMo/RL",  # PyPI's nemo-rl is an empty package
}
"""Packages whose module has another name."""


def lacking(module: str) -> str | None:
    """Name for pip of the package that a module is missing from; None: it is there."""
    with contextlib.suppress(ModuleNotFoundError):  # its parent is not there
        if find_spec(module) is not None:
            return None
    return PACKAGES.get(module, module.replace("_", "-"))


@dataclass(frozen=True)
class Contender:
    """One implementation of some of the losses."""

    name: str
    kinds: tuple[Kind, ...]
    make: Callable[[Kind], Loss]
    """The adapter: given a kind, a function of a problem. It imports what it needs."""
    packages: tuple[str, ...] = ()
    """Modules that must be importable."""
    gpu: bool = False
    """The contender has no CPU path."""
    hopper: bool = False
    """It has kernels for compute capability 9.0 alone."""

    def missing(self, kind: Kind, device: torch.device) -> str | None:
        """Why it cannot compute ``kind`` on ``device``; None: it can."""
        if kind not in self.kinds:
            return f"has no {kind}"
        if self.gpu and device.type != "cuda":
            return "needs a GPU"
        if self.hopper and torch.cuda.get_device_capability(device) != (9, 0):
            return "needs a GPU of compute capability 9.0"
        absent = " ".join(filter(None, map(lacking, self.packages)))
        return f"is not installed: pip install {absent}" if absent else None


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


def _liger_kl(_: Kind) -> Loss:
    """Takes the teacher's probabilities, which are computed here as its users would."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    module = LigerFusedLinearKLDivLoss(accum_dtype=torch.float32)

    def loss(x: Problem) -> Tensor:
        with torch.no_grad():
            q_NV = (x.teacher @ x.weight.T).float().softmax(-1)
        return module(x.hidden, x.weight, q_NV)

    return loss


def _liger_cross_entropy(_: Kind) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda x: module(x.weight, x.hidden, x.targets)


def _liger_scaled(_: Kind) -> Loss:
    """-log p(y) per token; on Hopper by CuTe DSL."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    return lambda x: function.apply(x.hidden, x.weight, x.targets).mean()


def _liger_sm90(_: Kind) -> Loss:
    """Its forward keeps the logits' gradient, as ours does. N and V by multiples of 128 and 256."""
    module = importlib.import_module(LIGER_SM90)
    function = module.LigerFusedLinearCrossEntropySM90Function
    return lambda x: function.apply(x.hidden, x.weight, x.targets)


def _nemo(_: Kind) -> Loss:
    """Takes both logits, which are computed here as its trainers would; on one tensor rank."""
    module = importlib.import_module("nemo_rl.distributed.model_utils")
    function = module.ChunkedDistributedReverseKLToFixedLogits

    def loss(x: Problem) -> Tensor:
        with torch.no_grad():
            u_NV = x.teacher @ x.weight.T
        z_NV = x.hidden @ x.weight.T
        return function.apply(z_NV[None], u_NV[None], NEMO_CHUNK, _alone(x)).mean()

    return loss


def _alone(x: Problem):
    """A process group of this process."""
    if not dist.is_initialized():
        backend = "nccl" if x.hidden.is_cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


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
    """From 0.6 on its scaled-exponential pipeline on Hopper, where V is a multiple of 128."""
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda x: function(x.hidden, x.weight, x.targets)


def _torch_chunked(_: Kind) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x: F.linear_cross_entropy(x.hidden, x.weight, x.targets, options=options)


ALL: tuple[Kind, ...] = (*DIVERGENCES, "logprob")
LIGER, TRITON = ("liger_kernel",), ("triton",)
CONTENDERS = (
    Contender(OURS, ALL, ours),
    Contender("sdpo, any upstream", ALL, partial(ours, known=False)),
    Contender("sdpo torch", ALL, partial(ours, impl="torch")),
    Contender("sdpo triton", ALL, partial(ours, impl="triton"), TRITON, gpu=True),
    Contender("sdpo fused", ("logprob",), partial(ours, impl="fused"), TRITON, gpu=True),
    Contender("torch", ALL, partial(_plain, upcast=False)),
    Contender("torch, float32 operands", ALL, partial(_plain, upcast=True)),
    Contender("torch.compile", ALL, _compiled),
    Contender("Liger fused JSD", DIVERGENCES, _liger_fused, LIGER, gpu=True),
    Contender("Liger chunked JSD", DIVERGENCES, _liger_chunked, LIGER),
    Contender("Liger fused KL", ("forward_kl",), _liger_kl, LIGER, gpu=True),
    Contender("Liger cross-entropy", ("logprob",), _liger_cross_entropy, LIGER, gpu=True),
    Contender("Liger scaled cross-entropy", ("logprob",), _liger_scaled, LIGER),
    Contender("Liger SM90", ("logprob",), _liger_sm90, (*LIGER, "cutlass"), True, hopper=True),
    Contender("fla fused KL", ("forward_kl",), _fla, ("fla",), gpu=True),
    Contender("TRL chunked divergence", DIVERGENCES, _trl, ("trl",)),
    Contender("TRL chunked logprob", ("logprob",), _trl_logprob, ("trl",)),
    Contender("NeMo-RL chunked reverse KL", ("reverse_kl",), _nemo, (NEMO,)),
    Contender("Apple CCE", ("logprob",), _cce, ("cut_cross_entropy",), gpu=True),
    Contender("QuACK", ("logprob",), _quack, ("quack",), gpu=True),
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


FLOOR = "floor"
"""What times are multiples of."""


def floors(kind: Kind, x: Problem) -> dict[str, Callable[[], Any]]:
    """The bare matmuls that no implementation can do without: both logits (log p(y): one), dH and
    dW, in the inputs' dtype, their outputs there before.

    A second floor is of who does not round logits. On a GPU half-precision inputs' come out in
    float32; on a CPU each product is the fastest way that this machine has, operands cast before.
    """
    h, w, u = x.hidden.detach(), x.weight.detach(), x.teacher
    z_NV, dh_ND, dw_VD = torch.mm(h, w.T), torch.empty_like(h), torch.empty_like(w)

    def matmuls(out_NV: Tensor, **dtype: torch.dtype) -> None:
        if kind != "logprob":
            torch.mm(u, w.T, out=out_NV, **dtype)
        torch.mm(h, w.T, out=out_NV, **dtype)
        torch.mm(z_NV, w, out=dh_ND)
        torch.mm(z_NV.T, h, out=dw_VD)

    found: dict[str, Callable[[], Any]] = {FLOOR: partial(matmuls, z_NV)}
    if _wide(h):
        wide_NV = torch.empty_like(z_NV, dtype=torch.float32)
        wide = partial(matmuls, wide_NV, out_dtype=torch.float32)
        found[f"{FLOOR}, float32 logits"] = wide
    if not h.is_cuda and torch.backends.mkldnn.is_available():
        ways = _ways(u, h, w, z_NV)
        chosen = [_fastest(ways[name]) for name in ("u", "z", "dh", "dw")[kind == "logprob" :]]
        found[f"{FLOOR}, fastest products"] = lambda: [multiply() for multiply in chosen]
    return found


def _ways(u: Tensor, h: Tensor, w: Tensor, z_NV: Tensor) -> dict[str, list[Callable[[], Tensor]]]:
    """How a CPU may multiply: by torch (MKL, and oneDNN in half precision) in the inputs' dtype or
    in float32, and by oneDNN in float32. Logits are float32."""
    wide_u, wide_h, wide_w, wide_z = (t.float() for t in (u, h, w, z_NV))

    def linear(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    def both(a: Tensor, b: Tensor, out: Tensor) -> list[Callable[[], Tensor]]:
        return [lambda: torch.mm(a, b.T, out=out), lambda: linear(a, b)]

    logits, dh, dw = (torch.empty_like(t) for t in (wide_z, wide_h, wide_w))
    found = {
        "u": both(wide_u, wide_w, logits),
        "z": both(wide_h, wide_w, logits),
        "dh": both(wide_z, wide_w.T, dh),
        "dw": both(wide_z.T, wide_h.T, dw),
    }
    if h.dtype != torch.float32:
        found["dh"].append(lambda: torch.mm(z_NV, w))
        found["dw"].append(lambda: torch.mm(z_NV.T, h))
    return found


def _fastest(ways: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """By the second of two calls."""
    seconds = []
    for multiply in ways:
        multiply()
        begin = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - begin)
    return ways[seconds.index(min(seconds))]


def _wide(h: Tensor) -> bool:
    """Whether torch multiplies such tensors with a float32 result."""
    return h.is_cuda and h.dtype != torch.float32
