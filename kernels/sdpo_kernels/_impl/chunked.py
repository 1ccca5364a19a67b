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
        weights_N = None if weights_N is None else torch.where(mask, weights_N, 0)
        out = run(x.silenced(mask), spec, weights_N, wanted)
        value, stats = (torch.where(mask, t, 0) for t in (out.value, out.stats))
        return out._replace(value=value, stats=stats)
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
        self.spec, self.result = spec, result
        self.weights_N = weights_N if gradient else None
        self.dtype = result.value.dtype
        self.fused = spec.impl == "fused" and not spec.paired
        self.rows = _row_operations(spec.impl)
        self.values_are_partial = (
            spec.paired and not spec.k and spec.kind not in rows_torch.TWO_PASSES
        )
        self.x = x = self._prepared(x)
        streams = 2 if x.teacher_hidden is not None and not self.fused else 1
        if self.fused and self.weights_N is None:
            self.chunk_rows = _chunk_rows(x, spec, FUSED_BYTES_PER_ROW)
        else:
            self.chunk_rows = _chunk_rows(x, spec, streams * self.dtype.itemsize)
            # rows start at aligned addresses, whatever the vocabulary
            vocabulary = x.lm_head_weight.shape[0]
            columns = -(-vocabulary // 8) * 8
            self.buffer = x.student_hidden.new_empty(
                (streams * self.chunk_rows, columns), dtype=self.dtype
            )[:, :vocabulary]

    def _prepared(self, x: Inputs) -> Inputs:
        """Vectors in the logits' dtype, targets among this rank's rows, the teacher's bias."""
        names = ("bias", "teacher_bias", "old_logp", "advantage")
        vectors = [(name, getattr(x, name)) for name in names]
        x = x._replace(**{name: t.to(self.dtype) for name, t in vectors if t is not None})
        if x.targets is not None:
            rows = x.lm_head_weight.shape[0]
            x = x._replace(targets=vocab.local_targets(x.targets, self.spec.start, rows))
        if x.teacher_hidden is not None and x.teacher_lm_head_weight is None:
            x = x._replace(teacher_bias=x.bias)
        return x

    def run_chunk(self, c: slice) -> None:
        x = self.x.map_tokens(lambda t: t[c])
        weight_C = None if self.weights_N is None else self.weights_N[c]
        z_CV, u_CV, part_FC = self._read(x)
        if self.spec.group:
            part_FC = partials.merge(vocab.gather(self.spec.group, part_FC))
        norm, gap, stats = partials.finish(part_FC)
        torch.stack(stats, out=self.result.stats[:, c])
        if x.targets is None:
            self.result.stats[:2, c] = torch.nan
        if not self.spec.paired:
            value_C, grad_CV = self._function_of_logp(x, z_CV, norm, stats, weight_C)
        elif self.spec.k:
            assert z_CV is not None and u_CV is not None
            dtype = x.student_hidden.dtype
            value_C, grad_CV = topk_divergence(self.rows, self.spec, z_CV, u_CV, weight_C, dtype)
        else:
            value_C, grad_CV = self._divergence(z_CV, u_CV, norm, gap, weight_C)
        self.result.value[c] = value_C
        if grad_CV is not None:
            self._accumulate(c, grad_CV)

    def _read(self, x: Inputs) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Both streams' transformed logits, where they are needed, and their partials."""
        if self.fused:
            return self._read_fused(x)
        n = x.student_hidden.shape[0]
        z, u = self.buffer[:n], None
        if x.teacher_hidden is None:
            logits(x.student_hidden, x.lm_head_weight, z)
        else:
            u = self.buffer[n : 2 * n]
            if x.teacher_lm_head_weight is None:
                both = torch.cat([x.student_hidden, x.teacher_hidden])
                logits(both, x.lm_head_weight, self.buffer[: 2 * n])
            else:
                logits(x.student_hidden, x.lm_head_weight, z)
                logits(x.teacher_hidden, x.teacher_lm_head_weight, u)
        return z, u, self.rows.stats(self.spec, z, u, x.targets, x.bias, x.teacher_bias)

    def _read_fused(self, x: Inputs) -> tuple[Tensor | None, None, Tensor]:
        """One stream at a time, and logits of the student's only if it gets a gradient."""
        from .fused_triton import stream_stats  # Triton is optional

        z = None
        if self.weights_N is None:
            part = stream_stats(self.spec, x.student_hidden, x.lm_head_weight, x.bias, x.targets)
        else:
            z = self.buffer[: x.student_hidden.shape[0]]
            logits(x.student_hidden, x.lm_head_weight, z)
            part = self.rows.stats(self.spec, z, None, x.targets, x.bias)
        if x.teacher_hidden is not None:
            weight = x.teacher_lm_head_weight
            weight = x.lm_head_weight if weight is None else weight
            other = stream_stats(self.spec, x.teacher_hidden, weight, x.teacher_bias, x.targets)
            part = torch.cat([part, other, torch.zeros_like(part[:1])])
        return z, None, part

    def _divergence(self, z, u, norm, gap, weight_C) -> tuple[Tensor, Tensor | None]:
        """Values (C,) and, given weights, the gradient with respect to raw logits (C, V)."""
        dtype = self.x.student_hidden.dtype
        if self.spec.kind not in rows_torch.TWO_PASSES:
            sums, grad = self.rows.divergence(self.spec, z, u, norm, gap, weight_C, dtype)
            return sums[0], grad
        sums, grad = self.rows.divergence(self.spec, z, u, norm, None, None, dtype)
        if self.spec.group:
            vocab.sum_(self.spec.group, sums)
        if weight_C is not None:
            _, grad = self.rows.divergence(self.spec, z, u, norm, sums[1], weight_C, dtype)
        return sums[0], grad

    def _function_of_logp(
        self, x: Inputs, z: Tensor | None, norm: Tensor, stats: TokenStats, weight_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same for a value that depends on the student's logits through log p(y) alone."""
        logp, advantage_C = stats.logp_student, x.advantage
        if self.spec.kind == "logprob":
            value, slope = logp, torch.ones_like(logp)
        else:
            if advantage_C is None:
                advantage_C = stats.logp_teacher - logp
            value, slope = policy_gradient(logp, advantage_C, x.old_logp, *self.spec.parameters)
        if weight_C is None:
            return value, None
        assert z is not None
        by, dtype = torch.where(weight_C == 0, 0, weight_C * slope), x.student_hidden.dtype
        return value, self.rows.softmax_grad(self.spec, z, norm, -by, by, x.targets, dtype)

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
