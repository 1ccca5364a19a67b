"""The custom operators, and the one call that every public function ends in.

``sdpo_kernels::values``     values and statistics; its backward forms the logits again, so that any
                             per-token upstream gradient is right.
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
from .chunked import Result, empty_result, run
from .full_logits import full_logits
from .matmul import accumulation_dtype
from .options import DIFFERENTIABLE, IGNORE_INDEX, Impl, Inputs, Options, Spec
from .partials import TokenStats

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
        impl = tuning.choose_impl(hidden.device, hidden.dtype, hidden.shape[0], statistics)
        spec = spec._replace(impl=impl)
    evaluate = full_logits if spec.impl == "reference" else _evaluate
    if token_weights is None:
        value, stats = evaluate(x, spec)
        return value, TokenStats(*stats.detach().unbind()), None
    token_weights = token_weights.to(accumulation_dtype(hidden.dtype))
    if spec.impl != "reference" and any(wanted):
        loss, value, stats, *_ = _gradients(*x, token_weights, wanted, **spec._asdict())
    else:
        value, stats = evaluate(x, spec)
        loss = _weighted_sum(value, token_weights)
    return value.detach(), TokenStats(*stats.detach().unbind()), loss


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
    impl: Impl = "auto",
    **own,
) -> Spec:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no softcap; got {softcap}")
    if chunk_bytes is None:
        chunk_bytes = tuning.chunk_bytes(x.student_hidden.device)
    return Spec(
        kind=kind,
        impl=impl,
        temperature=float(temperature),
        softcap=float(softcap or 0.0),
        chunk_bytes=int(chunk_bytes),
        group="" if shard is None else shard.group.group_name,
        start=0 if shard is None else shard.start,
        total=x.lm_head_weight.shape[0] if shard is None else shard.total,
        **own,
    )


def _weighted_sum(value: Tensor, token_weights: Tensor) -> Tensor:
    """A weight of 0 silences whatever the value is."""
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


def _evaluate(x: Inputs, spec: Spec) -> tuple[Tensor, Tensor]:
    return _values(*x, **spec._asdict())


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


def _with_loss(result: Result, token_weights: Tensor) -> tuple[Tensor, ...]:
    return _weighted_sum(result.value, token_weights), *result


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
_gradients.register_autograd(_gradients_backward, setup_context=_gradients_setup)
