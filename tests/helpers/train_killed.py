"""Run under torchrun: `sdpo train`, each of whose ranks kills itself.

argv: a step, after whose metrics are written they die; what follows `sdpo train`.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from sdpo.cli import main


def die_after(step: int, metrics: Path) -> None:
    """As a cluster does it."""
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < step:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    metrics = Path(arguments[arguments.index("--out") + 1]) / "metrics.jsonl"
    threading.Thread(target=die_after, args=(int(step), metrics), daemon=True).start()
    main(["train", *arguments])
