"""log p(y), entropy and log-sum-exp per token, straight from hidden states."""

from typing import NamedTuple, Unpack

from torch import Tensor

from ._impl.op import call
from ._impl.options import Inputs, Options


class LogProb(NamedTuple):
    """Per-token log-probabilities and statistics, in nats, and the loss."""

    logp: Tensor
    """(N,) log p(y), differentiable if no token weights were given."""
    entropy: Tensor
    """(N,), detached."""
    lse: Tensor
    """(N,) log-sum-exp of the logits, detached."""
    loss: Tensor | None
    """The scalar sum of token_weights * logp, differentiable; None without token weights."""


def linear_logprob(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    **options: Unpack[Options],
) -> LogProb:
    """log softmax(hidden @ lm_head_weight.T)[targets] per token, without (N, V) logits.

    Args:
        hidden: (N, D) hidden states before the lm_head: float32, bfloat16, float16 or float64;
            differentiable.
        lm_head_weight: (V, D), of the same dtype; differentiable.
        targets: (N,) token ids in [0, V), of an integer dtype, or -100 for rows to ignore, whose
            values, statistics and gradients are 0. Any other raises on a CPU; on a GPU, where the
            host would have to wait to see it, its log-probability is -inf, and so is the loss.
        token_weights: (N,) constants, of ``loss`` = sum of token_weights * logp. It costs three
            matmuls; without them, where more tokens than ``grad_bytes`` allows are to be
            differentiated, four.
        options: see ``Options``.

    Returns:
        ``LogProb``; every tensor float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or setting does not fit; the message names the argument.
    """
    x = Inputs(hidden, lm_head_weight, targets=targets)
    value, stats, loss = call("logprob", x, token_weights, options)
    return LogProb(value, stats.entropy_student, stats.lse_student, loss)
