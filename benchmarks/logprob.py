"""log p(y) from hidden states, forward and backward: everybody side by side.

    python -m benchmarks.logprob [--heads qwen3-8b --tokens 1024 8192] [--out results.jsonl]

Peers that compute a cross-entropy are peers here: its mean is that of -log p(y). See
benchmarks/README.md for how to read the table.
"""

import tyro

from benchmarks.microbenchmark import Settings, run

if __name__ == "__main__":
    run("logprob", ("logprob",), tyro.cli(Settings, description=__doc__))
