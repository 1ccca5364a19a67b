"""Run under torchrun: users take turns at one engine, and each trains as if alone.

argv: a JSON file of cases, [{"model", "parallel", "lora"}], and an empty folder.
"""

import json
import sys
from pathlib import Path

import torch

from sdpo.batching import Cursor
from sdpo.train.trainer import RunState
from sdpo_parallel.build import build_engine
from sdpo_parallel.config import LoraConfig, ParallelConfig
from sdpo_parallel.engine import Engine, EngineConfig, Seat

USERS, STEPS = ("alice", "bob", "christine"), 3


def step(engine: Engine, user: str, number: int) -> None:
    """One update with gradients of the user's own."""
    for i, p in enumerate(p for p in engine.module.parameters() if p.requires_grad):
        generator = torch.Generator().manual_seed(1000 * number + 10 * len(user) + i)
        p.grad = torch.full_like(p, float(torch.randn((), generator=generator)))
    engine.clip_gradients()
    engine.update(number)


def same(a: Seat, b: Seat) -> bool:
    """Bit for bit."""
    pairs = zip(a.weights, b.weights, strict=True)
    memories = zip(a.memory, b.memory, strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in memories
    )


def main(cases: str, folder: str) -> None:
    found = []
    for number, case in enumerate(json.loads(Path(cases).read_text())):
        engine = build_engine(
            "torchtitan",
            EngineConfig(
                model=case["model"],
                run_folder=f"{folder}/{number}",
                total_steps=STEPS,
                max_tokens=256,
                parallel=ParallelConfig(**case["parallel"]),
                lora=LoraConfig(**case["lora"]),
            ),
            RunState(Cursor(1, 0), ""),
        )
        engine.load()
        start = engine.seat()
        alone = {}
        for user in USERS:
            engine.take(start)
            for n in range(STEPS):
                step(engine, user, n)
            alone[user] = engine.seat()
        seats = dict.fromkeys(USERS, start)
        others_stay = True
        for n in range(STEPS):
            for user in USERS:
                before = {u: engine_copy(engine, seats[u]) for u in USERS if u != user}
                engine.take(seats[user])
                step(engine, user, n)
                seats[user] = engine.seat()
                others_stay &= all(same(before[u], seats[u]) for u in before)
        told = {
            "alone": all(same(seats[u], alone[u]) for u in USERS),
            "differ": not same(seats["alice"], seats["christine"]),
            "moved": not same(seats["bob"], start),
            "others_stay": others_stay,
            "bytes": seats["bob"].bytes,
        }
        found += engine.gather(told)
        engine.checkpoints.finish()
    if engine.ranks.is_main:
        (Path(folder) / "found.json").write_text(json.dumps(found))


def engine_copy(engine: Engine, seat: Seat) -> Seat:
    """What it is now, whatever is done to it later."""
    memory = [{n: v.clone() for n, v in of.items()} for of in seat.memory]
    return Seat([w.clone() for w in seat.weights], memory)


if __name__ == "__main__":
    main(*sys.argv[1:])
