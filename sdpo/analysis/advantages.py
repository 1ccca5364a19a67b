"""Log-probabilities of every response token, with and without the follow-up.

A `Reader` holds a model and its tokenizer. It takes interactions one at a time, encodes and packs
them, and yields a `Reading` of each; memory does not grow with their number. The model is anything
with ``hidden_states`` and ``lm_head``.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdpo_kernels import linear_logprob
from sdpo_parallel.engine import ROW_MULTIPLE
from sdpo_parallel.huggingface import load_tokenizer, resolve_model
from sdpo_parallel.rows import Sharing
from sdpo_parallel.transformers.engine import load_model

from ..batching import BatchConfig, micro_batches, pack_passes
from ..chat import chat_format
from ..hindsight import Encoded, encode, hindsight_ids
from ..interactions import Interaction
from ..step import CausalModel, two_passes
from .options import ReaderOptions


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One response's log-probabilities in nats: (response tokens,) float64 tensors on the CPU."""

    encoded: Encoded
    policy: Tensor
    """Without a follow-up."""
    hindsight: tuple[Tensor, ...]
    """With its own follow-up, then with each of the others."""

    @property
    def advantages(self) -> list[Tensor]:
        """log q(y_t) - log p(y_t) under each follow-up."""
        return [logp - self.policy for logp in self.hindsight]


class Reader:
    """A model and its tokenizer, loaded once."""

    def __init__(
        self, model: CausalModel, tokenizer: PreTrainedTokenizerBase, options: ReaderOptions
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, options.hindsight
        self.device = model.lm_head().weight.device
        tokens = options.batch_tokens
        self.packing = BatchConfig(row_tokens=tokens // 8 or 1, micro_batch_tokens=tokens)
        self.sharing: Sharing = "keys" if model.reads_tries else "none"

    @classmethod
    def load(cls, model: str, options: ReaderOptions) -> "Reader":
        """Read with a model on the first GPU or else the CPU.

        Args:
            model: Hugging Face folder, or name on the hub.
        """
        folder = resolve_model(model)
        tokenizer = load_tokenizer(folder)
        return cls(load_model(folder, dtype=options.dtype), tokenizer, options)

    def read(self, asked: Iterable[tuple[Interaction, Sequence[str]]]) -> Iterator[Reading]:
        """Readings in the order of ``asked``.

        Args:
            asked: interactions, each with further follow-ups to read its response under; every
                interaction has the same number of them.
        """
        waiting: deque[tuple[Encoded, list[tuple[int, ...]]]] = deque()

        def encoded() -> Iterator[tuple[Encoded, float]]:
            for interaction, followups in asked:
                own = encode(interaction, self.tokenizer, self.config)
                waiting.append((own, [self._hindsight(interaction, own, f) for f in followups]))
                yield own, 1.0

        for batch in micro_batches(encoded(), self.packing, self.sharing):
            members = [waiting.popleft() for _ in batch.lengths]
            split = (logp.split(batch.lengths) for logp in self._log_probs(members))
            for (own, _), logps in zip(members, zip(*split, strict=True), strict=True):
                yield Reading(encoded=own, policy=logps[0], hindsight=logps[1:])

    def _hindsight(self, interaction: Interaction, own: Encoded, followup: str) -> tuple[int, ...]:
        """The hindsight prompt with another follow-up, cut as `encode` cuts it."""
        chat = chat_format(self.tokenizer, self.config.date)
        prompt = hindsight_ids(chat, interaction.prompt, followup, self.config, thought=own.thought)
        return prompt.ids

    @torch.no_grad()
    def _log_probs(self, members: Sequence[tuple[Encoded, list[tuple[int, ...]]]]) -> list[Tensor]:
        """log-probabilities (N,) of all responses without a follow-up, with their own, and with
        each of the others."""
        policy = [(own.policy, own.response) for own, _ in members]
        prompts = zip(*((own.hindsight, *others) for own, others in members), strict=True)
        contexts = [
            [(p, own.response) for p, (own, _) in zip(column, members, strict=True)]
            for column in prompts
        ]
        hindsight = list(chain(*contexts))
        layout = self.packing.row_tokens, ROW_MULTIPLE, self.sharing
        passes = (rows.to(self.device) for rows in pack_passes(policy, hindsight, *layout)[0])
        states = two_passes(self.model, *passes, self.model, self.sharing)
        head = self.model.lm_head()
        targets = torch.tensor([t for own, _ in members for t in own.response], device=self.device)
        out = []
        for hidden_ND in (states[0], *states[1].chunk(len(contexts))):
            logp = linear_logprob(hidden_ND, head.weight, targets, **head.options).logp
            out.append(logp.cpu().double())
        return out
