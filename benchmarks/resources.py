"""Registers, spills, shared memory and instructions of every Triton kernel, by architecture; no GPU
is needed.

    python -m benchmarks.resources [--out resources.jsonl]

Triton compiles each kernel for a GPU that is not there, and cuobjdump, which comes with Triton,
prints what the machine code uses. Instructions are those of the loop over a row, for each logit
of one stream or pair of logits of two. Exits 1 if a kernel spills or asks for more shared memory
than a block of that architecture may have.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
import tyro
from rich.console import Console
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.absent_gpu import SHARED_LIMIT, dump, sass_loop
from benchmarks.report import Output, grid
from sdpo_kernels._impl import fused_triton, rows_triton, tuning

MEASURED = ("3.6", "3.7", "3.8", "3.9")
"""Releases of Triton with which every kernel was compiled and found to fit. With others, a kernel
that does not fit is news about the compiler, not a mistake here."""
TYPES = {"targets_ptr": "*i64", "cap": "fp32", "temperature": "fp32", "beta": "fp32"}


def kernels(sm: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(variant, kernel, types, constants, options) of all kernels, as launched on ``sm``."""
    options, lanes = tuning.row_tiles(tuning.ROW_BLOCK), tuning.lane_tiles(tuning.LANES)
    rows = {"BLOCK": options.pop("BLOCK")}
    tiles = {name: lanes.pop(name) for name in ("ROWS", "LANES")}
    for name, extra in (("plain", False), ("softcap, bias, temperature", True)):
        shape = {"CAP": extra, "SCALE": extra, **rows}
        for paired in (False, True):
            bias = dict(BIAS=extra, TEACHER_BIAS=extra and paired)
            constants = dict(PAIRED=paired, TARGETS=True, WHOLE=True, CAP=extra, SCALE=extra)
            constants |= bias | tiles
            variant = f"{'pair' if paired else 'one stream'}, {name}"
            yield variant, rows_triton.stats_kernel, {}, constants, lanes
        for dtype in ("bf16", "fp32", None):
            types = {"grad_ptr": f"*{dtype or 'fp32'}"}
            narrow = {"IN_PLACE": dtype == "bf16", **shape}
            what = f"{dtype} gradient" if dtype else "values only"
            for kind, formula in rows_triton.FORMULAS.items():
                two_passes = kind in rows_triton.TWO_PASSES
                constants = dict(
                    FORMULA=formula,
                    TWO_PASSES=two_passes,
                    CENTRED=kind in rows_triton.CENTRED,
                    CENTRE=dtype is not None or not two_passes,
                    GRAD=dtype is not None,
                    **narrow,
                )
                variant = f"{kind}, {what}, {name}"
                launch = options
                if two_passes and not dtype:
                    launch = tuning.row_tiles(tuning.ROW_BLOCK, first_of_two=True)
                    del launch["BLOCK"]
                yield variant, rows_triton.divergence_kernel, types, constants, launch
            if dtype:
                constants = {"TARGETS": True, **narrow}
                variant = f"{what}, {name}"
                yield variant, rows_triton.softmax_grad_kernel, types, constants, options
        for dtype in ("bf16", "fp32"):
            yield _fused(sm, dtype, name, extra, descriptors=False)
        if sm >= 90:
            yield _fused(sm, "bf16", name, extra, descriptors=True)


def _fused(sm: int, dtype: str, name: str, extra: bool, descriptors: bool):
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
        GROUP=fused_triton.GROUP,
        BLOCK_N=tiles.tokens,
        BLOCK_V=tiles.vocabulary,
        BLOCK_D=tiles.hidden,
        CAP=extra,
        SCALE=extra,
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, **tuning.FP_FUSION}
    variant = f"{dtype}, {'descriptors' if descriptors else 'pointers'}, {name}"
    return variant, fused_triton.fused_stats_kernel, types, constants, options


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


def measure(sm: int) -> list[dict[str, Any]]:
    """Every kernel's resources on one architecture: registers and spills (local memory) of a
    thread, shared memory of a block; of kernels that read rows, instructions per logit or pair."""
    found = []
    for variant, kernel, types, constants, options in kernels(sm):
        compiled = compile_for(sm, kernel, types, constants, options)
        account, sass = dump(compiled.asm["cubin"], True)
        loop, _ = sass_loop(sass)
        row = dict(kernel=compiled.metadata.name, variant=variant, sm=sm, registers=account["REG"])
        row |= dict(spill_bytes=account["LOCAL"] + account["STACK"])
        row |= dict(shared_bytes=compiled.metadata.shared, warps=compiled.metadata.num_warps)
        columns = constants.get("BLOCK") or constants.get("ROWS", 0) * constants.get("LANES", 0)
        row |= dict(instructions=32 * row["warps"] * loop / columns if columns else None)
        found.append(row)
    return found


def fits(row: Mapping[str, Any]) -> bool:
    """Nothing spills, and a block may have its shared memory."""
    return not row["spill_bytes"] and row["shared_bytes"] <= SHARED_LIMIT[row["sm"]]


def main(out: Path | None = None, sm: tuple[int, ...] = tuple(SHARED_LIMIT)) -> None:
    """Print the table.

    Args:
        out: JSON lines are appended to this file.
        sm: architectures.
    """
    found = [r for arch in sm for r in measure(arch)]
    numbers = "sm", "warps", "registers", "spills, B", "shared, KiB", "instructions", ""
    table = grid(f"Triton {triton.__version__}", "kernel", "variant", *numbers, left=2)
    for r in found:
        shared = f"{r['shared_bytes'] / 1024:.0f} of {SHARED_LIMIT[r['sm']] // 1024}"
        count = "" if r["instructions"] is None else f"{r['instructions']:.1f}"
        cells = (r["sm"], r["warps"], r["registers"], r["spill_bytes"], shared, count)
        verdict = "" if fits(r) else "does not fit"
        table.add_row(r["kernel"], r["variant"], *map(str, cells), verdict)
    Console(width=150).print(table)
    Output(out=out).keep(found)
    sys.exit(not all(map(fits, found)))


if __name__ == "__main__":
    tyro.cli(main)
