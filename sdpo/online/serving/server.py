"""One vLLM server, through its HTTP routes: answers, whole weights, adapters.

The order of the calls, and what each status and body means, is vLLM 0.32's, as measured on a
running server; docs/serving.md tells what goes wrong in another order.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from ...errors import SdpoError

_GENERATE = "/inference/v1/generate"
_MAY_PASS = (408, 425, 429, 502, 503, 504)
"""Statuses of a server that is busy, starts or goes: the same request may succeed later."""


class Away(Exception):
    """A server that does not answer now, and may later."""


class Unknown(Exception):
    """A server does not have the adapter that it was asked for; it was restarted, say."""


class Span(NamedTuple):
    """Tokens from ``start`` up to ``end`` of an answer come from the weights of that label."""

    label: str | None
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Generated:
    """An answer as the server gave it.

    Attributes:
        token_ids: with the id that ends it, where it ended by itself.
        logprobs: nats; of the model's own distribution, or of the one drawn from, as the server
            was started.
        spans: which weights made which tokens.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    spans: tuple[Span, ...]


class Server:
    """A vLLM server.

    Args:
        url: without a path.
        client: its timeout is that of a request.
    """

    def __init__(self, url: str, client: httpx.AsyncClient):
        self.url, self.client = url.rstrip("/"), client

    # Answers

    async def generate(
        self, model: str, prompt: Sequence[int], sampling: Mapping[str, Any]
    ) -> Generated:
        """An answer to a prompt's ids.

        Args:
            model: the served model's name, or an adapter's.
            sampling: vLLM's SamplingParams. What is left out is what the server's settings say.

        Raises:
            Away: no answer, or a broken one.
            Unknown: the server has no such model.
            SdpoError: the server refuses the request.
        """
        body = {"model": model, "token_ids": list(prompt), "sampling_params": dict(sampling)}
        try:
            answer = await self._call("POST", _GENERATE, json=body, missing=Unknown)
        except SdpoError as error:
            if "status 5" in str(error):  # the engine died under this request, say
                raise Away(str(error)) from None
            raise
        try:
            choice = answer["choices"][0]
            ids = tuple(choice["token_ids"])
            content = choice["logprobs"]["content"]
            logprobs = tuple(float(entry["logprob"]) for entry in content)
            said = answer.get("weight_versions") or choice.get("weight_versions") or ()
            spans = tuple(Span(s["version"], s["start"], s["end"]) for s in said)
            end = choice["finish_reason"]
        except (LookupError, TypeError, ValueError) as error:
            raise self._unreadable(_GENERATE, error) from None
        if end not in ("stop", "length"):
            raise Away(f"{self.url} broke off an answer ({end})")
        if len(ids) != len(logprobs) or not ids:
            raise SdpoError(f"{self.url}: {len(ids)} tokens with {len(logprobs)} log-probabilities")
        spans = spans or (Span(None, 0, len(ids)),)
        return Generated(token_ids=ids, logprobs=logprobs, finished=end == "stop", spans=spans)

    # Whole weights

    async def load_weights(self, folder: Path, label: str, previous: Path | None) -> None:
        """Swap all weights. Requests that run meanwhile pause; their tokens after the swap come
        from the new weights, and their prompts are read again with them.

        Args:
            folder: a Hugging Face folder, checked and as the server sees it.
            label: what answers call these weights from here on.
            previous: folder of the weights that the server has, to go back to.

        Raises:
            Away: the server went.
            SdpoError: it cannot load them. It has the previous ones then, or has stopped
                answering.
        """
        await self._call("POST", "/pause", params={"mode": "keep"})
        try:
            await self._rpc("reload_weights", weights_path=str(folder))
        except SdpoError as error:
            await self._back_to(previous, error)
        await self.repack()
        await self._call("POST", "/update_weight_version", json={"new_version": label})
        await self._call("POST", "/resume")

    async def _back_to(self, previous: Path | None, error: SdpoError) -> None:
        """A failed load leaves weights half there: the next request would end the server."""
        if previous is not None:
            try:
                await self._rpc("reload_weights", weights_path=str(previous))
                await self.repack()
            except SdpoError:
                pass
            else:
                await self._call("POST", "/resume")
                raise SdpoError(f"{error}; the server has its weights from before again") from None
        raise SdpoError(
            f"{error}; nor could it load those from before. It is paused: restart it, as its next "
            "answer would end it"
        ) from None

    async def repack(self) -> None:
        """Let a lm_head that is tied to the embeddings follow them, where it does not by itself.

        Raises:
            Away: the server went.
            SdpoError: it was started without our worker extension.
        """
        await self._rpc("repack_tied_head")

    async def label(self) -> str | None:
        """What the server calls its weights; None: it does not say."""
        answer = await self._call("GET", "/weight_info")
        return answer.get("weight_version") if isinstance(answer, dict) else None

    # Whole weights, from GPU to GPU

    async def world_size(self) -> int:
        """Its workers, over all that it splits a model over."""
        return (await self._call("GET", "/get_world_size"))["world_size"]

    async def join_group(self, rank: int, world_size: int, unique_id: str) -> None:
        """Let its workers join an NCCL group.

        Args:
            rank: of its first worker.
            unique_id: NCCL's, in base64.
        """
        info = {"rank_offset": rank, "world_size": world_size, "nccl_unique_id_b64": unique_id}
        await self._call("POST", "/init_weight_transfer_engine", json={"init_info": info})

    async def receive_weights(
        self, names: Sequence[tuple[str, Sequence[int]]], dtype: str, label: str
    ) -> None:
        """Swap all weights for those that the group's first rank is about to broadcast.

        Args:
            names: and shapes, in the order in which they come.
            label: what answers call these weights from here on.
        """
        info = {
            "names": [name for name, _ in names],
            "dtype_names": [dtype] * len(names),
            "shapes": [list(shape) for _, shape in names],
        }
        await self._call("POST", "/pause", params={"mode": "keep"})
        await self._call("POST", "/start_weight_update")
        await self._call("POST", "/update_weights", json={"update_info": info})
        await self._call("POST", "/finish_weight_update", json={"weight_version": label})
        await self._call("POST", "/resume")

    # Adapters

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Serve an adapter. A name and a folder stand for the same weights for ever: vLLM reads
        them again when it needs to, and keeps what prompts looked like with them.

        Raises:
            Away: the server went.
            SdpoError: it cannot load it.
        """
        body = {"lora_name": name, "lora_path": str(folder)}
        try:
            await self._call("POST", "/v1/load_lora_adapter", json=body)
        except SdpoError as error:
            if "already been loaded" not in str(error):
                raise

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; those that run end as they began."""
        body = {"lora_name": name}
        with contextlib.suppress(Unknown):
            await self._call("POST", "/v1/unload_lora_adapter", json=body, missing=Unknown)

    async def adapters(self) -> dict[str, str]:
        """Name -> folder of those that it serves."""
        answer = await self._call("GET", "/v1/models")
        rows = answer["data"]
        return {row["id"]: row["root"] for row in rows if row.get("parent") is not None}

    # What it is

    async def routes(self) -> set[str]:
        """Paths that it answers to."""
        return set((await self._call("GET", "/openapi.json"))["paths"])

    async def base(self) -> tuple[str, int]:
        """Its model's name, and how many tokens a prompt and its answer may have together."""
        rows = (await self._call("GET", "/v1/models"))["data"]
        (row,) = (row for row in rows if row.get("parent") is None)
        return row["id"], row["max_model_len"]

    async def settings(self) -> dict[str, Any]:
        """How it was started, by the names of vLLM's configuration."""
        answer = await self._call("GET", "/server_info", params={"config_format": "json"})
        return answer["vllm_config"]

    async def resume(self) -> None:
        """Go on, where it was paused by a run that was killed."""
        await self._call("POST", "/resume")

    async def alive(self) -> bool:
        """It answers."""
        try:
            await self._call("GET", "/health", timeout=10.0)
        except (Away, SdpoError):
            return False
        return True

    async def _rpc(self, method: str, **kwargs: Any) -> None:
        await self._call("POST", "/collective_rpc", json={"method": method, "kwargs": kwargs})

    async def _call(
        self, verb: str, path: str, *, missing: type[Exception] = SdpoError, **request: Any
    ) -> Any:
        """The body of an answer of status 200: JSON where it is that, else text.

        Args:
            missing: raised for status 404.
        """
        try:
            # after status 500 the server closes connections that it said it would keep
            once = {"connection": "close"} if path != _GENERATE else {}
            answer = await self.client.request(verb, self.url + path, headers=once, **request)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise Away(f"{self.url} cannot be reached ({reason})") from None
        text = answer.text
        if answer.status_code == 200:
            if not answer.headers.get("content-type", "").startswith("application/json"):
                return text
            try:
                return answer.json()
            except ValueError as error:
                raise self._unreadable(path, error) from None
        problem = f"{self.url}{path}: status {answer.status_code} ({_in_a_line(text)})"
        if answer.status_code in _MAY_PASS or "EngineDead" in text:
            raise Away(problem)
        raise (missing if answer.status_code == 404 else SdpoError)(problem)

    def _unreadable(self, path: str, error: Exception) -> SdpoError:
        return SdpoError(
            f"{self.url}{path}: not an answer of vLLM 0.32 or later ({type(error).__name__}: "
            f"{error}); which server is it?"
        )


def _in_a_line(text: str) -> str:
    return " ".join(text.split())[:300] or "without a word"
