"""The chunk loop: hidden states -> per-token values and statistics and, if asked for, gradients.
(N, V) logits never exist as a whole.

Shapes: N tokens, C tokens of a chunk, B of a block, V rows of this rank's lm_head, D hidden size.
  z_CV = h_CD @ w_VD.T   student logits, float32,  p = softmax(z)
  u_CV = g_CD @ v_VD.T   teacher logits, float32,  q = softmax(u)

Per chunk: one matmul for the logits (both streams stacked if they share an lm_head), row statistics
(merged over tensor-parallel ranks), values, and G, the gradient of each value with respect to its
row of logits. dH = diag(s) G W and dW = G^T diag(s) H, where s is the upstream gradient of each
value. What becomes of G depends on how much of it there is:

  run_kept  G of all tokens is kept, in the inputs' dtype, for the backward, where s is known:
            ``products`` makes dH and dW of it by one matmul each
  run       s is known. G of a block of chunks, as many as there is room for, becomes dH and an
            addend of dW; if there is room for none, that of each chunk, in the logits' own memory

Rows of G are 0 where statistics are no finite numbers (``defined`` is False); s is then no number,
unless it is 0. So a row whose s is 0 adds nothing, whatever its hidden states are.

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
from .checks import check_targets
from .matmul import (
    accumulation_dtype,
    add_weight_gradient,
    bias_gradient,
    chunks,
    hidden_gradient,
    logits,
    narrow,
    scaled,
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
are too small for float16."""
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
    """Values, statistics and G."""

    value: Tensor
    """(N,)"""
    stats: Tensor
    """(6, N)"""
    grad: Tensor
    """(N, V and what fills its rows up), in the inputs' dtype, times its ``HEADROOM``."""
    defined: Tensor
    """(N,) bool."""


def empty_kept(x: Inputs) -> Kept:
    """The tensors of a ``Kept``, for the loop to fill."""
    value, stats, *_ = empty_result(x)
    n, vocabulary = x.student_hidden.shape[0], x.lm_head_weight.shape[0]
    grad = x.student_hidden.new_empty((n, row_length(vocabulary)))
    return Kept(value, stats, grad, value.new_empty(n, dtype=torch.bool))


def row_length(vocabulary: int) -> int:
    """Numbers from the begin of one row of logits to that of the next."""
    return -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE


def kept_bytes(x: Inputs, spec: Spec) -> int:
    """What ``run_kept`` would keep."""
    return x.student_hidden.shape[0] * _row_bytes(x, spec)


def _row_bytes(x: Inputs, spec: Spec) -> int:
    """Of a row of G."""
    return row_length(_even_vocabulary(x, spec)) * x.student_hidden.element_size()


def _even_vocabulary(x: Inputs, spec: Spec) -> int:
    """Rows of this rank's lm_head; of an even shard's, where all ranks must decide alike."""
    if not spec.group:
        return x.lm_head_weight.shape[0]
    return -(-spec.total // vocab.size(spec.group))


def empty_result(x: Inputs, wanted: Sequence[bool] = ()) -> Result:
    """A result's tensors, for the loop to fill.

    Args:
        wanted: for which of ``DIFFERENTIABLE`` a gradient is asked for.
    """
    dtype = accumulation_dtype(x.student_hidden.dtype)
    new = functools.partial(torch.empty, device=x.student_hidden.device)
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
    result, n = empty_result(x, wanted), x.student_hidden.shape[0]
    with torch.autocast(x.student_hidden.device.type, enabled=False):
        if weights_N is None or not any(wanted) or not n:
            for summed in (result.dweight, result.dbias, result.scale):
                summed.zero_()
            loop = _Loop(x, spec, result.value, result.stats)
            loop.run(slice(0, n))
        else:
            loop = _Loop(
                x, spec, result.value, result.stats, result.value.new_empty(n, dtype=torch.bool)
            )
            _differentiate(loop, result, weights_N)
        loop.finish()
    return result


def _differentiate(loop: "_Loop", result: Result, weights_N: Tensor) -> None:
    """Run the loop in blocks, and add up their gradients."""
    x, spec, n = loop.x, loop.spec, len(weights_N)
    # factors are rounded to the inputs' dtype with the hidden states, and a mean over many tokens
    # would underflow in float16
    tiny = torch.finfo(weights_N.dtype).tiny
    torch.amax(weights_N.abs().clamp_(min=tiny), 0, out=result.scale)
    weights_N = weights_N / result.scale
    result.scale.div_(loop.headroom)
    rows, grad = loop.chunk_rows, None
    if most := spec.grad_bytes // (rows * _row_bytes(x, spec)):
        rows *= _evenly(-(-n // rows), most)
        grad = x.student_hidden.new_empty((min(rows, n), row_length(loop.vocabulary)))
    for c in chunks(n, rows):
        grad_BV, factor_B, first = loop.run(c, grad), weights_N[c], c.start == 0
        assert grad_BV is not None and loop.defined is not None
        if spec.kind == "sampled_token":
            logp, logq = result.stats[:2, c]
            old_logp = None if x.old_logp is None else x.old_logp[c]
            result.value[c], slope = policy_gradient(logp, logq - logp, old_logp, *spec.parameters)
            factor_B = torch.where(factor_B == 0, 0, factor_B * slope)
        factor_B = where_defined(factor_B, loop.defined[c])
        if result.dhidden.numel():
            dhidden = hidden_gradient(grad_BV, x.lm_head_weight, factor_B.dtype)
            torch.mul(dhidden, factor_B[:, None], out=result.dhidden[c])
            del dhidden
        if result.dweight.numel():
            hidden = scaled(x.student_hidden[c], factor_B)
            add_weight_gradient(result.dweight, grad_BV, hidden, first)
        if result.dbias.numel():
            dbias = bias_gradient(grad_BV, factor_B)
            result.dbias.copy_(dbias) if first else result.dbias.add_(dbias)


@torch.no_grad()
def run_kept(x: Inputs, spec: Spec) -> Kept:
    """Values, statistics and G of all tokens."""
    kept = empty_kept(x)
    kept.grad[:, x.lm_head_weight.shape[0] :] = 0
    with torch.autocast(x.student_hidden.device.type, enabled=False):
        loop = _Loop(x, spec, kept.value, kept.stats, kept.defined)
        loop.run(slice(0, len(kept.value)), kept.grad)
        loop.finish()
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
            outs[2] = bias_gradient(grad_NV, scale_N)
    return outs[0], outs[1], outs[2]


def where_defined(factor_N: Tensor, defined_N: Tensor) -> Tensor:
    """NaN in the other rows, unless they are 0."""
    return torch.where(defined_N | (factor_N == 0), factor_N, torch.nan)


class _Loop:
    """The buffers that the chunks of a call share, and what is done with each chunk."""

    def __init__(
        self, x: Inputs, spec: Spec, value: Tensor, stats: Tensor, defined: Tensor | None = None
    ):
        """
        Args:
            value, stats, defined: (N,), (6, N), (N,): what is filled. None: no G.
        """
        check_targets(x, spec.total)
        self.spec, self.value, self.stats, self.defined = spec, value, stats, defined
        self.headroom = value.new_full((), HEADROOM.get(x.student_hidden.dtype, 1.0))
        self.dtype = value.dtype
        self.fused = spec.impl == "fused" and not spec.paired
        self.rows = _row_operations(spec.impl)
        self.values_are_partial = (
            spec.paired and not spec.k and spec.kind not in rows_torch.TWO_PASSES
        )
        self.x = x = self._prepared(x)
        streams = 2 if x.teacher_hidden is not None and not self.fused else 1
        self.vocabulary = x.lm_head_weight.shape[0]
        if self.fused and defined is None:
            self.chunk_rows = _chunk_rows(x, spec, FUSED_BYTES_PER_ROW)
            return
        self.chunk_rows = _chunk_rows(x, spec, streams * self.dtype.itemsize)
        shape = (streams * self.chunk_rows, row_length(self.vocabulary))
        self.buffer = x.student_hidden.new_empty(shape, dtype=self.dtype)
        # Triton's kernels read rows to their end, where -inf is no logit; transformed it would be
        plain = spec.temperature == 1 and not spec.softcap and x.bias is x.teacher_bias is None
        self.read = shape[1] if plain and spec.impl in ("triton", "fused") else self.vocabulary

    def _prepared(self, x: Inputs) -> Inputs:
        """Vectors in the logits' dtype, targets among this rank's rows, the teacher's bias."""
        vectors = [(name, getattr(x, name)) for name in ("bias", "teacher_bias", "old_logp")]
        x = x._replace(**{name: t.to(self.dtype) for name, t in vectors if t is not None})
        if x.targets is not None:
            rows = x.lm_head_weight.shape[0]
            x = x._replace(targets=vocab.local_targets(x.targets, self.spec.start, rows))
        if x.teacher_hidden is not None and x.teacher_lm_head_weight is None:
            x = x._replace(teacher_bias=x.bias)
        return x

    def run(self, block: slice, grad: Tensor | None = None) -> Tensor | None:
        """Values, statistics and, where ``defined`` was given, G of a block of tokens, (B, V).

        Args:
            grad: (B or more, V or more), where G is put. None: in the logits' memory, if the block
                is one chunk.
        """
        n = block.stop - block.start
        if not self.fused or self.defined is not None:
            self.buffer[:, self.vocabulary :] = -torch.inf  # G may have taken its place
        if grad is None and self.defined is not None:
            grad = narrow(self.buffer[:n], self.x.student_hidden.dtype)
        for c in chunks(n, self.chunk_rows):
            tokens = slice(block.start + c.start, block.start + c.stop)
            self._run_chunk(tokens, None if grad is None else grad[c, : self.read])
        return None if grad is None else grad[:n, : self.vocabulary]

    def finish(self) -> None:
        """Add up what several ranks have of the values."""
        if self.spec.group and self.values_are_partial:
            vocab.sum_(self.spec.group, self.value)

    def _run_chunk(self, c: slice, grad_CV: Tensor | None) -> None:
        x = self.x.map_tokens(lambda t: t[c])
        z_CV = u_CV = None
        if not self.fused:
            z_CV, u_CV = self._logits(x)
        elif self.defined is not None:
            z_CV, _ = self._logits(x._replace(teacher_hidden=None))
        blocks = iter([slice(0, c.stop - c.start)])
        if z_CV is not None and self.spec.impl == "torch" and not self.spec.group:
            blocks = rows_torch.blocks(z_CV)
        for r in blocks:
            of_rows = (None if t is None else t[r] for t in (z_CV, u_CV, grad_CV))
            self._run_rows(slice(c.start + r.start, c.start + r.stop), *of_rows)

    def _run_rows(
        self, c: slice, z_CV: Tensor | None, u_CV: Tensor | None, grad_CV: Tensor | None
    ) -> None:
        """Values, statistics and G of raw logits."""
        x = self.x.map_tokens(lambda t: t[c])
        norm, gap = self._read(x, c, z_CV, u_CV)
        weight_C = None if grad_CV is None else self._weight(c, gap)
        if not self.spec.paired:
            value_C = self.stats[0, c]
            if weight_C is not None:
                assert z_CV is not None and grad_CV is not None
                given = (z_CV, norm, -weight_C, weight_C, x.targets, grad_CV)
                self.rows.softmax_grad(self.spec, *given)
        elif self.spec.k:
            assert z_CV is not None and u_CV is not None
            value_C = topk_divergence(self.rows, self.spec, z_CV, u_CV, weight_C, grad_CV)
            if self.defined is not None:
                self.defined[c] = value_C.isfinite()
        else:
            value_C = self._divergence(z_CV, u_CV, norm, gap, weight_C, grad_CV)
        self.value[c] = value_C

    def _weight(self, c: slice, gap: Tensor | None) -> Tensor:
        """What rows of G are multiplied by, (C,)."""
        assert self.defined is not None
        if self.spec.kind in rows_torch.CENTRED and not self.spec.k:
            assert gap is not None
            of_row = gap  # which is never -inf
        else:
            of_row = self.stats[4, c]
            of_row = (of_row + self.stats[5, c] if self.spec.paired else of_row).abs()
        torch.lt(of_row, torch.inf, out=self.defined[c])
        return self.defined[c] * self.headroom

    def _read(
        self, x: Inputs, c: slice, z: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Norm and gap; statistics. The logits are transformed in place."""
        out_6C = self.stats[:, c]
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
            return self.rows.divergence(self.spec, z, u, norm, gap, weight_C, grad_CV)[0]
        if not self.spec.group:
            return self.rows.divergence(self.spec, z, u, norm, None, weight_C, grad_CV)[0]
        sums = self.rows.divergence(self.spec, z, u, norm, None)
        vocab.sum_(self.spec.group, sums)
        if weight_C is not None:
            self.rows.divergence(self.spec, z, u, norm, sums[1], weight_C, grad_CV)
        return sums[0]


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
    rows = _evenly(n, most)
    rounded = -(-rows // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    return rounded if rounded <= most else rows


def _evenly(n: int, most: int) -> int:
    """The size of parts of n, where as few as possible have at most ``most``."""
    return max(1, -(-n // -(-n // most))) if n else 1


def _row_operations(impl: str):
    if impl == "torch":
        return rows_torch.Rows()
    from . import rows_triton  # Triton is optional

    return rows_triton
