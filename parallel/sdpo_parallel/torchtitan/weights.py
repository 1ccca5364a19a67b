"""Weights of a sharded module: from a Hugging Face folder, and out to one.

torchtitan writes weights only, and adapters (LoRA) it trains but neither merges nor exports.
"""

import json
import math
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files_on_every_rank,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..config import LoraConfig

ADAPTER = re.compile(r"\.lora_[ab]\.weight$")
"""Ends the names of adapters' weights in a torchtitan state dict."""


def load_weights(module: torch.nn.Module, adapter: Any, folder: str) -> None:
    """Read a Hugging Face folder's weights into a (sharded) module; adapters stay as they are."""
    plain = {name: w for name, w in module.state_dict().items() if not ADAPTER.search(name)}
    hf = adapter.to_hf(plain)
    dcp_load(hf, storage_reader=adapter.get_hf_storage_reader(folder))
    module.load_state_dict(adapter.from_hf(hf), strict=False)


class AdapterState:
    """The adapters of a module, for checkpoints."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        """Theirs alone."""
        held = self.module.state_dict()
        return {name: w for name, w in held.items() if ADAPTER.search(name)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put them in place; all else stays."""
        self.module.load_state_dict(state_dict, strict=False)


@torch.no_grad()
def start_adapters(module: torch.nn.Module) -> None:
    """A ~ kaiming uniform, B = 0 (arXiv:2106.09685), the same whatever the layout."""
    for name, p in module.state_dict().items():
        if name.endswith(".lora_a.weight"):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            start = torch.empty(p.shape, dtype=p.dtype)
            torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            p.copy_(_like(start, p))
        elif name.endswith(".lora_b.weight"):
            p.zero_()


def merged_weights(module: torch.nn.Module, lora: LoraConfig) -> dict[str, Any]:
    """The module's state dict with W + alpha / rank B A in place of adapted W, and no adapters."""
    state = module.state_dict()
    out = {name: w for name, w in state.items() if not ADAPTER.search(name)}
    for name in state:
        if not name.endswith(".lora_a.weight"):
            continue
        stem = name.removesuffix(".lora_a.weight")
        a, b = whole(state[name]), whole(state[f"{stem}.lora_b.weight"])
        weight = out[f"{stem}.weight"]
        delta = (lora.alpha / lora.rank) * (b.float() @ a.float())
        out[f"{stem}.weight"] = weight + _like(delta, weight).to(weight.dtype)
    return out


def peft_weights(module: torch.nn.Module, adapter: Any) -> dict[str, Tensor]:
    """Whole adapter weights under PEFT's names, on the CPU."""
    names = {ours: theirs for theirs, ours in adapter.from_hf_map.items() if ours}
    attention = adapter.model_config.layers[0].attention
    heads = {"wq": attention.n_heads, "wk": attention.n_kv_heads or attention.n_heads}
    out = {}
    for name, value in module.state_dict().items():
        if not ADAPTER.search(name):
            continue
        stem, which = ADAPTER.sub("", name), name[-len("a.weight")]
        layer = re.search(r"\d+", stem)
        assert layer is not None
        hf = names[re.sub(r"\d+", "{}", stem, count=1) + ".weight"].format(layer.group())
        full = whole(value).cpu()
        projection = stem.rpartition(".")[2]
        if which == "b" and projection in heads and hasattr(adapter, "_permute"):
            full = adapter._permute(full, heads[projection], *full.shape)
        key = hf.removesuffix(".weight") + f".lora_{which.upper()}.weight"
        out[f"base_model.model.{key}"] = full.contiguous()
    return out


def whole(w: Tensor) -> Tensor:
    """All of a weight, on every rank that holds a part of it."""
    return w.full_tensor() if isinstance(w, DTensor) else w


def _like(full: Tensor, pattern: Tensor) -> Tensor:
    """This rank's part of ``full``, laid out as ``pattern`` is."""
    if not isinstance(pattern, DTensor):
        return full.to(pattern.device)
    mesh, placements = pattern.device_mesh, pattern.placements
    shape, offset = compute_local_shape_and_global_offset(pattern.shape, mesh, placements)
    part = full[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    part, stride = part.to(pattern.device), pattern.stride()
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=pattern.shape, stride=stride
    )


def write_hf(adapter: Any, weights: dict[str, Any], folder: Path) -> None:
    """Write safetensors, as many files as the source folder had. Every rank takes part."""
    hf = adapter.to_hf(weights)
    files = adapter.fqn_to_index_mapping
    writer = HuggingFaceStorageWriter(
        path=str(folder / "sharded" if files else folder),
        save_distributed=True,
        fqn_to_index_mapping=files,
        enable_consolidation=not files,
    )
    dcp_save(hf, storage_writer=writer)
    if files:
        consolidate_safetensors_files_on_every_rank(
            input_dir=str(folder / "sharded"), output_dir=str(folder), fqn_to_index_mapping=files
        )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "sharded", ignore_errors=True)


def write_peft(folder: Path, weights: dict[str, Tensor], lora: LoraConfig, base: str) -> None:
    """Write ``peft_weights`` and their config as PEFT reads them. One rank calls it."""
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 3)[1] for name in weights}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
