"""log p(y) and entropy per token, straight from hidden states."""

from typing import NamedTuple

from torch import Tensor

from .checks import check_linear, check_targets
from .chunked import DEFAULT_CHUNK_BYTES, LinearLogProb


class LogProb(NamedTuple):
    """``logp`` (N,): log p(y), differentiable. ``entropy`` (N,): detached. Both in nats."""

    logp: Tensor
    entropy: Tensor


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> LogProb:
    """log softmax(hidden @ weight.T)[targets], without ever holding (N, V) logits.

    Args:
        hidden: (N, D), float32, bfloat16, float16 or float64; differentiable.
        weight: (V, D), the lm_head, of the same dtype; differentiable.
        targets: (N,), integer token ids in [0, V).
        chunk_bytes: logits that may be alive at once, in bytes.

    Returns:
        ``LogProb(logp, entropy)``, each (N,) float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_linear(hidden, weight)
    check_targets(targets, hidden)
    logp_N, entropy_N = LinearLogProb.apply(hidden, weight, targets, chunk_bytes)  # pyright: ignore
    return LogProb(logp_N, entropy_N)
