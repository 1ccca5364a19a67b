"""A user played by a model of transformers in this process."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sdpo_parallel.huggingface import load_tokenizer, resolve_model

from ...chat import ChatFormat, chat_format
from ...conversations import Message
from ...errors import DataError, SdpoError
from .base import Exchange, Reply
from .personas import Persona
from .playing import LONGEST_SHOWN, messages_for, read, reply

if TYPE_CHECKING:
    from .config import LocalUser

_SHORTEST_SHOWN = 100


class ModelUser:
    """A user whose messages a local model writes, its thinking off where its template can do that.

    Each reply is drawn from its own random numbers, made of the seed and the exchange's id: order
    and batching change it by no more than the rounding of logits does.

    Raises:
        SdpoError: the model cannot be loaded.
    """

    def __init__(self, config: "LocalUser", persona: Persona):
        self.config, self.persona = config, persona
        self._model: Any
        self._tokenizer, self._chat, self._model = _player(config)
        self._device = self._model.device
        self._system = self._takes_system_messages()

    def reply(self, exchanges: Sequence[Exchange], *, seed: int) -> list[Reply]:
        """What the model lets the user say; source "model", or "model:empty", "model:truncated",
        "model:refused", "model:long" where it was no message.

        Raises:
            SdpoError: a prompt does not fit, or a reply is faulty and ``on_failure`` is "stop".
        """
        replies = list[Reply]()
        for start in range(0, len(exchanges), self.config.batch):
            replies += self._batch(exchanges[start : start + self.config.batch], seed)
        return replies

    def close(self) -> None:
        """Let go of the model, which other personas may still be played by."""
        self._model = None
        _player.cache_clear()

    def _takes_system_messages(self) -> bool:
        try:
            self._chat.prompt_ids([Message("system", "a"), Message("user", "b")])
        except DataError:
            return False
        return True

    @torch.no_grad()
    def _batch(self, exchanges: Sequence[Exchange], seed: int) -> list[Reply]:
        prompts = [self._prompt(exchange) for exchange in exchanges]
        longest = max(map(len, prompts))
        pad = min(self._chat.end_ids)
        ids_BT = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        output_BT = self._model.generate(
            input_ids=ids_BT.to(self._device),
            attention_mask=mask_BT.to(self._device),
            logits_processor=self._sampling(exchanges, seed),
        )
        replies = []
        for exchange, row in zip(exchanges, output_BT[:, longest:].tolist(), strict=True):
            ends = [i for i, token in enumerate(row) if token in self._chat.end_ids]
            text = self._tokenizer.decode(row[: ends[0]] if ends else row, skip_special_tokens=True)
            said = read(text, cut=not ends, max_chars=self.config.max_chars)
            where = f"{self.config.model}, exchange {exchange.id}"
            replies.append(reply(said, "model", self.config.on_failure, where))
        return replies

    def _prompt(self, exchange: Exchange) -> list[int]:
        """Ids of what the player is shown, with less of long messages until it fits."""
        shown = LONGEST_SHOWN
        while True:
            said = messages_for(self.persona, exchange, system=self._system, longest=shown)
            ids = self._chat.prompt_ids(said)
            if len(ids) <= self.config.max_prompt_tokens:
                return ids
            if shown < _SHORTEST_SHOWN:
                raise SdpoError(
                    f"exchange {exchange.id}: its {len(exchange.prompt)} messages take {len(ids)} "
                    f"tokens even when cut to {shown} characters each, and max_prompt_tokens is "
                    f"{self.config.max_prompt_tokens}: raise it"
                )
            shown //= 2

    def _sampling(self, exchanges: Sequence[Exchange], seed: int) -> LogitsProcessorList:
        """Greedy decoding at temperature 0; otherwise noise of each row's own that makes its
        largest logit a sample."""
        config, processors = self.config, LogitsProcessorList()
        if config.temperature == 0:
            return processors
        processors.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.top_k:
            processors.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            processors.append(TopPLogitsWarper(config.top_p))
        processors.append(_Gumbel([f"{seed}/{self.persona.name}/{e.id}" for e in exchanges]))
        return processors


@lru_cache(maxsize=1)
def _player(config: "LocalUser") -> tuple[Any, ChatFormat, Any]:
    """Tokenizer, its chat format and the model: one for all personas of a run."""
    folder = resolve_model(config.model)
    tokenizer = load_tokenizer(folder)
    chat = chat_format(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = on_gpu if config.dtype == "auto" else getattr(torch, config.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # generate() takes whatever a call leaves at its default from the model's own config
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=sorted(chat.end_ids),
        pad_token_id=min(chat.end_ids),
    )
    return tokenizer, chat, model.to(device).eval()


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise to each row's logits, of which the largest is then drawn as softmax would
    draw it."""

    def __init__(self, names: Sequence[str]):
        seeds = (hashlib.sha256(name.encode()).digest()[:8] for name in names)
        self._generators = [
            torch.Generator().manual_seed(int.from_bytes(seed, "big", signed=True))
            for seed in seeds
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise_BV = torch.stack(
            [
                torch.empty(scores.shape[1], dtype=torch.float64).exponential_(generator=g)
                for g in self._generators
            ]
        )
        return scores.float() - noise_BV.log().to(scores.device, torch.float32)
