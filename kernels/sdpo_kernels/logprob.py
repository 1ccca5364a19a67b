"""log p(y), entropy and log-sum-exp per token, straight from hidden states."""

from typing import NamedTuple, Unpack

from torch import Tensor

from ._impl.chunked import Inputs
from ._impl.op import call
from ._impl.options import Options


class LogProb(NamedTuple):
    """Each (N,), in nats. ``logp`` is log p(y), differentiable unless weights were given; then
    ``loss``, the scalar sum of weights * logp, is. ``entropy`` and ``lse`` are detached."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    loss: Tensor | None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    **options: Unpack[Options],
) -> LogProb:
    """log softmax(hidden @ weight.T)[targets] per token, without ever holding (N, V) logits.

    Args:
        hidden: (N, D) hidden states before the head: float32, bfloat16, float16 or float64;
            differentiable.
        weight: (V, D) lm_head, of the same dtype; differentiable.
        targets: (N,) token ids in [0, V), of an integer dtype. A token that no rank's head holds
            has log-probability -inf.
        weights: (N,) constants. Known up front, they make ``loss`` = sum of weights * logp cost
            three products instead of four: its gradient is formed while the logits are there.
        options: see ``Options``.

    Returns:
        ``LogProb``; every tensor float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or setting does not fit; the message names the argument.
    """
    x = Inputs(hidden, weight, targets=targets)
    out = call("logprob", x, weights, options)
    return LogProb(out.value, out.stats[2], out.stats[4], out.loss)
