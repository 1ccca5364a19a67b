"""The roofline adds up what its parts say; machine code is read as written."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.absent_gpu import Launch, ptx_loop_accesses, sass_loop  # noqa: E402
from benchmarks.kernel_tables import BEGIN, END, replaced  # noqa: E402
from benchmarks.operator_stream import Collective, Kernel, Matmul, Small  # noqa: E402
from benchmarks.roofline import Card, floor, measured, seconds  # noqa: E402

CARD = Card(name="X", flops=1e12, bandwidth=1e9, clock=1e9, multiprocessors=1, issue=1.0, launch=1)


def matmul(adds: bool, out_dtype: torch.dtype) -> Matmul:
    """Of 1000 x 1000 x 1000 in bfloat16: 2e9 flops, 2e6 numbers read."""
    size = 4e6 + 1e6 * out_dtype.itemsize * (2 if adds else 1)
    return Matmul(
        name="mm",
        flops=2e9,
        bytes=size,
        backward=False,
        shape=(1000, 1000, 1000),
        dtype=torch.bfloat16,
        out_dtype=out_dtype,
        adds=adds,
    )


@pytest.mark.parametrize(
    ("adds", "out_dtype", "exposed"),
    [
        (False, torch.bfloat16, 0.0),
        (False, torch.float32, 2e-3),
        (True, torch.float32, 6e-3),
    ],
)
def test_a_result_beyond_one_half_precision_write_is_hidden_or_is_not(adds, out_dtype, exposed):
    event = matmul(adds, out_dtype)
    hidden = seconds([event], CARD, hidden=True)
    shown = seconds([event], CARD, hidden=False)
    assert hidden == {"launches": 1, "matmuls": pytest.approx(6e-3)}
    assert shown.pop("results of matmuls") == pytest.approx(exposed)
    assert shown == hidden


def test_a_kernel_takes_the_longer_of_its_bytes_and_its_instructions():
    launch = Launch("stats_kernel", {}, (1,), {}, 0, ())
    given: dict[str, Any] = dict(name="stats_kernel", launch=launch, backward=False)
    slow = Kernel(**given, bytes=1e6, instructions=128e9)
    large = Kernel(**given, bytes=1e9, instructions=128.0)
    small = Small(name="add", bytes=3e9, backward=False)
    free = Collective(name="allreduce", bytes=1e9, backward=False)
    found = seconds([slow, large, small, free], CARD, hidden=True)
    assert found == {"launches": 3, "stats_kernel": 2.0, "small operators": 3.0}


def test_the_floor_is_four_matmuls():
    assert floor((1000, 1000, 1000), CARD) == pytest.approx(4 * 6e-3)
    assert floor((10**5, 10**5, 10**5), CARD) == pytest.approx(4 * 2e15 / 1e12)


def test_what_was_measured_is_of_the_same_shape_card_and_upstream_gradient():
    row = dict(kind="reverse_kl", contender="sdpo", dtype="bfloat16", tokens=1, vocabulary=2)
    row |= dict(hidden=3, over_floor=1.5, machine={"device": "NVIDIA X"})
    asked = dict(tokens=1, vocabulary=2, hidden=3, upstream="weights", card={"name": "X"})
    assert measured([row], asked) == 1.5
    for other in (dict(hidden=4), dict(upstream="any"), dict(card={"name": "Y"})):
        assert measured([row], asked | other) is None


def test_accesses_are_narrow_only_in_a_loop():
    ptx = """
    ld.global.b32 %r1, [%rd1];
$L__BB0_1:                     // loop
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p2 ld.global.L1::evict_first.v2.b32 { %r1, %r2 }, [ %rd1 ];
    @%p3 st.global.b16 [ %rd2 ], { %rs1 };
    @%p4 bra $L__BB0_1;
    st.global.b32 [%rd3], %r9;
    bra.uni $L__BB0_2;
$L__BB0_2:
"""
    assert [width for width, _ in ptx_loop_accesses(ptx)] == [16, 8, 2]


def test_the_largest_loop_of_machine_code_is_counted():
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0040*/              @!P0 BRA 0x10 ;
        /*0050*/                   BRA 0x50 ;
"""
    assert sass_loop(sass) == (4, 18)


def test_a_document_without_markers_is_refused():
    text = f"before\n{BEGIN}old\n{END}after\n"
    new = replaced(text, [])
    assert new.startswith(f"before\n{BEGIN}") and new.endswith(f"{END}after\n")
    assert "old" not in new and replaced(new, []) == new
    with pytest.raises(ValueError, match="markers"):
        replaced("nothing", [])
