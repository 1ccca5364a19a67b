"""A stand-in for an OpenAI-compatible server: real HTTP, and as slow, wrong, strict or absent as a
test wants it."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server does with one request.

    Args:
        text: the message's content.
        finish: why it ended.
        raw: a body in place of the completion.
        delay: seconds before it is sent.
        drip: seconds between the bytes of the body.
        drop: close the connection without a word.
        usage: tokens (read, written) that it tells of; None: nothing.
    """

    text: str | None = "Shorter, please."
    finish: str = "stop"
    refusal: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    delay: float = 0.0
    drip: float = 0.0
    drop: bool = False
    usage: tuple[int, int] | None = (100, 10)

    def body(self) -> bytes:
        """What is sent."""
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": f"status {self.status}"}}).encode()
        message = {"role": "assistant", "content": self.text, "refusal": self.refusal}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        answer: dict[str, Any] = {"id": "x", "object": "chat.completion", "choices": [choice]}
        if self.usage is not None:
            read, written = self.usage
            answer["usage"] = {"prompt_tokens": read, "completion_tokens": written}
        return json.dumps(answer).encode()


Behaviour = Callable[[int, dict[str, Any]], Answer]
"""(number of the request, from 0; its body) -> the answer."""


class Listener(ThreadingHTTPServer):
    """Takes many connections at once: the 5 of http.server are too few, and others are reset."""

    request_queue_size = 128


class StandIn:
    """The server.

    Attributes:
        requests: (when it came, its body, its headers) of each request.
        most_at_once: requests that it had at one time.
    """

    def __init__(self, behaviour: Behaviour):
        self.behaviour = behaviour
        self.requests: list[tuple[float, dict[str, Any], dict[str, str]]] = []
        self.most_at_once = self._at_once = 0
        self._lock, self._port = Lock(), 0
        self.start()

    @property
    def url(self) -> str:
        """What a client is told."""
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Listen, after a stop at the same address as before."""
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = Listener(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Go down: connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        """What one request gets."""
        with self._lock:
            number = len(self.requests)
            self.requests.append((time.monotonic(), body, headers))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        answer = self.behaviour(number, body)
        time.sleep(answer.delay)
        with self._lock:
            self._at_once -= 1
        return answer


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions", self.path
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.stand_in.answer(body, {k.lower(): v for k, v in self.headers.items()})
        self.close_connection = True
        if answer.drop:
            return
        said = answer.body()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(said))}
        try:
            self.send_response(answer.status)
            for name, value in (headers | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            for byte in said if answer.drip else ():
                self.wfile.write(bytes([byte]))
                time.sleep(answer.drip)
            self.wfile.write(b"" if answer.drip else said)
        except OSError:  # the client did not wait
            pass

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the console."""


@contextmanager
def serving(*answers: Answer | Behaviour) -> Iterator[StandIn]:
    """A server that gives these answers in turn and the last of them for ever, or behaves so."""
    first = answers[0]
    if callable(first):
        behaviour = first
    else:

        def behaviour(number: int, body: dict[str, Any]) -> Answer:
            answer = answers[min(number, len(answers) - 1)]
            assert isinstance(answer, Answer)
            return answer

    server = StandIn(behaviour)
    try:
        yield server
    finally:
        server.stop()
