"""Registers, spills and shared memory of every Triton kernel, by architecture; no GPU is needed.

    python -m benchmarks.resources [--out resources.jsonl]

Triton compiles each kernel for a GPU that is not there, and cuobjdump, which comes with it, reads
the machine code's account of itself. Exits 1 if a kernel spills or asks for more shared memory
than a block of that architecture may have.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import tyro
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdpo_kernels._impl import (
    fused_triton as triton_fused,
)
from sdpo_kernels._impl import (
    rows_triton as triton_rows,
)
from sdpo_kernels._impl import (
    tuning,
)

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a block may have, by compute capability (CUDA C++ programming guide, table 30)."""
TYPES = {
    "targets_ptr": "*i64",
    "cap": "fp32",
    "temperature": "fp32",
    "beta": "fp32",
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel takes."""

    kernel: str
    variant: str
    sm: int
    registers: int
    """Per thread."""
    spill_bytes: int
    """Local memory per thread."""
    shared_bytes: int
    """Per block."""
    warps: int

    @property
    def fits(self) -> bool:
        return not self.spill_bytes and self.shared_bytes <= SHARED_LIMIT[self.sm]


def kernels(sm: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(variant, kernel, types, constants, options) of all kernels, as launched on ``sm``."""
    found = []
    rows = {"BLOCK": tuning.ROW_BLOCK}
    options = {"num_warps": tuning.ROW_WARPS}
    for name, extra in (("plain", False), ("softcap, bias, temperature", True)):
        shape = {"CAP": extra, "SCALE": extra}
        for paired in (False, True):
            constants = dict(
                PAIRED=paired, TARGETS=True, BIAS=extra, HINDSIGHT_BIAS=extra and paired
            )
            variant = f"{'pair' if paired else 'one stream'}, {name}"
            found.append(
                (variant, triton_rows.stats_kernel, {}, {**constants, **shape, **rows}, options)
            )
        for kind, number in triton_rows.KINDS.items():
            constants = {"KIND": number, "GRAD": False, "NARROW": False, **shape, **rows}
            variant = f"{kind}, values only, {name}"
            found.append((variant, triton_rows.divergence_kernel, {}, constants, options))
        for dtype in ("bf16", "fp32"):
            types = {"grad_ptr": f"*{dtype}"}
            narrow = {"NARROW": dtype != "fp32", **shape, **rows}
            for kind, number in triton_rows.KINDS.items():
                constants = {"KIND": number, "GRAD": True, **narrow}
                variant = f"{kind}, {dtype} gradient, {name}"
                found.append((variant, triton_rows.divergence_kernel, types, constants, options))
            constants = {"TARGETS": True, **narrow}
            variant = f"{dtype} gradient, {name}"
            found.append((variant, triton_rows.softmax_grad_kernel, types, constants, options))
        for dtype in ("bf16", "fp32"):
            found.append(_fused(sm, dtype, name, shape, extra, descriptors=False))
        if sm >= 90:
            found.append(_fused(sm, "bf16", name, shape, extra, descriptors=True))
    return found


def _fused(sm: int, dtype: str, name: str, shape: dict, extra: bool, descriptors: bool):
    tiles = tuning.fused_tiles_for(sm // 10, 4 if dtype == "fp32" else 2)
    types = {"hidden": f"*{dtype}", "weight": f"*{dtype}"}
    if descriptors:
        types = {
            "hidden": f"tensordesc<{dtype}[{tiles.tokens}, {tiles.hidden}]>",
            "weight": f"tensordesc<{dtype}[{tiles.vocabulary}, {tiles.hidden}]>",
        }
    constants = dict(
        TARGETS=True,
        BIAS=extra,
        DESCRIPTORS=descriptors,
        UPCAST=False,
        GROUP=triton_fused.GROUP,
        BLOCK_N=tiles.tokens,
        BLOCK_V=tiles.vocabulary,
        BLOCK_D=tiles.hidden,
        **shape,
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    variant = f"{dtype}, {'descriptors' if descriptors else 'pointers'}, {name}"
    return variant, triton_fused.fused_stats_kernel, types, constants, options


def compile_for(sm: int, kernel, types: dict, constants: dict, options: dict):
    """A compiled kernel, for sizes and strides that are multiples of 16, as in real heads."""
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        default = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = types.get(name) or TYPES.get(name) or default
        if signature[name][0] in "*i":
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def measure(sm: int) -> list[Resources]:
    """Every kernel's resources on one architecture."""
    found = []
    for variant, kernel, types, constants, options in kernels(sm):
        compiled = compile_for(sm, kernel, types, constants, options)
        account = _account(compiled.asm["cubin"])
        found.append(
            Resources(
                kernel=compiled.metadata.name,
                variant=variant,
                sm=sm,
                registers=account["REG"],
                spill_bytes=account["LOCAL"] + account["STACK"],
                shared_bytes=compiled.metadata.shared,
                warps=compiled.metadata.num_warps,
            )
        )
    return found


def _account(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and more, as cuobjdump prints them."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}


def main(out: Path | None = None, sm: tuple[int, ...] = tuple(SHARED_LIMIT)) -> None:
    """Print the table.

    Args:
        out: also write it as JSON lines.
        sm: architectures.
    """
    found = [r for arch in sm for r in measure(arch)]
    table = Table(title=f"Triton {triton.__version__}")
    for column in ("kernel", "variant", "sm", "warps", "registers", "spills, B", "shared, KiB", ""):
        table.add_column(column, overflow="fold")
    for r in found:
        shared = f"{r.shared_bytes / 1024:.0f} of {SHARED_LIMIT[r.sm] // 1024}"
        numbers = (r.sm, r.warps, r.registers, r.spill_bytes)
        verdict = "" if r.fits else "does not fit"
        table.add_row(r.kernel, r.variant, *map(str, numbers), shared, verdict)
    Console(width=150).print(table)
    if out is not None:
        out.write_text("".join(json.dumps(asdict(r)) + "\n" for r in found))
    sys.exit(not all(r.fits for r in found))


if __name__ == "__main__":
    tyro.cli(main)
