"""Triton's interpreter, mended: bfloat16 and fused multiply-adds as GPUs round them; in Triton 3.6,
minima and maxima that leave NaN out, and numpy 2.4."""

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_cut_off = interpreter.InterpreterBuilder.create_fp_trunc
_patch = interpreter._patch_lang_tensor


def mend() -> None:
    """To be called once, before any kernel."""
    interpreter.InterpreterBuilder.create_fp_trunc = _round_to_nearest
    interpreter.InterpreterBuilder.create_fma = _fused
    if triton.__version__.startswith("3.6."):
        interpreter._patch_lang_tensor = _patch_and_squeeze
        builder = interpreter.InterpreterBuilder
        builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
        builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)


def _round_to_nearest(builder, source, to):
    """As hardware does; the interpreter cuts the low half of a float32 off."""
    if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
        return _cut_off(builder, source, to)
    rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
    return interpreter.TensorHandle(rounded, to.scalar)


def _fused(builder, x, y, z):
    """x y + z of float32, rounded once; the interpreter rounds the product, too."""
    assert z.dtype.scalar == tl.float32
    exact = x.data.astype("float64") * y.data + z.data
    return interpreter.TensorHandle(exact.astype("float32"), z.dtype.scalar)


def _patch_and_squeeze(tensor, scope) -> None:
    """3.6 takes an array of one element for an int, which numpy 2.4 refuses."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
