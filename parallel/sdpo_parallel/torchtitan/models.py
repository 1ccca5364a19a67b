"""The torchtitan 0.3.0 model that a Hugging Face folder's config.json describes.

torchtitan itself never reads config.json. To add an architecture: docs/adding-a-model.md.
"""

from pathlib import Path

import torch
from transformers import AutoConfig

from ..config import LoraConfig
from ..errors import SdpoError
from ..huggingface import read_config
from . import cpu

cpu.prepare()  # before torchtitan binds the device
import torchtitan.models.llama3 as llama3  # noqa: E402
import torchtitan.models.qwen3 as qwen3  # noqa: E402
from torchtitan.components.lora import LoRAConverter  # noqa: E402
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear  # noqa: E402
from torchtitan.models.common.nn_modules import RMSNorm  # noqa: E402
from torchtitan.protocols.model_spec import ModelSpec  # noqa: E402


def spec_from_hf(
    folder: str, *, attention: str = "flex", lora: LoraConfig | None = None
) -> ModelSpec:
    """The torchtitan model that a Hugging Face folder's config.json describes.

    Args:
        attention: torchtitan's name of the inner attention.
        lora: adapters beside frozen weights, where its rank is not 0.

    Raises:
        SdpoError: the architecture, or one of its options, is not one that torchtitan computes
            exactly as transformers does; the message names the field.
    """
    read_config(folder)
    try:  # for what config.json leaves to defaults
        c = AutoConfig.from_pretrained(folder).to_dict()
    except (KeyError, ValueError, OSError) as error:
        raise SdpoError(f"{folder}/config.json: transformers cannot read it ({error})") from error
    build = {"qwen3": _qwen3, "llama": _llama}.get(c.get("model_type", ""))
    if build is None:
        raise SdpoError(
            f"{folder}/config.json: model_type {c.get('model_type')!r} has no torchtitan model "
            "here (qwen3 and llama have); use --engine transformers"
        )
    exact = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    exact |= {"use_sliding_window": False, "partial_rotary_factor": 1.0}
    for field, value in exact.items():
        if c.get(field) not in (value, None):
            raise SdpoError(
                f"{folder}/config.json: {field}={c[field]!r} is not supported by the torchtitan "
                "engine; use --engine transformers"
            )
    adapters = lora is not None and lora.rank > 0
    # adapters go beside Q, K and V each, as Hugging Face names them
    options = dict(
        n_layers=c["num_hidden_layers"],
        dim=c["hidden_size"],
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        hidden_dim=c["intermediate_size"],
        attn_backend=attention,
        fuse_qkv=not adapters,
    )
    spec = build(folder, c, options)
    spec.flavor = Path(folder).name
    if lora is not None and adapters:
        converter = LoRAConverter.Config(
            rank=lora.rank, alpha=lora.alpha, target_modules=list(lora.targets)
        )
        known = set(LoraConfig.targets)
        if unknown := set(lora.targets) - known:
            raise SdpoError(
                f"lora targets {', '.join(sorted(unknown))}: no such linear layers; there are "
                f"{', '.join(sorted(known))}"
            )
        spec.model = converter.build().convert(spec.model)  # pyright: ignore
    return spec


def _norm(c: dict, dim: int) -> RMSNorm.Config:
    ones = {"weight": torch.nn.init.ones_}
    return RMSNorm.Config(normalized_shape=dim, eps=c["rms_norm_eps"], param_init=ones)


def _rope(folder: str, c: dict) -> dict:
    """Length, theta and scaling of the rotary embedding, under the names of RoPE.Config."""
    r = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = r.get("rope_theta") or c.get("rope_theta") or 10000.0
    kind = r.get("rope_type", r.get("type", "default"))
    rope = {"max_seq_len": c["max_position_embeddings"], "theta": theta}
    if kind == "default":
        return {**rope, "scaling": "none"}
    if kind == "llama3" and c["model_type"] == "llama":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {name: r[name] for name in names}
        return {**rope, "scaling": "llama", "scaling_factor": r["factor"], **scaling}
    raise SdpoError(
        f"{folder}/config.json: rope_type {kind!r} is not supported by the torchtitan engine; "
        "use --engine transformers"
    )


def _spec(c: dict, module, config: type, layers: list) -> ModelSpec:
    """torchtitan's ``module`` with a decoder of these layers."""
    dim, vocabulary, tied = c["hidden_size"], c["vocab_size"], bool(c.get("tie_word_embeddings"))
    for layer in layers:  # torchtitan's builders know one eps
        layer.attention_norm = layer.ffn_norm = _norm(c, dim)
    embedding = module._EMBEDDING_SKIP_INIT if tied else module._EMBEDDING_INIT
    head = module._LINEAR_INIT
    spec = module.model_registry("debugmodel")
    spec.model = config(
        dim=dim,
        vocab_size=vocabulary,
        norm=_norm(c, dim),
        enable_weight_tying=tied,
        layers=layers,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary, embedding_dim=dim, param_init=embedding
        ),
        lm_head=Linear.Config(in_features=dim, out_features=vocabulary, param_init=head),
    )
    return spec


def _qwen3(folder: str, c: dict, options: dict) -> ModelSpec:
    head_dim = c["head_dim"]
    rope = CosSinRoPE.Config(dim=head_dim, **_rope(folder, c))
    layers = qwen3._build_qwen3_layers(**options, head_dim=head_dim, rope=rope)
    for layer in layers:
        layer.attention.qk_norm = _norm(c, head_dim)  # pyright: ignore
    return _spec(c, qwen3, qwen3.Qwen3Model.Config, layers)


def _llama(folder: str, c: dict, options: dict) -> ModelSpec:
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    if head_dim * heads != c["hidden_size"]:
        raise SdpoError(
            f"{folder}/config.json: head_dim {head_dim} x {heads} heads is not hidden_size "
            f"{c['hidden_size']}; the torchtitan engine needs it; use --engine transformers"
        )
    rope = ComplexRoPE.Config(dim=head_dim, **_rope(folder, c))
    layers = llama3._build_llama3_layers(**options, rope=rope)
    return _spec(c, llama3, llama3.Llama3Model.Config, layers)
