"""Run under torchrun: `sdpo online`, whose main rank kills itself.

argv: an update; when: seconds after its answers are written down, or "between" its two files; what
follows `sdpo online`.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from sdpo.cli import main
from sdpo.online import record


def die() -> None:
    """As a cluster does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def between(update: int) -> None:
    """Die when the first file of an update is there, and the second one is not."""
    write = record._write

    def dying(path: Path, *rest: object) -> None:
        if path.parent.name == "interactions" and path.stem.endswith(f"{update:06d}"):
            die()
        write(path, *rest)  # pyright: ignore

    record._write = dying


def after(path: Path, seconds: float) -> None:
    """Die a while after a file is there."""

    def wait() -> None:
        while not path.is_file():
            time.sleep(0.002)
        time.sleep(seconds)
        die()

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    update, moment, *arguments = sys.argv[1:]
    if os.environ["RANK"] == "0":
        out = Path(arguments[arguments.index("--out") + 1])
        path = record.rollouts_file(out, int(update))
        if moment == "between" and not path.is_file():
            between(int(update))
        else:  # which a run that was killed before may have left
            after(path, 0.0 if moment == "between" else float(moment))
    main(["online", *arguments])
