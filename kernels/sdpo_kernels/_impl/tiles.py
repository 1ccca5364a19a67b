"""@triton.jit helpers shared by the kernels. Everything is float32."""

import triton
import triton.language as tl


@triton.jit
def expm1_nonpositive(x):
    """e^x - 1 for x <= 0: its series where the difference would lose digits."""
    series = x * (
        1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720)))))
    )
    return tl.where(x > -0.3, series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """To an ulp or two, with Cephes' polynomial for float32 where 1 - 2 / (e^2x + 1) cancels."""
    y = x * x
    series = 1.33314422036e-1 + y * (
        -5.37397155531e-2 + y * (2.06390887954e-2 - y * 5.70498872745e-3)
    )
    series = x + x * (y * (-3.33332819422e-1 + y * series))
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, series, tl.where(x < 0, -far, far))


@triton.jit
def transform(x, cap, temperature, CAP: tl.constexpr, SCALE: tl.constexpr):
    """cap tanh(x / cap) / temperature."""
    if CAP:
        x = cap * tanh(x / cap)
    if SCALE:
        x = x / temperature
    return x


@triton.jit
def transform_grad(z, cap, temperature, CAP: tl.constexpr, SCALE: tl.constexpr):
    """d z / d raw, from the transformed logits z."""
    one = tl.full(z.shape, 1.0, tl.float32)
    if CAP:
        t = z * (temperature / cap)
        one = 1.0 - t * t
    if SCALE:
        one = one / temperature
    return one


@triton.jit
def weighted(p, x):
    """p x, and 0 where p is 0, whatever x."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def online(m, s, t, x):
    """Partials (m, s, t) of one row, scalars, with a block x of more logits; -inf is none.

    Returns them, e^(x - m), and what sums under the old maximum are to be scaled by.
    """
    new_m = tl.maximum(m, tl.max(x, 0))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)
    shift = tl.where(s == 0, 0.0, m - base)
    scale = tl.exp(shift)
    e = tl.exp(x - base)
    t = scale * (t + s * shift) + tl.sum(weighted(e, x - base), 0)
    s = scale * s + tl.sum(e, 0)
    return new_m, s, t, e, scale


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1: the rounding of 1 + x is divided out again."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def excess(p, d, difference):
    """p (e^d - 1 - d) >= 0, given difference = p (e^d - 1); 0 where p is 0 and so is e^d p."""
    series = d * d * (0.5 + d * (1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d * (1.0 / 720)))))
    return tl.where(tl.abs(d) < 0.3, p * series, difference - weighted(p, d))
