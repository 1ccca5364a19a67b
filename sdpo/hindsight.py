"""The hindsight prompt, and the tokens of both passes.

An interaction is (x, y, o): the prompt history, the model's answer, the user's follow-up.

  policy pass     chat(x)                        then y
  hindsight pass  chat(x with o appended)        then y

Both end in the *same* ids of y, tokenized once, end-of-sequence included: they are aligned by
construction, whatever the tokenizer would merge at the border. What SDPO is compared with reads the
prompt alone, and maybe y', the answer behind the follow-up (`Reading`).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date as Date
from typing import TYPE_CHECKING, Literal, NamedTuple

from .chat import ChatFormat, Thinking, chat_format, today
from .conversations import Message
from .errors import DataError, SdpoError
from .interactions import Interaction, conversation_of

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
    "wish": "\n\n(How I like answers: {followup})",
}
"""Appended to the last user message of x. The first two are the published ones (arXiv:2603.12273).

``wish`` blames no earlier answer and names no message, so that a small model has nothing to
apologise for or to speak of; benchmarks/LOG.md compares them."""

Reading = Literal["hindsight", "response", "next", "pair"]
"""What is read of an interaction. hindsight: y behind x, and behind x with o. response: y behind x,
in one pass. next: y' behind x, in one pass. pair: y' and y behind x, in both passes."""
ALONE: tuple[Reading, ...] = ("response", "next")
"""Those without a second pass."""

ONLY_A_THOUGHT = "no answer behind the thought"
KEEP_THOUGHTS = "Remove such rows, or train on thoughts with --hindsight.thinking keep"


@dataclass(frozen=True, kw_only=True)
class HindsightConfig:
    """How an interaction becomes tokens."""

    template: str = "paper-offline"
    """A preset (``paper-offline``, ``paper-online``, ``wish``) or any text with a ``{followup}``
    field."""
    max_prompt_tokens: int = 2048
    """Longer prompts are shortened, counted in ``truncated/policy``."""
    max_hindsight_prompt_tokens: int = 4096
    """Longer prompts with the hindsight context are shortened, counted in
    ``truncated/hindsight``."""
    max_response_tokens: int = 2048
    """Longer responses lose tokens, and their end, on the right, counted in
    ``truncated/response``."""
    truncation: Literal["structure", "paper"] = "structure"
    """What prompts lose. structure: whole messages of the history, oldest first; then the end of
    the follow-up; then the middle of the question. paper: their left end, as published, roles and
    question included."""
    thinking: Thinking = "strip"
    """A response that begins with a thinking block of its own loses it (strip), or is read with it
    (keep)."""
    date: str | None = None
    """Day, YYYY-MM-DD, that chat templates which read the clock are told; None: the day on which
    the run, or the command, starts."""

    def __post_init__(self):
        resolve_template(self.template)
        for name in ("max_prompt_tokens", "max_hindsight_prompt_tokens", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise SdpoError(f"{name} must be at least 1, got {getattr(self, name)}")
        try:
            Date.fromisoformat(self.date or today())
        except ValueError:
            raise SdpoError(f"date must be a day, YYYY-MM-DD, got {self.date!r}") from None

    @property
    def max_tokens(self) -> int:
        """The longest sequence that either pass may read."""
        longest_prompt = max(self.max_prompt_tokens, self.max_hindsight_prompt_tokens)
        return longest_prompt + self.max_response_tokens


class Truncated(NamedTuple):
    """Whether an interaction lost tokens to the limits: by sequence, and what of its prompts."""

    policy: bool = False
    hindsight: bool = False
    response: bool = False
    history: bool = False
    followup: bool = False
    question: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Token ids of one interaction: the passes read ``policy + response`` and ``hindsight +
    response``; without a ``hindsight`` there is no second pass."""

    id: str
    policy: tuple[int, ...]
    hindsight: tuple[int, ...]
    response: tuple[int, ...]
    old_logprobs: tuple[float, ...] | None
    """log-probabilities of ``response`` under the policy that sampled it, where known."""
    ends: bool
    """The last token is the end of the response, not where it was cut."""
    truncated: Truncated
    thought: bool = False
    """The response brings its own thinking block, and the prompts close none."""
    conversation: str = ""
    """Of which it is a turn."""
    further: tuple[tuple[int, ...], ...] = ()
    """Other hindsight prompts behind which the response is read, where it is scored."""
    rejected: "Encoded | None" = None
    """The response that this one is preferred to, behind the same prompt."""

    @property
    def sequences(self) -> tuple["Encoded", ...]:
        """This, or the preferred and the rejected one of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)


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
    """x with o appended to its last message, or, where that is a tool's, to its last user message;
    o is stripped, x is not touched."""
    context = resolve_template(template).replace("{followup}", followup.strip())
    shown, at = list(prompt), _asked_at(prompt)
    at = at if prompt[-1].role not in ("user", "assistant") else len(prompt) - 1
    shown[at] = replace(shown[at], content=shown[at].content + context)
    return shown


def encode(
    interaction: Interaction,
    tokenizer: "PreTrainedTokenizerBase",
    config: HindsightConfig,
    *,
    sampled_thought: bool | None = None,
    reading: Reading = "hindsight",
) -> Encoded:
    """Tokens of both passes of one interaction, cut to the limits.

    A response that came with its sampled ids is used as sampled, up to the first id that ends it.

    Args:
        sampled_thought: whether the prompt that sampled ids were sampled behind left a thinking
            block to the response; None: judged by what the ids hold.
        reading: what the passes read.

    Raises:
        DataError: the response holds no text, or nothing but a thought that is to be stripped; the
            chat template does not accept the prompt; it cannot be shortened to the limits; or what
            is to be read is missing. The interaction's id is named.
    """
    chat = chat_format(tokenizer, config.date)
    read = [
        _encoded(i, chat, config, sampled_thought, reading) for i in as_read(interaction, reading)
    ]
    return replace(read[0], rejected=read[1]) if reading == "pair" else read[0]


def as_read(interaction: Interaction, reading: Reading) -> tuple[Interaction, ...]:
    """The interaction with the response, or responses, that are read, the preferred one first.

    Raises:
        DataError: it has no response behind its follow-up, which is to be read.
    """
    if reading in ("hindsight", "response"):
        return (interaction,)
    if interaction.next_response is None:
        problem = "missing, but the response behind the follow-up is to be trained on"
        hint = "Prepare the log with --next-response, or choose another objective or target"
        row = f"interaction {interaction.id}"
        raise DataError(problem, row=row, field="next_completion", hint=hint)
    after = replace(
        interaction,
        response=interaction.next_response,
        response_token_ids=None,
        response_logprobs=None,
    )
    return (after,) if reading == "next" else (after, interaction)


def _encoded(
    interaction: Interaction,
    chat: ChatFormat,
    config: HindsightConfig,
    sampled_thought: bool | None,
    reading: Reading,
) -> Encoded:
    """One response behind its prompts."""
    if interaction.response_token_ids is not None:
        response, thought = chat.sampled_ids(interaction.response_token_ids)
        thought = thought if sampled_thought is None else sampled_thought
    else:
        response, thought = chat.response_ids(interaction.response, config.thinking)
    row = f"interaction {interaction.id}"
    if not has_answer(interaction, chat, config.thinking):
        raise DataError(ONLY_A_THOUGHT, row=row, field="completion", hint=KEEP_THOUGHTS)
    if interaction.response_token_ids is None and len(response) == chat.fewest:
        raise DataError("no tokens", row=row, field="completion", hint="Remove the row")
    try:
        policy = hindsight = policy_ids(chat, interaction.prompt, config, thought=thought)
        if reading == "hindsight":
            hindsight = hindsight_ids(
                chat, interaction.prompt, interaction.followup, config, thought=thought
            )
    except DataError as error:
        raise error.at(row=row) from error.__cause__
    kept = response[: config.max_response_tokens]
    old = interaction.response_logprobs
    lost = policy.lost | hindsight.lost
    return Encoded(
        id=interaction.id,
        policy=policy.ids,
        hindsight=() if reading in ALONE else hindsight.ids,
        response=tuple(kept),
        old_logprobs=None if old is None else tuple(old[: len(kept)]),
        ends=len(kept) == len(response) and kept[-1] in chat.end_ids,
        truncated=Truncated(
            policy=policy.truncated,
            hindsight=reading == "hindsight" and hindsight.truncated,
            response=len(response) > config.max_response_tokens,
            history="history" in lost,
            followup="followup" in lost,
            question="question" in lost,
        ),
        thought=thought,
        conversation=conversation_of(interaction),
    )


def has_answer(interaction: Interaction, chat: ChatFormat, thinking: Thinking) -> bool:
    """There is something to train on: sampled ids, an answer, or a thought that is kept."""
    if interaction.response_token_ids is not None or thinking == "keep":
        return True
    thought, answer = chat.split_thought(interaction.response)
    return not thought or bool(answer.strip())


# Prompts, within their limits


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, and what was cut from it: parts of the structure, or just its left end."""

    ids: tuple[int, ...]
    truncated: bool = False
    lost: frozenset[str] = frozenset()


def policy_ids(
    chat: ChatFormat, prompt: Sequence[Message], config: HindsightConfig, *, thought: bool = False
) -> Prompt:
    """x as the policy reads it.

    Args:
        thought: the response brings its own thinking block.
    """
    limit = config.max_prompt_tokens
    ids = chat.prompt_ids(prompt, thought=thought)
    if len(ids) <= limit or config.truncation == "paper":
        return Prompt(tuple(ids[-limit:]), len(ids) > limit)
    return _shortened(chat, _Parts(list(prompt), None, config.template), limit, thought)


def hindsight_ids(
    chat: ChatFormat,
    prompt: Sequence[Message],
    followup: str,
    config: HindsightConfig,
    *,
    thought: bool = False,
) -> Prompt:
    """x with o, as hindsight reads it.

    Args:
        thought: the response brings its own thinking block.
    """
    limit = config.max_hindsight_prompt_tokens
    parts = _Parts(list(prompt), followup.strip(), config.template)
    ids = chat.prompt_ids(parts.messages(), thought=thought)
    if len(ids) <= limit or config.truncation == "paper":
        return Prompt(tuple(ids[-limit:]), len(ids) > limit)
    return _shortened(chat, parts, limit, thought)


@dataclass(frozen=True)
class _Parts:
    """What a prompt is made of."""

    prompt: list[Message]
    followup: str | None
    """None: the policy's prompt, without hindsight context."""
    template: str

    def messages(self) -> list[Message]:
        if self.followup is None:
            return self.prompt
        return hindsight_prompt(self.prompt, self.followup, self.template)

    def texts(self) -> list[tuple[str, int | None]]:
        """(kind, index of the message; None: the follow-up) in the order in which they are cut."""
        asked = _asked_at(self.prompt)
        others = [("history", i) for i in range(len(self.prompt)) if i != asked]
        followup = [] if self.followup is None else [("followup", None)]
        return [*others, *followup, ("question", asked)]

    def text(self, at: int | None) -> str:
        return (self.followup or "") if at is None else self.prompt[at].content

    def with_text(self, at: int | None, text: str) -> "_Parts":
        if at is None:
            return replace(self, followup=text)
        message = replace(self.prompt[at], content=text)
        return replace(self, prompt=[*self.prompt[:at], message, *self.prompt[at + 1 :]])


def _asked_at(prompt: Sequence[Message]) -> int:
    """Index of the last user message."""
    return max(i for i, message in enumerate(prompt) if message.role == "user")


def _shortened(chat: ChatFormat, whole: _Parts, limit: int, thought: bool) -> Prompt:
    """A prompt that exceeds its limit, shortened: messages before the last user message, from one
    user message to the next, oldest first, system prompts apart; then what is left of the history
    (system prompts, tool results); then the follow-up, whose beginning is kept; then the question,
    of which both ends are. A text is cut to less than a quarter of the limit only when all are.

    Raises:
        DataError: one token of each is still too long.
    """

    def ids_of(parts: _Parts) -> list[int]:
        return chat.prompt_ids(parts.messages(), thought=thought)

    system, asked = 0, _asked_at(whole.prompt)
    while whole.prompt[system].role not in ("user", "assistant"):
        system += 1
    users = [i for i in range(system + 1, asked) if whole.prompt[i].role == "user"]
    cuts = [
        replace(whole, prompt=whole.prompt[:system] + whole.prompt[i:]) for i in [*users, asked]
    ]
    # the last is not asked: where nothing fits, it is the one to cut further
    first = bisect_left(cuts[:-1], True, key=lambda parts: len(ids_of(parts)) <= limit)
    parts, lost = cuts[first], {"history"} if asked > system else set[str]()
    ids = ids_of(parts)
    for least in (max(1, limit // 4), 1):
        for kind, at in parts.texts():
            text, starts = parts.text(at), chat.token_starts(parts.text(at))
            n = len(starts)
            while len(ids) > limit and n > least:
                n = max(least, n - (len(ids) - limit))
                parts = parts.with_text(at, _cut(text, starts, n, middle=kind != "followup"))
                ids = ids_of(parts)
                lost.add(kind)
    if len(ids) > limit:
        problem = f"{len(ids)} tokens where the limit is {limit}, even with one token of each text"
        hint = (
            "Raise max_prompt_tokens or max_hindsight_prompt_tokens: the chat template and the "
            "hindsight context alone need about as many; or drop the row"
        )
        raise DataError(problem, hint=hint)
    return Prompt(tuple(ids), True, frozenset(lost))


def _cut(text: str, starts: Sequence[int], n: int, *, middle: bool) -> str:
    """The first ``n`` tokens of a text, or the first and last that make ``n``; "…" is in the place
    of what is gone."""
    head = n - n // 2 if middle else n
    kept = text[: starts[head]] + " …"
    return kept + " " + text[starts[len(starts) - n // 2] :] if middle and n > 1 else kept
