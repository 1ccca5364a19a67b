"""The chunk loop: hidden states -> per-token values and statistics, and, if the token weights are
known, the gradients of the weighted sum. (N, V) logits never exist as a whole.

Shapes: N tokens, C tokens of a chunk, V rows of this rank's lm_head, D hidden size.
  z_CV = h_CD @ w_VD.T   student logits, float32,  p = softmax(z)
  u_CV = g_CD @ v_VD.T   teacher logits, float32,  q = softmax(u)

Per chunk: one matmul for the logits (both streams stacked if they share an lm_head), row statistics
(merged over tensor-parallel ranks), values and the gradient in the logits' own memory, and two
matmuls for dH and dW. Logits, statistics and dW are float32 whatever the inputs' dtype (float64
stays float64). Oracle: reference.py. Derivations: kernels/README.md.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import vocab_parallel as vocab
from . import partials, rows_torch
from .matmul import accumulation_dtype, add_weight_gradient, chunks, hidden_gradient, logits
from .options import Inputs, Spec
from .partials import TokenStats
from .topk_rows import topk_divergence

FUSED_BYTES_PER_ROW = 0.25
"""Memory of the fused kernel's partials for one token and one row of the lm_head: 16 bytes for a
tile of at least 64 rows."""


class Result(NamedTuple):
    """What the loop fills. The gradients of sum token_weights * value are divided by ``scale``, and
    empty if not asked for."""

    value: Tensor
    """(N,)"""
    stats: Tensor
    """(6, N), the fields of ``TokenStats``."""
    dhidden: Tensor
    """(N, D), in the inputs' dtype."""
    dweight: Tensor
    """(V, D), float32 (float64 for float64), as are all the others."""
    dbias: Tensor
    """(V,)"""
    scale: Tensor
    """()"""


def empty_result(x: Inputs, wanted: Sequence[bool] = (), zero: bool = False) -> Result:
    """A result's tensors, for the loop to fill.

    Args:
        wanted: for which of ``DIFFERENTIABLE`` a gradient is asked for.
    """
    dtype = accumulation_dtype(x.student_hidden.dtype)
    new = functools.partial(torch.zeros if zero else torch.empty, device=x.student_hidden.device)
    n, vocabulary = x.student_hidden.shape[0], x.lm_head_weight.shape[0]
    hidden, weight, bias = wanted or (False, False, False)
    return Result(
        value=new(n, dtype=dtype),
        stats=new(len(TokenStats._fields), n, dtype=dtype),
        dhidden=new(x.student_hidden.shape if hidden else 0, dtype=x.student_hidden.dtype),
        dweight=new(x.lm_head_weight.shape if weight else 0, dtype=dtype),
        dbias=new(vocabulary if bias else 0, dtype=dtype),
        scale=new((), dtype=dtype),
    )


@torch.no_grad()
def run(
    x: Inputs, spec: Spec, weights_N: Tensor | None = None, wanted: Sequence[bool] = ()
) -> Result:
    """Values and statistics and, given token weights, gradients of the values' weighted sum."""
    if x.mask is not None:
        return _run_masked(x, x.mask, spec, weights_N, wanted)
    result = empty_result(x, wanted)
    for summed in (result.dweight, result.dbias):
        summed.zero_()
    result.scale.fill_(1)
    n = x.student_hidden.shape[0]
    if weights_N is not None and n:
        # G is rounded to the inputs' dtype, as every mixed-precision linear layer does, but
        # relative to the largest weight: a mean over many tokens would underflow in float16
        tiny = torch.finfo(result.scale.dtype).tiny
        torch.amax(weights_N.abs().to(result.scale.dtype).clamp_(min=tiny), 0, out=result.scale)
        weights_N = weights_N / result.scale
    with torch.autocast(x.student_hidden.device.type, enabled=False):
        loop = _Loop(x, spec, weights_N, any(wanted), result)
        for c in chunks(n, loop.chunk_rows):
            loop.run_chunk(c)
    if spec.group and loop.values_are_partial:
        vocab.sum_(spec.group, result.value)
    return result


def _run_masked(
    x: Inputs, mask: Tensor, spec: Spec, weights_N: Tensor | None, wanted: Sequence[bool]
) -> Result:
    """A mask in host memory drops rows; one on the device only silences them, because the host
    would have to wait for the device to know their number."""
    device = x.student_hidden.device
    if device.type != "cpu" and mask.device == device:

        def silence(t: Tensor) -> Tensor:
            return torch.where(mask[:, None] if t.ndim == 2 else mask, t, 0)

        weights_N = None if weights_N is None else silence(weights_N)
        out = run(x.map_tokens(silence), spec, weights_N, wanted)
        return out._replace(value=silence(out.value), stats=torch.where(mask, out.stats, 0))
    index = mask.nonzero()[:, 0].to(device, non_blocking=True)
    weights_N = None if weights_N is None else weights_N[index]
    part = run(x.map_tokens(lambda t: t[index]), spec, weights_N, wanted)
    hidden = bool(wanted) and wanted[0]
    out = empty_result(x, (hidden, False, False), zero=True)
    out.value.index_copy_(0, index, part.value)
    out.stats.index_copy_(1, index, part.stats)
    if hidden:
        out.dhidden.index_copy_(0, index, part.dhidden)
    return out._replace(dweight=part.dweight, dbias=part.dbias, scale=part.scale)


class _Loop:
    """The buffers that the chunks of a call share, and what is done with each chunk."""

    def __init__(
        self, x: Inputs, spec: Spec, weights_N: Tensor | None, gradient: bool, result: Result
    ):
        self.x, self.spec, self.result = x, spec, result
        self.weights_N = weights_N if gradient else None
        self.dtype = result.value.dtype
        self.vocabulary = x.lm_head_weight.shape[0]
        self.fused = spec.impl == "fused" and not spec.paired
        self.rows = _row_operations(spec.impl)
        self.values_are_partial = (
            spec.paired and not spec.k and spec.kind not in self.rows.TWO_PASSES
        )
        self.targets_N = x.targets
        if x.targets is not None:
            self.targets_N = vocab.local_targets(x.targets, spec.start, self.vocabulary)
        self.shared_head = x.teacher_lm_head_weight is None
        self.bias = _cast(x.bias, self.dtype)
        self.teacher_bias = self.bias if self.shared_head else _cast(x.teacher_bias, self.dtype)
        streams = 2 if x.teacher_hidden is not None and not self.fused else 1
        if self.fused and self.weights_N is None:
            self.chunk_rows = _chunk_rows(x, spec, FUSED_BYTES_PER_ROW)
        else:
            self.chunk_rows = _chunk_rows(x, spec, streams * self.dtype.itemsize)
            # rows start at aligned addresses, whatever the vocabulary
            columns = -(-self.vocabulary // 8) * 8
            self.buffer = x.student_hidden.new_empty(
                (streams * self.chunk_rows, columns), dtype=self.dtype
            )[:, : self.vocabulary]

    def run_chunk(self, c: slice) -> None:
        z_CV, u_CV, part_FC = self._read(c)
        if self.spec.group:
            part_FC = partials.merge(vocab.gather(self.spec.group, part_FC))
        norm, gap, stats = partials.finish(part_FC)
        torch.stack(stats, out=self.result.stats[:, c])
        if self.targets_N is None:
            self.result.stats[:2, c] = torch.nan
        weight_C = None if self.weights_N is None else self.weights_N[c]
        if not self.spec.paired:
            value_C, grad_CV = self._function_of_logp(c, z_CV, norm, stats, weight_C)
        elif self.spec.k:
            assert z_CV is not None and u_CV is not None
            dtype = self.x.student_hidden.dtype
            value_C, grad_CV = topk_divergence(self.rows, self.spec, z_CV, u_CV, weight_C, dtype)
        else:
            value_C, grad_CV = self._divergence(z_CV, u_CV, norm, gap, weight_C)
        self.result.value[c] = value_C
        if grad_CV is not None:
            self._accumulate(c, grad_CV)

    def _read(self, c: slice) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Both streams' transformed logits, where they are needed, and their partials."""
        x, targets = self.x, None if self.targets_N is None else self.targets_N[c]
        teacher_weight = x.lm_head_weight if self.shared_head else x.teacher_lm_head_weight
        student_hidden, n = x.student_hidden[c], c.stop - c.start
        if x.teacher_hidden is None or self.fused:
            keep = self.weights_N is not None
            z, part = self._read_one(student_hidden, x.lm_head_weight, self.bias, targets, keep)
            if x.teacher_hidden is not None:
                assert teacher_weight is not None
                teacher = (x.teacher_hidden[c], teacher_weight, self.teacher_bias, targets)
                _, other = self._read_one(*teacher, keep=False)
                part = torch.cat([part, other, torch.zeros_like(part[:1])])
            return z, None, part
        z, u = self.buffer[:n], self.buffer[n : 2 * n]
        if self.shared_head:
            both = torch.cat([student_hidden, x.teacher_hidden[c]])
            logits(both, x.lm_head_weight, self.buffer[: 2 * n])
        else:
            assert teacher_weight is not None
            logits(student_hidden, x.lm_head_weight, z)
            logits(x.teacher_hidden[c], teacher_weight, u)
        return z, u, self.rows.stats(self.spec, z, u, targets, self.bias, self.teacher_bias)

    def _read_one(
        self,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """Partials of one stream, and its logits where they must be kept."""
        if self.fused and not keep:
            from .fused_triton import stream_stats  # Triton is optional

            return None, stream_stats(self.spec, hidden_CD, weight_VD, bias_V, targets)
        z = self.buffer[: hidden_CD.shape[0]]
        logits(hidden_CD, weight_VD, z)
        return z, self.rows.stats(self.spec, z, None, targets, bias_V)

    def _divergence(self, z, u, norm, gap, weight_C) -> tuple[Tensor, Tensor | None]:
        """Values (C,) and, given weights, the gradient with respect to raw logits (C, V)."""
        dtype = self.x.student_hidden.dtype
        if self.spec.kind not in self.rows.TWO_PASSES:
            sums, grad = self.rows.divergence(self.spec, z, u, norm, gap, weight_C, dtype)
            return sums[0], grad
        sums, grad = self.rows.divergence(self.spec, z, u, norm, None, None, dtype)
        if self.spec.group:
            vocab.sum_(self.spec.group, sums)
        if weight_C is not None:
            _, grad = self.rows.divergence(self.spec, z, u, norm, sums[1], weight_C, dtype)
        return sums[0], grad

    def _function_of_logp(
        self, c: slice, z: Tensor | None, norm: Tensor, stats: TokenStats, weight_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same for a value that depends on the student's logits through log p(y) alone."""
        x, logp = self.x, stats.logp_student
        if self.spec.kind == "logprob":
            value, slope = logp, torch.ones_like(logp)
        else:
            if x.advantage is None:
                advantage_C = stats.logp_teacher - logp
            else:
                advantage_C = x.advantage[c].to(self.dtype)
            old_C = None if x.old_logp is None else x.old_logp[c].to(self.dtype)
            value, slope = policy_gradient(logp, advantage_C, old_C, *self.spec.parameters)
        if weight_C is None:
            return value, None
        assert z is not None and self.targets_N is not None
        by = torch.where(weight_C == 0, 0, weight_C * slope)
        targets, dtype = self.targets_N[c], x.student_hidden.dtype
        return value, self.rows.softmax_grad(self.spec, z, norm, -by, by, targets, dtype)

    def _accumulate(self, c: slice, grad_CV: Tensor) -> None:
        """dH = G W, dW += G^T H, db += sum G."""
        x, out = self.x, self.result
        if out.dhidden.numel():
            out.dhidden[c] = hidden_gradient(grad_CV, x.lm_head_weight, self.dtype)
        if out.dweight.numel():
            add_weight_gradient(out.dweight, grad_CV, x.student_hidden[c])
        if out.dbias.numel():
            out.dbias.add_(grad_CV.sum(0, dtype=self.dtype))


def policy_gradient(
    logp_C: Tensor,
    advantage_C: Tensor,
    old_logp_C: Tensor | None,
    ppo_clip: float,
    importance_clip: float,
) -> tuple[Tensor, Tensor]:
    """``reference.policy_gradient`` and its derivative in log p; a clip of 0 is none."""
    if not ppo_clip and not importance_clip:
        return -advantage_C * logp_C, -advantage_C
    assert old_logp_C is not None
    ratio_C = (logp_C - old_logp_C).exp()
    if importance_clip:
        slope_C = -ratio_C.clamp(max=importance_clip) * advantage_C
        return slope_C * logp_C, slope_C
    free_C = ratio_C * advantage_C
    clipped_C = ratio_C.clamp(1 - ppo_clip, 1 + ppo_clip) * advantage_C
    return -torch.minimum(free_C, clipped_C), torch.where(free_C <= clipped_C, -free_C, 0)


def _chunk_rows(x: Inputs, spec: Spec, bytes_per_row: float) -> int:
    """Tokens of a chunk: as many as the budget allows, but at least one, and chunks of one size.

    All ranks must use the same chunk size, so it is computed from an even shard.
    """
    n, vocabulary = x.student_hidden.shape[0], x.lm_head_weight.shape[0]
    if spec.group:
        vocabulary = -(-spec.total // vocab.size(spec.group))
    most = max(1, int(spec.chunk_bytes / (bytes_per_row * max(1, vocabulary))))
    return max(1, -(-n // -(-n // most))) if n else 1


def _row_operations(impl: str):
    if impl == "torch":
        return rows_torch
    from . import rows_triton  # Triton is optional

    return rows_triton


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
