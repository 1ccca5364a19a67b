"""How closeness is judged: against a float64 oracle, relative to a float32 baseline's own error."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MUTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "x1.01": lambda x: 1.01 * x,
    "negated": lambda x: -x,
    "shifted row": lambda x: x.roll(1, 0),
    "sum for mean": lambda x: x * x.shape[0],
}


def rel_err(x: Tensor, oracle: Tensor) -> float:
    """||x - oracle|| / ||oracle||, in float64; infinite where x is not finite."""
    if not torch.isfinite(x).all():
        return float("inf")
    return float((x.double() - oracle).norm() / oracle.norm())


def assert_as_good_as(
    out: Tensor, oracle: Tensor, baseline: Tensor, *, k: float = 2.0, mutants: Sequence[Tensor] = ()
) -> None:
    """``out`` is at most ``k`` times further from the oracle than ``baseline`` (plain float32 torch
    on the same inputs, its result rounded to ``out``'s dtype), plus one float32 rounding, or an
    eighth of a half-precision one; and this very tolerance rejects every mutant of the oracle, and
    the ``mutants`` of what it stands for."""
    assert out.shape == oracle.shape, (out.shape, oracle.shape)
    slack = max(torch.finfo(torch.float32).eps, torch.finfo(out.dtype).eps / 8)
    limit = k * rel_err(baseline.to(out.dtype), oracle) + slack
    assert rel_err(out, oracle) <= limit, (rel_err(out, oracle), limit)
    for name, mutate in MUTANTS.items():
        if oracle.shape[0] > 1:
            assert rel_err(mutate(oracle), oracle) > limit, f"mutant {name} passes at {limit}"
    for i, mutant in enumerate(mutants):
        assert rel_err(mutant, oracle) > limit, f"mutant {i} passes at {limit}"
