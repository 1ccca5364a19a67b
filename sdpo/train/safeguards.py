"""What keeps a long run honest: skipped steps, drift from the first policy, ranks that stall."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sdpo_kernels import linear_reverse_kl

from ..batching import Batch


@dataclass(frozen=True, kw_only=True)
class SafeguardConfig:
    """When a run is stopped, and what is watched."""

    max_nonfinite: int = 3
    """A step whose gradient is not finite is skipped and counted; as many in a row stop the run."""
    probe_interactions: int = 16
    """Interactions, evenly taken from the data, on which drift is measured; 0: none. Each rank
    keeps a copy of the first head in host memory."""
    probe_every: int = 50
    """Steps between measurements of drift."""
    stop_kl: float | None = None
    """Nats per token: KL(policy || first policy) on the probe beyond which the run stops."""
    stop_entropy: float | None = None
    """Nats per token: the policy's entropy on the probe under which the run stops (collapse)."""
    stall_seconds: float = 1200.0
    """Without a step for as long, the run ends with an error that names the ranks behind; 0: off.
    Longer than the slowest step, the first one's compilation and a checkpoint's writing."""

    def __post_init__(self):
        for name in ("max_nonfinite", "probe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("probe_interactions", "stall_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.probe_interactions and (self.stop_kl or self.stop_entropy):
            raise ValueError("stop_kl and stop_entropy need probe_interactions")


class Collapse(ValueError):
    """The policy drifted beyond what the run allows."""


class Probe:
    """Drift of the policy on fixed interactions: KL(policy || first policy) and entropy, exact.

    The first policy is kept as its hidden states at the probe's responses and its head, in host
    memory: logits are formed again when they are compared.

    Args:
        batches: this rank's micro-batches of the probe; as many on all ranks.
    """

    def __init__(self, engine: Any, batches: Sequence[Batch]):
        self.engine, self.batches = engine, batches
        with torch.no_grad(), engine.context():
            self.first = [self._read(b)[1].cpu() for b in batches]
            # a copy, as on a CPU it would follow the policy
            self.head = engine.policy.lm_head().weight.detach().to("cpu", copy=True)
        engine.release()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """``drift/kl`` and ``drift/entropy``, means over the probe's response tokens, in nats."""
        device = self.engine.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        head = self.head.to(device)
        with self.engine.context():
            for batch, first in zip(self.batches, self.first, strict=True):
                own, hidden_ND = self._read(batch)
                now = self.engine.policy.lm_head()
                kl = linear_reverse_kl(
                    hidden_ND,
                    now.weight,
                    first.to(device),
                    head,
                    targets=own.targets_N,
                    shard=now.shard,
                )
                sums[0] += kl.value.double().sum()
                sums[1] += kl.stats.entropy_policy.double().sum()
                sums[2] += own.targets_N.numel()
        self.engine.release()
        kl, entropy, tokens = self.engine.sum_over_ranks(sums).tolist()
        return {"drift/kl": kl / max(tokens, 1), "drift/entropy": entropy / max(tokens, 1)}

    def _read(self, batch: Batch) -> tuple[Batch, torch.Tensor]:
        batch = batch.to(self.engine.device)
        rows = batch.policy
        hidden = self.engine.policy.hidden_states(rows.tokens_BT, rows.positions_BT, rows.index_N)
        mine = self.engine.policy.own_responses(batch.lengths)
        if mine is None:
            return batch, hidden
        batch, kept_N = batch.only(mine)
        return batch, hidden[kept_N]


def check_drift(config: SafeguardConfig, row: dict[str, float], step: int) -> None:
    """Stop a run that has drifted too far.

    Raises:
        Collapse: beyond ``stop_kl`` or under ``stop_entropy``.
    """
    kl, entropy = row.get("drift/kl"), row.get("drift/entropy")
    if kl is not None and config.stop_kl is not None and kl > config.stop_kl:
        raise Collapse(
            f"step {step}: KL to the first policy is {kl:.3f} nats per token, beyond stop_kl="
            f"{config.stop_kl}; a checkpoint was written. Lower the learning rate, or use an EMA, "
            "frozen or trust-region teacher, as another run"
        )
    if entropy is not None and config.stop_entropy is not None and entropy < config.stop_entropy:
        raise Collapse(
            f"step {step}: the policy's entropy is {entropy:.3f} nats per token, under "
            f"stop_entropy={config.stop_entropy}; a checkpoint was written. Use reverse KL, a "
            "lower learning rate or another teacher, as another run"
        )


class StopRequest:
    """SIGTERM (a scheduler's) or SIGINT asks for a checkpoint and a clean end after this step."""

    def __init__(self):
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


PHASES = ("data", "passes", "update", "checkpoint")
"""Of a step, in order."""


class Watch:
    """Ends the process, naming the ranks behind, where training makes no progress.

    Every rank tells the job's store how far it is; a thread on each compares. It speaks when its
    own rank has not advanced for ``seconds``, be it the one that hangs or one that waits for it.
    """

    def __init__(self, seconds: float, rank: int, ranks: int):
        self.seconds, self.rank, self.ranks = seconds, rank, ranks
        self.period = min(10.0, seconds / 4)
        self._at, self._phase, self._step = time.monotonic(), PHASES[0], 0
        self._told = 0
        self._stop = threading.Event()
        self._store: Any = None
        if seconds and ranks > 1:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                host, port, is_master=False, wait_for_workers=False
            )
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()

    def beat(self, step: int, phase: str) -> None:
        """Called as training advances."""
        self._at, self._step, self._phase = time.monotonic(), step, phase

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(RuntimeError, OSError):  # the store went with rank 0's host
                self._tell()
            self._stop.wait(self.period)
            if time.monotonic() - self._at > self.seconds and not self._stop.is_set():
                self._end()

    def _tell(self) -> None:
        """Step, phase, how often it has told, seconds since it advanced, host."""
        self._told += 1
        if self._store is not None:
            silence = time.monotonic() - self._at
            beat = f"{self._step}|{self._phase}|{self._told}|{silence:.0f}|{os.uname().nodename}"
            self._store.set(f"sdpo/watch/{self.rank}", beat)

    def _end(self) -> None:
        print(f"sdpo: error: {self.message()}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(70)

    def message(self) -> str:
        """Who is behind, by rank, host, step, phase and silence. Takes two periods: whoever does
        not tell anew in that time does not answer."""
        head = f"rank {self.rank}: no progress for {self.seconds:.0f} s in step {self._step + 1}"
        if self._store is None:
            return f"{head}, {self._phase}"
        try:
            self._tell()  # that it waits, too
            before = {r: self._beat(r) for r in range(self.ranks)}
            time.sleep(2 * self.period)
            self._tell()
            beats = {r: self._beat(r) for r in range(self.ranks)}
        except (RuntimeError, OSError) as error:
            return f"{head}; rank 0's host does not answer ({error})"
        mute = [r for r, b in beats.items() if b is None or b == before[r] and r != self.rank]
        # others that notice the same at the same time are busy telling it, not mute
        silent = [r for r in mute if (b := beats[r]) is None or int(b[3]) < self.seconds]
        if silent:
            names = ", ".join(self._name(r, beats[r]) for r in silent)
            return f"{head}; ranks that no longer answer: {names}"
        place = {r: (int(b[0]), PHASES.index(b[1])) for r, b in beats.items() if b}
        behind = [r for r in place if place[r] == min(place.values())]
        if len(behind) == self.ranks:
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
