"""Divergences between two heads' distributions, forward and backward: everybody side by side.

    python -m benchmarks.divergence [--heads qwen3-8b --tokens 1024 8192] [--out results.jsonl]

Without options: on a GPU the heads of Qwen3-8B and Llama-3.2-1B in bfloat16 and float32; on a CPU
one of 32,000 x 512. See benchmarks/README.md for how to read the table.
"""

from dataclasses import dataclass

import tyro

from benchmarks.microbenchmark import Settings, run
from benchmarks.problems import Kind


@dataclass(frozen=True, kw_only=True)
class DivergenceSettings(Settings):
    """Divergences side by side."""

    kinds: tuple[Kind, ...] = ("reverse_kl", "forward_kl", "jsd")


if __name__ == "__main__":
    settings = tyro.cli(DivergenceSettings, description=__doc__)
    run("divergence", settings.kinds, settings)
