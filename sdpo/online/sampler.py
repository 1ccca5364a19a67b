"""Who answers: the policy as it is now, sampled. And how.

    sampler = InProcessSampler(config, engine, folder, chat)
    sampler.update(engine, version=3)
    rollouts = sampler.sample(prompts, seeds)

A rollout carries the ids that were sampled, their log-probabilities under the distribution that
they were drawn from, and the version of the weights.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils.logging import disable_progress_bar

from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.engine import Engine, Ranks

from ..chat import ChatFormat
from ..errors import SdpoError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How answers are drawn. What a model's own generation_config says does not count."""

    temperature: float = 1.0
    """Logits are divided by it."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability; 1: from all."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    max_new_tokens: int = 256
    """Longer answers are cut."""
    batch: int = 32
    """Answers that a rank generates at a time."""
    max_gap: float | None = 0.1
    """Nats: the run stops when trainer's and sampler's log-probabilities of the sampled tokens are
    further apart in the mean, of answers drawn at temperature 1 from all tokens."""

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise SdpoError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise SdpoError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise SdpoError(f"top_k must not be negative, got {self.top_k}")
        for name in ("max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise SdpoError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def truncates(self) -> bool:
        """Some tokens cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def from_policy(self) -> bool:
        """Answers are drawn from the policy's own distribution."""
        return self.temperature == 1 and not self.truncates


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer as it was sampled.

    Attributes:
        token_ids: the id that ends it included, where it ended by itself.
        logprobs: of each token under the distribution it was drawn from, in nats; of the policy's
            own where the answer is greedy.
        finished: it ended by itself, and was not cut.
        versions: of the weights that made each token: the number of updates behind them.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    versions: tuple[int, ...]


class Sampler(Protocol):
    """Something that answers with the policy's weights. All ranks call its methods together."""

    @property
    def version(self) -> int:
        """Of the weights that it has: the number of updates behind them."""
        ...

    def update(self, engine: Engine, version: int) -> None:
        """Take over the engine's weights."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, greedy: bool = False
    ) -> list[Rollout]:
        """An answer to each prompt, in their order, on every rank.

        Args:
            prompts: token ids, up to where the assistant begins.
            seeds: of each answer: the same prompt, weights and seed give the same answer, whatever
                else is sampled with it (but for rounding).
            greedy: take the likeliest token instead of drawing.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


@runtime_checkable
class RemoteSampler(Sampler, Protocol):
    """One that answers elsewhere, so that it may do so while the ranks train."""

    staleness: int
    """Updates that may be made meanwhile; 0: none."""

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        greedy: bool = False,
        limits: Sequence[int] = (),
    ) -> list[Rollout]:
        """What ``sample`` gives, on the main rank alone and in any thread.

        Args:
            limits: tokens at which each answer is cut; none: the config's for all.
        """
        ...


@runtime_checkable
class LocalSampler(Sampler, Protocol):
    """One that answers in this process."""

    @property
    def model(self) -> Any:
        """The model of transformers that answers, with the weights of its ``version``."""
        ...


class Place(Protocol):
    """Where a sampler's ranks are: an engine, or a process alone."""

    @property
    def ranks(self) -> Ranks: ...

    @property
    def device(self) -> torch.device: ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        ...


class InProcessSampler:
    """A copy of the model on each rank, and transformers' ``generate``. Ranks share the prompts.

    Args:
        folder: the Hugging Face folder that the engine starts from.
        chat: of its tokenizer: says which tokens end an answer.
    """

    def __init__(
        self,
        config: SamplingConfig,
        engine: Place,
        folder: str,
        chat: ChatFormat,
        parallel: ParallelConfig,
    ):
        disable_progress_bar()
        self.config, self.ranks, self.gather = config, engine.ranks, engine.gather
        self.end_ids, self.device = chat.end_ids, engine.device
        dtype = getattr(torch, parallel.resolve_dtype(self.device.type))
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(self.device).eval()
        self.generation = GenerationConfig(
            do_sample=False,  # Choose draws
            max_new_tokens=config.max_new_tokens,
            eos_token_id=sorted(self.end_ids),
            pad_token_id=min(self.end_ids),
            use_cache=True,
        )
        # transformers asks it for whatever is at its default in what `generate` is given
        self.model.generation_config = self.generation
        self.version = 0

    @torch.no_grad()
    def update(self, engine: Engine, version: int) -> None:
        mine = dict(self.model.state_dict())
        taken = set[int]()
        for name, weight in engine.weights():
            if name not in mine:
                raise SdpoError(f"the sampler's model has no weight {name}, which the policy has")
            mine[name].copy_(weight)
            taken.add(mine[name].data_ptr())
        left = [name for name, weight in mine.items() if weight.data_ptr() not in taken]
        if left:
            raise SdpoError(f"the policy has no weight {left[0]}, which the sampler's model has")
        self.version = version

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, greedy: bool = False
    ) -> list[Rollout]:
        ranks = self.ranks
        # long prompts together, so that little is padding; ranks get as many of each length
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        mine = order[ranks.rank :: ranks.world_size]
        found: dict[int, Rollout] = {}
        with one_thread(self.device):
            for start in range(0, len(mine), self.config.batch):
                some = mine[start : start + self.config.batch]
                rollouts = self._generate(
                    [prompts[i] for i in some], [seeds[i] for i in some], greedy
                )
                found |= zip(some, rollouts, strict=True)
        for others in self.gather(found):
            found |= others
        return [found[i] for i in range(len(prompts))]

    def close(self) -> None:
        pass

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], greedy: bool
    ) -> list[Rollout]:
        width = max(map(len, prompts))
        pad = min(self.end_ids)
        ids_BT = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        seen_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        choose = _Choose(self.config, seeds, greedy)
        out_BT = self.model.generate(
            input_ids=ids_BT.to(self.device),
            attention_mask=seen_BT.to(self.device),
            generation_config=self.generation,
            logits_processor=[choose],
        )
        logprobs_BT = torch.stack(choose.logprobs, dim=1).tolist()
        answers = out_BT[:, width:].tolist()
        return [self._rollout(*pair) for pair in zip(answers, logprobs_BT, strict=True)]

    def _rollout(self, ids: list[int], logprobs: list[float]) -> Rollout:
        ends = [i for i, token in enumerate(ids) if token in self.end_ids]
        n = ends[0] + 1 if ends else len(ids)
        return Rollout(
            token_ids=tuple(ids[:n]),
            logprobs=tuple(min(x, 0.0) for x in logprobs[:n]),
            finished=bool(ends),
            versions=(self.version,) * n,
        )


class _Choose(LogitsProcessor):
    """Draws the next token of each row with that row's own random numbers, notes its
    log-probability, and leaves ``generate`` no other choice.

    Drawing by the inverse of the cumulative distribution takes one uniform number a token.
    """

    def __init__(self, config: SamplingConfig, seeds: Sequence[int], greedy: bool):
        self.temperature, self.greedy = config.temperature, greedy
        self.warpers: list[LogitsProcessor] = []
        if config.top_k and not greedy:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1 and not greedy:
            self.warpers.append(TopPLogitsWarper(config.top_p))
        self.uniform = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore
        logits_BV = scores.float() / (1.0 if self.greedy else self.temperature)
        for warp in self.warpers:
            logits_BV = warp(input_ids, logits_BV)  # pyright: ignore
        logp_BV = logits_BV.log_softmax(-1)
        if self.greedy:
            chosen_B1 = logp_BV.argmax(-1, keepdim=True)
        else:
            mass_BV = logp_BV.double().exp().cumsum(-1)
            uniform_B1 = torch.tensor([[g.random()] for g in self.uniform], dtype=torch.float64)
            drawn_B1 = uniform_B1.to(mass_BV.device) * mass_BV[:, -1:]
            chosen_B1 = torch.searchsorted(mass_BV, drawn_B1, right=True)
            chosen_B1.clamp_(max=mass_BV.shape[1] - 1)
        self.logprobs.append(logp_BV.gather(1, chosen_B1)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B1, 0.0)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, one thread: a token is too little work to share, and threads that spin while they
    wait slow every process of the machine many times over."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
