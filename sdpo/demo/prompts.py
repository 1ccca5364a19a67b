"""Questions of our own that the demo's users ask: one in each line of prompts.txt."""

from functools import cache
from pathlib import Path
from zlib import crc32

FILE = Path(__file__).with_name("prompts.txt")
HELD_OUT = 64
"""Questions that nobody asks in training."""


@cache
def training_prompts() -> tuple[str, ...]:
    """The questions that users ask in training, in the file's order."""
    held_out = set(held_out_prompts())
    return tuple(prompt for prompt in _prompts() if prompt not in held_out)


@cache
def held_out_prompts() -> tuple[str, ...]:
    """The questions that are kept for measuring: those of the smallest CRC-32."""
    return tuple(sorted(_prompts(), key=lambda prompt: crc32(prompt.encode()))[:HELD_OUT])


def _prompts() -> tuple[str, ...]:
    return tuple(FILE.read_text(encoding="utf-8").splitlines())
