"""What many users of one base model take: memory and time of their turns at one engine.

    python -m benchmarks.users MODEL FOLDER [--users 200] [--rank 4]

Each user has adapters and an optimizer of their own (`Engine.seat`, `Engine.take`), and makes two
updates with gradients at random: what is measured is their turns, not what they learn. Beside it
stands what the shapes say: 4 bytes of a weight and 8 of AdamW's memory for each number that is
trained. `--url` names a vLLM server, of a `--lora-rank` that suffices: each user's adapters are
loaded there, asked once for one token, and unloaded.
"""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import httpx
import psutil
import torch
import tyro
from rich.console import Console
from rich.table import Table

from sdpo.batching import Cursor
from sdpo.online.serving.server import Server
from sdpo.train.trainer import RunState
from sdpo_parallel.build import build_engine
from sdpo_parallel.config import LoraConfig
from sdpo_parallel.engine import Engine, EngineConfig, Seat

ONE_TOKEN = {"max_tokens": 1, "temperature": 0.0, "logprobs": 0}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder."""
    folder: Annotated[Path, tyro.conf.Positional]
    """Where adapters are written for the server, and one checkpoint; emptied first."""
    users: int = 200
    rank: int = 4
    url: str = ""
    reckoned: tuple[int, ...] = (200, 1000, 10_000)
    """Numbers of users that the table is reckoned for."""


def main(settings: Annotated[Settings, tyro.conf.arg(name="")]) -> None:
    """Measure, and print a table and a line of JSON."""
    shutil.rmtree(settings.folder, ignore_errors=True)
    engine = build_engine(
        "torchtitan",
        EngineConfig(
            model=settings.model,
            run_folder=str(settings.folder / "run"),
            total_steps=2,
            max_tokens=256,
            lora=LoraConfig(rank=settings.rank, alpha=2.0 * settings.rank),
        ),
        RunState(Cursor(1, 0), ""),
    )
    engine.load()
    found = turns(engine, settings.users)
    found["checkpoint_mib"] = checkpoint(engine, settings.folder)
    if settings.url:
        found |= asyncio.run(served(settings, engine))
    Console().print(table(settings, found))
    print(json.dumps({"users": settings.users, "rank": settings.rank} | found))
    engine.close()


def turns(engine: Engine, users: int) -> dict[str, float]:
    """Two updates of each user, in turn."""
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    start, seats = engine.seat(), dict[int, Seat]()
    resident = psutil.Process().memory_info().rss
    swaps, updates = [], []
    for _ in range(2):
        for user in range(users):
            began = time.process_time()
            engine.take(seats.get(user, start))
            sat = time.process_time()
            for i, p in enumerate(p for p in engine.module.parameters() if p.requires_grad):
                p.grad = torch.full_like(p, 1e-3 * (1 + (user + i) % 7))
            engine.clip_gradients()
            engine.update(0)
            updated = time.process_time()
            seats[user] = engine.seat()
            swaps.append(sat - began + time.process_time() - updated)
            updates.append(updated - sat)
    grown = psutil.Process().memory_info().rss - resident
    return {
        "trained": trained,
        "seat_mib": fmean(seat.bytes for seat in seats.values()) / 2**20,
        "reckoned_mib": 12 * trained / 2**20,
        "resident_mib_per_user": grown / users / 2**20,
        "swap_ms": 1e3 * median(swaps),
        "update_ms": 1e3 * median(updates),
    }


def checkpoint(engine: Engine, folder: Path) -> float:
    """MiB of one user's checkpoint."""
    engine.save(1, {}, wait=True)
    files = (folder / "run" / "checkpoints" / "step-1").iterdir()
    return sum(path.stat().st_size for path in files) / 2**20


async def served(settings: Settings, engine: Engine) -> dict[str, float]:
    """Each user's adapters on a server: seconds to load, for a first token, and to unload."""
    one = settings.folder / "adapter"
    engine.export(str(one), adapters=True)
    loads, firsts = [], []
    async with httpx.AsyncClient(timeout=120.0) as client:
        server, pid = Server(settings.url, client), os.getpid()
        for user in range(settings.users):
            name, folder = f"{pid}-{user}", settings.folder / "served" / str(user)
            shutil.copytree(one, folder)
            loads.append(await timed(lambda n=name, f=folder: server.load_adapter(n, f)))
            firsts.append(await timed(lambda n=name: server.generate(n, [1, 2, 3, 4], ONE_TOKEN)))
        for user in range(settings.users):
            await server.unload_adapter(f"{pid}-{user}")
    return {"load_ms": 1e3 * median(loads), "first_token_ms": 1e3 * median(firsts)}


async def timed(call: Callable) -> float:
    """Seconds of an awaited call."""
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


def table(settings: Settings, found: dict[str, float]) -> Table:
    """Reckoned for more users from what one takes."""
    shown = Table("users", "in memory, GiB", "on disk, GiB, a checkpoint each", "a turn each, s")
    turn = (found["swap_ms"] + found["update_ms"]) / 1e3
    for users in settings.reckoned:
        shown.add_row(
            f"{users:,}",
            f"{users * found['seat_mib'] / 1024:.2f}",
            f"{users * found['checkpoint_mib'] / 1024:.2f}",
            f"{users * turn:.1f}",
        )
    return shown


if __name__ == "__main__":
    tyro.cli(main)
