"""``impl="reference"``: full logits and autograd, in float32 (float64 for float64)."""

import torch
from torch import Tensor

from .. import reference
from .checks import check_targets
from .matmul import accumulation_dtype
from .options import Inputs, Spec


def full_logits(x: Inputs, spec: Spec) -> tuple[Tensor, Tensor]:
    """Values (N,), differentiable, and statistics (6, N)."""
    check_targets(x, spec.total)
    with torch.autocast(x.student_hidden.device.type, enabled=False):
        return _evaluate(x, spec)


def _evaluate(x: Inputs, spec: Spec) -> tuple[Tensor, Tensor]:
    student = _stream(x.student_hidden, x.lm_head_weight, x.bias, x.targets, spec)
    teacher = [torch.zeros_like(student[1])] * 4
    if x.teacher_hidden is not None:
        head = (x.teacher_lm_head_weight, x.teacher_bias)
        weight, bias = (x.lm_head_weight, x.bias) if head[0] is None else head
        with torch.no_grad():
            teacher = _stream(x.teacher_hidden, weight, bias, x.targets, spec)
    pairs = zip(student[1:], teacher[1:], strict=True)
    stats = torch.stack([t.detach() for pair in pairs for t in pair])  # as in TokenStats
    return _value(x, spec, student, teacher), stats


def _stream(hidden, weight, bias, targets, spec: Spec) -> list[Tensor]:
    """log p (N, V); log p(y), entropy and log-sum-exp, each (N,)."""
    dtype = accumulation_dtype(hidden.dtype)
    bias = None if bias is None else bias.to(dtype)
    z = reference.logits(
        hidden.to(dtype),
        weight.to(dtype),
        bias,
        temperature=spec.temperature,
        softcap=spec.softcap or None,
    )
    logp, lse = z.log_softmax(-1), z.detach().logsumexp(-1)
    at = torch.full_like(lse, torch.nan)
    if targets is not None:
        at = reference.logprob(logp, targets)
    return [logp, at, reference.entropy(logp.detach()), lse]


def _value(x: Inputs, spec: Spec, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    if spec.kind == "logprob":
        return student[1]
    logp, logq = student[0], teacher[0]
    if spec.k:
        support = logp.detach() if spec.support == "student" else logq
        index = support.topk(spec.k, dim=-1).indices
        logp, logq = (reference.topk_buckets(t, index) for t in (logp, logq))
    return getattr(reference, spec.kind)(logp, logq, *spec.parameters)
