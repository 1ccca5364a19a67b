"""The hindsight prompt, and the tokens of both passes.

An interaction is (x, y, o): the prompt history, the model's answer, the user's follow-up.

  policy pass     chat(x)                        then y
  hindsight pass  chat(x with o appended)        then y

Both end in the *same* ids of y, tokenized once, end-of-sequence included: they are aligned by
construction, whatever the tokenizer would merge at the border.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from .conversations import Message
from .errors import DataError, SdpoError
from .interactions import Interaction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = {
    "paper-offline": (
        "\n\n[HINDSIGHT CONTEXT]\n"
        "The following is a user response to your previous, insufficient attempt. "
        "Improve your response to the user prompt.\n"
        "Future User Message: {followup}"
    ),
    "paper-online": (
        "\n\n=== HINDSIGHT CONTEXT ===\n"
        "[The following is a future user message. "
        "Use this to guide your answer to the user prompt.]\n"
        "{followup}"
    ),
}
"""The published templates (arXiv:2603.12273): appended to the last user message of x."""


@dataclass(frozen=True, kw_only=True)
class HindsightConfig:
    """How an interaction becomes tokens."""

    template: str = "paper-offline"
    """A preset (``paper-offline``, ``paper-online``) or any text with a ``{followup}`` field."""
    max_prompt_tokens: int = 2048
    """Longer prompts lose tokens on the left, counted in ``truncated/policy``."""
    max_hindsight_prompt_tokens: int = 4096
    """Longer prompts with the hindsight context lose tokens on the left, counted in
    ``truncated/hindsight``."""
    max_response_tokens: int = 2048
    """Longer responses lose tokens, and their end, on the right, counted in
    ``truncated/response``."""

    def __post_init__(self):
        resolve_template(self.template)
        for name in ("max_prompt_tokens", "max_hindsight_prompt_tokens", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise SdpoError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Token ids of one interaction: the passes read ``policy + response`` and ``hindsight +
    response``."""

    id: str
    policy: tuple[int, ...]
    hindsight: tuple[int, ...]
    response: tuple[int, ...]
    old_logprobs: tuple[float, ...] | None
    """log-probabilities of ``response`` under the policy that sampled it, where known."""
    ends: bool
    """The last token is the end of the response, not where it was cut."""
    truncated: tuple[bool, bool, bool]
    """Whether tokens were cut from the policy prompt, the hindsight prompt, the response."""


def resolve_template(template: str) -> str:
    """The text of a preset, or ``template`` itself.

    Raises:
        SdpoError: it is neither a preset nor a text with exactly one ``{followup}``.
    """
    text = TEMPLATES.get(template, template)
    if text.count("{followup}") != 1:
        raise SdpoError(
            f"template {template!r} is no preset ({', '.join(TEMPLATES)}) and does not hold "
            "exactly one {followup} field: name a preset or write the text with {followup}"
        )
    return text


def hindsight_prompt(
    prompt: Sequence[Message], followup: str, template: str = "paper-offline"
) -> list[Message]:
    """x with o appended to its last user message; o is stripped, x is not touched."""
    context = resolve_template(template).replace("{followup}", followup.strip())
    *history, last = prompt
    return [*history, Message(last.role, last.content + context)]


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Chat-templated ids up to where the assistant begins; thinking is off where the template has
    that option.

    Raises:
        DataError: the template does not accept these messages.
    """
    chat = [message.for_template() for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except TemplateError as error:
        roles = ", ".join(m.role for m in messages)
        raise DataError(
            f"the model's chat template refuses a prompt of the roles {roles} ({error})",
            field="prompt",
            hint="Drop such interactions, or use a model whose template takes them",
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore


def response_ids(tokenizer: "PreTrainedTokenizerBase", completion: str) -> list[int]:
    """Ids of the right-stripped response and its end-of-sequence token."""
    ids = tokenizer(completion.rstrip(), add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]  # pyright: ignore


def encode(
    interaction: Interaction, tokenizer: "PreTrainedTokenizerBase", config: HindsightConfig
) -> Encoded:
    """Tokens of both passes of one interaction, cut to the limits.

    Prompts keep their right end, as published. A response that came with its sampled ids is used
    as sampled.

    Raises:
        DataError: the response holds no text; the interaction's id is named.
    """
    policy = prompt_ids(tokenizer, interaction.prompt)
    with_context = hindsight_prompt(interaction.prompt, interaction.followup, config.template)
    hindsight = prompt_ids(tokenizer, with_context)
    if interaction.response_token_ids is not None:
        response = list(interaction.response_token_ids)
    else:
        response = response_ids(tokenizer, interaction.response)
        if len(response) == 1:
            row = f"interaction {interaction.id}"
            raise DataError("no tokens", row=row, field="completion", hint="Remove the row")
    kept = response[: config.max_response_tokens]
    old = interaction.response_logprobs
    return Encoded(
        id=interaction.id,
        policy=tuple(policy[-config.max_prompt_tokens :]),
        hindsight=tuple(hindsight[-config.max_hindsight_prompt_tokens :]),
        response=tuple(kept),
        old_logprobs=None if old is None else tuple(old[: len(kept)]),
        ends=kept[-1] == tokenizer.eos_token_id,
        truncated=(
            len(policy) > config.max_prompt_tokens,
            len(hindsight) > config.max_hindsight_prompt_tokens,
            len(response) > config.max_response_tokens,
        ),
    )
