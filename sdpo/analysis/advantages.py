"""Log-probabilities of every response token, with and without the follow-up.

A `Reader` holds a model and its tokenizer. It takes interactions one at a time, encodes and packs
them, and yields a `Reading` of each; memory does not grow with their number. The model is anything
with ``hidden_states`` and ``lm_head``.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdpo_kernels import linear_logprob
from sdpo_parallel.huggingface import load_tokenizer, resolve_model
from sdpo_parallel.transformers.engine import load_model

from ..batching import BatchConfig, Rows, micro_batches, pack
from ..chat import chat_format
from ..hindsight import Encoded, encode, hindsight_ids
from ..interactions import Interaction
from ..step import CausalModel, score
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

        for batch in micro_batches(encoded(), self.packing):
            members = [waiting.popleft() for _ in batch.lengths]
            batch = batch.to(self.device)
            stats = score(self.model, batch)
            passes = [stats.logp_student, stats.logp_teacher]
            for prompts in zip(*(others for _, others in members), strict=True):
                pairs = [(p, e.response) for p, (e, _) in zip(prompts, members, strict=True)]
                rows = pack(pairs, self.packing.row_tokens)
                passes.append(self._log_probs(rows, batch.targets_N))
            split = (logp.cpu().double().split(batch.lengths) for logp in passes)
            for (own, _), logps in zip(members, zip(*split, strict=True), strict=True):
                yield Reading(encoded=own, policy=logps[0], hindsight=logps[1:])

    def _hindsight(self, interaction: Interaction, own: Encoded, followup: str) -> tuple[int, ...]:
        """The hindsight prompt with another follow-up, cut as `encode` cuts it."""
        chat = chat_format(self.tokenizer, self.config.date)
        prompt = hindsight_ids(chat, interaction.prompt, followup, self.config, thought=own.thought)
        return prompt.ids

    @torch.no_grad()
    def _log_probs(self, rows: Rows, targets_N: Tensor) -> Tensor:
        at = (t.to(self.device) for t in (rows.tokens_BT, rows.positions_BT, rows.index_N))
        hidden_ND, head = self.model.hidden_states(*at), self.model.lm_head()
        return linear_logprob(hidden_ND, head.weight, targets_N, **head.options).logp
