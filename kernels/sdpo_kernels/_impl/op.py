"""The custom operators, and the one call that every public function ends in.

``sdpo_kernels::kept``       values and statistics, and the gradients of each value with respect to
                             its logits, of which the backward (``products``) makes those of hidden
                             states and lm_head, for any upstream gradient.
``sdpo_kernels::values``     values and statistics; if there is too much to keep, its backward forms
                             the logits again.
``sdpo_kernels::gradients``  the same and, as the token weights are known, the gradients of the
                             weighted sum, formed block by block; its backward scales them.

They take the tensors of ``Inputs`` by position and the fields of ``Spec`` by keyword, are opaque to
torch.compile, do their own collectives, and change none of their inputs. They know no mask: rows
that do not count are left out, or made harmless, around them.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..vocab_parallel import VocabShard
from . import tuning
from .checks import check, check_targets
from .chunked import (
    HEADROOM,
    empty_kept,
    empty_result,
    kept_bytes,
    products,
    run,
    run_kept,
    where_defined,
)
from .full_logits import full_logits
from .matmul import accumulation_dtype
from .options import DIFFERENTIABLE, IGNORE_INDEX, Impl, Inputs, Options, Spec
from .partials import TokenStats

_TYPES = {str: "str", float: "float", int: "int", list[float]: "float[]"}
_REQUIRED = ("student_hidden", "lm_head_weight")
_INPUTS = ", ".join(f"Tensor{'' if n in _REQUIRED else '?'} {n}" for n in Inputs._fields)
_SPEC = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in Spec.__annotations__.items())
_POSITIONS = [Inputs._fields.index(name) for name in DIFFERENTIABLE]

_Answer = tuple[Tensor, Tensor, Tensor | None]
"""Values, statistics and, with token weights, the loss."""


def call(
    kind: str,
    x: Inputs,
    token_weights: Tensor | None,
    options: Options,
    finish: Callable[[Tensor, TokenStats], tuple[Tensor, Tensor | None]] | None = None,
    /,
    **own,
) -> tuple[Tensor, TokenStats, Tensor | None]:
    """Check the arguments, choose an implementation, and run it.

    Args:
        finish: log p(y) and statistics -> value and loss, for the kind "logprob", and for
            "sampled_token" wherever it is no dearer that the operators compute log p(y).
        own: the fields of ``Spec`` that belong to the kind.

    Returns:
        value: (N,); carries the gradient if there are no token weights.
        stats: detached.
        loss: scalar; carries the gradient if there are token weights. None without.
    """
    own_head = (
        x.teacher_lm_head_weight is not x.lm_head_weight or options.get("teacher_bias") is not None
    )
    x = x._replace(
        teacher_hidden=_detached(x.teacher_hidden),
        teacher_lm_head_weight=_detached(x.teacher_lm_head_weight) if own_head else None,
        bias=options.get("bias"),
        teacher_bias=_detached(options.get("teacher_bias")),
    )
    mask, names = options.get("mask"), ("mask", *Inputs._fields)
    settings = {name: value for name, value in options.items() if name not in names}
    spec = _spec(kind, x, **settings, **own)  # pyright: ignore[reportArgumentType]
    check(x, spec, mask, token_weights)
    leaves = [getattr(x, name) for name in DIFFERENTIABLE]
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in leaves]
    hidden = x.student_hidden
    if spec.impl == "auto":
        statistics = not any(wanted) and not spec.paired
        widths = [t.shape[1] for t in (hidden, x.teacher_hidden) if t is not None]
        settled = (hidden.device, hidden.dtype, hidden.shape[0], widths, statistics)
        spec = spec._replace(impl=tuning.choose_impl(*settled))
    if token_weights is not None:
        token_weights = token_weights.to(accumulation_dtype(hidden.dtype))
    at_once = token_weights is not None and any(wanted) and not _keeps(x, spec)
    if kind == "sampled_token" and (spec.impl == "reference" or not at_once):
        spec = spec._replace(kind="logprob")
    if spec.kind != "logprob":
        finish = None
    weights = token_weights if finish is None else None
    value, stats, loss = _of_counted_rows(x, spec, mask, weights, wanted)
    found = TokenStats(*stats.detach().unbind())
    if finish is not None:
        value, loss = finish(value, found)
    return value if token_weights is None else value.detach(), found, loss


def _keeps(x: Inputs, spec: Spec) -> bool:
    """Whether G may be kept."""
    return kept_bytes(x, spec) <= spec.grad_bytes


def _of_counted_rows(
    x: Inputs, spec: Spec, mask: Tensor | None, weights: Tensor | None, wanted: list[bool]
) -> _Answer:
    """The call, with value and statistics 0, and no gradient, in rows that the mask or their target
    leaves out. Rows that are known in host memory are dropped before any work; others would have to
    be waited for: their values' upstream gradient is 0, which is enough."""
    device, n = x.student_hidden.device, x.student_hidden.shape[0]
    marks = [] if mask is None else [mask]
    if x.targets is not None:
        marks.append(x.targets != IGNORE_INDEX)
    on_host = [t for t in marks if t.device.type == "cpu" and not torch.compiler.is_compiling()]
    if on_host and not (counted := functools.reduce(torch.logical_and, on_host)).all():
        check_targets(x, spec.total, counted)
        index = to_device(counted.nonzero()[:, 0], device)
        if weights is not None:
            weights = weights[index]
        part = x.map_tokens(lambda t: t.index_select(0, index))
        value, stats, loss = _of_counted_rows(part, spec, None, weights, wanted)
        value = value.new_zeros(n).index_copy(0, index, value)
        return value, stats.new_zeros(len(stats), n).index_copy(1, index, stats), loss
    marks = [t for t in marks if not any(t is known for known in on_host)]
    if not marks:
        return _evaluate(x, spec, weights, wanted)
    counted = functools.reduce(torch.logical_and, [to_device(t, device) for t in marks])
    if weights is not None:
        weights = torch.where(counted, weights, 0)
    if spec.impl == "reference":  # whose gradients are autograd's
        x = x.map_tokens(lambda t: torch.where(counted[:, None] if t.ndim == 2 else counted, t, 0))
    elif x.targets is not None and mask is not None:
        x = x._replace(targets=torch.where(counted, x.targets, IGNORE_INDEX))
    value, stats, loss = _evaluate(x, spec, weights, wanted)
    return torch.where(counted, value, 0), torch.where(counted, stats, 0), loss


def _evaluate(x: Inputs, spec: Spec, weights: Tensor | None, wanted: list[bool]) -> _Answer:
    if spec.impl == "reference":
        value, stats = full_logits(x, spec)
    elif any(wanted) and spec.kind != "sampled_token" and _keeps(x, spec):
        value, stats, *_ = _kept(*x, **spec._asdict())
    elif any(wanted) and weights is not None:
        loss, value, stats, *_ = _gradients(*x, weights, wanted, **spec._asdict())
        return value, stats, loss
    else:
        value, stats = _values(*x, **spec._asdict())
    return value, stats, weighted_sum(value, weights)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device, where the host waits for nothing."""
    if device.type == "cuda" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        x = x.pin_memory()  # other memory cannot be copied without waiting
    return x.to(device, non_blocking=True)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _spec(
    kind: str,
    x: Inputs,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    shard: VocabShard | None = None,
    chunk_bytes: int | None = None,
    grad_bytes: int | None = None,
    impl: Impl = "auto",
    **own,
) -> Spec:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no softcap; got {softcap}")
    if chunk_bytes is None:
        chunk_bytes = tuning.chunk_bytes(x.student_hidden.device)
    if grad_bytes is None:
        grad_bytes = tuning.grad_bytes(x.student_hidden.device)
    return Spec(
        kind=kind,
        impl=impl,
        temperature=float(temperature),
        softcap=float(softcap or 0.0),
        chunk_bytes=int(chunk_bytes),
        grad_bytes=int(grad_bytes),
        group="" if shard is None else shard.group.group_name,
        start=0 if shard is None else shard.start,
        total=x.lm_head_weight.shape[0] if shard is None else shard.total,
        **own,
    )


def weighted_sum(value: Tensor, token_weights: Tensor | None) -> Tensor | None:
    """A weight of 0 silences whatever the value is."""
    if token_weights is None:
        return None
    return torch.where(token_weights == 0, 0, value * token_weights).sum()


@torch.library.custom_op(
    "sdpo_kernels::values", mutates_args=(), schema=f"({_INPUTS}, *, {_SPEC}) -> (Tensor, Tensor)"
)
def _values(*tensors, **spec):
    return run(Inputs(*tensors), Spec(**spec))[:2]


@_values.register_fake
def _(*tensors, **spec):
    return empty_result(Inputs(*tensors))[:2]


@torch.library.custom_op(
    "sdpo_kernels::gradients",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor token_weights, bool[] wanted, *, {_SPEC}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gradients(*args, **spec):
    *tensors, token_weights, wanted = args
    result = run(Inputs(*tensors), Spec(**spec), token_weights, wanted)
    return weighted_sum(result.value, token_weights), *result


@_gradients.register_fake
def _(*args, **spec):
    *tensors, _, wanted = args
    result = empty_result(Inputs(*tensors), wanted)
    return torch.empty_like(result.scale), *result


@torch.library.custom_op(
    "sdpo_kernels::kept",
    mutates_args=(),
    schema=f"({_INPUTS}, *, {_SPEC}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _kept(*tensors, **spec):
    return tuple(run_kept(Inputs(*tensors), Spec(**spec)))


@_kept.register_fake
def _(*tensors, **spec):
    return tuple(empty_kept(Inputs(*tensors)))


@torch.library.custom_op(
    "sdpo_kernels::products",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor scale, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor)",
)
def _products(grad, hidden, weight, scale, wanted):
    return products(grad, hidden, weight, scale, wanted)


@_products.register_fake
def _(grad, hidden, weight, scale, wanted):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (hidden.dtype, hidden.dtype, scale.dtype)
    every = zip(shapes, dtypes, wanted, strict=True)
    return tuple(hidden.new_empty(s if w else 0, dtype=t if w else None) for s, t, w in every)


def _values_setup(ctx, inputs, keyword_only_inputs, output):
    x, ctx.spec = Inputs(*inputs), keyword_only_inputs
    ctx.dtypes = [None if t is None else t.dtype for t in inputs]
    if ctx.spec["kind"] == "logprob":  # whose gradient needs no teacher
        x = x._replace(teacher_hidden=None, teacher_lm_head_weight=None, teacher_bias=None)
    ctx.save_for_backward(*x)


def _values_backward(ctx, upstream, _):
    _refuse_double_backward()
    wanted = [ctx.needs_input_grad[i] for i in _POSITIONS]
    args = (*ctx.saved_tensors, upstream.contiguous(), wanted)
    _, _, _, *grads, scale = _gradients(*args, **ctx.spec)
    return tuple(_to_inputs(ctx.dtypes, wanted, grads, scale))


def _gradients_setup(ctx, inputs, keyword_only_inputs, output):
    *tensors, _, ctx.wanted = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in tensors]
    ctx.set_materialize_grads(False)  # zeros of the size of dW for an output that nobody sees
    ctx.save_for_backward(*output[-4:])


def _gradients_backward(ctx, upstream, *_):
    _refuse_double_backward()
    if upstream is None:
        return (None,) * (len(ctx.dtypes) + 2)
    *grads, scale = ctx.saved_tensors
    return *_to_inputs(ctx.dtypes, ctx.wanted, grads, scale * upstream), None, None


def _kept_setup(ctx, inputs, keyword_only_inputs, output):
    x, (_, stats, grad, defined) = Inputs(*inputs), output
    ctx.dtypes = [None if t is None else t.dtype for t in inputs]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, grad, defined)
    ctx.save_for_backward(grad, x.student_hidden, x.lm_head_weight, defined)


def _kept_backward(ctx, upstream, *_):
    _refuse_double_backward()
    out: list[Tensor | None] = [None] * len(Inputs._fields)
    if upstream is None:
        return tuple(out)
    grad, hidden, weight, defined = ctx.saved_tensors
    factor = where_defined(upstream / HEADROOM.get(grad.dtype, 1.0), defined)
    wanted = [ctx.needs_input_grad[i] for i in _POSITIONS]
    found = _products(grad, hidden, weight, factor.contiguous(), wanted)
    for i, want, gradient in zip(_POSITIONS, wanted, found, strict=True):
        if want:
            out[i] = gradient.to(ctx.dtypes[i])
    return tuple(out)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():  # as under create_graph=True; silence would be a wrong gradient
        raise NotImplementedError("these operators have no second derivative: no create_graph=True")


def _to_inputs(dtypes, wanted, grads, scale: Tensor) -> list[Tensor | None]:
    """Gradients by position: scaled, and in the input's dtype."""
    out: list[Tensor | None] = [None] * len(dtypes)
    for i, want, grad in zip(_POSITIONS, wanted, grads, strict=True):
        if want:
            out[i] = torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtypes[i]))
    return out


_values.register_autograd(_values_backward, setup_context=_values_setup)
_kept.register_autograd(_kept_backward, setup_context=_kept_setup)
_gradients.register_autograd(_gradients_backward, setup_context=_gradients_setup)
