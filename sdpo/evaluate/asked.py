"""The harness's questions, put to a sampler that answers elsewhere. Needs the extra ``eval``."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from transformers import PreTrainedTokenizerBase

from ..errors import SdpoError
from ..online.sampler import RemoteSampler


class Asked(LM):
    """A model of the harness whose answers are the sampler's: to token ids, and by no other weights
    than the run's newest, whatever a server does."""

    def __init__(self, sampler: RemoteSampler, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.sampler, self.tokenizer = sampler, tokenizer
        self.chat_template_args: dict[str, Any] = {}

    # the same texts as of a model in this process
    apply_chat_template: Any = HFLM.apply_chat_template
    chat_template: Any = HFLM.chat_template
    tokenizer_name: Any = HFLM.tokenizer_name

    def generate_until(self, requests: list[Instance]) -> list[str]:
        texts, given = zip(*(request.args for request in requests), strict=True)
        how: list[Any] = [normalize_gen_kwargs(one) for one in given]
        if any(one["do_sample"] for one in how):
            raise _refused("draws its answers")
        limits = [one["max_gen_toks"] for one in how]
        prompts = [self._ids(text) for text in texts]
        rollouts = self.sampler.answers(prompts, range(len(prompts)), greedy=True, limits=limits)
        ids = [list(rollout.token_ids) for rollout in rollouts]
        answers = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            postprocess_generated_text(answer, one["until"], None)
            for answer, one in zip(answers, how, strict=True)
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise _refused("compares the log-probabilities of given answers")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise _refused("reads the log-probabilities of texts")

    def _ids(self, text: str) -> Sequence[int]:
        tokenizer: Any = self.tokenizer
        special = not has_bos_prefix(text, tokenizer.bos_token)
        return tokenizer(text, add_special_tokens=special)["input_ids"]


def _refused(what: str) -> SdpoError:
    return SdpoError(
        f"evaluate.tasks: a task {what}, which this run's servers cannot be asked for: take tasks "
        'that are answered greedily, such as ifeval, or sampler.kind = "InProcess"'
    )
