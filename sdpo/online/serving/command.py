"""`sdpo serve MODEL` starts a vLLM server as runs need it; `sdpo check-server URL` looks at one."""

import asyncio
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Annotated, Literal

import httpx
import tyro
from rich.console import Console

from ...errors import SdpoError
from .check import Needs, complaints
from .server import Away, Server

EXTENSION = Path(__file__).parent / "extension"
"""What a server's workers import of ours."""


def serve(
    model: tyro.conf.Positional[str],
    more: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[-- FLAG …]")
    ] = (),
    /,
    *,
    vllm: str = "vllm",
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    lora_rank: int = 0,
    adapters: int = 4,
    nccl: bool = False,
    tempered: bool = False,
    dry_run: bool = False,
) -> None:
    """Start a vLLM server that ``sdpo online`` can sample from, in place of this process.

    vLLM may be installed in an environment of its own: of ours it needs one file without
    dependencies. The server takes orders from whoever reaches it: keep it off public networks.

    Args:
        model: Hugging Face folder or name of the model that the run starts from.
        more: flags for vLLM, behind ``--``, such as ``-- --tensor-parallel-size 2``.
        vllm: the program, such as /opt/vllm/bin/vllm.
        host: address to listen at.
        port: port to listen at.
        dtype: of the weights; a run's own is its ``parallel.compute_dtype``.
        lora_rank: largest rank of adapters; 0: whole weights are sent.
        adapters: how many adapters one batch may use.
        nccl: take whole weights from GPU to GPU.
        tempered: tell log-probabilities of the distribution that answers are drawn from, for runs
            with another temperature than 1, or with top-p or top-k.
        dry_run: print the command, for another machine or a launch file.

    Raises:
        SdpoError: there is no such program.
    """
    environment, argv = launch(
        model,
        *("--host", host, "--port", str(port), "--dtype", dtype),
        *(("--logprobs-mode", "processed_logprobs") if tempered else ()),
        *(_with_adapters(lora_rank, adapters) if lora_rank else ()),
        *(("--weight-transfer-config", '{"backend": "nccl"}') if nccl else ()),
        *more,
        vllm=vllm,
    )
    if dry_run:
        print(
            " ".join((*(f"{k}={shlex.quote(v)}" for k, v in environment.items()), shlex.join(argv)))
        )
        return
    if shutil.which(vllm) is None:
        raise SdpoError(
            f"{vllm}: no such program. Install vLLM in an environment of its own, and name it with "
            "--vllm /…/bin/vllm"
        )
    os.execvpe(vllm, argv, os.environ | environment)


def launch(model: str, *flags: str, vllm: str = "vllm") -> tuple[dict[str, str], list[str]]:
    """Environment variables and arguments of a server that a run can use."""
    path = os.pathsep.join(filter(None, (str(EXTENSION), os.environ.get("PYTHONPATH"))))
    environment = {
        "PYTHONPATH": path,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        # a CPU's server takes nearly all memory where nothing is said; GPUs' do not read it
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
    }
    argv = [vllm, "serve", model, "--enable-scale-out", "--generation-config", "vllm"]
    return environment, [*argv, "--worker-extension-cls", "sdpo_vllm.Extension", *flags]


def _with_adapters(rank: int, at_once: int) -> tuple[str, ...]:
    # a run's new adapter is loaded before the one that it replaces goes
    return (
        "--enable-lora",
        *("--max-lora-rank", str(rank), "--max-loras", str(at_once)),
        *("--max-cpu-loras", str(4 * at_once)),
    )


def check_server(
    urls: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    lora_rank: int = 0,
    nccl: bool = False,
    tempered: bool = False,
    tokens: int = 0,
    wait: float = 0.0,
) -> None:
    """Say whether vLLM servers can do what ``sdpo online`` needs, and what is missing.

    Args:
        urls: addresses, such as http://127.0.0.1:8000.
        lora_rank: of the run's adapters; 0: whole weights are sent.
        nccl: they are sent from GPU to GPU.
        tempered: the run has another temperature than 1, or top-p or top-k.
        tokens: of a prompt and its answer together.
        wait: seconds that servers may take to come up.

    Raises:
        SdpoError: something is missing, or a server cannot be reached.
    """
    sync = "adapters" if lora_rank else "nccl" if nccl else "weights"
    needs = Needs(sync=sync, rank=lora_rank, raw_logprobs=not tempered, tokens=tokens)
    until = time.monotonic() + wait

    async def look(url: str) -> list[str]:
        async with httpx.AsyncClient(timeout=30.0) as client:
            while True:
                try:
                    found = await complaints(Server(url, client), needs)
                except Away as error:
                    if time.monotonic() > until:
                        return [str(error)]
                    await asyncio.sleep(1.0)
                else:
                    return [f"{url}: {problem}" for problem in found]

    problems = [problem for url in urls for problem in asyncio.run(look(url))]
    if problems:
        raise SdpoError("; ".join(problems))
    Console().print(f"{', '.join(urls)}: ready", soft_wrap=True)
