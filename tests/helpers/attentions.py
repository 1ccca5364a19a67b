"""Five training steps by an engine and an attention, on whatever device there is."""

import math
from pathlib import Path

import pytest
import torch

from helpers import runs, tiny
from sdpo_parallel.torchtitan.attention import Machine, importable
from sdpo_parallel.transformers import engine

TITAN = ("branches", "dense", "flex", "varlen", "flex_flash")
BOTH = [("transformers", a) for a in ("sdpa", "flash_attention_2")]
BOTH += [("torchtitan", a) for a in TITAN]
"""(engine, attention), all that there are."""
STEPS = 5


def obstacle(name: str, attention: str) -> str | None:
    """Why an engine cannot train with an attention here; None: it can."""
    gpu = torch.cuda.is_available()
    if name == "transformers":
        flash = gpu and engine.is_flash_attn_2_available()
        return None if attention == "sdpa" or flash else "needs a GPU and flash-attn"
    if not importable("torchtitan"):
        return "torchtitan cannot be imported"
    capability = torch.cuda.get_device_capability() if gpu else None
    device, dtype = ("cuda", "bfloat16") if gpu else ("cpu", "float32")
    here = Machine(
        device_type=device,
        capability=capability,
        context=1,
        installed=importable,
        compute_dtype=dtype,
    )
    return here.obstacle(attention)  # pyright: ignore


def assert_learns(
    name: str, attention: str, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict]:
    """Five steps over the same interactions, through the command line: losses and gradients are
    finite and the last loss is below the first. The rows of metrics.jsonl."""
    if (why := obstacle(name, attention)) is not None:
        pytest.skip(why)
    # several documents to a row, or masks would not matter
    data = tiny.make_interactions(folder / "i.jsonl", 6)
    options = ["--engine", name, "--batch.epochs", str(STEPS)]
    if name == "torchtitan":
        options += ["--parallel.attention", attention]
    else:
        flash = attention != "sdpa"  # which reads whole sequences
        monkeypatch.setattr(engine, "choose_attention", lambda *_: attention if flash else None)
        options += ["--batch.share-prefix", "none" if flash else "auto"]
    rows = runs.train("reverse-kl", model, data, folder / "run", *options)
    losses = [row["loss"] for row in rows]
    assert len(losses) == STEPS
    assert all(math.isfinite(x) and x > 0 for x in losses), losses
    assert all(row["grad_norm"] > 0 and not row["skipped"] for row in rows)
    assert losses[-1] < losses[0], losses
    return rows
