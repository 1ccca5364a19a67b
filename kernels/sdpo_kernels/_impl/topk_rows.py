"""A divergence over K + 1 buckets: the K likeliest tokens, and all others together.

Shapes: C tokens of a chunk, V columns of this rank, K chosen tokens, B = K + 1 buckets.
The buckets are themselves a softmax, over the K logits and the log-sum-exp of the others. Their
values and gradients are therefore those of ``rows_torch.Rows.divergence``; the gradient of the last
bucket is spread over its tokens in proportion to their probability. Oracle:
``reference.topk_buckets``.
"""

import torch
from torch import Tensor

from .. import vocab_parallel as vocab
from . import partials, rows_torch
from .options import Spec


def topk_divergence(
    rows,
    spec: Spec,
    z: Tensor,
    u: Tensor,
    weight_C: Tensor | None,
    grad_CV: Tensor | None,
) -> Tensor:
    """Values (C,) and, given weights, the gradient in raw logits in ``grad_CV``; 0 in rows whose
    value is no finite number.

    Args:
        rows: a ``rows_torch.Rows``, or ``rows_triton``.
        z, u: (C, V) transformed logits in this rank's part of the vocabulary; both are overwritten.
    """
    columns = _top_columns(z if spec.support == "student" else u, spec)
    here, safe = columns >= 0, columns.clamp(min=0)
    plain = spec._replace(temperature=1.0, softcap=0.0, group="")

    def pick_(x: Tensor) -> Tensor:
        """The K logits, -inf where another rank holds them; -inf takes their place."""
        if not x.shape[1]:
            return x.new_full(columns.shape, -torch.inf)
        at = torch.where(here, x.gather(1, safe), -torch.inf)
        gone = torch.full_like(at, torch.inf).masked_fill_(here, -torch.inf)
        x.scatter_reduce_(1, safe, gone, "amin")
        return at

    at = torch.cat([pick_(z), pick_(u)], dim=1).T
    others = rows.stats(plain, z, u, None)
    if spec.group:
        parts = vocab.gather(spec.group, torch.cat([others, at]))
        others = partials.merge(parts[:, : partials.PAIR])
        at = parts[:, partials.PAIR :].amax(0)
    norm, _, _ = partials.finish(others)
    tail_z, tail_u = (m + log_s for m, log_s in norm.unflatten(0, (2, 2)))
    z_CB = torch.cat([at[: spec.k].T, tail_z[:, None]], 1)
    u_CB = torch.cat([at[spec.k :].T, tail_u[:, None]], 1)
    value, grad = _bucket_divergence(plain, z_CB, u_CB, weight_C)
    if grad is None or grad_CV is None:
        return value
    grad.masked_fill_(~value.isfinite()[:, None], 0)
    # no other tokens: e^(-inf) of them
    norm = norm[:2].masked_fill(norm[:2].isinf(), 0)
    last = grad[:, -1].contiguous()
    rows.softmax_grad(spec, z, norm, last, None, None, grad_CV)
    if grad_CV.shape[1]:
        raw = grad[:, :-1] * rows_torch.transform_grad(spec, z_CB[:, :-1])
        grad_CV.scatter_add_(1, safe, torch.where(here, raw, 0).to(grad_CV.dtype))
    return value


def _top_columns(x_CV: Tensor, spec: Spec) -> Tensor:
    """(C, K): this rank's columns among the K largest of the whole vocabulary, else -1."""
    value, column = x_CV.topk(min(spec.k, x_CV.shape[1]), dim=1)
    if not spec.group:
        return column
    missing = spec.k - value.shape[1]
    value = torch.nn.functional.pad(value, (0, missing), value=-torch.inf)
    column = torch.nn.functional.pad(column + spec.start, (0, missing), value=-1)
    values = vocab.gather(spec.group, value).transpose(0, 1).flatten(1)
    ids = vocab.gather(spec.group, column).transpose(0, 1).flatten(1)
    best = ids.gather(1, values.topk(spec.k, dim=1).indices)
    # rows may be padded: ids of the next rank then fall into columns that hold -inf, and whose G
    # nobody reads
    return vocab.local_targets(best, spec.start, x_CV.shape[1])


def _bucket_divergence(
    spec: Spec, z_CB: Tensor, u_CB: Tensor, weight_C: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The divergence of two softmax distributions over few buckets, and the gradient in z."""
    rows = rows_torch.Rows()
    norm, centre, _ = partials.finish(rows.stats(spec, z_CB, u_CB, None))
    grad = None if weight_C is None else torch.empty_like(z_CB)
    centre = None if spec.kind in rows_torch.TWO_PASSES else centre
    return rows.divergence(spec, z_CB, u_CB, norm, centre, weight_C, grad)[0], grad
