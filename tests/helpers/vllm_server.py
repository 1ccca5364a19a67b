"""A stand-in for a vLLM server: real HTTP, and vLLM 0.32's traps as they were measured on it.

Its "model" is one number in a folder's weights, `WEIGHT`. What it answers to any prompt are three
ids: the number of the body that read the prompt, that of the lm_head, and the end. So an answer
tells which weights made it.
"""

import base64
import json
import queue
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.openai_server import Listener

WEIGHT, OTHER = "model.body.weight", "model.other.weight"
END = 2
INFO = ("names", "dtype_names", "shapes")
BLOCK = 128
"""Tokens of a block of the prefix cache: shorter prompts are not in it."""
SAMPLING = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "max_tokens", "seed", "stop_token_ids",
}  # fmt: skip
"""What a request must say lest the model's folder or the server does."""


def write_model(folder: Path, value: int, **tensors: torch.Tensor) -> Path:
    """A folder of weights with that number."""
    folder.mkdir(parents=True)
    held = {WEIGHT: torch.tensor([float(value)]), OTHER: torch.zeros(2, 3)} | tensors
    save_file(held, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    return folder


def write_adapter(folder: Path, value: int) -> Path:
    """A folder of an adapter with that number."""
    folder.mkdir(parents=True)
    save_file({WEIGHT: torch.tensor([float(value)])}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def value_in(folder: str) -> int:
    """The number."""
    (path,) = Path(folder).glob("*.safetensors")
    return int(load_file(path)[WEIGHT])


class StandInNccl:
    """In the place of `torch.cuda.nccl`, with what servers do of it: ranks wait for each other."""

    def __init__(self):
        self.groups: dict[bytes, threading.Barrier] = {}
        self.inboxes: dict[bytes, list[queue.Queue]] = {}
        self.reduced: list[bytes] = []

    def unique_id(self) -> bytes:
        return len(self.inboxes).to_bytes(1, "big") * 128

    def init_rank(self, world_size: int, unique: bytes, rank: int, inbox: Any = None) -> bytes:
        barrier = self.groups.setdefault(unique, threading.Barrier(world_size))
        assert barrier.parties == world_size and rank < world_size
        if inbox is not None:
            self.inboxes.setdefault(unique, []).append(inbox)
        barrier.wait(10.0)
        return unique

    def all_reduce(self, inputs: list[torch.Tensor], *, comms: list[bytes]) -> None:
        assert [t.shape for t in inputs] == [(1,)] and inputs[0].dtype == torch.float32
        self.reduced += comms

    def broadcast(self, inputs: list[torch.Tensor], root: int, *, comms: list[bytes]) -> None:
        assert root == 0 and self.reduced[-1:] == comms, "servers warm up with one number"
        for inbox in self.inboxes[comms[0]]:
            inbox.put(inputs[0].clone())


class Refused(Exception):
    """A status and a body."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class Stub:
    """The server.

    Args:
        base: folder of its model.
        slots: adapters that it holds; others are read again when they are asked for.
        delay: seconds that an answer takes.
        busy: requests that it refuses with status 429 before it answers any.
        fail_reload: how many times loading weights fails, from now on.
        generation_config: "auto" lets the model's folder change what a request leaves out.
        lacks: routes that it does not have.
        extension: its workers have ours.
        port: 0: a free one.
        nccl: takes weights by it.
        workers: of its engine.

    Attributes:
        calls: (verb and path, body) of all that it was asked, in order.
        keys: what they were authorized by.
        most_at_once: requests for answers that it had at one time.
    """

    base: Path
    slots: int = 2
    delay: float = 0.0
    busy: int = 0
    fail_reload: int = 0
    generation_config: str = "vllm"
    logprobs_mode: str = "raw_logprobs"
    lora_rank: int = 16
    max_len: int = 4096
    lacks: tuple[str, ...] = ()
    extension: bool = True
    host: str = "127.0.0.1"
    port: int = 0
    nccl: StandInNccl | None = None
    workers: int = 1
    calls: list[tuple[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0

    def __post_init__(self):
        self.lock, self.at_once = threading.RLock(), 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Come up, as after a restart: with the weights that it was started with."""
        self.body = self.head = value_in(str(self.base))
        self.label, self.paused, self.broken, self.dead = "default", False, False, False
        self.updating, self.inboxes = False, []
        self.adapters: dict[str, str] = {}
        self.held: OrderedDict[tuple[str, str], int] = OrderedDict()
        self.cache: dict[tuple, int] = {}
        self.running = threading.Condition(self.lock)
        handler = type("Handler", (_Handler,), {"stub": self})
        self._server = _bound(self.host, self.port, handler)
        self._server.daemon_threads = True
        self.port, self.up = self._server.server_port, True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Go away."""
        self.dead, self.up = True, False
        self._server.shutdown()
        self._server.server_close()

    def forever(self) -> None:
        """Until the process is killed."""
        threading.Event().wait()

    def count(self, path: str) -> int:
        """How often a path was asked."""
        return sum(called.endswith(path) for called, _ in self.calls)

    # Routes

    def answer(self, verb: str, path: str, body: Any, query: str) -> Any:
        if self.dead:
            raise Refused(500, "EngineDeadError")
        route = getattr(self, f"{verb}_{path.strip('/').replace('/', '_')}".lower(), None)
        if route is None or path in self.lacks:
            raise Refused(404, "Not Found")
        return route(body, query)

    def get_health(self, body: Any, query: str) -> Any:
        return ""

    def get_openapi_json(self, body: Any, query: str) -> Any:
        paths = [
            "/inference/v1/generate", "/pause", "/resume", "/collective_rpc", "/server_info",
            "/update_weight_version", "/weight_info", "/v1/load_lora_adapter", "/v1/models",
            "/init_weight_transfer_engine",
        ]  # fmt: skip
        return {"paths": {path: {} for path in paths if path not in self.lacks}}

    def get_server_info(self, body: Any, query: str) -> Any:
        assert query == "config_format=json"
        model = {"generation_config": self.generation_config, "logprobs_mode": self.logprobs_mode}
        lora = {"max_lora_rank": str(self.lora_rank)} if self.lora_rank else None
        transfer = {"backend": "nccl"} if self.nccl is not None else None
        parts = {"model_config": model, "lora_config": lora, "weight_transfer_config": transfer}
        return {"vllm_config": parts}

    def get_v1_models(self, body: Any, query: str) -> Any:
        base = {"id": str(self.base), "root": str(self.base), "parent": None}
        rows = [base | {"max_model_len": self.max_len}]
        for name, folder in self.adapters.items():
            rows.append({"id": name, "root": folder, "parent": str(self.base)})
        return {"data": rows}

    def get_weight_info(self, body: Any, query: str) -> Any:
        return {"weight_version": self.label}

    def post_update_weight_version(self, body: Any, query: str) -> Any:
        self.label = body["new_version"]
        return {"success": True}

    def post_pause(self, body: Any, query: str) -> Any:
        assert query == "mode=keep", "other modes give tokens of no policy, or break answers off"
        self.paused = True
        self.cache.clear()  # clear_cache is on where nothing is said
        return {"status": "paused"}

    def post_resume(self, body: Any, query: str) -> Any:
        self.paused = False
        self.running.notify_all()
        return {"status": "resumed"}

    def post_collective_rpc(self, body: Any, query: str) -> Any:
        if body["method"] == "repack_tied_head":
            if not self.extension:
                raise Refused(500, "'CPUWorker' object has no attribute 'repack_tied_head'")
            if not self.broken:
                self.head = self.body
            return {"results": ["True"]}
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        if self.fail_reload or not folder.is_dir():
            self.fail_reload = max(0, self.fail_reload - 1)
            self.broken = True
            raise Refused(500, "Call to collective_rpc method failed")
        held = load_file(folder / "model.safetensors")
        if OTHER in held and held[OTHER].shape != (2, 3):
            self.broken = True
            raise Refused(500, "shape mismatch")
        self.broken = False
        if WEIGHT in held:  # else the old one stays, without a word
            self.body = int(held[WEIGHT])  # the packed lm_head stays as it was
        return {"results": ["None"]}

    def get_get_world_size(self, body: Any, query: str) -> Any:
        return {"world_size": self.workers}

    def post_init_weight_transfer_engine(self, body: Any, query: str) -> Any:
        info = body["init_info"]
        unique = base64.b64decode(info["nccl_unique_id_b64"], validate=True)
        assert len(unique) == 128 and self.nccl is not None
        self.inboxes = [queue.Queue() for _ in range(self.workers)]
        ranks = [info["rank_offset"] + i for i in range(self.workers)]
        threads = [
            threading.Thread(
                target=self.nccl.init_rank, args=(info["world_size"], unique, rank, inbox)
            )
            for rank, inbox in zip(ranks, self.inboxes, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"message": "Weight transfer initialized"}

    def post_start_weight_update(self, body: Any, query: str) -> Any:
        assert self.paused
        self.updating = True
        return {"message": "Weight update started"}

    def post_update_weights(self, body: Any, query: str) -> Any:
        assert self.updating
        info = body["update_info"]
        for name, dtype, shape in zip(*(info[k] for k in INFO), strict=True):
            for inbox in self.inboxes:
                tensor = inbox.get(timeout=10.0)
                assert tensor.dtype == getattr(torch, dtype) and list(tensor.shape) == shape
                if name == WEIGHT:
                    self.body = self.head = int(tensor)
        return {"message": "Weights updated"}

    def post_finish_weight_update(self, body: Any, query: str) -> Any:
        self.updating, self.label = False, body["weight_version"]
        return {"message": "Weight update finished"}

    def post_v1_load_lora_adapter(self, body: Any, query: str) -> Any:
        name, folder = body["lora_name"], body["lora_path"]
        if not self.lora_rank:
            raise Refused(404, "Not Found")
        if name in self.adapters:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded")
        if not Path(folder).is_dir():
            raise Refused(404, f"No adapter found for {folder}")
        self.adapters[name] = folder
        self._adapter(name)
        return f"Success: LoRA adapter '{name}' added successfully."

    def post_v1_unload_lora_adapter(self, body: Any, query: str) -> Any:
        if self.adapters.pop(body["lora_name"], None) is None:
            raise Refused(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return "Success"

    def _adapter(self, name: str) -> int:
        """An adapter's number, read again where it was thrown out."""
        key = name, self.adapters[name]
        if key not in self.held:
            try:
                self.held[key] = value_in(key[1])
            except ValueError:  # in a worker's step: the engine does not survive it
                self.dead = True
                raise Refused(500, "EngineDeadError") from None
            while len(self.held) > self.slots:
                self.held.popitem(last=False)
        self.held.move_to_end(key)
        return self.held[key]

    def post_inference_v1_generate(self, body: Any, query: str) -> Any:
        with self.running:
            if self.busy:
                self.busy -= 1
                raise Refused(429, "too many requests")
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            if body["model"] not in {str(self.base), *self.adapters}:
                self.at_once -= 1
                raise Refused(404, f"The model `{body['model']}` does not exist.")
            while self.paused:
                self.running.wait()
        time.sleep(self.delay)
        with self.running:
            self.at_once -= 1
            if self.dead:
                raise Refused(500, "EngineDeadError")
            if self.broken:  # parameters that are not there
                self.dead = True
                raise Refused(500, "EngineDeadError")
            return self._generated(body)

    def _generated(self, body: Any) -> Any:
        name, prompt, sampling = body["model"], body["token_ids"], body["sampling_params"]
        if len(prompt) + sampling["max_tokens"] > self.max_len:
            raise Refused(400, "maximum context length")
        if name in self.adapters:
            number, key = self._adapter(name), (name, self.adapters[name])
        else:
            number, key = self.body, ("", "")
            if self.held:  # on a CPU "no adapter" takes the last slot's
                number = next(reversed(self.held.values()))
        if len(prompt) >= BLOCK:  # weights that were swapped under the same key are not seen
            number = self.cache.setdefault((*key, *prompt[:BLOCK]), number)
        head = number if name in self.adapters or self.held else self.head
        if self.generation_config != "vllm" and (left_out := SAMPLING - sampling.keys()):
            number = -len(left_out)
        ids = [number, head, END][: sampling["max_tokens"]]
        content = [{"token_id": i, "logprob": -0.5, "rank": 1} for i in ids]
        end = "stop" if ids[-1] in sampling["stop_token_ids"] else "length"
        spans = [{"version": self.label, "start": 0, "end": len(ids)}]
        choice = {"index": 0, "finish_reason": end, "token_ids": ids, "weight_versions": spans}
        return {"choices": [choice | {"logprobs": {"content": content}}]}


def _bound(host: str, port: int, handler: type) -> Listener:
    """A server at a port that connections of a server before it may still hold for a moment."""
    for _ in range(100):
        try:
            return Listener((host, port), handler)
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"port {port} stays in use")


class _Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"

    def _handle(self, verb: str) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        path, _, query = self.path.partition("?")
        # what waits or takes time sees to the lock itself
        alone = self.stub.lock if "generate" not in path else threading.RLock()
        with alone:
            self.stub.calls.append((f"{verb} {path}", body))
            self.stub.keys.append(self.headers.get("Authorization"))
            try:
                status, said = 200, self.stub.answer(verb, path.replace(".", "_"), body, query)
            except Refused as error:
                status, said = error.status, {"error": {"message": str(error)}}
        kind = "text/plain" if isinstance(said, str) else "application/json"
        text = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            if status == 500:  # the connection goes, unannounced
                self.wfile.flush()
                time.sleep(0.05)
                self.close_connection = True
        except OSError:  # the client did not wait
            pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the console."""


@contextmanager
def serving(base: Path, **how: Any):
    """A stand-in, up."""
    stub = Stub(base, **how)
    try:
        yield stub
    finally:
        if stub.up:
            stub.stop()
