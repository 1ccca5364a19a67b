"""A GPU that is not there: Triton compiles every launch for it, down to machine code, runs none.

``pretend`` changes torch and Triton for the process. Fake tensors on ``cuda:0`` then have addresses
of their own, so that Triton specialises a launch as it would with real ones, and the launch is
handed to whoever records it.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

KIB = 1024
SHARED_LIMIT = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Bytes of shared memory a block may have, by compute capability (CUDA C++ programming guide)."""
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}
"""Of an A100, an H100, a B200 and an RTX 5090."""
WIDE = 8
ALIGNMENT_BITS = 9
"""CUDA's allocator aligns to 512 bytes."""


@dataclass(frozen=True)
class Machine:
    """What a kernel's code takes and does, as compiled for one architecture."""

    registers: int
    spill_bytes: int
    """Local memory of a thread."""
    shared_bytes: int
    loop_bytes: float
    """Global memory that all threads of a block access in one iteration of its largest loop."""
    narrow: tuple[str, ...]
    """Accesses of fewer than ``WIDE`` bytes per thread in loops; PTX."""
    loop_instructions: float
    """Machine instructions of all threads in one iteration; 0 if nothing was disassembled."""


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel."""

    kernel: str
    arguments: Mapping[str, Any]
    grid: tuple[int, ...]
    machines: Mapping[int, Machine]
    """By compute capability."""
    device: int
    """The current device when it was launched."""
    key: tuple
    """Which compiled variant it is."""


class _Driver:
    """Names a target. Triton keeps what it compiled by device, here one per architecture."""

    sm = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class AbsentGPU:
    """The state of the pretence."""

    def __init__(self):
        self.architectures: tuple[int, ...] = (90,)
        """What launches are compiled for; torch is told of the first one."""
        self.disassemble = False
        """Whether machine instructions are counted, which takes longer than all else."""
        self.current_device = 1
        """Not that of the tensors, so that a missing device guard shows."""
        self.on_launch: Callable[[Launch], None] = lambda launch: None

    def capability(self, *_) -> tuple[int, int]:
        return divmod(self.architectures[0], 10)

    def exchange_device(self, index: int) -> int:
        before = self.current_device
        if index >= 0:
            self.current_device = index
        return before


def pretend() -> AbsentGPU:
    """Change torch and Triton, for good."""
    gpu, names = AbsentGPU(), _Driver()
    driver.set_active(names)  # pyright: ignore[reportArgumentType]
    torch.cuda.get_device_capability = gpu.capability
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS[gpu.architectures[0]]
    )
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = gpu.exchange_device
    _give_addresses()
    run = jit.JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        sizes: Any = grid(named) if callable(grid) else grid
        machines, kernel = {}, None
        for sm in gpu.architectures:
            names.sm = sm
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            machines[sm] = machine(kernel, gpu.disassemble)
        assert kernel is not None
        name = self.__name__
        launch = Launch(
            name, named, tuple(sizes), machines, gpu.current_device, (name, kernel.hash)
        )
        gpu.on_launch(launch)
        return kernel

    jit.JITFunction.run = record
    return gpu


def _give_addresses() -> None:
    """Fake storages have addresses: their own objects', which are distinct while they live."""
    real = torch.UntypedStorage.data_ptr

    def of_storage(self) -> int:
        return self._cdata << ALIGNMENT_BITS if self.device.type == "meta" else real(self)

    def of_tensor(self) -> int:
        begin = self.untyped_storage()._cdata << ALIGNMENT_BITS
        return begin + self.storage_offset() * self.element_size()

    torch.UntypedStorage.data_ptr = of_storage
    FakeTensor.data_ptr = of_tensor


_MACHINES: dict[tuple[str, bool], Machine] = {}


def machine(kernel, disassemble: bool) -> Machine:
    """The account of a compiled kernel."""
    key = (kernel.hash, disassemble)
    if key not in _MACHINES:
        found, sass = dump(kernel.asm["cubin"], disassemble)
        threads = 32 * kernel.metadata.num_warps
        accesses = ptx_loop_accesses(kernel.asm["ptx"])
        size = sum(width for width, _ in accesses)
        instructions, loaded = sass_loop(sass)
        unrolled = max(1, round(loaded / size)) if size and loaded else 1
        _MACHINES[key] = Machine(
            registers=found["REG"],
            spill_bytes=found["LOCAL"] + found["STACK"],
            shared_bytes=kernel.metadata.shared,
            loop_bytes=float(size * threads),
            narrow=tuple(text for width, text in accesses if width < WIDE),
            loop_instructions=instructions * threads / unrolled,
        )
    return _MACHINES[key]


def dump(cubin: bytes, disassemble: bool) -> tuple[dict[str, int], str]:
    """REG, STACK, LOCAL and more, and the machine code, as cuobjdump prints them."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        argv = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
        argv += ["--dump-sass"] if disassemble else []
        text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}, text


_ACCESS = re.compile(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b")


def ptx_loop_accesses(ptx: str) -> list[tuple[int, str]]:
    """Bytes per thread, and text, of each global access that lies in a loop."""
    lines = [line.partition("//")[0].strip() for line in ptx.splitlines()]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if re.fullmatch(r"\$L\w+:", line)}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if jump and labels[jump[1]] <= i:
            inside.update(range(labels[jump[1]], i))
    accesses = (access for i in sorted(inside) for access in _ACCESS.finditer(lines[i]))
    return [(int(a[1] or 1) * int(a[2]) // 8, a[0]) for a in accesses]


def sass_loop(sass: str) -> tuple[int, int]:
    """Instructions of the largest loop of machine code, and bytes per thread that it accesses in
    global memory."""
    code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    loops = []
    for at, text in code:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            loops.append((int(jump[1], 16), at))
    if not loops:
        return 0, 0
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
    body = [text for at, text in code if begin <= at <= end]
    size = 0
    for text in body:
        if access := re.search(r"\b(?:LDG|STG)\.E([\w.]*)", text):
            bits = re.search(r"\.(?:U|S)?(8|16|32|64|128)\b", access[1])
            size += int(bits[1]) // 8 if bits else 4
    return len(body), size
