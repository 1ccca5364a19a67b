"""Liger's kernels in both engines' models against the stock modules: logits, and every gradient.

Interpreted, on the CPU, in float32; each tolerance is shown to fail on mutants.
"""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import triton.language as tl
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from triton.runtime import interpreter

from helpers.oracle import MUTANTS, rel_err
from sdpo_parallel.torchtitan import cpu
from sdpo_parallel.transformers.liger import apply_liger

pytest.importorskip("liger_kernel")
cpu.prepare()  # before torchtitan binds the device
from torchtitan.config import OverrideConfig, ParallelismConfig, apply_overrides  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.distributed.activation_checkpoint import SelectiveAC  # noqa: E402
from torchtitan.distributed.spmd_types import annotate_input_spmd_types  # noqa: E402

from sdpo_parallel.rows import Rows  # noqa: E402
from sdpo_parallel.torchtitan.liger import OVERRIDES  # noqa: E402
from sdpo_parallel.torchtitan.models import spec_from_hf  # noqa: E402

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("not interpreted where there is a GPU")
    complete_interpreter(monkeypatch)


def complete_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two things that Liger's kernels ask of Triton and its interpreter lacks: libdevice's rsqrt,
    and float arguments that are scalars of Triton's, as integers are."""
    import liger_kernel.ops.rms_norm

    def convert(argument, convert=interpreter._implicit_cvt):
        if type(argument) is not float:
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)


def packed_rows(rows: int) -> tuple[Tensor, Tensor]:
    """(B, T) tokens and positions; documents end elsewhere in every row."""
    documents = [[5, 1, 9, 9], [14, 10], [24]][:rows]
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in documents]
    return torch.randint(448, (rows, 24)), torch.stack(positions)


def titan_model(folder: str, liger: bool, parallelize=None) -> torch.nn.Module:
    """The torchtitan model of a Hugging Face folder with its weights, on this process alone or as
    ``parallelize`` lays it out."""
    spec = spec_from_hf(folder)
    model = spec.model
    model.update_from_config(config=SimpleNamespace(parallelism=ParallelismConfig()))
    imports = ["sdpo_parallel.torchtitan.inner_attention.flex_to_cpu"]
    imports += OVERRIDES if liger else []
    apply_overrides(OverrideConfig(imports=imports), model)
    module = model.build()
    adapter = spec.state_dict_adapter(model, folder)
    weights = adapter.from_hf(load_file(f"{folder}/model.safetensors"))
    missing = module.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    if parallelize is not None:
        parallelize(module)
    return module


def titan_course(module: torch.nn.Module, tokens: Tensor, positions: Tensor) -> dict[str, Tensor]:
    masks = Rows.of(tokens, positions, tokens).sight.dense()
    return trajectory(module, module(tokens, positions=positions, attention_masks=masks))


def trajectory(module: torch.nn.Module, logits_BTV: Tensor) -> dict[str, Tensor]:
    """The logits and, of a fixed random cotangent, the gradient of every parameter."""
    generator = torch.Generator().manual_seed(0)
    (logits_BTV * torch.randn(logits_BTV.shape, generator=generator)).sum().backward()
    wrapper = "_checkpoint_wrapped_module."
    grads = {n.replace(wrapper, ""): p.grad for n, p in module.named_parameters()}
    assert all(g is not None and g.any() for g in grads.values())
    return {"logits": logits_BTV.detach().flatten(0, 1), **grads}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, t in theirs.items():
        assert ours[name].shape == t.shape, name
        assert rel_err(ours[name], t.double()) < TOLERANCE, name
        for mutant, mutate in MUTANTS.items():
            assert rel_err(mutate(t), t.double()) > TOLERANCE, (name, mutant)


def checkpoint(module: torch.nn.Module) -> None:
    """Save projections and compute the rest again, which in-place rotation would spoil."""
    SelectiveAC.Config().build(dump_folder="").apply(module)


@pytest.mark.parametrize(("rows", "layout"), [(1, None), (3, None), (2, checkpoint)])
@pytest.mark.parametrize("kind", ["qwen3", "llama-tied"])
def test_torchtitans_model_computes_the_same(kind, rows, layout, models):
    data = packed_rows(rows)
    stock, liger = titan_model(models(kind), False), titan_model(models(kind), True, layout)
    names = {type(m).__name__ for m in liger.modules() if type(m).__name__.startswith("Liger")}
    rope = "LigerCosSinRoPE" if kind == "qwen3" else "LigerComplexRoPE"
    assert names == {"LigerRMSNorm", "LigerFeedForward", rope}
    assert_equal(titan_course(liger, *data), titan_course(stock, *data))


@pytest.mark.exhaustive
def test_tensor_parallel_ranks_compute_the_same_and_the_sharding_types_hold(models, tmp_path):
    folders = [models("qwen3"), models("llama")]
    mp.spawn(tensor_parallel_rank, (folders, str(tmp_path / "store")), nprocs=2)  # pyright: ignore


def tensor_parallel_rank(rank: int, folders: list[str], store: str) -> None:
    """One of two ranks: each rank's part of the logits and gradients, with sequence parallelism and
    torchtitan's type checker on."""
    complete_interpreter(pytest.MonkeyPatch())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    config = ParallelismConfig(tensor_parallel_degree=2, data_parallel_shard_degree=1)
    dims = ParallelDims.from_config(config, 2)
    dist_utils.set_spmd_backend(config.spmd_backend)
    dims.build_mesh()
    context = dist_utils.get_spmd_context(parallel_dims=dims, spmd_typechecking=True)
    for folder in folders:
        trajectories = []
        for liger in (False, True):
            module = titan_model(folder, liger, lambda module: module.parallelize(dims))
            torch.manual_seed(0)
            tokens, positions = packed_rows(2)
            masks, labels = Rows.of(tokens, positions, tokens).sight.dense(), tokens.clone()
            with context():
                annotate_input_spmd_types(dims, tokens, labels, {"positions": positions})
                logits = module(tokens, positions=positions, attention_masks=masks)
            trajectories.append(trajectory(module, logits))
        assert trajectories[0]["logits"].shape == (48, 224)  # half of the vocabulary
        assert_equal(trajectories[1], trajectories[0])
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_rope_leaves_its_inputs_as_they_were(kind, models):
    module = titan_model(models(kind), True)
    rope = next(m for m in module.modules() if type(m).__name__.endswith("RoPE"))
    _, positions = packed_rows(2)
    q, k = (torch.randn(2, 24, n, rope.config.dim) for n in (4, 2))
    before = q.clone(), k.clone()
    rope(q, k, positions)
    torch.testing.assert_close((q, k), before, rtol=0, atol=0)


@pytest.fixture
def modeling(monkeypatch):
    """kind -> transformers' module of that model, put back after the test."""

    def get(kind: str):
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        for name in ("apply_rotary_pos_emb", f"{kind.title()}RMSNorm", f"{kind.title()}MLP"):
            monkeypatch.setattr(module, name, getattr(module, name))
        return module

    return get


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_transformers_model_computes_the_same(kind, checkpointing, models, modeling):
    tokens, positions = packed_rows(2)
    module, trajectories = modeling(kind), []
    for liger in (False, True):
        model = AutoModelForCausalLM.from_pretrained(models(kind))
        if liger:
            apply_liger(model)
            assert module.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
            if checkpointing:
                getattr(
                    model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
                )()
                model.train()
        names = {m._get_name() for m in model.modules()}
        assert ("LigerRMSNorm" in names) == ("LigerSwiGLUMLP" in names) == liger, names
        assert type(model).forward == model.forward.__func__  # no loss of Liger's
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        trajectories.append(trajectory(model, logits))
    assert_equal(trajectories[1], trajectories[0])


def test_liger_that_is_missing_or_has_no_gpu_is_said_so(models, monkeypatch):
    stranger = SimpleNamespace(config=SimpleNamespace(model_type="gpt_neox"))
    with pytest.raises(ValueError, match="no kernels for model_type 'gpt_neox'"):
        apply_liger(stranger)  # pyright: ignore[reportArgumentType]
    on_cpu = SimpleNamespace(config=SimpleNamespace(model_type="qwen3"), device=torch.device("cpu"))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="need a GPU"):
        apply_liger(on_cpu)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="need a GPU"):
        titan_model(models("qwen3"), True)
    for name in ("liger_kernel.ops", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sdpo_parallel.torchtitan.liger")
    with pytest.raises(ValueError, match=r"pip install 'sdpo\[liger\]'"):
        apply_liger(on_cpu)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"pip install 'sdpo\[liger\]'"):
        importlib.import_module("sdpo_parallel.torchtitan.liger")
