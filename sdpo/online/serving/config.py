"""Where answers come from: a model in this process, or vLLM servers."""

from dataclasses import dataclass
from typing import Literal

from ...errors import SdpoError


@dataclass(frozen=True, kw_only=True)
class InProcess:
    """A copy of the model on each rank, and transformers' ``generate``."""


@dataclass(frozen=True, kw_only=True)
class VLLM:
    """One or several servers, as `sdpo serve` starts them. They must see the folders that weights
    are written to."""

    urls: tuple[str, ...] = ("http://127.0.0.1:8000",)
    """Addresses of the servers, without a path."""
    sync: Literal["weights", "adapters", "nccl"] = "weights"
    """What servers are given after an update: all weights, or the adapters of a run with
    ``lora.rank``, through a folder; or all weights from GPU to GPU, which has never been run."""
    folder: str | None = None
    """Where weights are written for the servers; none: ``serving`` in the run's folder."""
    staleness: int = 0
    """Updates that may be made between the weights that answer and the update that learns from it,
    beyond the one: 0 waits for each update; more let servers answer while the learner trains."""
    concurrency: int = 32
    """Requests that a server has at a time."""
    timeout: float = 600.0
    """Seconds that one request, or the loading of weights, may take."""
    patience: float = 300.0
    """Seconds that servers are waited for when none can be reached, before the run stops."""
    key_variable: str = ""
    """Environment variable that holds the servers' key; "": they need none."""

    def __post_init__(self):
        if not self.urls:
            raise SdpoError("sampler.urls: name at least one server")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise SdpoError(f"sampler.urls must begin with http:// or https://, got {url!r}")
            if url.rstrip("/").endswith("/v1"):
                raise SdpoError(f"sampler.urls: leave out the path of {url}")
        if len(set(self.urls)) < len(self.urls):
            raise SdpoError("sampler.urls: a server is named twice")
        if self.staleness < 0:
            raise SdpoError(f"sampler.staleness must not be negative, got {self.staleness}")
        for name in ("concurrency", "timeout", "patience"):
            if not getattr(self, name) > 0:
                raise SdpoError(f"sampler.{name} must be positive, got {getattr(self, name)}")


AnySampler = InProcess | VLLM
"""What a configuration may name."""
