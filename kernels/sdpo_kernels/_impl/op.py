"""The custom operators, and the one call that every public function ends in.

``sdpo_kernels::values``     values and statistics; its backward forms the logits again, so that any
                             per-token upstream gradient is right.
``sdpo_kernels::gradients``  the same and, as the weights are known, the gradients of the weighted
                             sum, formed while the logits are there; its backward scales them.

They are opaque to torch.compile, do their own collectives, and change none of their inputs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..vocab_parallel import VocabShard
from . import tuning
from .checks import check
from .chunked import (
    NOTHING,
    PAIRED,
    Inputs,
    Result,
    Wanted,
    accumulation_dtype,
    empty_result,
    run,
)
from .options import Kind, Options, Path, Spec
from .partials import RowStats

_TYPES = {str: "str", float: "float", int: "int"}
_INPUTS = ", ".join(
    f"Tensor{'' if name in ('hidden', 'weight') else '?'} {name}" for name in Inputs._fields
)
_SPEC = ", ".join(f"{_TYPES[Spec.__annotations__[name]]} {name}" for name in Spec._fields)
_WANTED = ", ".join(f"bool want_{name}" for name in Wanted._fields)
_N_INPUTS, _N_SPEC = len(Inputs._fields), len(Spec._fields)
_DIFFERENTIABLE = [Inputs._fields.index(name) for name in Wanted._fields]


class Call(NamedTuple):
    """What a call yields: see the public functions. ``value`` carries the gradient where no weights
    were given, ``loss`` where they were."""

    value: Tensor
    stats: Tensor
    loss: Tensor | None


def call(
    kind: Kind, x: Inputs, weights: Tensor | None, options: Options, **of_kind: float | str
) -> Call:
    """Check the arguments, choose a path, and run it.

    Args:
        of_kind: the fields of ``Spec`` that are the kind's own.
    """
    own_head = x.hindsight_weight is not x.weight or options.get("hindsight_bias") is not None
    x = x._replace(
        hindsight=_detached(x.hindsight),
        hindsight_weight=_detached(x.hindsight_weight) if own_head else None,
        bias=options.get("bias"),
        hindsight_bias=_detached(options.get("hindsight_bias")),
        mask=options.get("mask"),
    )
    static = {name: value for name, value in options.items() if name not in Inputs._fields}
    if weights is not None and weights.is_floating_point():
        weights = weights.to(accumulation_dtype(x.hidden.dtype))
    spec = _spec(kind, x, **static, **of_kind)  # pyright: ignore[reportArgumentType]
    check(x, spec, weights)
    if spec.path == "auto":
        spec = spec._replace(path=_choose(x, spec))
    return _run(x, spec, weights)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _spec(
    kind: Kind,
    x: Inputs,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    shard: VocabShard | None = None,
    chunk_bytes: int | None = None,
    path: Path = "auto",
    **of_kind,
) -> Spec:
    return Spec(
        kind=kind,
        path=path,
        temperature=float(temperature),
        softcap=0.0 if softcap is None else float(softcap) or -1.0,
        chunk_bytes=tuning.chunk_bytes(x.hidden.device)
        if chunk_bytes is None
        else int(chunk_bytes),
        group="" if shard is None else shard.group.group_name,
        start=0 if shard is None else shard.start,
        total=0 if shard is None else shard.total,
        **of_kind,
    )


def _choose(x: Inputs, spec: Spec) -> str:
    h = x.hidden
    gradient = any(_wants_gradient(getattr(x, name)) for name in Wanted._fields)
    statistics = not gradient and spec.kind not in PAIRED
    return tuning.choose_path(h.device, h.dtype, h.shape[0], statistics)


def _run(x: Inputs, spec: Spec, weights: Tensor | None) -> Call:
    if spec.path == "reference":
        value, stats = _reference(x, spec)
        if weights is None:
            return Call(value, stats, None)
        return Call(value.detach(), stats, _weighted_sum(value, weights))
    wanted = Wanted(*(_wants_gradient(getattr(x, name)) for name in Wanted._fields))
    if weights is None or not any(wanted):
        value, stats = _values(*x, *spec)
        loss = None if weights is None else _weighted_sum(value, weights)
        return Call(value, stats.detach(), loss)
    loss, value, stats, *_ = _gradients(*x, *spec, weights, *wanted)
    return Call(value.detach(), stats.detach(), loss)


def _wants_gradient(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _split(args) -> tuple[Inputs, Spec]:
    return Inputs(*args[:_N_INPUTS]), Spec(*args[_N_INPUTS : _N_INPUTS + _N_SPEC])


def _weighted(args) -> tuple[Inputs, Spec, Tensor, Wanted]:
    return *_split(args), args[_N_INPUTS + _N_SPEC], Wanted(*args[-len(Wanted._fields) :])


@torch.library.custom_op(
    "sdpo_kernels::values", mutates_args=(), schema=f"({_INPUTS}, {_SPEC}) -> (Tensor, Tensor)"
)
def _values(*args):
    return run(*_split(args))[:2]


@_values.register_fake
def _(*args):
    return empty_result(_split(args)[0], NOTHING)[:2]


@torch.library.custom_op(
    "sdpo_kernels::gradients",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SPEC}, Tensor weights, {_WANTED}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gradients(*args):
    x, spec, weights, wanted = _weighted(args)
    return _with_loss(run(x, spec, weights, wanted), weights)


@_gradients.register_fake
def _(*args):
    x, _, weights, wanted = _weighted(args)
    return _with_loss(empty_result(x, wanted), weights)


def _weighted_sum(value: Tensor, weights: Tensor) -> Tensor:
    """A weight of 0 silences whatever the value is."""
    return torch.where(weights == 0, 0, value * weights).sum()


def _with_loss(result: Result, weights: Tensor) -> tuple[Tensor, ...]:
    return _weighted_sum(result.value, weights), *result


def _values_setup(ctx, inputs, output):
    tensors, ctx.spec = _split(inputs)
    ctx.save_for_backward(*tensors)


def _values_backward(ctx, upstream, _):
    _refuse_double_backward()
    wanted = Wanted(*(ctx.needs_input_grad[i] for i in _DIFFERENTIABLE))
    x = Inputs(*ctx.saved_tensors)
    _, _, _, *grads, scale = _gradients(*x, *ctx.spec, upstream.contiguous(), *wanted)
    return _to_inputs(x, wanted, grads, scale, _N_INPUTS + _N_SPEC)


def _gradients_setup(ctx, inputs, output):
    x, _, _, ctx.wanted = _weighted(inputs)
    ctx.dtypes = [None if t is None else t.dtype for t in x]
    ctx.n_args = len(inputs)
    ctx.set_materialize_grads(False)  # zeros of the size of dW for an output that nobody sees
    ctx.save_for_backward(*output[-4:])


def _gradients_backward(ctx, upstream, *_):
    _refuse_double_backward()
    if upstream is None:
        return (None,) * ctx.n_args
    *grads, scale = ctx.saved_tensors
    return _to_inputs(ctx.dtypes, ctx.wanted, grads, scale * upstream, ctx.n_args)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():  # as create_graph=True has it; silence would be a wrong gradient
        raise NotImplementedError("these operators have no second derivative: no create_graph=True")


def _to_inputs(
    like, wanted: Wanted, grads, scale: Tensor, n_args: int
) -> tuple[Tensor | None, ...]:
    """Gradients by argument: scaled, and in the argument's dtype."""
    out: list[Tensor | None] = [None] * n_args
    for i, want, grad in zip(_DIFFERENTIABLE, wanted, grads, strict=True):
        if want:
            dtype = like[i] if isinstance(like, list) else like[i].dtype
            out[i] = torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
    return tuple(out)


_values.register_autograd(_values_backward, setup_context=_values_setup)
_gradients.register_autograd(_gradients_backward, setup_context=_gradients_setup)


def _reference(x: Inputs, spec: Spec) -> tuple[Tensor, Tensor]:
    """Full logits and plain autograd, in float32 (float64 for float64)."""
    dtype = accumulation_dtype(x.hidden.dtype)
    transform: dict[str, Any] = dict(temperature=spec.temperature, softcap=spec.softcap or None)

    def read(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if x.mask is not None:
            hidden = torch.where(x.mask.to(hidden.device)[:, None], hidden, 0)
        bias = None if bias is None else bias.to(dtype)
        z = reference.logits(hidden.to(dtype), weight.to(dtype), bias, **transform)
        return z.log_softmax(-1), z.detach().logsumexp(-1)

    def row(logp: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.full_like(lse, torch.nan)
        if targets is not None:
            at = reference.logprob(logp, targets)
        return lse, reference.entropy(logp), at

    targets = x.targets
    if targets is not None and x.mask is not None:
        targets = torch.where(x.mask.to(targets.device), targets, 0)
    with torch.autocast(x.hidden.device.type, enabled=False):
        logp, lse = read(x.hidden, x.weight, x.bias)
        nothing = torch.zeros_like(lse)
        stats = RowStats(nothing, *row(logp, lse))
        logq = None
        if x.hindsight is not None:
            shared = x.hindsight_weight is None
            weight, bias = (x.weight, x.bias) if shared else (x.hindsight_weight, x.hindsight_bias)
            assert weight is not None
            with torch.no_grad():
                logq, lse = read(x.hindsight, weight, bias)
                stats = RowStats(*stats[:4], *row(logq, lse))
        value = _reference_value(x, spec, logp, logq, stats)
    if x.mask is not None:
        value = torch.where(x.mask.to(value.device), value, 0)
    columns = (
        stats.logp,
        stats.hindsight_logp,
        stats.entropy,
        stats.hindsight_entropy,
        stats.lse,
        stats.hindsight_lse,
    )
    out = torch.stack([nothing if s is None else s.detach() for s in columns])
    return value, out if x.mask is None else torch.where(x.mask.to(out.device), out, 0)


def _reference_value(
    x: Inputs, spec: Spec, logp: Tensor, logq: Tensor | None, stats: RowStats
) -> Tensor:
    if spec.kind == "logprob":
        return stats.logp
    if spec.kind == "sampled_token":
        advantage = x.advantage
        if advantage is None:
            assert stats.hindsight_logp is not None
            advantage = stats.hindsight_logp - stats.logp
        return reference.policy_gradient(
            stats.logp,
            advantage,
            x.old_logp,
            ppo_clip=spec.clip if spec.clip > 0 else None,
            importance_clip=-spec.clip if spec.clip < 0 else None,
        )
    assert logq is not None
    kind = spec.kind
    if kind == "topk":
        support = logp.detach() if spec.support == "policy" else logq
        index = support.topk(spec.k, dim=-1).indices
        logp, logq = (reference.topk_buckets(t, index) for t in (logp, logq))
        kind = spec.buckets
    if kind == "jsd":
        return reference.jsd(logp, logq, spec.beta)
    return getattr(reference, kind)(logp, logq)
