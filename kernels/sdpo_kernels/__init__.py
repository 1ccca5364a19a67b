"""Per-token log-probabilities and divergences from hidden states, without full logits.

Imports torch and nothing of the rest of this project: made to be used in other trainers.
"""

from .chunked import DEFAULT_CHUNK_BYTES, TokenStats
from .divergence import Divergence, linear_forward_kl, linear_jsd, linear_reverse_kl
from .logprob import LogProb, linear_logprob

__all__ = [
    "DEFAULT_CHUNK_BYTES",
    "Divergence",
    "LogProb",
    "TokenStats",
    "linear_forward_kl",
    "linear_jsd",
    "linear_logprob",
    "linear_reverse_kl",
]
