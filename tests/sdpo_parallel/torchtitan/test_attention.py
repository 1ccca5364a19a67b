"""The table of attentions, row by row; nothing here needs torchtitan or a GPU."""

import re
from typing import get_args, get_type_hints

import pytest

from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.torchtitan.attention import FA3, FA4, Setting, choose_attention, importable

AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)
TURING, RTX_BLACKWELL = (7, 5), (12, 0)


def choose(setting="auto", device_type="cuda", capability=HOPPER, context=1, modules=(), **options):
    return choose_attention(
        setting,
        device_type=device_type,
        capability=capability,
        context=context,
        installed=lambda module: module in modules,
        **options,
    )


@pytest.mark.parametrize(
    ("capability", "modules", "context", "backend", "reasons"),
    [
        (TURING, (FA3, FA4), 1, "flex", ["no kernels for compute capability 7.5"]),
        (AMPERE, (), 1, "varlen", ["FlashAttention 2"]),
        (ADA, (), 1, "varlen", ["FlashAttention 2"]),
        (AMPERE, (), 2, "flex", ["not varlen", "context=2"]),
        (HOPPER, (), 1, "flex", [f"not varlen, as .*{FA3}", f"not flex_flash, as .*{FA4}"]),
        (HOPPER, (FA3,), 1, "varlen", ["FlashAttention 3"]),
        (HOPPER, (FA3, FA4), 1, "varlen", ["FlashAttention 3"]),
        (HOPPER, (FA4,), 1, "flex_flash", ["FlashAttention 4", f"not varlen, as .*{FA3}"]),
        (HOPPER, (FA3, FA4), 2, "flex", ["context=2", "blocks of 256"]),
        (BLACKWELL, (), 1, "flex", [FA4]),
        (BLACKWELL, (FA3,), 1, "flex", [FA4]),
        (BLACKWELL, (FA4,), 1, "varlen", ["FlashAttention 4"]),
        (BLACKWELL, (FA4,), 4, "flex", ["context=4"]),
        (RTX_BLACKWELL, (FA3, FA4), 1, "flex", ["no kernels for compute capability 12.0"]),
        (None, (FA3, FA4), 1, "flex", ["NVIDIA GPUs only"]),
    ],
)
def test_auto_on_a_gpu(capability, modules, context, backend, reasons):
    choice = choose(capability=capability, modules=modules, context=context)
    assert choice.backend == backend
    assert "\n" not in choice.why
    for reason in reasons:
        assert re.search(reason, choice.why), choice.why


@pytest.mark.parametrize("context", [1, 2])
def test_auto_on_a_cpu_is_dense(context):
    choice = choose(device_type="cpu", capability=None, context=context, modules=(FA3, FA4))
    assert choice.backend == "dense"


def test_auto_elsewhere_is_flex():
    assert choose(device_type="xpu", capability=None, modules=(FA3, FA4)).backend == "flex"


def test_auto_in_float32_uses_no_flash_kernels():
    choice = choose(modules=(FA3, FA4), compute_dtype="float32")
    assert choice.backend == "flex"
    assert "compute_dtype is float32" in choice.why


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
        ("flex", {"device_type": "cpu"}, "no backward on a CPU.*what works here: dense"),
        ("varlen", {"device_type": "cpu"}, "no CPU kernels.*what works here: dense"),
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
        choose_attention(
            setting, device_type="cuda", capability=HOPPER, context=1, installed=pytest.fail
        )


def test_the_settings_are_those_of_the_config():
    assert get_args(Setting) == get_args(get_type_hints(ParallelConfig)["attention"])


def test_a_broken_package_is_not_importable(tmp_path, monkeypatch):
    (tmp_path / "built_for_another_torch.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert importable("math")
    assert not importable("built_for_another_torch")
    assert not importable("no_such_package.part")
