"""Every collective of a stretch of code, as a rank sees it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPERATORS = {
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
}
"""How names in c10d and _c10d_functional begin, underscores aside."""


class Collective(NamedTuple):
    """One collective call."""

    operator: str
    ranks: tuple[int, ...]
    bytes: int
    """Size of the whole tensor that is gathered, reduced or scattered."""
    dimensions: int
    kernels: bool
    """The kernels made the call."""


class Collectives(TorchDispatchMode):
    """Notes every collective that runs while it is entered.

    A mode does not see inside other operators, and the kernels are operators: the functions of
    torch.distributed that they call (``NESTED``) enter the mode again.
    """

    NESTED = ("all_gather_into_tensor", "all_reduce")

    def __init__(self):
        super().__init__()
        self.seen: list[Collective] = []
        self.inside: str | None = None
        self.originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self):
        if not self.originals:
            self.originals = {name: getattr(dist, name) for name in self.NESTED}
            for name, original in self.originals.items():
                setattr(dist, name, self._again(original))
        return super().__enter__()

    def restore(self) -> None:
        """Leave torch.distributed as it was."""
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def _again(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args, **kwargs):
            if self.inside != "sdpo_kernels":
                return original(*args, **kwargs)
            with self:
                return original(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2].lstrip("_")
        kind = next((k for begin, k in OPERATORS.items() if name.startswith(begin)), None)
        if func.namespace in ("c10d", "_c10d_functional") and kind is not None:
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            largest = max(tensors, key=Tensor.numel)
            ranks = _ranks(tree_leaves(args))
            size = largest.numel() * largest.element_size()
            if kind == "all-gather" and func.namespace == "_c10d_functional":
                size *= len(ranks)  # its argument is one rank's part
            nested = self.inside == "sdpo_kernels"
            self.seen.append(Collective(kind, ranks, size, largest.dim(), nested))
        outside, self.inside = self.inside, func.namespace
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = outside


def _ranks(leaves: list[Any]) -> tuple[int, ...]:
    """Ranks in the collective's group."""
    for x in leaves:
        if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(x)))
        if isinstance(x, str) and x not in ("sum", "avg", "max", "min"):
            return tuple(dist.get_process_group_ranks(_resolve_process_group(x)))
    raise AssertionError(f"a collective without a group: {leaves}")
