"""Per-token log-probabilities and divergences from hidden states, without full logits.

Imports torch, and Triton where it is installed, and nothing else of this project: it is made for
other people's trainers too. ``sdpo_kernels._impl`` is private; kernels/README.md has the maths.
"""

from ._impl.tuning import chunk_bytes as default_chunk_bytes
from ._impl.tuning import grad_bytes as default_grad_bytes
from .divergence import Divergence, TokenStats, linear_forward_kl, linear_jsd, linear_reverse_kl
from .huggingface import logit_options
from .logprob import LogProb, linear_logprob
from .sampled_token import linear_sampled_token
from .topk import linear_topk_divergence
from .vocab_parallel import VocabShard

__all__ = [
    "Divergence",
    "LogProb",
    "TokenStats",
    "VocabShard",
    "default_chunk_bytes",
    "default_grad_bytes",
    "linear_forward_kl",
    "linear_jsd",
    "linear_logprob",
    "linear_reverse_kl",
    "linear_sampled_token",
    "linear_topk_divergence",
    "logit_options",
]
