"""A model that answers, for measuring it and for the users that talk to it before any training."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

from sdpo_parallel.huggingface import load_tokenizer

from ..chat import chat_format
from ..conversations import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model said.

    Args:
        text: without control tokens.
        finished: it ended by itself and was not cut at the limit.
        entropies: of the model's own distribution of each token, in nats.
    """

    text: str
    finished: bool
    entropies: tuple[float, ...]


class Talker:
    """The model of a Hugging Face folder, in float32.

    Attributes:
        ends: ids at which an answer ends.

    Raises:
        SdpoError: the folder has no model or no tokenizer with a chat template.
    """

    def __init__(self, folder: str):
        disable_progress_bar()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = load_tokenizer(folder)
        self._format = chat_format(self.tokenizer)
        self.ends = self._format.end_ids
        takes = signature(self.model.forward).parameters
        self._cache = "cache" if "cache" in takes else "past_key_values"  # its older name

    @torch.inference_mode()
    def answer(
        self, questions: Sequence[str], *, seed: int, max_tokens: int, temperature: float = 1.0
    ) -> list[Answer]:
        """An answer to each question, all at a time; what has ended costs nothing any more.

        Args:
            temperature: 0: the likeliest token each time. Otherwise any token may be drawn,
                whatever the model's generation config says.
        """
        prompts = [self._format.prompt_ids([Message("user", q)]) for q in questions]
        # what all begin with is read once
        common = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
        cache = DynamicCache()
        if common:
            self.model(torch.tensor([prompts[0][:common]]), use_cache=True, **{self._cache: cache})
            cache.batch_repeat_interleave(len(prompts))
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        tokens_BT = torch.tensor([[0] * n + p[common:] for n, p in zip(pads, prompts, strict=True)])
        seen_BT = torch.tensor(
            [
                [1] * common + [0] * n + [1] * (len(p) - common)
                for n, p in zip(pads, prompts, strict=True)
            ]
        )
        random = torch.Generator().manual_seed(seed)
        ids: list[list[int]] = [[] for _ in prompts]
        entropies: list[list[float]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        positions_BT = (seen_BT.cumsum(1) - 1)[:, common:].clamp(min=0)
        for _ in range(max_tokens):
            logp_BV = self._next(tokens_BT, seen_BT, positions_BT, cache)
            entropy_B = -(logp_BV.exp() * logp_BV).sum(-1)
            drawn_B1 = _draw(logp_BV, temperature, random)
            goes_on = []
            for row, (i, token) in enumerate(zip(live, drawn_B1[:, 0].tolist(), strict=True)):
                ids[i].append(token)
                entropies[i].append(entropy_B[row].item())
                if token not in self.ends:
                    goes_on.append(row)
            if not goes_on:
                break
            if len(goes_on) < len(live):
                rows = torch.tensor(goes_on)
                cache.batch_select_indices(rows)
                drawn_B1, seen_BT, positions_BT = drawn_B1[rows], seen_BT[rows], positions_BT[rows]
                live = [live[row] for row in goes_on]
            tokens_BT, positions_BT = drawn_B1, positions_BT[:, -1:] + 1
            seen_BT = torch.cat([seen_BT, seen_BT.new_ones(len(seen_BT), 1)], 1)
        return [self._answer(i, e) for i, e in zip(ids, entropies, strict=True)]

    def _next(self, tokens_BT: Tensor, seen_BT: Tensor, positions_BT: Tensor, cache: Any) -> Tensor:
        """Log-probabilities of each row's next token."""
        out = self.model(
            input_ids=tokens_BT,
            attention_mask=seen_BT,
            position_ids=positions_BT,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache: cache},
        )
        return out.logits[:, -1].float().log_softmax(-1)

    def _answer(self, ids: list[int], entropies: list[float]) -> Answer:
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        finished = ids[-1] in self.ends
        return Answer(text=text, finished=finished, entropies=tuple(entropies))


def _draw(logp_BV: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    """(B, 1): a token of each row, by the inverse of its cumulative distribution."""
    if not temperature:
        return logp_BV.argmax(-1, keepdim=True)
    mass_BV = (logp_BV / temperature).softmax(-1).double().cumsum(-1)
    uniform_B1 = torch.rand(len(mass_BV), 1, generator=random, dtype=torch.float64)
    drawn_B1 = torch.searchsorted(mass_BV, uniform_B1 * mass_BV[:, -1:], right=True)
    return drawn_B1.clamp(max=mass_BV.shape[1] - 1)
