"""Answers from vLLM servers, which are given the policy's weights after each update.

    update    the policy's weights -> a folder of their own -> into each server
    sample    prompts' ids -> the servers -> answers' ids and log-probabilities

Prompts and answers travel as token ids, so that no server's template or tokenizer can differ from
the trainer's. What a server has is never taken for granted: each answer names the weights that made
it, and one that comes from others than asked for (a server was restarted, say) is thrown away, the
weights are sent again, and the prompt is asked again.
"""

import asyncio
import contextlib
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx

from sdpo_parallel.engine import Engine

from ...chat import ChatFormat
from ...errors import SdpoError
from ..config import OnlineConfig
from ..sampler import Rollout
from .check import Needs, complaints
from .config import VLLM
from .folders import Versions
from .server import Away, Generated, Server, Span, Unknown
from .sync import Fleet, Version, sync_of

T = TypeVar("T")


class _Stale(Exception):
    """An answer from other weights than those asked for."""


@dataclass
class _Place:
    """A server, and what is known of it.

    Attributes:
        lock: held while it is given weights.
        has: the weights that were sent to it last, and arrived.
        sure: nothing has happened since.
        met: it was checked, and its model's name is known.
        failures: in a row.
        not_before: seconds of the monotonic clock until which it is left alone.
        reason: of the last failure.
    """

    server: Server
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    name: str = ""
    has: Version | None = None
    sure: bool = False
    met: bool = False
    failures: int = 0
    not_before: float = 0.0
    reason: str = ""

    def failed(self, error: Exception) -> None:
        """Leave it alone for a while, and make sure of it then."""
        self.failures += 1
        self.not_before = time.monotonic() + min(0.25 * 2**self.failures, 8.0)
        self.reason, self.sure, self.met = str(error), False, False


class _Job(NamedTuple):
    """A prompt to be answered."""

    place: int
    prompt: Sequence[int]
    sampling: dict[str, Any]


@dataclass
class _Round:
    """What the workers of one call of ``sample`` share."""

    jobs: asyncio.Queue[_Job]
    began: float
    found: dict[int, Rollout] = field(default_factory=dict)
    last_good: dict[str, float] = field(default_factory=dict)


class VLLMSampler:
    """A `Sampler` of vLLM servers. The main rank talks to them; all ranks export the weights.

    Args:
        config: of the run.
        servers: where they are, and what they are sent: the config's sampler.
        engine: its weights are sent at once.
        chat: of the model's tokenizer: says which tokens end an answer.

    Raises:
        SdpoError: a server lacks something that the run needs, or the key for it is not set.
    """

    def __init__(self, config: OnlineConfig, servers: VLLM, engine: Engine, chat: ChatFormat):
        self.config, self.servers = config.sampling, servers
        self.patience = servers.patience
        self.on_main, self.is_main = engine.on_main, engine.ranks.is_main
        self.end_ids = chat.end_ids
        dtype = config.parallel.resolve_dtype(engine.device.type)
        self.sync = sync_of(servers.sync, Path(config.model), dtype)
        self.versions = Versions(Path(servers.folder or Path(config.out) / "serving"))
        self.needs = Needs(
            sync=servers.sync,
            rank=config.lora.rank,
            raw_logprobs=config.sampling.from_policy,
            tokens=config.hindsight.max_prompt_tokens + config.sampling.max_new_tokens,
        )
        self.key = self.on_main(lambda: key_of(servers))
        self.run = self.on_main(lambda: uuid.uuid4().hex[:8])
        self.places: list[_Place] = []
        self.labels: dict[str | None, int] = {}
        self.sent = deque[Version](maxlen=servers.staleness + 2)  # what may be asked for still
        self.staleness, self.version = servers.staleness, -1
        self.thread = _Thread()
        self.on_main(lambda: self.thread.do(self._open()))
        self.update(engine, 0)

    async def _open(self) -> None:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(self.servers.timeout, connect=10.0)
        self.client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        self.places = [_Place(Server(url, self.client)) for url in self.servers.urls]

    def update(self, engine: Engine, version: int) -> None:
        label = f"{self.run}-{version}"
        new = Version(version, label, self.versions.of(label))
        self.labels[label] = version
        self.on_main(lambda: self.thread.do(self._meet_all()))
        servers = [place.server for place in self.places]
        self.sync.give(engine, new, Fleet(servers, lambda: self._load(new), self.thread.do))
        self.version = version

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, greedy: bool = False
    ) -> list[Rollout]:
        return self.on_main(lambda: self.answers(prompts, seeds, greedy=greedy))

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        greedy: bool = False,
        limits: Sequence[int] = (),
    ) -> list[Rollout]:
        limits = limits or [self.config.max_new_tokens] * len(prompts)
        jobs = [
            _Job(i, prompt, self._sampling(seed, greedy) | {"max_tokens": limit})
            for i, (prompt, seed, limit) in enumerate(zip(prompts, seeds, limits, strict=True))
        ]
        found = self.thread.do(self._all(jobs))
        return [found[i] for i in range(len(prompts))]

    def close(self) -> None:  # by any rank alone: others may have failed
        """Remove what was written for the servers, which keep whole weights that they have read."""
        if self.is_main:
            self.thread.do(self._leave())
            self.versions.keep(())
        self.thread.stop()

    async def _leave(self) -> None:
        for place in self.places:
            with contextlib.suppress(Away, SdpoError):  # it is gone, and its adapters with it
                await self.sync.leave(place.server, self.versions.root)
        await self.client.aclose()

    # Weights

    def _load(self, new: Version) -> "Future[None]":
        """Give a version to all servers that can be reached."""
        self.sent.append(new)
        return self.thread.begin(self._everywhere())

    async def _everywhere(self) -> None:
        async def bring(place: _Place) -> None:
            try:
                await self._bring(place)
            except Away as error:  # the workers try again
                place.failed(error)
                print(f"sdpo: {error}: it is left out until it is back", file=sys.stderr)

        await asyncio.gather(*map(bring, self.places))
        # a server that is away may still be asked for what it had, and die of a missing folder
        held = [*self.sent, *(place.has for place in self.places)]
        self.versions.keep({version.label for version in held if version is not None})

    async def _bring(self, place: _Place) -> Version:
        """The newest weights, which the server is sure to have."""
        server = place.server
        async with place.lock:
            wanted = self.sent[-1]
            if place.sure and place.has == wanted:
                return wanted
            if not place.met:
                await self._meet(place)
            if place.has != wanted or not await self.sync.has(server, wanted):
                before, place.has = place.has, None
                await self.sync.load(server, wanted, before)
                place.has = wanted
            place.sure = True
            return wanted

    async def _meet_all(self) -> None:
        for place in self.places:
            with contextlib.suppress(Away):  # `_everywhere` tells
                if not place.met:
                    await self._meet(place)

    async def _meet(self, place: _Place) -> None:
        """See whether a server can do what the run needs of it."""
        server = place.server
        if found := await complaints(server, self.needs):
            raise SdpoError(f"{server.url}: " + "; ".join(found))
        place.name, _ = await server.base()
        place.met = True

    # Answers

    def _sampling(self, seed: int, greedy: bool) -> dict[str, Any]:
        """All of vLLM's SamplingParams that change an answer, so that no default of the server or
        of the model's folder does."""
        config = self.config
        drawn = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        return (drawn if not greedy else {"temperature": 0.0, "top_p": 1.0, "top_k": 0}) | {
            "n": 1,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed % 2**63,
            "min_tokens": 0,
            "stop_token_ids": sorted(self.end_ids),
            "ignore_eos": False,
            "logprobs": 0,
        }

    async def _all(self, jobs: Sequence[_Job]) -> dict[int, Rollout]:
        """Every job's answer, whichever server gives it."""
        shared = _Round(asyncio.Queue(), time.monotonic())
        for job in jobs:
            shared.jobs.put_nowait(job)
        workers = [
            asyncio.create_task(self._work(place, shared))
            for place in self.places
            for _ in range(min(self.servers.concurrency, len(jobs)))
        ]
        answered = asyncio.create_task(shared.jobs.join())
        try:
            await self._until(answered, workers)
        finally:
            for task in (answered, *workers):
                task.cancel()
            await asyncio.gather(answered, *workers, return_exceptions=True)
        return shared.found

    async def _until(self, answered: asyncio.Task, workers: list[asyncio.Task]) -> None:
        """Until all is answered, a worker fails for good, or all have given up."""
        waiting = set(workers)
        while not answered.done():
            if not waiting:
                told = "; ".join(place.reason for place in self.places)
                raise SdpoError(
                    f"no server has answered for {self.patience:.0f} s (sampler.patience): "
                    f"{told}. Start one again and resume the run: no answer that was trained on "
                    "is lost"
                )
            done, _ = await asyncio.wait({answered, *waiting}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {answered}:
                waiting.discard(task)
                task.result()  # raises what it failed of

    async def _work(self, place: _Place, shared: _Round) -> None:
        """Answer what is waiting, one job after the other, while the server lives."""
        url = place.server.url
        while True:
            while (wait := place.not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            job = await shared.jobs.get()
            try:
                version = await self._bring(place)
                model = version.label if self.sync.adapters else place.name
                out = await place.server.generate(model, job.prompt, job.sampling)
                shared.found[job.place] = self._rollout(out, model)
                shared.last_good[url] = time.monotonic()
                place.failures = 0
            except (Away, Unknown, _Stale) as error:
                shared.jobs.put_nowait(job)
                if time.monotonic() >= place.not_before:  # others may have told of the same failure
                    place.failed(error)
                if time.monotonic() - shared.last_good.get(url, shared.began) > self.patience:
                    return
            finally:
                shared.jobs.task_done()

    def _rollout(self, out: Generated, model: str) -> Rollout:
        spans = [Span(model, 0, len(out.token_ids))] if self.sync.adapters else out.spans
        by_token = [span.label for span in spans for _ in range(span.start, span.end)]
        if unknown := [label for label in by_token if label not in self.labels]:
            raise _Stale(f"answered with weights {unknown[0]!r}, which this run did not send")
        return Rollout(
            token_ids=out.token_ids,
            logprobs=tuple(min(x, 0.0) for x in out.logprobs),
            finished=out.finished,
            versions=tuple(self.labels[label] for label in by_token),
        )


class _Thread:
    """A thread in which all that talks to servers runs, whoever waits for it."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def begin(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Set it going."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """What comes of it."""
        return self.begin(work).result()

    def stop(self) -> None:
        """Wait for nothing any more."""
        self.loop.call_soon_threadsafe(self.loop.stop)


def key_of(servers: VLLM) -> str:
    """What a server wants to see; "" for nothing.

    Raises:
        SdpoError: the environment variable that should hold it is not set.
    """
    name = servers.key_variable
    if name and not os.environ.get(name):
        raise SdpoError(f"sampler.key_variable: the environment variable {name} is not set")
    return os.environ[name] if name else ""
