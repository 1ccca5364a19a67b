"""The chunk loop: hidden states -> per-token values, statistics and, where weights are known, the
gradients of their weighted sum. Never (N, V) logits.

Shapes: N tokens, C tokens of a chunk, V rows of this rank's head, D hidden size.
  z_CV = h_CD @ w_VD.T   policy logits, float32,     p = softmax(z)
  u_CV = g_CD @ v_VD.T   hindsight logits, float32,  q = softmax(u)

Per chunk: one product for the logits (both streams stacked where they share a head), row statistics
(merged over tensor-parallel ranks), values and the gradient in the logits' own memory, and two
products for dH and dW. Logits, statistics and dW are float32 whatever the inputs' dtype (float64
stays float64). Oracle: reference.py. Derivations: kernels/README.md.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import vocab_parallel as vocab
from ..topk import topk_divergence
from . import partials
from . import rows_torch as torch_rows
from .matmul import (
    accumulation_dtype,
    add_weight_gradient,
    chunks,
    hidden_gradient,
    logits,
)
from .options import Spec
from .partials import RowStats

PAIRED = ("reverse_kl", "forward_kl", "jsd", "topk")
"""Kinds that need both streams' logits at once."""
FUSED_WORD_BYTES = 0.25
"""Of the fused kernel's partials, per token: 16 bytes a tile of at least 64 words."""
PER_TOKEN = ("hidden", "hindsight", "targets", "old_logp", "advantage")


class Inputs(NamedTuple):
    """The tensors of a call."""

    hidden: Tensor
    """(N, D)"""
    weight: Tensor
    """(V, D)"""
    hindsight: Tensor | None = None
    """(N, D')"""
    hindsight_weight: Tensor | None = None
    """(V, D'); None: the policy's."""
    bias: Tensor | None = None
    """(V,)"""
    hindsight_bias: Tensor | None = None
    """(V,); with the policy's head, the policy's."""
    targets: Tensor | None = None
    """(N,)"""
    old_logp: Tensor | None = None
    """(N,), of the sampling policy."""
    advantage: Tensor | None = None
    """(N,); None: formed from the two streams."""
    mask: Tensor | None = None
    """(N,) bool"""

    def rows(self, index: Tensor) -> "Inputs":
        """The tokens ``index``."""
        take = {name: t[index] for name in PER_TOKEN if (t := getattr(self, name)) is not None}
        return self._replace(mask=None, **take)


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


NOTHING = Wanted()


class Result(NamedTuple):
    """``value`` (N,); ``stats`` (6, N): see ``TokenStats``; gradients of sum weights * value,
    divided by ``scale`` (), empty where not wanted. dH is in the inputs' dtype, dW in float32."""

    value: Tensor
    stats: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor
    scale: Tensor


def empty_result(x: Inputs, wanted: Wanted, zero: bool = False) -> Result:
    """A result's tensors, for the driver to fill."""
    dtype = accumulation_dtype(x.hidden.dtype)
    n = x.hidden.shape[0]
    new = functools.partial((torch.zeros if zero else torch.empty), device=x.hidden.device)
    vocabulary = x.weight.shape[0]
    return Result(
        value=new(n, dtype=dtype),
        stats=new(6, n, dtype=dtype),
        dhidden=new(x.hidden.shape if wanted.hidden else 0, dtype=x.hidden.dtype),
        dweight=new(x.weight.shape if wanted.weight else 0, dtype=dtype),
        dbias=new(vocabulary if wanted.bias else 0, dtype=dtype),
        scale=new((), dtype=dtype),
    )


@torch.no_grad()
def run(x: Inputs, spec: Spec, weights_N: Tensor | None = None, wanted: Wanted = NOTHING) -> Result:
    """Values and statistics and, given weights, gradients of the weighted sum of the values."""
    if x.mask is not None:
        return _run_masked(x, spec, weights_N, wanted)
    result = empty_result(x, wanted)
    for summed in (result.dweight, result.dbias, result.stats):
        summed.zero_()
    result.scale.fill_(1)
    n = x.hidden.shape[0]
    if weights_N is not None and n:
        # G is rounded to the inputs' dtype, as every mixed-precision linear layer does, but
        # relative to the largest weight: a mean over many tokens would underflow in float16
        tiny = torch.finfo(result.scale.dtype).tiny
        torch.amax(weights_N.abs().to(result.scale.dtype).clamp_(min=tiny), 0, out=result.scale)
        weights_N = weights_N / result.scale
    with torch.autocast(x.hidden.device.type, enabled=False):
        _Loop(x, spec, weights_N, wanted, result).run()
    if spec.group and spec.kind in ("reverse_kl", "forward_kl"):
        vocab.sum_(spec.group, result.value)
    return result


def _run_masked(x: Inputs, spec: Spec, weights_N: Tensor | None, wanted: Wanted) -> Result:
    """A mask in host memory drops rows; one on the device only silences them, as their number is
    not known here without waiting for the device."""
    mask, device = x.mask, x.hidden.device
    assert mask is not None
    if device.type != "cpu" and mask.device == device:
        keep = mask[:, None]
        quiet = x._replace(
            mask=None,
            **{
                name: torch.where(keep if t.ndim == 2 else mask, t, 0)
                for name in PER_TOKEN
                if (t := getattr(x, name)) is not None
            },
        )
        weights_N = None if weights_N is None else torch.where(mask, weights_N, 0)
        out = run(quiet, spec, weights_N, wanted)
        return out._replace(
            value=torch.where(mask, out.value, 0), stats=torch.where(mask, out.stats, 0)
        )
    index = mask.nonzero()[:, 0].to(device, non_blocking=True)
    part = run(x.rows(index), spec, None if weights_N is None else weights_N[index], wanted)
    out = empty_result(x, wanted._replace(weight=False, bias=False), zero=True)
    out.value.index_copy_(0, index, part.value)
    out.stats.index_copy_(1, index, part.stats)
    if wanted.hidden:
        out.dhidden.index_copy_(0, index, part.dhidden)
    return out._replace(dweight=part.dweight, dbias=part.dbias, scale=part.scale)


class _Loop:
    """One call's chunk loop: the buffers it reuses, and what it does with each chunk."""

    def __init__(
        self, x: Inputs, spec: Spec, weights_N: Tensor | None, wanted: Wanted, result: Result
    ):
        self.x, self.spec, self.weights_N = x, spec, weights_N
        self.wanted, self.result = wanted, result
        self.dtype = result.value.dtype
        self.vocabulary = x.weight.shape[0]
        self.gradient = weights_N is not None and any(wanted)
        self.fused = spec.path == "fused" and spec.kind not in PAIRED
        self.rows = _row_operations(spec.path)
        self.stacked = x.hindsight_weight is None
        self.targets_N = (
            vocab.local_targets(x.targets, spec.start, self.vocabulary)
            if x.targets is not None
            else None
        )
        self.bias = _cast(x.bias, self.dtype)
        self.hindsight_bias = self.bias if self.stacked else _cast(x.hindsight_bias, self.dtype)
        streams = 2 if x.hindsight is not None and not self.fused else 1
        without_logits = self.fused and not self.gradient
        word_bytes = FUSED_WORD_BYTES if without_logits else streams * self.dtype.itemsize
        self.chunk_rows = _chunk_rows(x, word_bytes, spec)
        if not without_logits:
            self.buffer = self._new_buffer(streams * self.chunk_rows)

    def run(self) -> None:
        for c in chunks(self.x.hidden.shape[0], self.chunk_rows):
            z_CV, u_CV, row = self._read(c)
            value_C, grad_CV = self._evaluate(c, z_CV, u_CV, row)
            self.result.value[c] = value_C
            if grad_CV is not None:
                self._accumulate(c, grad_CV)

    def _read(self, c: slice) -> tuple[Tensor | None, Tensor | None, RowStats]:
        """Both streams' transformed logits, where they are needed, and their statistics."""
        x, targets = self.x, None if self.targets_N is None else self.targets_N[c]
        z = u = None
        if x.hindsight is None or self.fused:
            z, part = self._read_one(x.hidden[c], x.weight, self.bias, targets, self.gradient)
            if x.hindsight is not None:
                weight = x.weight if self.stacked else x.hindsight_weight
                assert weight is not None
                _, other = self._read_one(
                    x.hindsight[c], weight, self.hindsight_bias, targets, False
                )
                part = torch.cat([part, other, torch.zeros_like(part[:1])])
        else:
            z, u = self._logits_of_both(c)
            part = self.rows.stats(
                z, u, targets, self.spec.transform, self.bias, self.hindsight_bias
            )
        row = self._merge(part)
        stats_6C = self.result.stats[:, c]
        stats_6C[0], stats_6C[2], stats_6C[4] = row.logp, row.entropy, row.lse
        if row.hindsight_lse is not None:
            assert row.hindsight_logp is not None and row.hindsight_entropy is not None
            stats_6C[1], stats_6C[3] = row.hindsight_logp, row.hindsight_entropy
            stats_6C[5] = row.hindsight_lse
        if targets is None:
            stats_6C[:2] = torch.nan
        return z, u, row

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
            from .fused_triton import stream_stats

            return None, stream_stats(hidden_CD, weight_VD, bias_V, targets, self.spec.transform)
        z = self._buffer(hidden_CD.shape[0])
        logits(hidden_CD, weight_VD, z)
        return z, self.rows.stats(z, None, targets, self.spec.transform, bias_V)

    def _logits_of_both(self, c: slice) -> tuple[Tensor, Tensor]:
        x, n = self.x, c.stop - c.start
        assert x.hindsight is not None
        both = self._buffer(2 * n)
        if self.stacked:
            logits(torch.cat([x.hidden[c], x.hindsight[c]]), x.weight, both)
        else:
            assert x.hindsight_weight is not None
            logits(x.hidden[c], x.weight, both[:n])
            logits(x.hindsight[c], x.hindsight_weight, both[n:])
        return both[:n], both[n:]

    def _merge(self, part_FC: Tensor) -> RowStats:
        if self.spec.group:
            part_FC = partials.merge(vocab.gather(self.spec.group, part_FC))
        return partials.finish(part_FC)

    def _evaluate(
        self, c: slice, z: Tensor | None, u: Tensor | None, row: RowStats
    ) -> tuple[Tensor, Tensor | None]:
        """Values (C,) and, where asked for, the gradient with respect to raw logits (C, V)."""
        weight_C = self.weights_N[c] if self.gradient and self.weights_N is not None else None
        kind = self.spec.kind
        if kind in ("reverse_kl", "forward_kl"):
            values, grad = self._divergence(kind, z, u, row, row.gap, weight_C)
            return values[0], grad
        if kind == "jsd":
            values, _ = self._divergence(kind, z, u, row, None, None)
            if self.spec.group:
                vocab.sum_(self.spec.group, values)
            grad = None
            if weight_C is not None:
                _, grad = self._divergence(kind, z, u, row, values[0], weight_C)
            return (1 - self.spec.beta) * values[0] + self.spec.beta * values[1], grad
        if kind == "topk":
            assert z is not None and u is not None
            return topk_divergence(self.rows, self.spec, z, u, weight_C, self.x.hidden.dtype)
        value, slope = self._of_logprob(c, row)
        if weight_C is None:
            return value, None
        assert z is not None and self.targets_N is not None
        by = torch.where(weight_C == 0, 0, weight_C * slope)
        return value, self.rows.softmax_grad(
            z, row.norm, -by, by, self.targets_N[c], self.spec.transform, self.x.hidden.dtype
        )

    def _divergence(self, kind, z, u, row, centre_C, weight_C):
        return self.rows.divergence(
            kind,
            self.spec.beta,
            z,
            u,
            row.norm,
            centre_C,
            weight_C,
            self.spec.transform,
            self.x.hidden.dtype,
        )

    def _of_logprob(self, c: slice, row: RowStats) -> tuple[Tensor, Tensor]:
        """A function of log p(y) alone, and its derivative."""
        if self.spec.kind == "logprob":
            return row.logp, torch.ones_like(row.logp)
        old_C = None if self.x.old_logp is None else self.x.old_logp[c].to(self.dtype)
        if self.x.advantage is not None:
            advantage_C = self.x.advantage[c].to(self.dtype)
        else:
            assert row.hindsight_logp is not None
            advantage_C = row.hindsight_logp - row.logp
        return policy_gradient(row.logp, advantage_C, old_C, self.spec.clip)

    def _accumulate(self, c: slice, grad_CV: Tensor) -> None:
        """dH = G W, dW += G^T H, db += sum G."""
        x, out = self.x, self.result
        if self.wanted.hidden:
            out.dhidden[c] = hidden_gradient(grad_CV, x.weight, self.dtype)
        if self.wanted.weight:
            add_weight_gradient(out.dweight, grad_CV, x.hidden[c])
        if self.wanted.bias:
            out.dbias.add_(grad_CV.sum(0, dtype=self.dtype))

    def _new_buffer(self, rows: int) -> Tensor:
        """Rows of logits whose starts are aligned, whatever the vocabulary."""
        return self.x.hidden.new_empty((rows, -(-self.vocabulary // 8) * 8), dtype=self.dtype)

    def _buffer(self, rows: int) -> Tensor:
        return self.buffer[:rows, : self.vocabulary]


def policy_gradient(
    logp_C: Tensor, advantage_C: Tensor, old_logp_C: Tensor | None, clip: float
) -> tuple[Tensor, Tensor]:
    """``reference.policy_gradient`` and its derivative in log p; ``clip`` as in ``Spec``."""
    if not clip:
        return -advantage_C * logp_C, -advantage_C
    assert old_logp_C is not None
    ratio_C = (logp_C - old_logp_C).exp()
    if clip < 0:
        slope_C = -ratio_C.clamp(max=-clip) * advantage_C
        return slope_C * logp_C, slope_C
    free_C = ratio_C * advantage_C
    clipped_C = ratio_C.clamp(1 - clip, 1 + clip) * advantage_C
    return -torch.minimum(free_C, clipped_C), torch.where(free_C <= clipped_C, -free_C, 0)


def _chunk_rows(x: Inputs, word_bytes: float, spec: Spec) -> int:
    """Tokens of a chunk: as many as the budget allows, but at least one, and chunks of one size.

    Ranks must agree on it, however uneven their shards: it is reckoned for an even one.
    """
    n, vocabulary = x.hidden.shape[0], x.weight.shape[0]
    if spec.group:
        vocabulary = -(-spec.total // vocab.size(spec.group))
    most = max(1, int(spec.chunk_bytes / (word_bytes * max(1, vocabulary))))
    return max(1, -(-n // -(-n // most))) if n else 1


def _row_operations(path: str):
    if path == "torch":
        return torch_rows
    from . import rows_triton as triton_rows

    return triton_rows


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
