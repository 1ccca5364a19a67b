"""Everything that a call would send to a GPU, in order, and what is wrong with it.

``Recorder`` is a dispatch mode above fake tensors: it sees each operator of torch, which meta
kernels execute, and is told of each Triton launch. What meta kernels do not check is checked here:
the rules of cuBLAS and of ``out_dtype``, arguments of Triton kernels, whatever makes the host wait
or cannot be captured in a CUDA graph.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.absent_gpu import SHARED_LIMIT, Launch

HALF = (torch.bfloat16, torch.float16)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive"}
WAITS |= {"_unique2", "unique_dim", "repeat_interleave", "histc", "bincount", "is_nonzero"}
"""Operators whose result the host needs before it goes on."""
UNACCOUNTED = ("bmm", "baddbmm", "addbmm", "_scaled_mm", "convolution")
ALLOCATES = ("empty", "new_empty")
GRID_LIMIT = (2**31 - 1, 65_535, 65_535)
ROW_KERNELS = ("stats_kernel", "divergence_kernel", "softmax_grad_kernel")
BLOCK_BYTES = 512
"""The caching allocator hands out multiples."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One piece of work for the GPU."""

    name: str
    flops: float = 0.0
    bytes: float
    """That memory must move."""
    backward: bool


@dataclass(frozen=True, kw_only=True)
class Matmul(Event):
    """(M, K) x (K, N) -> (M, N)."""

    shape: tuple[int, int, int]
    """M, N, K."""
    dtype: torch.dtype
    out_dtype: torch.dtype
    adds: bool
    """The result is added to what was there."""

    @property
    def beyond_half(self) -> float:
        """Bytes of the result beyond one write in the operands' dtype."""
        m, n, _ = self.shape
        moved = self.out_dtype.itemsize * (2 if self.adds else 1)
        return m * n * max(0, moved - self.dtype.itemsize)


@dataclass(frozen=True, kw_only=True)
class Kernel(Event):
    """A launch of ours."""

    launch: Launch
    instructions: float
    """Machine instructions of all threads, in the kernel's loop."""


@dataclass(frozen=True, kw_only=True)
class Small(Event):
    """A launch of torch's that is no matmul."""


@dataclass(frozen=True, kw_only=True)
class Collective(Event):
    """An exchange between ranks; ``bytes``: what this rank puts in."""


class Recorder(TorchDispatchMode):
    """The stream of one call, its memory, and its problems."""

    def __init__(self, mask_share: float = 2 / 3):
        """
        Args:
            mask_share: of a mask in host memory, which has no data here, how much is True.
        """
        super().__init__()
        self.mask_share = mask_share
        self.events: list[Event] = []
        self.problems: list[str] = []
        self.peak = self.largest = 0
        self.backward = False
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._pinned: list[StorageWeakRef] = []

    def problem(self, text: str) -> None:
        """Add one, once."""
        if text not in self.problems:
            self.problems.append(text)

    def live_bytes(self) -> int:
        """Storages on the GPU that something still refers to."""
        for key in [k for k, (ref, _) in self._live.items() if ref.expired()]:
            del self._live[key]
        return sum(size for _, size in self._live.values())

    def note(self, tensors) -> None:
        """Count the storages of tensors on the GPU as allocated."""
        for x in tensors:
            if isinstance(x, Tensor) and x.device.type == "cuda":
                storage = x.untyped_storage()
                known = self._live.get(storage._cdata)
                if known is None or known[0].expired():
                    size = allocated(storage.nbytes())
                    self._live[storage._cdata] = (StorageWeakRef(storage), size)
                    self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.live_bytes())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        ins = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.device.type == "cuda" for x in ins)
        if func.namespace == "c10d":
            self._collective(name, ins)
            return func(*args, **kwargs)
        if func.namespace != "aten":
            return func(*args, **kwargs)
        if name in ("_pin_memory", "pin_memory", "is_pinned"):
            return self._pin(name, args[0])
        if name == "nonzero" and not on_gpu:
            size = round(args[0].numel() * self.mask_share)
            return args[0].new_empty((size, args[0].ndim), dtype=torch.long)
        if name == "_local_scalar_dense" and not on_gpu and args[0].dtype == torch.bool:
            return False  # as of a mask in host memory: not all of it is True
        if name in WAITS and on_gpu:
            self.problem(f"the host waits for the device: {func}")
            if name == "_local_scalar_dense":  # no data: any number will do
                return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool and i.device.type == "cuda" for i in args[1]
        ):
            self.problem("the host waits for the device: an index by a mask on it")
        if name == "addmm" and "dtype" in func._overloadname:
            out = _addmm(args, kwargs)
        else:
            out = func(*args, **kwargs)
        outs = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.note(ins + outs)
        if name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs, ins, outs)
        if any(x.device.type == "cuda" and x.numel() for x in outs) and _launches(func):
            self._work(func, name, args, ins, outs)
        return out

    def _pin(self, name: str, x: Tensor) -> Tensor | bool:
        """Pinning asks for a CUDA context; here it is remembered."""
        if name == "is_pinned":
            return self._is_pinned(x)
        out = torch.empty_like(x, device="cpu")
        self._pinned.append(StorageWeakRef(out.untyped_storage()))
        return out

    def _is_pinned(self, x: Tensor) -> bool:
        cdata = x.untyped_storage()._cdata
        return any(not ref.expired() and ref.cdata == cdata for ref in self._pinned)

    def _copy(self, name: str, args, kwargs, ins: list[Tensor], outs: list[Tensor]) -> None:
        source, to = (args[1], args[0]) if name == "copy_" else (args[0], outs[0])
        if {source.device.type, to.device.type} != {"cpu", "cuda"} or not source.numel():
            return
        way = f"{source.device.type} to {to.device.type}"
        free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        host = source if source.device.type == "cpu" else to
        if not free:
            self.problem(f"the host waits for the device: a blocking copy, {way}")
        if not self._is_pinned(host):
            self.problem(f"a CUDA graph cannot capture it: a copy of pageable memory, {way}")

    def _collective(self, name: str, ins: list[Tensor]) -> None:
        if name.strip("_") in ("allgather_base", "allreduce", "allgather", "reduce_scatter_base"):
            sent = ins[0] if name.strip("_") == "allreduce" else ins[-1]
            self.events.append(
                Collective(name=name.strip("_"), bytes=_size(sent), backward=self.backward)
            )

    def _work(self, func, name: str, args, ins: list[Tensor], outs: list[Tensor]) -> None:
        if name in ("mm", "addmm"):
            self._matmul(func, name, args, outs[0])
            return
        if name in UNACCOUNTED:
            self.problem(f"{name}: a matmul that is not accounted for")
        written = [x for x in outs if not any(x is y for y in ins)]
        size = sum(_size(x) for x in (*ins, *written) if x.device.type == "cuda")
        if len(ins) == 1 and outs and ins[0] is outs[0] and name in ("fill_", "zero_"):
            size = _size(outs[0])
        self.events.append(Small(name=name, bytes=size, backward=self.backward))

    def _matmul(self, func, name: str, args, c: Tensor) -> None:
        adds = name == "addmm"
        *first, a, b = args[: 3 if adds else 2]
        for text in _matmul_problems(func, name, first, a, b, c):
            self.problem(f"{name} {tuple(a.shape)} x {tuple(b.shape)}: {text}")
        m, k, n = *a.shape, b.shape[1]
        size = _size(a) + _size(b) + _size(c) * (2 if adds else 1)
        event = Matmul(
            name=name,
            flops=2.0 * m * n * k,
            bytes=size,
            shape=(m, n, k),
            dtype=a.dtype,
            out_dtype=c.dtype,
            adds=adds,
            backward=self.backward,
        )
        self.events.append(event)

    def launched(self, launch: Launch) -> None:
        """A launch of a Triton kernel."""
        for text in launch_problems(launch):
            self.problem(f"{launch.kernel}: {text}")
        moved, instructions = _kernel_work(launch)
        # without the tensors, which would stay alive
        numbers = {k: x for k, x in launch.arguments.items() if isinstance(x, int | float)}
        launch = replace(launch, arguments=numbers)
        event = Kernel(
            name=launch.kernel,
            bytes=moved,
            launch=launch,
            instructions=instructions,
            backward=self.backward,
        )
        self.events.append(event)


def _addmm(args, kwargs) -> Tensor:
    """With ``out_dtype``, whose meta kernel fails in torch 2.11."""
    own, a, b, dtype = args[:4]
    shape = (a.shape[0], b.shape[1])
    out = kwargs.get("out")
    out = own.new_empty(shape, dtype=dtype) if out is None else out
    if a.shape[1] != b.shape[0] or out.shape != shape or out.dtype != dtype:
        raise RuntimeError(f"addmm {a.shape} x {b.shape} into {out.shape} of {out.dtype}")
    return out


def allocated(size: int) -> int:
    """Bytes that the caching allocator hands out."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _size(x: Tensor) -> int:
    """Bytes of what a tensor shows; a broadcast dimension is read once."""
    shown = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0]
    return math.prod(shown) * x.element_size()


def _launches(func) -> bool:
    """Not of views, which return an alias that they do not write, nor of mere allocations."""
    if func.overloadpacket.__name__.startswith(ALLOCATES):
        return False
    returned = [r.alias_info for r in func._schema.returns]
    return not (returned and all(a is not None and not a.is_write for a in returned))


def _matmul_problems(
    func, name: str, first: list[Tensor], a: Tensor, b: Tensor, c: Tensor
) -> Iterator[str]:
    """What aten/src/ATen/native/cuda/Blas.cpp refuses, and what costs it its fast kernels."""
    if a.dtype != b.dtype:
        yield f"operands of {a.dtype} and {b.dtype}"
    if c.dtype != a.dtype:
        if not (a.dtype in HALF and c.dtype == torch.float32):
            yield f"operands of {a.dtype} give no {c.dtype}"
        if "dtype" not in func._overloadname:
            yield f"{a.dtype} into {c.dtype} without out_dtype"
    if name == "addmm" and first[0].dtype not in (c.dtype, a.dtype):
        yield f"{first[0].dtype} is added to"
    if len({x.device for x in (a, b, c, *first)}) > 1:
        yield "operands on several devices"
    for which, x in (("left", a), ("right", b), ("result", c)):
        yield from _layout_problems(which, x)


def _layout_problems(which: str, x: Tensor) -> Iterator[str]:
    inner = next((d for d in (1, 0) if x.stride(d) == 1 or x.shape[d] == 1), None)
    if inner is None or (x.shape[1 - inner] > 1 and x.stride(1 - inner) < x.shape[inner]):
        yield f"the {which} of strides {x.stride()} is copied first"


def launch_problems(launch: Launch) -> Iterator[str]:
    """What the compiler, the hardware or the kernels' own conventions forbid."""
    for sm, m in launch.machines.items():
        if m.spill_bytes:
            yield f"spills {m.spill_bytes} B a thread on sm_{sm}"
        if m.shared_bytes > SHARED_LIMIT[sm]:
            yield f"{m.shared_bytes} B of shared memory on sm_{sm}, which has {SHARED_LIMIT[sm]}"
        if launch.kernel in ROW_KERNELS and m.narrow:
            yield f"{len(m.narrow)} narrow accesses in its loop, as {m.narrow[0]}"
    for size, limit in zip(launch.grid, GRID_LIMIT, strict=False):
        if not 0 <= size <= limit:
            yield f"grid {launch.grid}"
    for name, x in launch.arguments.items():
        if isinstance(x, Tensor):
            if x.device.type != "cuda":
                yield f"{name} is in host memory"
            elif x.device.index != launch.device:
                yield f"{name} is on {x.device}, and the current device is {launch.device}"
            yield from _pointer_problems(name, x, launch.arguments)
        elif hasattr(x, "block_shape"):
            yield from _descriptor_problems(name, x)


def _pointer_problems(name: str, x: Tensor, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Rows lie where the kernel looks for them: at the stride it was given, else end to end."""
    if name != "z_ptr" and x is arguments.get("z_ptr"):
        return  # in place of what is not read
    stride = arguments.get(name.replace("_ptr", "") + "_stride")
    if x.ndim == 2 and stride is not None:
        if x.shape[0] > 1 and x.stride(0) != stride:
            yield f"{name} has rows at {x.stride(0)}, and {stride} is passed"
        if x.shape[1] > 1 and x.stride(1) != 1:
            yield f"{name} has columns at {x.stride(1)}"
    elif x.numel() > 1 and not x.is_contiguous():
        yield f"{name} of strides {x.stride()} is not contiguous"
    columns = arguments.get("vocabulary")
    if name in ("z_ptr", "u_ptr", "grad_ptr") and x.ndim == 2 and columns is not None:
        room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        if (x.shape[0] - 1) * x.stride(0) + columns > room:
            yield f"{name} ends before its last row does"


def _descriptor_problems(name: str, x) -> Iterator[str]:
    """The rules of TMA: CUDA driver API, cuTensorMapEncodeTiled."""
    size = x.base.element_size()
    if x.base.data_ptr() % 16 or any(s * size % 16 for s in x.strides[:-1]):
        yield f"{name}: TMA needs bases and strides of 16 B"
    if any(b > 256 for b in x.block_shape) or x.block_shape[-1] * size % 16:
        yield f"{name}: TMA has no box {x.block_shape}"
    if any(n >= 2**32 for n in x.shape) or any(s * size >= 2**40 for s in x.strides):
        yield f"{name}: TMA reaches no {tuple(x.shape)} at strides {tuple(x.strides)}"


def _kernel_work(launch: Launch) -> tuple[float, float]:
    """Bytes and machine instructions of a launch: its loop's, as compiled, for all rows."""
    a = launch.arguments
    first = next(iter(launch.machines.values()))
    if launch.kernel not in ROW_KERNELS:
        n, v, d = a["tokens"], a["vocabulary"], a["hidden_size"]
        return 2.0 * (n + v) * d + 16.0 * n * -(-v // a["BLOCK_V"]), 0.0
    columns = a["BLOCK"] if "BLOCK" in a else a["ROWS"] * a["LANES"]
    iterations = a["tokens"] * a["vocabulary"] / columns
    return first.loop_bytes * iterations, first.loop_instructions * iterations
