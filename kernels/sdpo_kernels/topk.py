"""A divergence over K + 1 buckets per token: the K likeliest tokens, and all others as one.

It is a lower bound of the divergence over the vocabulary (data processing inequality) and equal to
it at K = V. The bucket for all others keeps it a divergence, which a renormalised top K is not.
Oracle: ``reference.topk_buckets``.
"""

from typing import Literal, Unpack

from torch import Tensor

from ._impl.op import call
from ._impl.options import Inputs, Options
from .divergence import Divergence, check_beta


def linear_topk_divergence(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor | None = None,
    *,
    k: int,
    support: Literal["student", "teacher"] = "student",
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl",
    beta: float = 0.5,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Divergence:
    """A divergence per token over the K likeliest tokens and one bucket for all others.

    Args:
        k: 1 to V. Ties at the K-th place are broken as ``torch.topk`` does.
        support: whose K likeliest tokens; the choice is a constant of the gradient.
        divergence: which one, with ``beta`` for the JSD.

    The other arguments, results and errors are those of ``linear_reverse_kl``.
    """
    if support not in ("student", "teacher"):
        raise ValueError(f'support must be "student" or "teacher", got {support!r}')
    if divergence not in ("reverse_kl", "forward_kl", "jsd"):
        raise ValueError(f"divergence must be reverse_kl, forward_kl or jsd, got {divergence!r}")
    if k < 1:
        raise ValueError(f"k must lie between 1 and V, got {k}")
    check_beta(beta)
    x = Inputs(student_hidden, lm_head_weight, teacher_hidden, teacher_lm_head_weight)
    x = x._replace(targets=targets)
    own = dict(k=k, support=support, parameters=[float(beta)] if divergence == "jsd" else [])
    return Divergence(*call(divergence, x, token_weights, options, **own))
