"""The custom operators, and the one call that every public function ends in.

``sdpo_kernels::kept``       values and statistics, and the gradients with respect to the logits, of
                             which the backward (``products``) makes those of hidden states and
                             lm_head, for any upstream gradient of the values or, if the token
                             weights are known, of their weighted sum.
``sdpo_kernels::values``     values and statistics; if there is too much to keep, its backward forms
                             the logits again.
``sdpo_kernels::gradients``  the same and, as the token weights are known, the gradients of the
                             weighted sum, formed while the logits are there; its backward scales
                             them.

They take the tensors of ``Inputs`` by position and the fields of ``Spec`` by keyword, are opaque to
torch.compile, do their own collectives, and change none of their inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..vocab_parallel import VocabShard
from . import tuning
from .checks import check, check_targets
from .chunked import Kept, Result, empty_kept, empty_result, kept_bytes, products, run, run_kept
from .full_logits import full_logits
from .matmul import accumulation_dtype
from .options import DIFFERENTIABLE, IGNORE_INDEX, Impl, Inputs, Options, Spec
from .partials import TokenStats
from .rows_torch import CENTRED

_TYPES = {str: "str", float: "float", int: "int", list[float]: "float[]"}
_REQUIRED = ("student_hidden", "lm_head_weight")
_INPUTS = ", ".join(f"Tensor{'' if n in _REQUIRED else '?'} {n}" for n in Inputs._fields)
_SPEC = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in Spec.__annotations__.items())
_POSITIONS = [Inputs._fields.index(name) for name in DIFFERENTIABLE]


def call(
    kind: str, x: Inputs, token_weights: Tensor | None, options: Options, **own
) -> tuple[Tensor, TokenStats, Tensor | None]:
    """Check the arguments, choose an implementation, and run it.

    Args:
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
        mask=options.get("mask"),
    )
    settings = {name: value for name, value in options.items() if name not in Inputs._fields}
    spec = _spec(kind, x, **settings, **own)  # pyright: ignore[reportArgumentType]
    check(x, spec, token_weights)
    leaves = [getattr(x, name) for name in DIFFERENTIABLE]
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in leaves]
    hidden = x.student_hidden
    if spec.impl == "auto":
        statistics = not any(wanted) and not spec.paired
        widths = [t.shape[1] for t in (hidden, x.teacher_hidden) if t is not None]
        given = (hidden.device, hidden.dtype, hidden.shape[0], widths, statistics)
        impl = tuning.choose_impl(*given)
        spec = spec._replace(impl=impl)
    if token_weights is not None:
        token_weights = token_weights.to(accumulation_dtype(hidden.dtype))
    run_it = _reference
    if spec.impl != "reference":
        keeps = any(wanted) and kept_bytes(x, spec) <= spec.grad_bytes
        run_it = _keep if keeps else _recompute
    value, stats, loss = run_it(x, spec, token_weights, wanted)
    if token_weights is not None:
        value = value.detach()
    return value, TokenStats(*stats.detach().unbind()), loss


_Answer = tuple[Tensor, Tensor, Tensor | None]
"""Values, statistics and, with token weights, the loss."""


def _reference(x: Inputs, spec: Spec, token_weights: Tensor | None, _: list[bool]) -> _Answer:
    value, stats = full_logits(x, spec)
    return value, stats, _weighted_sum(value, token_weights)


def _recompute(x: Inputs, spec: Spec, token_weights: Tensor | None, wanted: list[bool]) -> _Answer:
    if token_weights is not None and any(wanted):
        loss, value, stats, *_ = _gradients(*x, token_weights, wanted, **spec._asdict())
        return value, stats, loss
    value, stats = _values(*x, **spec._asdict())
    return value, stats, _weighted_sum(value, token_weights)


def _keep(x: Inputs, spec: Spec, token_weights: Tensor | None, _: list[bool]) -> _Answer:
    mask, n = x.mask, x.student_hidden.shape[0]
    if mask is None:
        loss, value, stats, *_ = _kept(*x, token_weights, **spec._asdict())
        return value, stats, None if token_weights is None else loss
    device = x.student_hidden.device
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        # rows are dropped; a mask on the device would have to be waited for
        index = mask.nonzero()[:, 0]
        if device.type == "cuda":
            index = index.pin_memory()  # other memory cannot be copied without waiting, either
        index = index.to(device, non_blocking=True)
        if token_weights is not None:
            token_weights = token_weights[index]
        part = x.map_tokens(lambda t: t.index_select(0, index))
        value, stats, loss = _keep(part, spec, token_weights, [])
        value = value.new_zeros(n).index_copy(0, index, value)
        return value, stats.new_zeros(len(stats), n).index_copy(1, index, stats), loss
    mask = mask.to(device, non_blocking=True)
    if token_weights is not None:
        token_weights = torch.where(mask, token_weights, 0)
    value, stats, loss = _keep(x.silenced(mask), spec, token_weights, [])
    return torch.where(mask, value, 0), torch.where(mask, stats, 0), loss


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


def _weighted_sum(value: Tensor, token_weights: Tensor | None) -> Tensor | None:
    """A weight of 0 silences whatever the value is."""
    if token_weights is None:
        return None
    return torch.where(token_weights == 0, 0, value * token_weights).sum()


def _run(
    x: Inputs, spec: Spec, weights_N: Tensor | None = None, wanted: Sequence[bool] = ()
) -> Result:
    """``run``, in which rows whose target is ``IGNORE_INDEX`` are as masked."""
    if x.targets is None:
        return run(x, spec, weights_N, wanted)
    if x.targets.device.type == "cpu":
        check_targets(x, spec.total)
        some = bool((x.targets == IGNORE_INDEX).any())
        return run(x.ignored_masked() if some else x, spec, weights_N, wanted)
    return _run_silenced(x, spec, weights_N, wanted)


def _run_silenced(
    x: Inputs, spec: Spec, weights_N: Tensor | None = None, wanted: Sequence[bool] = ()
) -> Result:
    """On a GPU, where the host does not wait for the ignored rows' number. A mask would copy the
    hidden states; here their rows cost their matmuls, and nothing else."""
    assert x.targets is not None
    kept = x.targets != IGNORE_INDEX
    weights_N = None if weights_N is None else torch.where(kept, weights_N, 0)
    out = run(x, spec, weights_N, wanted)
    value, stats = (torch.where(kept, t, 0) for t in (out.value, out.stats))
    return out._replace(value=value, stats=stats)


@torch.library.custom_op(
    "sdpo_kernels::values", mutates_args=(), schema=f"({_INPUTS}, *, {_SPEC}) -> (Tensor, Tensor)"
)
def _values(*tensors, **spec):
    return _run(Inputs(*tensors), Spec(**spec))[:2]


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
    result = _run(Inputs(*tensors), Spec(**spec), token_weights, wanted)
    return _with_loss(result, token_weights)


@_gradients.register_fake
def _(*args, **spec):
    *tensors, token_weights, wanted = args
    return _with_loss(empty_result(Inputs(*tensors), wanted), token_weights)


def _with_loss(result: Result | Kept, token_weights: Tensor | None) -> tuple[Tensor, ...]:
    loss = _weighted_sum(result.value, token_weights)
    return result.scale.new_zeros(()) if loss is None else loss, *result


@torch.library.custom_op(
    "sdpo_kernels::kept",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? token_weights, *, {_SPEC}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _kept(*args, **spec):
    *tensors, token_weights = args
    x, settings, counted = Inputs(*tensors), Spec(**spec), None
    if x.targets is not None:
        if x.targets.device.type == "cpu":
            check_targets(x, settings.total)
        counted = x.targets != IGNORE_INDEX
    return _with_loss(run_kept(x, settings, token_weights, counted), token_weights)


@_kept.register_fake
def _(*args, **spec):
    *tensors, token_weights = args
    return _with_loss(empty_kept(Inputs(*tensors)), token_weights)


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
    ctx.spec = keyword_only_inputs
    ctx.save_for_backward(*inputs)


def _values_backward(ctx, upstream, _):
    _refuse_double_backward()
    wanted = [ctx.needs_input_grad[i] for i in _POSITIONS]
    tensors = ctx.saved_tensors
    _, _, _, *grads, scale = _gradients(*tensors, upstream.contiguous(), wanted, **ctx.spec)
    dtypes = [None if x is None else x.dtype for x in tensors]
    return tuple(_to_inputs(dtypes, wanted, grads, scale))


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
    x, token_weights = Inputs(*inputs[:-1]), inputs[-1]
    _, value, _, grad, scale = output
    ctx.known = token_weights is not None
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:-1]]
    kind, k = keyword_only_inputs["kind"], keyword_only_inputs["k"]
    ctx.silent = ctx.known or not (k or kind in CENTRED or kind == "sampled_token")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:], *((value,) if ctx.known else (output[0],)))
    ctx.save_for_backward(grad, x.student_hidden, x.lm_head_weight, value, scale)


def _kept_backward(ctx, upstream_loss, upstream_value, *_):
    _refuse_double_backward()
    out: list[Tensor | None] = [None] * (len(Inputs._fields) + 1)
    upstream = upstream_loss if ctx.known else upstream_value
    if upstream is None:
        return tuple(out)
    grad, hidden, weight, value, scale = ctx.saved_tensors
    factor = (upstream * scale).expand_as(value)
    if not ctx.silent:  # where the value is infinite, G is 0, but no number
        factor = torch.where(value.isfinite() | (factor == 0), factor, torch.nan)
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
