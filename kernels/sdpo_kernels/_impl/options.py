"""The vocabulary of choices shared by all paths: what is computed, from which logits, and how."""

from typing import Literal, NamedTuple, TypedDict, get_args

from torch import Tensor

from ..vocab_parallel import VocabShard

Kind = Literal["logprob", "sampled_token", "reverse_kl", "forward_kl", "jsd", "topk"]
"""What is computed per token; ``topk`` is a divergence over buckets, named by ``Spec.buckets``."""
Path = Literal["auto", "reference", "torch", "triton", "fused"]
"""How: full logits; chunks with torch operators; chunks with Triton kernels; and, where no gradient
is asked for and one stream is read, one Triton kernel that never writes logits."""
PATHS: tuple[str, ...] = get_args(Path)


class Options(TypedDict, total=False):
    """Keyword arguments that all public functions share."""

    mask: Tensor | None
    """(N,) bool; False rows have value, statistics and gradient 0 whatever they hold. In host
    memory, such rows cost nothing; on a GPU, where their number is not known without waiting for
    it, their products are still computed."""
    bias: Tensor | None
    """(V,) of the policy's head, of any floating dtype; differentiable."""
    hindsight_bias: Tensor | None
    """(V,) of the hindsight's head, where that is not the policy's."""
    temperature: float
    """> 0, divides the logits of both streams. 1."""
    softcap: float | None
    """Logits become softcap * tanh(logits / softcap) before the temperature divides. None."""
    shard: VocabShard | None
    """This rank's rows of a head that is split over a process group; see ``VocabShard``."""
    chunk_bytes: int | None
    """float32 logits, of both streams, that may be alive at once, in bytes; with a shard, those of
    an even one. None: by device."""
    path: Path
    """Forces a way to compute it; see ``Path``. "auto"."""


class Transform(NamedTuple):
    """softcap tanh(x / softcap) / temperature. A softcap of 0 is none."""

    temperature: float = 1.0
    softcap: float = 0.0

    @property
    def identity(self) -> bool:
        return self.temperature == 1 and not self.softcap


IDENTITY = Transform()


class Spec(NamedTuple):
    """Everything about a call that is not a tensor; the types are those of operator schemas."""

    kind: str
    path: str
    beta: float = 0.5
    """Of JSD."""
    clip: float = 0.0
    """Of the ratio to the sampler, > 0: PPO's; < 0: truncated importance weights; 0: none."""
    k: int = 0
    buckets: str = "reverse_kl"
    """The divergence over top-K buckets."""
    support: str = "policy"
    """Whose top K."""
    temperature: float = 1.0
    softcap: float = 0.0
    chunk_bytes: int = 0
    group: str = ""
    """Name of the tensor-parallel process group; empty: the whole vocabulary is here."""
    start: int = 0
    total: int = 0

    @property
    def transform(self) -> Transform:
        return Transform(self.temperature, self.softcap)
