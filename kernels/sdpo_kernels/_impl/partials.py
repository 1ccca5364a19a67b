"""Per-token partials: what a range of the vocabulary says about a token's softmax.

Shapes: R ranges (tiles, or tensor-parallel ranks), F fields, C tokens.

  one stream       m = max z, s = sum e^(z-m), t = sum e^(z-m) (z-m), y = z at the target
  a pair, at last  c = sum e^(z-m) ((z-u) - (m-n)), n = max u, so that a difference of level
                   between the streams' logits does not cost digits

The target's logit is -inf where another range holds it. Ranges merge in any order and grouping, so
the same ``merge`` serves tiles of a kernel and ranks of a process group.
Oracle: tests/sdpo_kernels/test_shard.py splits a vocabulary anywhere.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SINGLE, PAIR = 4, 9
"""Number of fields F: (m, s, t, y) of one stream; of both streams, and c."""


class TokenStats(NamedTuple):
    """Detached statistics of both distributions, each (N,), in nats.

    ``logp_*`` are the log-probabilities of the targets; NaN if no targets were given.
    """

    logp_student: Tensor
    logp_teacher: Tensor
    entropy_student: Tensor
    entropy_teacher: Tensor
    lse_student: Tensor
    lse_teacher: Tensor


def merge(parts_RFC: Tensor) -> Tensor:
    """(R, F, C) -> (F, C)."""
    if parts_RFC.shape[0] == 1:
        return parts_RFC[0]
    out = torch.empty_like(parts_RFC[0])
    scale_RC = _merge_stream(parts_RFC[:, :4], out[:4])
    if parts_RFC.shape[1] == PAIR:
        _merge_stream(parts_RFC[:, 4:8], out[4:8])
        offset_RC = (parts_RFC[:, 0] - parts_RFC[:, 4]) - (out[0] - out[4])
        c_RC = parts_RFC[:, 8] + weighted(parts_RFC[:, 1], offset_RC)
        out[8] = weighted(scale_RC, c_RC).sum(0)
    return out


def _merge_stream(parts_R4C: Tensor, out_4C: Tensor) -> Tensor:
    m_RC, s_RC, t_RC, y_RC = parts_R4C.unbind(1)
    m_C = m_RC.amax(0)
    shift_RC = torch.where(m_RC == m_C, 0, m_RC - m_C)
    scale_RC = shift_RC.exp()
    out_4C[0] = m_C
    out_4C[1] = (scale_RC * s_RC).sum(0)
    out_4C[2] = weighted(scale_RC, t_RC + weighted(s_RC, shift_RC)).sum(0)
    out_4C[3] = y_RC.amax(0)
    return scale_RC


def weighted(p: Tensor, x: Tensor | float) -> Tensor:
    """p x, and 0 where p is 0, whatever x."""
    return (p * x).masked_fill_(p == 0, 0)


def finish(merged_FC: Tensor) -> tuple[Tensor, Tensor, TokenStats]:
    """The whole vocabulary's partials -> (norm, gap, statistics).

    norm: (2, C), or (4, C) for a pair: the maximum logit and log sum e^(z - max), whose sum is the
    log-sum-exp; apart they keep the digits that a large maximum would take.
    gap: (C,), sum p ((z - u) - (max z - max u)) under the student; 0 for a single stream, as are
    the teacher's statistics.
    """
    norm, lse, entropy, logp = _finish_stream(merged_FC[:4])
    if merged_FC.shape[0] == SINGLE:
        nothing = torch.zeros_like(lse)
        return norm, nothing, TokenStats(logp, nothing, entropy, nothing, lse, nothing)
    other_norm, other_lse, other_entropy, other_logp = _finish_stream(merged_FC[4:8])
    gap = merged_FC[8] / merged_FC[1]
    stats = TokenStats(logp, other_logp, entropy, other_entropy, lse, other_lse)
    return torch.cat([norm, other_norm]), gap, stats


def _finish_stream(merged_4C: Tensor) -> tuple[Tensor, ...]:
    m, s, t, y = merged_4C
    log_s = s.log()
    return torch.stack([m, log_s]), m + log_s, log_s - t / s, (y - m) - log_s
