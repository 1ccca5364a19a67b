"""Asking a model behind any OpenAI-compatible server, through the `openai` package and a book.

Theirs are connections, headers and classes of errors; ours are retries, as each is a call that the
budget counts, and the reading of the answer, as servers differ in what they call one.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import SdpoError
from .calls import Call, Calls, Outcome
from .playing import Said

if TYPE_CHECKING:
    from pathlib import Path

    from openai import AsyncOpenAI

    from .config import ChatServer

_AGAIN = (408, 409, 425, 429)
"""Statuses below 500 that may pass."""
_MESSAGE_OVERHEAD = 64
"""Tokens that a chat template may put around a message."""
_NEVER_SENT = ("ConnectError", "ConnectTimeout")
"""The client's errors after which a server has surely read nothing."""


class Ask(NamedTuple):
    """What a model is asked: messages, as a chat template takes them, and an id of one's own."""

    id: str
    messages: list[dict[str, Any]]


class Heard(NamedTuple):
    """What came back; ``cached``: from the book, or as the answer to the same content just now."""

    said: Said
    cached: bool


class Request(NamedTuple):
    """One request: its body, the hash of its content, and the most tokens that it may take."""

    id: str
    body: dict[str, Any]
    key: str
    most_tokens: int


class _Again(Exception):
    """An attempt that failed, and may succeed later: why, how it is booked, seconds to wait."""

    def __init__(self, reason: str, outcome: Outcome, wait: float = 0.0):
        super().__init__(reason)
        self.reason, self.outcome, self.wait = reason, outcome, wait


class _Fatal(Exception):
    """An attempt that failed as all others will: what to tell, and how it is booked."""

    def __init__(self, problem: str, outcome: Outcome):
        super().__init__(problem)
        self.problem, self.outcome = problem, outcome


@dataclass
class _Talk:
    """What concurrent requests share: places, those in flight, when the server wants to be asked
    again, and the first error that ends them all."""

    client: "AsyncOpenAI"
    slots: asyncio.Semaphore
    in_flight: int = 0
    settled: asyncio.Condition = field(default_factory=asyncio.Condition)
    not_before: float = 0.0
    stopped: SdpoError | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until the first error ends all requests."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)


class Asker:
    """A server's model, asked many things at a time.

    What was answered once to the same content, under any id, is taken from the book and costs
    nothing, so that a command goes on where it stopped.

    Args:
        folder: where the book of calls is, `calls.FILE`.
        read: makes what was said of an answer's text, told whether it was cut at the limit.
        about: what the calls are for, as the book has it.

    Raises:
        SdpoError: the `openai` package or the server's key is missing.
    """

    def __init__(
        self,
        config: "ChatServer",
        folder: "Path",
        read: Callable[[str, bool], Said],
        about: str,
    ):
        self.config, self.read, self.about = config, read, about
        try:
            import openai  # an optional extra
        except ImportError as error:
            raise SdpoError(
                f"{config.url} is asked through the openai package ({error}): "
                "pip install 'sdpo[online]'"
            ) from None
        self._openai = openai
        self._api_key = _api_key(config)
        self.calls = Calls(folder)

    def ask(self, asked: Sequence[Ask]) -> list[Heard]:
        """The model's answers, in order.

        No seed is sent, as some servers refuse one: what repeats an answer is the book.

        Raises:
            SdpoError: the server gives no answers, or the budget is spent.
        """
        requests = [self.request(one) for one in asked]
        known = {request.key: self.calls.found(request.key) for request in requests}
        new = dict[str, Request]()
        for request in requests:
            if known[request.key] is None:
                new.setdefault(request.key, request)
        said = asyncio.run(self._all(list(new.values()))) if new else {}
        heard = []
        for request in requests:
            if (old := known[request.key]) is not None:
                heard.append(Heard(Said(old[0]), True))
            else:
                heard.append(Heard(said[request.key], new[request.key] is not request))
        return heard

    def close(self) -> None:
        """Close the book."""
        self.calls.close()

    def request(self, ask: Ask) -> Request:
        """The request that an ask makes."""
        body = self.config.request(ask.messages)
        content = json.dumps(body, sort_keys=True, ensure_ascii=False)
        size = sum(len(m["content"].encode()) + _MESSAGE_OVERHEAD for m in ask.messages)
        limits = (body.get("max_tokens"), body.get("max_completion_tokens"))
        written = max(limit for limit in limits if limit is not None)
        key = hashlib.sha256(content.encode()).hexdigest()
        return Request(ask.id, body, key, size + written)  # no token is shorter than a byte

    def where(self, id: str) -> str:
        """Who was asked about what, for an error."""
        return f"{self.config.url}, model {self.config.model}, exchange {id}"

    async def _all(self, asks: Sequence[Request]) -> dict[str, Said]:
        slots = asyncio.Semaphore(self.config.concurrency)
        async with self._openai.AsyncOpenAI(
            base_url=self.config.url,
            api_key=self._api_key or "none",
            timeout=self.config.retry.timeout,
            max_retries=0,
        ) as client:
            talk = _Talk(client, slots)
            # what is in flight when one fails is paid for, so that its answer is waited for
            said = await asyncio.gather(
                *(self._one(talk, ask) for ask in asks), return_exceptions=True
            )
        if talk.stopped is not None:
            raise talk.stopped
        for error in said:
            if isinstance(error, BaseException):
                raise error
        return {ask.key: s for ask, s in zip(asks, said, strict=True) if isinstance(s, Said)}

    async def _one(self, talk: _Talk, ask: Request) -> Said:
        retry, rng = self.config.retry, random.Random(ask.key)
        async with talk.slots:
            for attempt in range(1, retry.tries + 1):
                while (wait := talk.not_before - time.monotonic()) > 0 and talk.stopped is None:
                    await talk.pause(wait)
                number = await self._book(talk, ask, attempt)
                try:
                    said, outcome = await self._request(talk.client, ask)
                except _Again as error:
                    await self._settle(talk, number, error.outcome)
                    wait = retry.wait(attempt, error.wait, rng.random())
                    if wait is None:
                        raise self._stop(talk, ask, self._too_long(error)) from None
                    if attempt == retry.tries:
                        raise self._stop(talk, ask, self._gave_up(error)) from None
                    if error.wait:  # all others would hear the same
                        talk.not_before = max(talk.not_before, time.monotonic() + wait)
                    await talk.pause(wait)
                except _Fatal as error:
                    await self._settle(talk, number, error.outcome)
                    raise self._stop(talk, ask, error.problem) from None
                except BaseException:  # it stays in the book as sent
                    await self._settle(talk, number, None)
                    raise
                else:
                    await self._settle(talk, number, outcome)
                    return said
        raise AssertionError("the last attempt returns or raises")

    async def _book(self, talk: _Talk, ask: Request, attempt: int) -> int:
        """The number of a call that the budget has room for, once those in flight have settled.

        Raises:
            SdpoError: it never will, or another request has ended the run.
        """
        limit = self.config.budget
        call = Call(
            ask.key,
            ask.id,
            self.about,
            self.config.url,
            self.config.model,
            attempt,
            ask.most_tokens,
            json.dumps(ask.body, ensure_ascii=False),
        )
        async with talk.settled:
            while True:
                if talk.stopped is not None:
                    raise talk.stopped
                number = self.calls.send(call, calls=limit.calls, tokens=limit.tokens)
                if number is not None:
                    talk.in_flight += 1
                    return number
                if not talk.in_flight:
                    raise self._stop(talk, ask, self._no_budget(ask))
                await talk.settled.wait()

    async def _settle(self, talk: _Talk, number: int, outcome: Outcome | None) -> None:
        if outcome is not None:
            self.calls.end(number, outcome)
        talk.in_flight -= 1
        async with talk.settled:
            talk.settled.notify_all()

    async def _request(self, client: "AsyncOpenAI", ask: Request) -> tuple[Said, Outcome]:
        extra = {k: v for k, v in ask.body.items() if k not in ("model", "messages")}
        try:
            async with asyncio.timeout(self.config.retry.timeout):  # of the whole, not of a read
                raw = await client.chat.completions.with_raw_response.create(
                    model=ask.body["model"], messages=ask.body["messages"], extra_body=extra
                )
        except (TimeoutError, self._openai.APITimeoutError):
            reason = f"no answer within {self.config.retry.timeout:g} s"
            raise _Again(reason, Outcome("timeout")) from None
        except self._openai.APIStatusError as error:
            return self._refused(error)
        except self._openai.APIConnectionError as error:
            sent = type(error.__cause__).__name__ not in _NEVER_SENT
            reason = f"cannot be reached ({error.__cause__ or error})"
            raise _Again(reason, Outcome("connection", None if sent else 0)) from None
        return self._heard(raw.content)

    def _refused(self, error: Any) -> tuple[Said, Outcome]:
        """What an answer of a status above 400 means."""
        status, text = error.status_code, error.response.text
        told = f"{status} ({_said_by_server(error.body, text)})"
        booked = Outcome(f"status {status}", 0, response=text)
        if error.code in ("content_filter", "content_policy_violation"):
            return Said(None, "refused"), booked._replace(status="refused")
        if error.code == "insufficient_quota":
            raise _Fatal(f"{told}: the account has no credit left", booked)
        if status in _AGAIN or status >= 500:
            raise _Again(told, booked, _retry_after(error.response.headers))
        if status in (401, 403):
            name = self.config.key_variable
            held = f"the key in the environment variable {name}" if name else "a key (key_variable)"
            raise _Fatal(f"{told}: give it {held}", booked)
        if status == 404:
            raise _Fatal(f"{told}: check the model's name and the address", booked)
        raise _Fatal(f"{told}: check the settings, extra among them", booked)

    def _heard(self, content: bytes) -> tuple[Said, Outcome]:
        """What an answer of status 200 says.

        Raises:
            _Again: it is no chat completion.
        """
        text = content.decode(errors="replace")
        try:
            answer = json.loads(text)
            choice = answer["choices"][0]
            message, end = choice["message"], choice.get("finish_reason")
            spoken, refusal = message.get("content") or "", message.get("refusal")
            if not isinstance(spoken, str):
                raise TypeError("content that is no text")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"an answer that is no chat completion ({type(error).__name__})"
            raise _Again(reason, Outcome("unreadable", response=text)) from None
        read_tokens, written = _usage(answer)
        known = None if read_tokens is None or written is None else read_tokens + written
        outcome = Outcome("aborted", known, read_tokens, written, text)
        if end in ("abort", "error"):
            raise _Again(f"it broke off its answer ({end})", outcome)
        if refusal or end == "content_filter":
            said = Said(None, "refused")
        else:
            said = self.read(spoken, end == "length")
        status = said.fault or ("silent" if said.text is None else "said")
        return said, outcome._replace(status=status, reply=said.text)

    # What ends a run

    def _stop(self, talk: _Talk, ask: Request, problem: str) -> SdpoError:
        if talk.stopped is None:
            talk.stopped = SdpoError(f"{self.where(ask.id)}: {problem}")
            talk.ended.set()
        return talk.stopped

    def _gave_up(self, error: _Again) -> str:
        tries = self.config.retry.tries
        return (
            f"no reply in {tries} tries, the last: {error.reason}. See to the server and resume "
            f"the run: what was answered is in {self.calls.path} and is not asked again"
        )

    def _too_long(self, error: _Again) -> str:
        longest = self.config.retry.longest_wait
        return (
            f"{error.reason}, and asks to wait {error.wait:.0f} s, more than {longest:g} "
            "(retry.longest_wait): resume the run later, or raise that"
        )

    def _no_budget(self, ask: Request) -> str:
        spent, limit = self.calls.spent(), self.config.budget
        if limit.calls is not None and spent.calls >= limit.calls:
            return (
                f"the budget is spent: {spent.calls} of {limit.calls} calls. Raise budget.calls "
                "and resume the run; nothing that was answered is asked again"
            )
        return (
            f"the budget is spent: {spent.tokens} of {limit.tokens} tokens, and the next call may "
            f"take {ask.most_tokens}. Raise budget.tokens and resume the run; nothing that was "
            "answered is asked again"
        )


def _api_key(config: "ChatServer") -> str:
    name = config.key_variable
    key = os.environ.get(name, "") if name else ""
    if name and not key:
        raise SdpoError(
            f"{config.url} needs a key in the environment variable {name}, which is not set: set "
            'it, name another (key_variable), or say key_variable = "" for a server without one'
        )
    return key


def _usage(answer: dict[str, Any]) -> tuple[int | None, int | None]:
    """Tokens read and written, where the server tells."""
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    read_tokens, written = (c if type(c) is int and c >= 0 else None for c in counts)
    return read_tokens, written


def _said_by_server(body: object, text: str) -> str:
    """A server's own words on an error, in one line."""
    if isinstance(body, dict):
        inner = body.get("error", body)
        text = str(inner.get("message", text) if isinstance(inner, dict) else inner)
    return " ".join(text.split())[:300] or "without a word"


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait, as a number or until a date; 0: it does not say."""
    value = headers.get("retry-after") or ""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
