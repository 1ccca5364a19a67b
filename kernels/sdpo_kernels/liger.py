"""Drop-in replacements for Liger's fused linear JSD losses: only the import changes.

``LigerFusedLinearJSD``      as ``liger_kernel.transformers.LigerFusedLinearJSD``
``LigerFusedLinearJSDLoss``  as ``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``

Names, arguments and results are those of liger-kernel 0.8: p is the student, q the teacher, and the
loss is JSD(beta), where beta = 0 stands for KL(q || p) and beta = 1 for KL(p || q), averaged over
the rows whose label is not ``ignore_index``; 0 if there are none. The differences are

- accuracy: logits, statistics and the lm_head's gradient are always float32. ``accum_dtype``,
  ``compiled`` and ``chunk_size`` are accepted and have no effect.
- ignored rows: on the CPU they cost nothing; on a GPU the host never waits for their number.
- dtypes: under autocast all inputs become its dtype; otherwise the teacher's become the student's.

Liger need not be installed. Oracle: reference.py in float64, and Liger itself.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .divergence import linear_forward_kl, linear_jsd, linear_reverse_kl
from .logprob import linear_logprob


class LigerFusedLinearJSD(nn.Module):
    """JSD of the distributions of student and teacher, averaged over the rows that count.

    ``jsd_beta`` lies between 0 and 1, and ``temperature`` > 0 divides the logits of both streams.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a float32 scalar, differentiable in the student's input and weight.

        Args:
            student_input: (BT, H), of any floating dtype.
            student_weight: (V, H), of the same dtype.
            teacher_input: (BT, H').
            teacher_weight: (V, H'). If it is the student's own object, one matmul serves both.
            shift_labels: (BT,) integers, already shifted; only ``ignore_index`` among them matters.
                None: every row counts.

        Raises:
            ValueError: a shape, dtype, device or setting does not fit.
        """
        own_head = teacher_weight is student_weight
        streams = _streams(student_input, student_weight, teacher_input, teacher_weight, own_head)
        rows = _rows(shift_labels, self.ignore_index, streams[0])
        return _jsd(self.jsd_beta, *streams, temperature=self.temperature, **rows)


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss * cross-entropy with the labels + weight_soft_loss * JSD with the teacher,
    both averaged over the rows that count.

    ``temperature`` divides the logits in the soft loss; the hard loss is always at temperature 1,
    and neither is multiplied by its square. The hard loss takes a pass of its own (three more
    matmuls of BT·V·H), which is made only if it is weighted or, with ``return_soft_hard_loss``,
    returned, as (loss, soft, hard), the latter two detached.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss, differentiable in the student's bias, too. Arguments and errors as for
        ``LigerFusedLinearJSD``, and:

        Args:
            teacher_weight: (V', H'), V' >= V. If it and its bias are the student's own objects, one
                matmul serves both. V' > V gives the student V' - V logits of 0, in a copy of its
                lm_head: better trim the teacher's.
            true_labels: (BT,) token ids or ``ignore_index``.
            student_bias: (V,).
            teacher_bias: (V',).
        """
        own_head = teacher_weight is student_weight and teacher_bias is student_bias
        student, head, teacher, teacher_head = _streams(
            student_input, student_weight, teacher_input, teacher_weight, own_head
        )
        rows = _rows(true_labels, self.ignore_index, student)
        padded_head, padded_bias = head, student_bias
        padding = teacher_weight.shape[0] - student_weight.shape[0]
        if padding > 0:
            padded_head = F.pad(head, (0, 0, 0, padding))
            padded_bias = None if student_bias is None else F.pad(student_bias, (0, padding))
        soft = _jsd(
            self.beta,
            student,
            padded_head,
            teacher,
            teacher_head,
            bias=padded_bias,
            teacher_bias=None if own_head else teacher_bias,
            temperature=self.temperature,
            **rows,
        )
        loss = self.weight_soft_loss * soft
        if not (self.weight_hard_loss or self.return_soft_hard_loss):
            return loss
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight_hard_loss != 0):
            logp = linear_logprob(student, head, true_labels, bias=student_bias, **rows).loss
        assert logp is not None
        loss = loss - self.weight_hard_loss * logp
        return (loss, soft.detach(), -logp.detach()) if self.return_soft_hard_loss else loss


def _streams(
    student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, own_head: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs in one dtype; None for a teacher's head that is the student's."""
    device = student.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        student, student_head = student.to(dtype), student_head.to(dtype)
    # detached, it is another object than the student's, and so keeps a bias of its own
    other = None if own_head else teacher_head.detach().to(student.dtype)
    return student, student_head, teacher.to(student.dtype), other


def _rows(labels: Tensor | None, ignore_index: int, student: Tensor) -> dict[str, Any]:
    """The options that turn a sum over rows into the mean over those that count."""
    n = student.shape[0]
    dtype = torch.promote_types(student.dtype, torch.float32)
    if labels is None:
        return {"token_weights": student.new_full((n,), 1 / max(n, 1), dtype=dtype)}
    if labels.shape != (n,):
        raise ValueError(f"labels must be (BT,) = ({n},), got shape {tuple(labels.shape)}")
    mask = labels != ignore_index
    return {"mask": mask, "token_weights": mask.to(dtype) / mask.sum().clamp(min=1)}


def _jsd(beta: float, *streams: Tensor | None, **options) -> Tensor:
    """The weighted sum of JSD(beta) over rows, with the KLs as its limits."""
    limits = {0.0: linear_forward_kl, 1.0: linear_reverse_kl}
    divergence = limits.get(beta) or functools.partial(linear_jsd, beta=beta)
    loss = divergence(*streams, **options).loss  # pyright: ignore[reportArgumentType]
    assert loss is not None
    return loss
