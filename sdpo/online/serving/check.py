"""Whether a server can do what a run needs of it, and what to start it with if not."""

from dataclasses import dataclass
from typing import Any

from ...errors import SdpoError
from .server import Server


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run needs of a server.

    Attributes:
        sync: what it is sent, as `VLLM.sync` says.
        rank: of adapters.
        raw_logprobs: answers are drawn at temperature 1 from all tokens, so that the model's own
            log-probabilities are those of the draw.
        tokens: of a prompt and its answer together.
    """

    sync: str = "weights"
    rank: int = 0
    raw_logprobs: bool = True
    tokens: int = 0


_OWN = "default"
"""What a server calls the weights that it was started with."""
_DEVELOPMENT = "VLLM_SERVER_DEV_MODE=1 in its environment"
_ROUTES = {
    "/inference/v1/generate": "--enable-scale-out",
    "/pause": _DEVELOPMENT,
    "/collective_rpc": _DEVELOPMENT,
    "/server_info": _DEVELOPMENT,
    "/update_weight_version": "a newer vLLM, 0.32 at least",
}
_ROUTES_OF = {
    "adapters": {"/v1/load_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"},
    "nccl": {"/init_weight_transfer_engine": _DEVELOPMENT},
}


async def complaints(server: Server, needs: Needs) -> list[str]:
    """What is missing, each with what to start the server with instead.

    Raises:
        Away: the server cannot be reached.
        SdpoError: it is no vLLM.
    """
    routes = await server.routes()
    wanted = _ROUTES | _ROUTES_OF.get(needs.sync, {})
    found = [
        f"it has no {route} (needs {how})" for route, how in wanted.items() if route not in routes
    ]
    _, longest = await server.base()
    if longest < needs.tokens:
        found.append(
            f"it takes {longest} tokens, prompts and answers may have {needs.tokens} (needs "
            "--max-model-len)"
        )
    if "/server_info" in routes:
        found += _of_settings(await server.settings(), needs)
    label = await server.label() if "/weight_info" in routes else None
    if needs.sync == "adapters" and label not in (None, _OWN):
        found.append(
            f"its weights are {label!r}, from a run before, and adapters belong to the model that "
            "it was started with (start it again)"
        )
    if needs.sync == "weights" and "/collective_rpc" in routes:
        try:
            await server.repack()
        except SdpoError:
            found.append("it lacks our worker extension (needs --worker-extension-cls)")
    return found


def _of_settings(settings: dict[str, Any], needs: Needs) -> list[str]:
    model, lora = settings["model_config"], settings["lora_config"]
    found = []
    if model["generation_config"] != "vllm":
        found.append("its model's folder changes sampling (needs --generation-config vllm)")
    mode, modes = model["logprobs_mode"], ["processed_logprobs"]
    modes += ["raw_logprobs"] if needs.raw_logprobs else []
    if mode not in modes:
        found.append(
            f"it tells {mode}, not those of the distribution that answers are drawn from (needs "
            f"--logprobs-mode {modes[0]})"
        )
    if needs.sync == "nccl" and not settings["weight_transfer_config"]:
        found.append("it takes no weights over NCCL (needs --weight-transfer-config)")
    if needs.sync == "adapters" and not lora:
        found.append("it takes no adapters (needs --enable-lora)")
    if lora and int(lora["max_lora_rank"]) < needs.rank:
        found.append(
            f"it takes adapters up to rank {lora['max_lora_rank']} (needs --max-lora-rank)"
        )
    return found
