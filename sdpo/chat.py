"""How a tokenizer's chat template turns messages into token ids, and where a response begins and
ends in it.

    chat = chat_format(tokenizer)
    chat.prompt_ids(messages)        # up to where the assistant begins
    chat.response_ids("Paris.")      # ... <|im_end|>

What a template does is found out by rendering a conversation of three made-up messages: what opens
a response, what ends it, whether there is a thinking block before it.

Control tokens, such as ``<|im_end|>``, are the template's alone. Where a message spells one, the
template reads the message with a private character before it, which tells the template's own marks
from the text's in what it renders; these then go by other names through a copy of the tokenizer
that does not know the control tokens. Messages without one, nearly all, are rendered and tokenized
as transformers does it.
"""

import json
import os
import re
import secrets
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date as Date
from datetime import datetime, time
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, TemplateError

from .conversations import Message
from .errors import DataError, SdpoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL_MARK = re.compile(
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>|\[/?INST\]|<(?:start|end)_of_turn>|</?think>"
)
"""Marks of ChatML, Llama 3, Mistral, Gemma, DeepSeek and of reasoning. Not Llama 2's </s>: HTML has
it too."""
THINKING_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)
"""What opens and what closes a thinking block."""
Thinking = Literal["strip", "keep"]

_ASKED, _ANSWERED, _ASKED_AGAIN = "sdpoQUESTIONsdpo", "sdpoANSWERsdpo", "sdpoAGAINsdpo"
_CLOCK = (
    "{% macro strftime_now(format) %}{{ sdpo_now[format] if format in sdpo_now else "
    "raise_exception('strftime_now with a format that is not written out') }}{% endmacro +%}"
)
"""Before a template it hides transformers' own strftime_now."""


@dataclass(frozen=True, kw_only=True)
class _Opening:
    """What stands between the last user message and a response.

    ``thinking``: what the template is told; ``drop``: the end of its generation prompt, which goes;
    ``add``: what comes in its place; ``lead``: what then stands there, from the last control token
    on; ``blank``: white space that the template puts before a response, part of the response.
    """

    thinking: bool
    drop: str = ""
    add: str = ""
    lead: str = ""
    blank: str = ""


class ChatFormat:
    """A tokenizer's chat template, known well enough to train with. `chat_format` makes one.

    Attributes:
        end: what the template puts behind a response, up to its last control token.
        end_ids: ids at which a sampled response ends: the template's, and what the tokenizer's and
            the generation config's ``eos_token`` say.
        fewest: number of ids of a response without text.
        notes: what is odd about the model's files, in sentences.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", date: str | None = None):
        self.tokenizer, self.notes = tokenizer, list[str]()
        self._template = tokenizer.get_chat_template()
        literals = list(_literals(self._template))
        self._variables: dict[str, Any] = {}
        if "strftime_now" in self._template:
            now = datetime.combine(Date.fromisoformat(date or today()), time())
            formats = {text for text in literals if "%" in text}
            self._variables["sdpo_now"] = {text: now.strftime(text) for text in formats}
            self._template = _CLOCK + self._template
        self._control = {
            token.content: id
            for id, token in tokenizer.added_tokens_decoder.items()
            if _is_control(token, literals)
        }
        self._control_ids = frozenset(self._control.values())
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_re = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._answer, self._thought = self._answer_opening(), self._thought_opening()
        self._always_open = _open_block(self._generation_prompt(False)) is not None
        self._lead_ids = {o: self._ids(o.lead) for o in (self._answer, self._thought)}
        self.end = self._find_end()
        self.fewest = len(self.response_ids("")[0])
        eos = {"tokenizer.eos_token": _as_ids(tokenizer.eos_token_id)}
        eos["generation_config.json"] = _generation_eos(tokenizer.name_or_path)
        last = self._ids(self.end)[-1]
        for source, ids in eos.items():
            if ids and last not in ids:
                named = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids)
                self.notes.append(
                    f"the chat template ends a response with {self.end!r}, {source} says {named}: "
                    "the template is followed"
                )
        self.end_ids = frozenset({last}.union(*eos.values()))

    # What training asks for

    def prompt_ids(self, messages: Sequence[Message], *, thought: bool = False) -> list[int]:
        """Ids of a prompt, up to where the assistant begins.

        Args:
            thought: the response brings its own thinking block; otherwise the prompt closes one
                that the template opens.

        Raises:
            DataError: the template does not accept these messages.
        """
        chat = [message.for_template() for message in messages]
        opening = self._thought if thought else self._answer

        def rendered(chat: list[dict[str, Any]]) -> str:
            text = self._render(chat, opening.thinking, generation=True)
            return text.removesuffix(opening.drop) + opening.add

        text = rendered(chat)
        if not any(self._control_re.search(said) for said in _strings(chat)):
            return self._ids(text)
        mark = _unused_character(_strings(chat))
        for left_to_the_template in ((), tuple(m for pair in THINKING_MARKS for m in pair)):
            marked = rendered(self._marked(chat, mark, left_to_the_template))
            marked = marked.replace(json.dumps(mark)[1:-1], mark)  # tojson(ensure_ascii=True)
            # a template that looks at its own marks in an assistant's message, to remove a
            # thinking block, must find them
            if marked.replace(mark, "") == text:
                break
        return self._ids(*_unmarked(marked, mark))

    def response_ids(self, response: str, thinking: Thinking = "strip") -> tuple[list[int], bool]:
        """Ids of a right-stripped response and of what the template puts behind it, and whether
        they hold a thinking block. A block that nothing closes was cut in the log, and has no end.

        They are what the template's own rendering of the whole conversation has there, but for
        white space at the response's beginning that the template removes.
        """
        thought, answer = self.split_thought(response)
        kept = thinking == "keep" and thought is not None
        opening = self._thought if kept else self._answer
        mark = _unused_character([response])
        text, end = self._marked(answer.rstrip(), mark), self.end
        if kept and thought:
            opens, inner, closes = thought
            if _open_block(opening.lead):  # the prompt has this mark, and often a new line
                blank = opening.lead[len(opening.lead.rstrip()) :]
                opens, inner = "", inner.removeprefix(blank)
            text = opens + self._marked(inner, mark) + closes + text
            end = end if closes else ""
        else:
            text = opening.blank + text
        lead_ids = self._lead_ids[opening]
        ids = self._ids(*_unmarked(opening.lead + text + end, mark))
        if ids[: len(lead_ids)] == lead_ids:
            return ids[len(lead_ids) :], kept
        # the tokenizer merges across the border, where the prompt's own ids end
        return self._ids(*_unmarked(text + end, mark)), kept

    def split_thought(self, response: str) -> tuple[tuple[str, str, str] | None, str]:
        """A response's own thinking block at its beginning, as (what opens it, the thought, what
        closes it with the white space behind), and the answer after it.

        A response may leave out the opening mark where the template's generation prompt has it. A
        block that nothing closes leaves no answer. Of several blocks in a row only the first is
        told, and none is part of the answer.
        """
        for opens, closes in THINKING_MARKS:
            block = re.compile(rf"(\s*{re.escape(opens)})(.*?)({re.escape(closes)}\s*)", re.DOTALL)
            found: tuple[str, str, str] | None = None
            answer = response
            if (implied := self._implied_close(response, opens, closes)) is not None:
                found, answer = implied
            while match := block.match(answer):
                found = found or (match[1], match[2], match[3])
                answer = answer[match.end() :]
            if answer.lstrip().startswith(opens):
                return found or (opens, answer.lstrip().removeprefix(opens), ""), ""
            if found:
                return found, answer
        return None, response

    def sampled_ids(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """Sampled ids up to and including the first that ends a response, and whether they are read
        behind the template's own generation prompt: they hold a thinking block, or go on with the
        one that it always opens."""
        ends = (i for i, token in enumerate(ids) if token in self.end_ids)
        kept = list(ids[: next(ends, len(ids) - 1) + 1])
        marks = {self._control.get(mark) for pair in THINKING_MARKS for mark in pair}
        return kept, self._always_open or not marks.isdisjoint(kept)

    def control_token(self, text: str) -> re.Match[str] | None:
        """The first control token that a text spells."""
        return self._control_re.search(text)

    def token_starts(self, text: str) -> list[int]:
        """Index of the character at which each token of a text begins, about."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return [start for start, _ in encoded["offset_mapping"]]  # pyright: ignore
        n = len(self._ids(text))
        return [i * len(text) // n for i in range(n)]

    # What the template does

    def _render(self, chat: list[dict[str, Any]], thinking: bool, *, generation: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                chat,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation,
                enable_thinking=thinking,
                thinking=thinking,
                **self._variables,
            )  # pyright: ignore[reportReturnType]
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in chat)
            raise DataError(
                f"the model's chat template refuses a prompt of the roles {roles} ({error})",
                field="prompt",
                hint="Drop such interactions, or use a model whose template takes them",
            ) from error

    def _rendered(self, *said: str, thinking: bool = False, generation: bool = False) -> str:
        """A conversation of these messages, the user's and the assistant's in turn; "" where the
        template does not accept it, and so tells nothing."""
        roles = ("user", "assistant", "user")
        chat = [{"role": r, "content": text} for r, text in zip(roles, said, strict=False)]
        try:
            return self._render(chat, thinking, generation=generation)
        except DataError:
            return ""

    def _generation_prompt(self, thinking: bool) -> str:
        """From the user's last word on."""
        return self._rendered(_ASKED, thinking=thinking, generation=True).partition(_ASKED)[2]

    def _answer_opening(self) -> _Opening:
        opened, add, blank = self._generation_prompt(False), "", ""
        before_answer = self._rendered(_ASKED, _ANSWERED).partition(_ASKED)[2]
        before_answer = before_answer.partition(_ANSWERED)[0]
        if before_answer.startswith(opened):  # and goes on: "</think>", "<|channel|>final"
            rest = before_answer.removeprefix(opened)
            add, blank = ("", rest) if rest.isspace() else (rest, "")
        if closes := _open_block(opened + add):
            open_line = (opened + add).endswith("\n")
            add += ("\n" if open_line else "\n\n") + closes + "\n\n"
        return _Opening(thinking=False, add=add, lead=self._lead(opened + add), blank=blank)

    def _thought_opening(self) -> _Opening:
        opened, drop = self._generation_prompt(True), ""
        for opens, closes in THINKING_MARKS:
            empty = rf"(?:{re.escape(opens)}\s*)?{re.escape(closes)}\s*\Z"
            if found := re.search(empty, opened):
                drop = found[0]
        return _Opening(thinking=True, drop=drop, lead=self._lead(opened.removesuffix(drop)))

    def _lead(self, opened: str) -> str:
        """From the last control token on: nothing before that changes the ids after it."""
        starts = [match.start() for match in self._control_re.finditer(opened)]
        return opened[starts[-1] :] if starts else opened

    def _implied_close(
        self, response: str, opens: str, closes: str
    ) -> tuple[tuple[str, str, str], str] | None:
        """A block without its opening mark, which the generation prompt had."""
        before, close, answer = response.partition(closes)
        if _open_block(self._thought.lead) != closes or not close or opens in before:
            return None
        blank = len(answer) - len(answer.lstrip())
        return ("", before, close + answer[:blank]), answer[blank:]

    def _find_end(self) -> str:
        """What the template puts behind an assistant's message, last or not."""
        behind = self._rendered(_ASKED, _ANSWERED).partition(_ANSWERED)[2]
        between = self._rendered(_ASKED, _ANSWERED, _ASKED_AGAIN).partition(_ANSWERED)[2]
        between = between.partition(_ASKED_AGAIN)[0]
        common = len(os.path.commonprefix([behind, between]))
        ends = [match.end() for match in self._control_re.finditer(behind)]
        if in_both := [end for end in ends if end <= common]:
            return behind[: in_both[-1]]
        if ends:
            return behind[: ends[0]]
        if behind.strip() and common == len(behind):  # marks that are no tokens
            return behind.rstrip()
        eos = self.tokenizer.eos_token
        if not isinstance(eos, str):
            raise SdpoError(
                "the chat template puts nothing behind a response, and the tokenizer names no "
                "eos_token: set it in its config"
            )
        self.notes.append(
            f"the chat template puts nothing behind a response: it ends with eos_token, {eos!r}"
        )
        return eos

    # Text and control tokens -> ids

    def _marked(self, value: Any, mark: str, left: Collection[str] = ()) -> Any:
        """``value`` with a character before each control token in its strings, roles apart.

        Args:
            left: control tokens that stay as they are in an assistant's messages.
        """
        if isinstance(value, str):
            return self._control_re.sub(lambda m: m[0] if m[0] in left else mark + m[0], value)
        if isinstance(value, list):
            return [self._marked(item, mark, left) for item in value]
        if isinstance(value, dict):
            if value.get("role", "assistant") != "assistant":
                left = ()
            return {k: v if k == "role" else self._marked(v, mark, left) for k, v in value.items()}
        return value

    def _ids(self, text: str, spelt: Collection[int] = ()) -> list[int]:
        """Ids of a rendered text; its control tokens are the template's, but for those that begin
        at the characters ``spelt``."""
        own = [m for m in self._control_re.finditer(text) if m.start() not in spelt]
        if not spelt:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if self._controls(ids) == len(own):
                return ids  # pyright: ignore[reportReturnType]
            # a normalizer made a control token out of other characters
        if not self.tokenizer.is_fast:
            return self._ids_by_stretches(text, own)
        ids = self._text_tokenizer(text, own)
        if self._controls(ids) > len(own):  # the model itself has the control token as a word
            ids = self._text_tokenizer(text, own, {start + 1 for start in spelt})
        return ids

    def _controls(self, ids: Any) -> int:
        return sum(map(self._control_ids.__contains__, ids))

    def _ids_by_stretches(self, text: str, own: Sequence[re.Match[str]]) -> list[int]:
        """For tokenizers without tokenizer.json: merges do not cross a control token."""
        ids, at = list[int](), 0
        for match in [*own, None]:
            said = text[at : match.start()] if match else text[at:]
            encoded = self.tokenizer(said, add_special_tokens=False, split_special_tokens=True)
            ids += encoded["input_ids"] if said else []  # pyright: ignore
            if match:
                ids.append(self._control[match[0]])
                at = match.end()
        return ids

    @cached_property
    def _text_tokenizer(self) -> "_TextTokenizer":
        return _TextTokenizer(self.tokenizer, self._control)


class _TextTokenizer:
    """A copy of a fast tokenizer that knows the control tokens by other names alone."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", control: Collection[str]):
        from tokenizers import AddedToken, Tokenizer  # seconds, which data commands need not pay

        state = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
        state |= {"added_tokens": [], "truncation": None, "padding": None}
        self._copy = Tokenizer.from_str(json.dumps(state))
        secret = secrets.token_hex(8)  # no text can spell the names
        self._names = {token: f"\U0010fffd{secret}{i}\U0010fffd" for i, token in enumerate(control)}
        self._break = f"\U0010fffd{secret}\U0010fffd"
        known = {self._break: (-1, AddedToken(self._break))}
        for id, token in tokenizer.added_tokens_decoder.items():
            name = self._names.get(token.content, token.content)
            flags = {f: getattr(token, f) for f in ("lstrip", "rstrip", "single_word")}
            plain = token.normalized and name == token.content
            known[name] = id, AddedToken(name, normalized=plain, **flags)
        self._copy.add_tokens([token for _, token in known.values()])
        self._ids = {self._copy.token_to_id(name): id for name, (id, _) in known.items()}

    def __call__(
        self, text: str, own: Sequence[re.Match[str]], breaks: Collection[int] = ()
    ) -> list[int]:
        """Ids of a text.

        Args:
            own: the control tokens in it that are to become their own ids.
            breaks: characters before which no token may be merged.
        """
        names = [(m.start(), m.end(), self._names[m[0]]) for m in own]
        pieces, at = [], 0
        for start, end, name in sorted([*names, *((i, i, self._break) for i in breaks)]):
            pieces += text[at:start], name
            at = end
        encoded = self._copy.encode("".join([*pieces, text[at:]]), add_special_tokens=False)
        ids = (self._ids.get(id, id) for id in encoded.ids)
        return [id for id in ids if id >= 0]


@lru_cache(maxsize=8)
def _chat_format(tokenizer: "PreTrainedTokenizerBase", template: str, date: str) -> ChatFormat:
    made = ChatFormat(tokenizer, date)
    if os.environ.get("RANK", "0") == "0":
        for note in made.notes:
            print(f"sdpo: {tokenizer.name_or_path or 'tokenizer'}: {note}", file=sys.stderr)
    return made


def chat_format(tokenizer: "PreTrainedTokenizerBase", date: str | None = None) -> ChatFormat:
    """What is known of a tokenizer's chat template; found out once, and then remembered. The main
    rank prints what is odd about it.

    Args:
        date: day, YYYY-MM-DD, that a template is told which reads the clock; None: the day on which
            this process first asked.

    Raises:
        SdpoError: nothing ends a response.
    """
    return _chat_format(tokenizer, str(tokenizer.chat_template), date or today())


@lru_cache(maxsize=1)
def today() -> str:
    """The day on which this process first asked, YYYY-MM-DD."""
    return Date.today().isoformat()


def _literals(template: str) -> Iterator[str]:
    """What a template writes: its text, and the strings in its expressions."""
    for _, kind, value in Environment().lex(template):
        if kind == "data":
            yield value
        elif kind == "string":
            yield value[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")


def _is_control(token: Any, literals: Sequence[str]) -> bool:
    """A special token; or one that looks like a mark of a chat format, or that the template writes,
    for tokenizers do not call all of theirs special. White space and words are text."""
    if token.content.isspace() or token.content.isalnum():
        return False
    looks = CONTROL_MARK.fullmatch(token.content) is not None
    return token.special or looks or any(token.content in text for text in literals)


def _strings(value: Any) -> Iterator[str]:
    """Every string in lists and dicts, roles apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "role":
                yield from _strings(item)


def _unused_character(texts: Collection[str] | Iterator[str]) -> str:
    """A private character that none of these texts has."""
    said = "".join(texts)
    return next(c for c in map(chr, range(0x10FFFC, 0xF0000, -1)) if c not in said)


def _unmarked(text: str, mark: str) -> tuple[str, set[int]]:
    """A text without its marks, and where they were."""
    pieces, places, at = text.split(mark), set[int](), 0
    for piece in pieces[:-1]:
        at += len(piece)
        places.add(at)
    return "".join(pieces), places


def _open_block(text: str) -> str | None:
    """What would close the thinking block that a text leaves open."""
    for opens, closes in THINKING_MARKS:
        if text.rfind(opens) > text.rfind(closes):
            return closes
    return None


def _as_ids(eos: Any) -> set[int]:
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _generation_eos(folder: str) -> set[int]:
    """The ids at which ``generation_config.json`` says to stop, where the folder has one."""
    try:
        settings = json.loads((Path(folder) / "generation_config.json").read_text("utf-8"))
        return _as_ids(settings.get("eos_token_id"))
    except (OSError, ValueError, AttributeError):
        return set()
