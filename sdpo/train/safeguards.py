"""When a run must stop: too many steps that were not finite, or a policy that has collapsed."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SdpoError


@dataclass(frozen=True, kw_only=True)
class SafeguardConfig:
    """What is monitored, and when a run is stopped."""

    max_nonfinite: int = 3
    """Steps whose gradient is not finite are skipped and counted; this many in a row stop the
    run."""
    probe_interactions: int = 16
    """Interactions, evenly spread over the data, on which drift is measured; 0: no measurement.
    Each rank keeps a copy of the first lm_head in host memory."""
    probe_every: int = 50
    """Steps between measurements of drift."""
    stop_kl: float | None = None
    """Nats per token: the run stops when KL(policy || first policy) exceeds it."""
    stop_entropy: float | None = None
    """Nats per token: the run stops when the policy's entropy falls below it (collapse)."""
    stall_seconds: float = 1200.0
    """Without a step for this long, the run ends with an error that names the ranks behind; 0: off.
    Must exceed the slowest step, including the first one's compilation and a checkpoint."""

    def __post_init__(self):
        for name in ("max_nonfinite", "probe_every"):
            if getattr(self, name) < 1:
                raise SdpoError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("probe_interactions", "stall_seconds"):
            if getattr(self, name) < 0:
                raise SdpoError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.probe_interactions and (self.stop_kl or self.stop_entropy):
            raise SdpoError("stop_kl and stop_entropy need probe_interactions")


def alarm(
    config: SafeguardConfig, row: Mapping[str, float], *, step: int, skipped_in_a_row: int
) -> SdpoError | None:
    """Why the run must end after this step, if it must.

    Args:
        row: the step's metrics.
        skipped_in_a_row: steps up to this one whose gradients were not finite.
    """
    if skipped_in_a_row >= config.max_nonfinite:
        return SdpoError(
            f"step {step}: {skipped_in_a_row} steps in a row had gradients that were not finite; "
            "their updates were skipped, and a checkpoint holds the weights as they were. Lower "
            "the learning rate (as another run), or leave out the data drawn here"
        )
    kl, entropy = row.get("drift/kl"), row.get("drift/entropy")
    if kl is not None and config.stop_kl is not None and kl > config.stop_kl:
        return SdpoError(
            f"step {step}: KL to the first policy is {kl:.3f} nats per token, beyond stop_kl="
            f"{config.stop_kl}; a checkpoint was written. Lower the learning rate, or use an EMA, "
            "frozen or trust-region teacher, as another run"
        )
    if entropy is not None and config.stop_entropy is not None and entropy < config.stop_entropy:
        return SdpoError(
            f"step {step}: the policy's entropy is {entropy:.3f} nats per token, under "
            f"stop_entropy={config.stop_entropy}; a checkpoint was written. Use reverse KL, a "
            "lower learning rate or another teacher, as another run"
        )
    return None
