"""The table of attentions, row by row; nothing here needs torchtitan or a GPU."""

import re

import pytest

from sdpo_parallel.torchtitan.attention import FA3, FA4, Machine, choose_attention, importable

AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)
TURING, RTX_BLACKWELL = (7, 5), (12, 0)


def choose(setting="auto", device_type="cuda", capability=HOPPER, context=1, modules=(), **options):
    where = dict(device_type=device_type, capability=capability, context=context, **options)
    return choose_attention(setting, Machine(installed=lambda module: module in modules, **where))


ALL = (FA3, FA4)
CPU, XPU = ({"device_type": name, "capability": None, "modules": ALL} for name in ("cpu", "xpu"))


@pytest.mark.parametrize(
    ("options", "backend", "reasons"),
    [
        ({"capability": TURING, "modules": ALL}, "flex", ["no kernels for.* 7.5"]),
        ({"capability": AMPERE}, "varlen", ["FlashAttention 2"]),
        ({"capability": ADA}, "varlen", ["FlashAttention 2"]),
        ({"capability": AMPERE, "context": 2}, "flex", ["not varlen", "context=2"]),
        ({}, "flex", [f"not varlen, as .*{FA3}", f"not flex_flash, as .*{FA4}"]),
        ({"modules": (FA3,)}, "varlen", ["FlashAttention 3"]),
        ({"modules": ALL}, "varlen", ["FlashAttention 3"]),
        ({"modules": (FA4,)}, "flex_flash", ["FlashAttention 4", f"not varlen, as .*{FA3}"]),
        ({"modules": ALL, "context": 2}, "flex", ["context=2", "blocks of 256"]),
        ({"modules": ALL, "compute_dtype": "float32"}, "flex", ["compute_dtype is float32"]),
        ({"capability": BLACKWELL}, "flex", [FA4]),
        ({"capability": BLACKWELL, "modules": (FA3,)}, "flex", [FA4]),
        ({"capability": BLACKWELL, "modules": (FA4,)}, "varlen", ["FlashAttention 4"]),
        ({"capability": BLACKWELL, "modules": (FA4,), "context": 4}, "flex", ["context=4"]),
        (
            {"capability": RTX_BLACKWELL, "modules": ALL},
            "flex",
            ["no kernels for.* 12.0"],
        ),
        ({"capability": None, "modules": ALL}, "flex", ["NVIDIA GPUs only"]),
        (XPU, "flex", ["NVIDIA GPUs only"]),
        (CPU, "branches", ["no CPU kernels", "no backward on a CPU"]),
        ({**CPU, "context": 2}, "dense", ["no CPU kernels", "not branches, as .*context=2"]),
        ({**CPU, "compiled": True}, "dense", ["not branches, as it cannot be compiled"]),
        ({"modules": ALL, "shares": True}, "flex_flash", ["not varlen, as .*share_prefix"]),
        ({"modules": (FA3,), "shares": True}, "flex", ["not varlen, as .*share_prefix"]),
    ],
)
def test_auto(options, backend, reasons):
    choice = choose(**options)
    assert choice.backend == backend
    assert "\n" not in choice.why
    for reason in reasons:
        assert re.search(reason, choice.why), choice.why


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("flex", {}),
        ("flex", {"context": 8}),
        ("flex", {"capability": TURING}),
        ("flex_flash", {"modules": (FA4,)}),
        ("flex_flash", {"modules": (FA4,), "capability": BLACKWELL, "context": 2}),
        ("varlen", {"modules": (FA3,)}),
        ("varlen", {"capability": AMPERE}),
        ("varlen", {"capability": BLACKWELL, "modules": (FA4,)}),
        ("dense", {}),
        ("dense", {"device_type": "cpu", "capability": None, "context": 2}),
        ("dense", {"compute_dtype": "float32"}),
    ],
)
def test_what_is_asked_for_and_works_is_taken(setting, options):
    choice = choose(setting, **options)
    assert choice.backend == setting
    assert choice.why.startswith("asked for") and "\n" not in choice.why


@pytest.mark.parametrize(
    ("setting", "options", "message"),
    [
        ("flex", {"device_type": "cpu"}, "no backward on a CPU.*what works here: branches, dense"),
        ("varlen", {"device_type": "cpu"}, "no CPU kernels.*what works here: branches, dense"),
        ("flex_flash", {"device_type": "cpu"}, "no CPU kernels"),
        ("varlen", {"device_type": "xpu", "capability": None}, "NVIDIA GPUs only"),
        ("flex_flash", {"capability": None}, "NVIDIA GPUs only"),
        ("varlen", {}, f"9.0 takes FlashAttention 3.*{FA3}.*install.*hopper"),
        ("varlen", {"modules": (FA4,)}, "FlashAttention 3.*what works here: flex_flash, flex"),
        ("varlen", {"capability": BLACKWELL}, f"10.0 takes FlashAttention 4.*{FA4}.*flash-attn-4"),
        ("varlen", {"modules": (FA3,), "context": 2}, r"context parallelism \(context=2\)"),
        ("varlen", {"capability": TURING}, "no kernels for compute capability 7.5"),
        ("varlen", {"capability": RTX_BLACKWELL, "modules": (FA4,)}, "no kernels.*12.0"),
        ("flex_flash", {"modules": (FA3,)}, f"{FA4}.*install.*works here: varlen, flex"),
        ("flex_flash", {"capability": AMPERE, "modules": (FA4,)}, "no kernels.*8.0"),
        ("flex_flash", {"capability": RTX_BLACKWELL, "modules": (FA4,)}, "no kernels.*12.0"),
        ("varlen", {"modules": (FA3,), "compute_dtype": "float32"}, "compute_dtype is float32"),
        ("flex_flash", {"modules": (FA4,), "compute_dtype": "float32"}, "what works here: flex"),
    ],
)
def test_what_is_asked_for_and_cannot_work_is_refused_with_a_way_out(setting, options, message):
    with pytest.raises(ValueError, match=f"attention={setting}: .*{message}.*or auto"):
        choose(setting, **options)


def test_nothing_is_imported_to_choose_what_needs_nothing():
    for setting in ("flex", "dense"):
        here = Machine(device_type="cuda", capability=HOPPER, context=1, installed=pytest.fail)
        choose_attention(setting, here)


def test_a_broken_package_is_not_importable(tmp_path, monkeypatch):
    (tmp_path / "built_for_another_torch.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert importable("math")
    assert not importable("built_for_another_torch")
    assert not importable("no_such_package.part")
