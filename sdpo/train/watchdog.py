"""When a run ends before its time: ranks that stall, and signals that ask it to stop."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from typing import Any

import torch.distributed as dist


class StopRequest(contextlib.ExitStack):
    """SIGTERM (a scheduler's) or SIGINT asks for a checkpoint and a clean end after the current
    step."""

    def __init__(self):
        super().__init__()
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.callback(signal.signal, number, signal.signal(number, self._ask))

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


PHASES = ("data", "passes", "update", "checkpoint")
"""The phases of a step, in order."""


class Watchdog:
    """Ends the process, naming the ranks behind, when training makes no progress.

    Every rank reports its progress to the job's store, and a thread on each compares. It acts when
    its own rank has not advanced for ``seconds``, whether that rank hangs or waits for another.
    """

    def __init__(self, seconds: float, rank: int, world_size: int):
        self.seconds, self.rank, self.world_size = seconds, rank, world_size
        self.period = min(10.0, seconds / 4)
        self._at, self._phase, self._step = time.monotonic(), PHASES[0], 0
        self._reports = 0
        self._stop = threading.Event()
        self._store: Any = None
        if seconds and world_size > 1:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                host, port, is_master=False, wait_for_workers=False
            )
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()

    def beat(self, step: int, phase: str) -> None:
        """Report progress: ``step`` steps are done and the next is in ``phase``."""
        self._at, self._step, self._phase = time.monotonic(), step, phase

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(RuntimeError, OSError):  # the store went with rank 0's host
                self._report()
            self._stop.wait(self.period)
            if time.monotonic() - self._at > self.seconds and not self._stop.is_set():
                self._end()

    def _report(self) -> None:
        """Report step, phase, a counter, seconds since the last progress, and the host."""
        self._reports += 1
        if self._store is not None:
            silence = time.monotonic() - self._at
            beat = f"{self._step}|{self._phase}|{self._reports}|{silence:.0f}|{os.uname().nodename}"
            self._store.set(f"sdpo/watch/{self.rank}", beat)

    def _end(self) -> None:
        print(f"sdpo: error: {self.message()}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(70)

    def message(self) -> str:
        """Which ranks are behind: rank, host, step, phase and silence. Takes two periods: a rank
        that does not report again in that time is taken as unresponsive."""
        head = f"rank {self.rank}: no progress for {self.seconds:.0f} s in step {self._step + 1}"
        if self._store is None:
            return f"{head}, {self._phase}"
        try:
            self._report()  # this rank waits, too
            before = {r: self._beat(r) for r in range(self.world_size)}
            time.sleep(2 * self.period)
            self._report()
            beats = {r: self._beat(r) for r in range(self.world_size)}
        except (RuntimeError, OSError) as error:
            return f"{head}; rank 0's host does not answer ({error})"
        silent = [r for r, b in beats.items() if b is None or b == before[r] and r != self.rank]
        # ranks that notice the stall at the same time are busy in this function, not silent
        silent = [r for r in silent if (b := beats[r]) is None or int(b[3]) < self.seconds]
        if silent:
            names = ", ".join(self._name(r, beats[r]) for r in silent)
            return f"{head}; ranks that no longer answer: {names}"
        place = {r: (int(b[0]), PHASES.index(b[1])) for r, b in beats.items() if b}
        behind = [r for r in place if place[r] == min(place.values())]
        if len(behind) == self.world_size:
            return f"{head}: all ranks hang in its {self._phase} phase"
        return f"{head}; ranks behind: {', '.join(self._name(r, beats[r]) for r in behind)}"

    def _beat(self, rank: int) -> list[str] | None:
        key = f"sdpo/watch/{rank}"
        return self._store.get(key).decode().split("|") if self._store.check([key]) else None

    @staticmethod
    def _name(rank: int, beat: list[str] | None) -> str:
        if beat is None:
            return f"rank {rank} (never heard of)"
        step, phase, _, silence, host = beat
        return f"rank {rank} on {host} (step {int(step) + 1}, {phase}, {silence} s before it)"
