"""The chunk loop: hidden states -> per-token values and statistics and, if asked for, gradients.
(N, V) logits never exist as a whole.

Shapes: N tokens, C tokens of a chunk, V rows of this rank's lm_head, D hidden size.
  z_CV = h_CD @ w_VD.T   student logits, float32,  p = softmax(z)
  u_CV = g_CD @ v_VD.T   teacher logits, float32,  q = softmax(u)

Per chunk: one matmul for the logits (both streams stacked if they share an lm_head), row statistics
(merged over tensor-parallel ranks), values, and the gradient G with respect to the logits. What
becomes of G depends on how much of it there is:

  run_kept  G of all tokens is kept, in the inputs' dtype, for the backward, where the upstream
            gradient is known: ``products`` makes dH and dW of it by one matmul each
  run       G of a chunk is left in the logits' own memory, and becomes dH and an addend of dW at
            once: all that can be done for more tokens than that, if their weights are known

Logits, statistics and sums of dW are float32 whatever the inputs' dtype (float64 stays float64).
Oracle: reference.py. Derivations: kernels/README.md.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import vocab_parallel as vocab
from . import partials, rows_torch
from .matmul import (
    accumulation_dtype,
    add_weight_gradient,
    chunks,
    hidden_gradient,
    logits,
    narrow,
    weight_gradient,
)
from .options import Inputs, Spec
from .partials import TokenStats
from .topk_rows import topk_divergence

FUSED_BYTES_PER_ROW = 0.25
"""Memory of the fused kernel's partials for one token and one row of the lm_head: 16 bytes for a
tile of at least 64 rows."""
CHUNK_MULTIPLE = 128
"""Tokens of a chunk are a multiple of the matmuls' tiles, where a chunk holds several."""
HEADROOM = {torch.float16: 2.0**7}
"""What G is multiplied by before it is rounded, by dtype: most of its entries in a real vocabulary
are too small for float16, and none is larger than the largest advantage."""
ROW_MULTIPLE = 16
"""Rows of logits start at addresses that a vector access may have, whatever the vocabulary."""


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


class Kept(NamedTuple):
    """Values, statistics and the gradients with respect to the logits, divided by ``scale``: of
    sum token_weights * value if token weights are given, else of each token's value."""

    value: Tensor
    """(N,)"""
    stats: Tensor
    """(6, N)"""
    grad: Tensor
    """(N, V and what fills its rows up), in the inputs' dtype."""
    scale: Tensor
    """()"""


def empty_kept(x: Inputs) -> Kept:
    """The tensors of a ``Kept``, for the loop to fill."""
    value, stats, *_, scale = empty_result(x)
    n, vocabulary = x.student_hidden.shape[0], x.lm_head_weight.shape[0]
    return Kept(value, stats, x.student_hidden.new_empty((n, row_length(vocabulary))), scale)


def row_length(vocabulary: int) -> int:
    """Numbers from the begin of one row of logits to that of the next."""
    return -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE


def kept_bytes(x: Inputs, spec: Spec) -> int:
    """What ``run_kept`` would keep."""
    n, item = x.student_hidden.shape[0], x.student_hidden.element_size()
    return n * row_length(_even_vocabulary(x, spec)) * item


def _even_vocabulary(x: Inputs, spec: Spec) -> int:
    """Rows of this rank's lm_head; of an even shard's, where all ranks must decide alike."""
    if not spec.group:
        return x.lm_head_weight.shape[0]
    return -(-spec.total // vocab.size(spec.group))


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
        result.scale.div_(HEADROOM.get(x.student_hidden.dtype, 1.0))
        weights_N = weights_N / result.scale
    _Loop(x, spec, weights_N if any(wanted) else None, result).run()
    return result


@torch.no_grad()
def run_kept(
    x: Inputs, spec: Spec, weights_N: Tensor | None = None, counted_N: Tensor | None = None
) -> Kept:
    """Values, statistics and the gradients with respect to the logits of all tokens.

    Args:
        counted_N: bool; other rows have value, statistics and gradient 0.
    """
    kept = empty_kept(x)
    value, stats, grad, scale = kept
    vocabulary = x.lm_head_weight.shape[0]
    grad[:, vocabulary:] = 0
    scale.fill_(1 / HEADROOM.get(grad.dtype, 1.0))
    known = weights_N is not None
    if weights_N is None:
        weights_N = torch.ones_like(value)
    elif len(weights_N):
        # a power of two, so that multiplying by it rounds nothing
        scale.mul_(torch.exp2(torch.frexp(weights_N.abs().amax())[1]))
        scale.clamp_(min=torch.finfo(scale.dtype).tiny)
    weights_N = weights_N / scale
    if counted_N is not None:
        weights_N = torch.where(counted_N, weights_N, 0)
    result = empty_result(x)._replace(value=value, stats=stats)
    _Loop(x, spec, weights_N, result, grad, finite=not known).run()
    if counted_N is not None:
        for t in (value, stats):
            t.masked_fill_(~counted_N, 0)
    return kept


@torch.no_grad()
def products(
    grad_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor, scale_N: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """diag(s) G W, G^T diag(s) H and G^T s, in the inputs' dtype; empty if not wanted.

    Args:
        scale_N: s, in float32 (float64 for float64); a row of 0 gives nothing.
    """
    outs = [hidden_ND.new_empty(0) for _ in wanted]
    with torch.autocast(hidden_ND.device.type, enabled=False):
        grad_NV = grad_NV[:, : weight_VD.shape[0]]
        if wanted[0]:
            dhidden = hidden_gradient(grad_NV, weight_VD, scale_N.dtype)
            out = torch.empty_like(dhidden, dtype=hidden_ND.dtype)
            outs[0] = torch.mul(dhidden, scale_N[:, None], out=out)
            del dhidden
        if wanted[1]:
            outs[1] = weight_gradient(grad_NV, hidden_ND, scale_N)
        if wanted[2]:
            dbias = scale_N.new_zeros(weight_VD.shape[0])
            for c in chunks(len(scale_N), CHUNK_MULTIPLE):
                dbias += scale_N[c] @ grad_NV[c].to(scale_N.dtype)
            outs[2] = dbias
    return outs[0], outs[1], outs[2]


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
        self,
        x: Inputs,
        spec: Spec,
        weights_N: Tensor | None,
        result: Result,
        grad: Tensor | None = None,
        finite: bool = False,
    ):
        """
        Args:
            weights_N: factors of G; None: no G.
            grad: where G is kept; None: it becomes dH and dW.
            finite: rows of G whose value is infinite are 0, where G would be NaN.
        """
        self.spec, self.result, self.kept, self.finite = spec, result, grad, finite
        self.weights_N = weights_N
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
            return
        self.chunk_rows = _chunk_rows(x, spec, streams * self.dtype.itemsize)
        self.vocabulary = x.lm_head_weight.shape[0]
        shape = (streams * self.chunk_rows, row_length(self.vocabulary))
        self.buffer = x.student_hidden.new_empty(shape, dtype=self.dtype)
        # Triton's kernels read rows to their end, where -inf is no logit; transformed it would be
        plain = spec.temperature == 1 and not spec.softcap and x.bias is x.teacher_bias is None
        self.read = shape[1] if plain and spec.impl in ("triton", "fused") else self.vocabulary
        self.buffer[:, self.vocabulary :] = -torch.inf

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

    def run(self) -> None:
        with torch.autocast(self.x.student_hidden.device.type, enabled=False):
            for c in chunks(self.x.student_hidden.shape[0], self.chunk_rows):
                self.run_chunk(c)
        if self.spec.group and self.values_are_partial:
            vocab.sum_(self.spec.group, self.result.value)

    def run_chunk(self, c: slice) -> None:
        x = self.x.map_tokens(lambda t: t[c])
        z_CV = u_CV = grad_CV = None
        if not self.fused:
            z_CV, u_CV = self._logits(x)
        elif self.weights_N is not None:
            z_CV, _ = self._logits(x._replace(teacher_hidden=None))
        if self.weights_N is not None:
            grad_CV = self._place_of_grad(c, z_CV)
        blocks = iter([slice(0, c.stop - c.start)])
        if z_CV is not None and self.spec.impl == "torch" and not self.spec.group:
            blocks = rows_torch.blocks(z_CV)
        for r in blocks:
            of_rows = (None if t is None else t[r] for t in (z_CV, u_CV, grad_CV))
            self._run_rows(slice(c.start + r.start, c.start + r.stop), *of_rows)
        if grad_CV is not None and self.kept is None:
            self._accumulate(c, grad_CV[:, : self.vocabulary])
            if grad_CV.dtype == self.dtype:  # G has overwritten what fills the rows up
                self.buffer[:, self.vocabulary :] = -torch.inf

    def _run_rows(
        self, c: slice, z_CV: Tensor | None, u_CV: Tensor | None, grad_CV: Tensor | None
    ) -> None:
        """Values, statistics and G of raw logits."""
        x = self.x.map_tokens(lambda t: t[c])
        weight_C = None if self.weights_N is None else self.weights_N[c]
        norm, gap = self._read(x, c, z_CV, u_CV)
        if not self.spec.paired:
            value_C = self._function_of_logp(x, c, z_CV, norm, weight_C, grad_CV)
        elif self.spec.k:
            assert z_CV is not None and u_CV is not None
            value_C = topk_divergence(
                self.rows, self.spec, z_CV, u_CV, weight_C, grad_CV, self.finite
            )
        else:
            value_C = self._divergence(z_CV, u_CV, norm, gap, weight_C, grad_CV)
        self.result.value[c] = value_C

    def _place_of_grad(self, c: slice, z_CV: Tensor | None) -> Tensor:
        """Its rows of what is kept, or the memory of the student's logits."""
        if self.kept is not None:
            return self.kept[c, : self.read]
        assert z_CV is not None
        return narrow(z_CV, self.x.student_hidden.dtype)

    def _read(
        self, x: Inputs, c: slice, z: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Norm and gap; statistics. The logits are transformed in place."""
        out_6C = self.result.stats[:, c]
        given = (x.targets, x.bias, x.teacher_bias)
        if self.fused:
            part_FC = self._read_fused(x, z)
        else:
            assert z is not None
            if not self.spec.group:
                return self.rows.whole_stats(self.spec, z, u, *given, out_6C)
            part_FC = self.rows.stats(self.spec, z, u, *given)
        if self.spec.group:
            part_FC = partials.merge(vocab.gather(self.spec.group, part_FC))
        norm, gap, stats = partials.finish(part_FC)
        torch.stack(stats, out=out_6C)
        if x.targets is None:
            out_6C[:2] = torch.nan
        return norm, gap

    def _logits(self, x: Inputs) -> tuple[Tensor, Tensor | None]:
        """Raw logits of the student and, if there is one, of the teacher."""
        n = x.student_hidden.shape[0]
        z, u = self.buffer[:n], None
        if x.teacher_hidden is None:
            self._multiply(x.student_hidden, x.lm_head_weight, z)
        else:
            u = self.buffer[n : 2 * n]
            if x.teacher_lm_head_weight is None:
                both = torch.cat([x.student_hidden, x.teacher_hidden])
                self._multiply(both, x.lm_head_weight, self.buffer[: 2 * n])
            else:
                self._multiply(x.student_hidden, x.lm_head_weight, z)
                self._multiply(x.teacher_hidden, x.teacher_lm_head_weight, u)
            u = u[:, : self.read]
        return z[:, : self.read], u

    def _multiply(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        logits(hidden, weight, out[:, : self.vocabulary])

    def _read_fused(self, x: Inputs, z: Tensor | None) -> Tensor:
        """Partials, one stream at a time, from logits where they are formed for a gradient."""
        from .fused_triton import stream_stats  # Triton is optional

        if z is None:
            part = stream_stats(self.spec, x.student_hidden, x.lm_head_weight, x.bias, x.targets)
        else:
            part = self.rows.stats(self.spec, z, None, x.targets, x.bias)
        if x.teacher_hidden is not None:
            weight = x.teacher_lm_head_weight
            weight = x.lm_head_weight if weight is None else weight
            other = stream_stats(self.spec, x.teacher_hidden, weight, x.teacher_bias, x.targets)
            part = torch.cat([part, other, torch.zeros_like(part[:1])])
        return part

    def _divergence(self, z, u, norm, gap, weight_C, grad_CV) -> Tensor:
        """Values (C,); given weights, G into ``grad_CV``."""
        if self.spec.kind not in rows_torch.TWO_PASSES:
            if self.finite and self.spec.kind in rows_torch.CENTRED:
                weight_C = weight_C * gap.isfinite()
            return self.rows.divergence(self.spec, z, u, norm, gap, weight_C, grad_CV)[0]
        if not self.spec.group:
            return self.rows.divergence(self.spec, z, u, norm, None, weight_C, grad_CV)[0]
        sums = self.rows.divergence(self.spec, z, u, norm, None)
        vocab.sum_(self.spec.group, sums)
        if weight_C is not None:
            self.rows.divergence(self.spec, z, u, norm, sums[1], weight_C, grad_CV)
        return sums[0]

    def _function_of_logp(
        self, x: Inputs, c: slice, z, norm, weight_C: Tensor | None, grad_CV: Tensor | None
    ) -> Tensor:
        """The same for a value that depends on the student's logits through log p(y) alone."""
        logp, logp_teacher = self.result.stats[:2, c]
        advantage_C = x.advantage
        if self.spec.kind == "logprob":
            value, slope = logp, torch.ones_like(logp)
        else:
            if advantage_C is None:
                advantage_C = logp_teacher - logp
            value, slope = policy_gradient(logp, advantage_C, x.old_logp, *self.spec.parameters)
        if weight_C is None or grad_CV is None:
            return value
        if self.finite:
            weight_C = weight_C * slope.isfinite()
        by = torch.where(weight_C == 0, 0, weight_C * slope)
        self.rows.softmax_grad(self.spec, z, norm, -by, by, x.targets, grad_CV)
        return value

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
    """Tokens of a chunk: as many as the budget allows, but at least one, and chunks of one size."""
    n, vocabulary = x.student_hidden.shape[0], _even_vocabulary(x, spec)
    most = max(1, int(spec.chunk_bytes / (bytes_per_row * max(1, vocabulary))))
    rows = max(1, -(-n // -(-n // most))) if n else 1
    rounded = -(-rows // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    return rounded if rounded <= most else rows


def _row_operations(impl: str):
    if impl == "torch":
        return rows_torch.Rows()
    from . import rows_triton  # Triton is optional

    return rows_triton
