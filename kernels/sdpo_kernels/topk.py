"""Divergences over K + 1 buckets: the K likeliest tokens, and all others together.

Shapes: C tokens of a chunk, V columns of this rank, K chosen tokens, B = K + 1 buckets.
The buckets are themselves a softmax, over the K logits and the others' log-sum-exp, so that their
values and gradients are those of ``torch_rows.divergence``; the last bucket's gradient is spread
over its tokens in proportion to their probability. Oracle: ``reference.topk_buckets``.
"""

import torch
from torch import Tensor

from . import vocab_parallel as vocab
from ._impl import partials
from ._impl import rows_torch as torch_rows
from ._impl.options import IDENTITY, Spec


def topk_divergence(
    rows, spec: Spec, z: Tensor, u: Tensor, weight_C: Tensor | None, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Values (C,) and, given weights, the gradient in raw logits (C, V), in z's memory.

    Args:
        rows: ``torch_rows`` or ``triton_rows``.
        z, u: (C, V) transformed logits of this rank's words; both are overwritten.
    """
    k = spec.k
    columns = _top_columns(z if spec.support == "policy" else u, k, spec)
    here, safe = columns >= 0, columns.clamp(min=0)

    def pick_(x: Tensor) -> Tensor:
        """The K logits, -inf where another rank holds them; -inf takes their place."""
        if not x.shape[1]:
            return x.new_full(columns.shape, -torch.inf)
        at = torch.where(here, x.gather(1, safe), -torch.inf)
        gone = torch.full_like(at, torch.inf).masked_fill_(here, -torch.inf)
        x.scatter_reduce_(1, safe, gone, "amin")
        return at

    at = torch.cat([pick_(z), pick_(u)], dim=1).T
    others = rows.stats(z, u, None, IDENTITY)
    if spec.group:
        parts = vocab.gather(spec.group, torch.cat([others, at]))
        others, at = (
            partials.merge(parts[:, : partials.PAIR]),
            parts[:, partials.PAIR :].amax(0),
        )
    tail = partials.finish(others)
    tail_z, tail_u = (m + log_s for m, log_s in tail.norm.unflatten(0, (2, 2)))
    b_z = torch.cat([at[:k].T, tail_z[:, None]], 1)
    b_u = torch.cat([at[k:].T, tail_u[:, None]], 1)
    value, grad = _bucket_divergence(spec, b_z, b_u, weight_C)
    if weight_C is None:
        return value, None
    assert grad is not None
    dz = rows.softmax_grad(
        z,
        tail.norm[:2].masked_fill(tail.norm[:2].isinf(), 0),  # no others: e^(-inf) of them
        grad[:, -1].contiguous(),
        None,
        None,
        spec.transform,
        grad_dtype,
    )
    if dz.shape[1]:
        raw = grad[:, :-1] * torch_rows.transform_grad(b_z[:, :-1], spec.transform)
        dz.scatter_add_(1, safe, torch.where(here, raw, 0).to(dz.dtype))
    return value, dz


def _top_columns(x_CV: Tensor, k: int, spec: Spec) -> Tensor:
    """(C, K): this rank's columns of the whole vocabulary's K largest, -1 where another's."""
    value, column = x_CV.topk(min(k, x_CV.shape[1]), dim=1)
    if not spec.group:
        return column
    missing = k - value.shape[1]
    value = torch.nn.functional.pad(value, (0, missing), value=-torch.inf)
    column = torch.nn.functional.pad(column + spec.start, (0, missing), value=-1)
    values = vocab.gather(spec.group, value).transpose(0, 1).flatten(1)
    ids = vocab.gather(spec.group, column).transpose(0, 1).flatten(1)
    best = ids.gather(1, values.topk(k, dim=1).indices)
    return vocab.local_targets(best, spec.start, x_CV.shape[1])


def _bucket_divergence(
    spec: Spec, z_CB: Tensor, u_CB: Tensor, weight_C: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The divergence of two softmax distributions over few buckets, and the gradient in z."""
    z, u = z_CB.clone(), u_CB.clone()
    row = partials.finish(torch_rows.stats(z, u, None, IDENTITY))

    def evaluate(centre_C: Tensor | None, by_C: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch_rows.divergence(
            spec.buckets, spec.beta, z, u, row.norm, centre_C, by_C, IDENTITY, z.dtype
        )

    if spec.buckets != "jsd":
        values, grad = evaluate(row.gap, weight_C)
        return values[0], grad
    values, _ = evaluate(None, None)
    _, grad = evaluate(values[0], weight_C)
    return (1 - spec.beta) * values[0] + spec.beta * values[1], grad
