"""What a call computes, from which tensors and how: the keyword arguments that users pass
(``Options``), the tensors (``Inputs``) and everything else (``Spec``)."""

from typing import Literal, NamedTuple, TypedDict, get_args

from torch import Tensor

from ..vocab_parallel import VocabShard

Impl = Literal["auto", "reference", "torch", "triton", "fused"]
"""``reference``: full logits. ``torch`` and ``triton``: chunks of logits, with torch operators or
Triton kernels. ``fused``: like ``triton``, but a stream that needs no gradient is read by one
kernel that never writes logits. ``auto``: chosen by device, dtype and number of tokens."""
IMPLS: tuple[str, ...] = get_args(Impl)
IGNORE_INDEX = -100
"""A target that stands for none, as in torch's cross-entropy: its row is as masked."""
DIFFERENTIABLE = ("student_hidden", "lm_head_weight", "bias")
PER_TOKEN = ("student_hidden", "teacher_hidden", "targets", "old_logp")


class Options(TypedDict, total=False):
    """Keyword arguments that all public functions share."""

    mask: Tensor | None
    """(N,) bool; rows where it is False have value, statistics and gradient 0 whatever they hold.
    With a mask in host memory they cost nothing; with one on the GPU, where their number is not
    known without waiting for the device, or in a compiled graph, their matmuls are computed."""
    bias: Tensor | None
    """(V,) bias of the student's lm_head, of any floating dtype; differentiable."""
    teacher_bias: Tensor | None
    """(V,) bias of the teacher's lm_head, if the teacher has its own."""
    temperature: float
    """Divides the logits of both streams; > 0. Default 1."""
    softcap: float | None
    """Logits become softcap * tanh(logits / softcap) before the temperature divides them."""
    shard: VocabShard | None
    """This rank's rows of an lm_head that is split over a process group; see ``VocabShard``."""
    chunk_bytes: int | None
    """Upper limit for the float32 logits, of both streams, that are alive at once, in bytes. With a
    shard, the size of an even shard counts. None: a default for the device."""
    grad_bytes: int | None
    """Upper limit for the gradients with respect to logits, in the inputs' dtype, that a call keeps
    until its backward, in bytes; with a shard, the size of an even shard counts. A call that stays
    below it costs four matmuls whatever its upstream gradient is. One that does not forms dH and dW
    in its forward if ``token_weights`` are given and nothing is centred, in blocks of as many
    tokens as stay below; if not, its backward forms the logits again. None: a default for the
    device."""
    impl: Impl
    """Forces an implementation; see ``Impl``. Default "auto"."""


class Inputs(NamedTuple):
    """The tensors of a call: N tokens, V rows of the lm_head, hidden sizes D and D'."""

    student_hidden: Tensor
    """(N, D)"""
    lm_head_weight: Tensor
    """(V, D)"""
    teacher_hidden: Tensor | None = None
    """(N, D')"""
    teacher_lm_head_weight: Tensor | None = None
    """(V, D'); None: the student's lm_head and bias."""
    bias: Tensor | None = None
    """(V,)"""
    teacher_bias: Tensor | None = None
    """(V,)"""
    targets: Tensor | None = None
    """(N,) token ids, or ``IGNORE_INDEX``."""
    old_logp: Tensor | None = None
    """(N,) log-probabilities of the targets when they were sampled."""

    def map_tokens(self, function) -> "Inputs":
        """``function`` applied to every tensor that has a row per token."""
        changed = {
            name: function(x) for name in PER_TOKEN if (x := getattr(self, name)) is not None
        }
        return self._replace(**changed)


class Spec(NamedTuple):
    """Everything about a call that is not a tensor; the types are those of operator schemas."""

    kind: str
    """"logprob", "sampled_token" or a divergence of ``rows_torch.FORMULAS``. What is kept or formed
    again is log p(y): of the sampled token's loss that is a function outside of the operators."""
    impl: str = "auto"
    parameters: list[float] = []
    """The kind's own numbers: (beta,) of the JSD; (ppo_clip, importance_clip) of the sampled token,
    0 for none."""
    k: int = 0
    """> 0: the divergence is taken over the k likeliest tokens and one bucket for all others."""
    support: str = "student"
    """Whose k likeliest tokens: "student" or "teacher"."""
    temperature: float = 1.0
    softcap: float = 0.0
    """0: none."""
    chunk_bytes: int = 0
    grad_bytes: int = 0
    group: str = ""
    """Name of the tensor-parallel process group; empty if this rank holds the whole vocabulary."""
    start: int = 0
    """First row of the vocabulary that this rank holds."""
    total: int = 0
    """Rows of the whole vocabulary."""

    @property
    def paired(self) -> bool:
        """Whether both streams' logits are needed at once."""
        return self.kind not in ("logprob", "sampled_token")
