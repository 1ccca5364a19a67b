"""Hugging Face model folders: what must be there, what is copied to an export, what is broken."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .errors import SdpoError
from .model import local

DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
"""Patterns of the files that a model's folder needs, out of those that the hub has for it."""
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?")

ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)
"""Files beside the weights that make a folder loadable by transformers, copied where present."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def resolve_model(name_or_folder: str) -> str:
    """A model's local folder: the folder itself, or where the hub's model of that name was put.

    A folder that exists is returned as it is. ``organisation/name`` is otherwise looked up on the
    Hugging Face hub, at the branch, tag or commit after an ``@``, and its weights, configuration
    and tokenizer are downloaded into huggingface_hub's cache. What is in the cache is not
    downloaded again, and is all there is under ``HF_HUB_OFFLINE=1``.

    Every rank may call this at once: huggingface_hub locks each file, so that one process of a
    node downloads it and the others find it in the cache.

    Raises:
        SdpoError: neither a folder nor a model that the hub or the cache can give.
    """
    if Path(name_or_folder).is_dir():
        return name_or_folder
    parts = _HUB_NAME.fullmatch(name_or_folder)
    if parts is None:
        raise SdpoError(
            f"{name_or_folder}: no such model folder, nor a name on the Hugging Face hub, which "
            "would be organisation/name or organisation/name@revision"
        )
    try:
        return snapshot_download(
            parts[1], revision=parts[2], allow_patterns=DOWNLOADED, ignore_patterns=["*/*"]
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SdpoError(
            f"{name_or_folder}: no such model folder here, and the Hugging Face hub "
            f"({constants.ENDPOINT}) and its cache ({constants.HF_HUB_CACHE}) cannot give it: "
            f"{reason} Check the name, the network and, for gated models, `hf auth login`"
        ) from error


def read_config(folder: str) -> dict:
    """config.json of a model folder.

    Raises:
        SdpoError: the folder or its config.json is missing or unreadable.
    """
    path = Path(folder)
    if not path.is_dir():
        raise SdpoError(f"{folder}: no such model folder; give a local Hugging Face folder")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SdpoError(f"{folder}: no config.json; is this a Hugging Face model?") from None
    except json.JSONDecodeError as error:
        raise SdpoError(f"{folder}/config.json: not valid JSON ({error})") from error
    return config


def check_weights(folder: str) -> None:
    """Refuse a model folder without weights.

    Raises:
        SdpoError: it has no safetensors.
    """
    if not any(Path(folder).glob("*.safetensors")):
        raise SdpoError(f"{folder}: no *.safetensors; save the model with save_pretrained")


def check_length(folder: str, longest: int | None, max_tokens: int) -> None:
    """Refuse sequences that the model has no positions for.

    Raises:
        SdpoError: ``max_tokens`` exceeds ``longest``, its max_position_embeddings where known.
    """
    if longest is not None and max_tokens > longest:
        raise SdpoError(
            f"prompt and response limits allow {max_tokens} tokens, but {folder} has "
            f"max_position_embeddings={longest}: lower the limits"
        )


def check_teacher(folder: str, policy: str) -> None:
    """Refuse a teacher's folder that does not share the policy's vocabulary.

    Raises:
        SdpoError: their sizes differ.
    """
    theirs, ours = read_config(folder)["vocab_size"], read_config(policy)["vocab_size"]
    if theirs != ours:
        raise SdpoError(
            f"teacher {folder} has vocab_size={theirs}, {policy} {ours}: both must read the same "
            "tokens"
        )


def check_tied(folder: str) -> None:
    """Refuse a checkpoint with a lm_head of its own where its config ties it to the embeddings.

    Which of the two the model was trained with is not for us to guess: transformers reads the
    lm_head, and servers such as vLLM the embeddings. A copy of the embeddings is no lm_head of its
    own.

    Raises:
        SdpoError: the two differ.
    """
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for path in Path(folder).glob("*.safetensors"):
            file = stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if name in ("lm_head.weight", "model.embed_tokens.weight"):
                    found[name] = file.get_slice(name)
        if len(found) < 2:
            return
        head, embeddings = found.values()
        parts = (slice(i, i + 4096) for i in range(0, head.get_shape()[0], 4096))
        if any(not torch.equal(head[part], embeddings[part]) for part in parts):
            raise two_heads(folder)


def two_heads(folder: str) -> SdpoError:
    """What is wrong with a checkpoint that has a lm_head of its own where its config has none."""
    return SdpoError(
        f"{folder}/config.json says tie_word_embeddings, but the checkpoint holds a lm_head that "
        "differs from its embeddings: some programs read the one and some the other. Set "
        "tie_word_embeddings to false there if the lm_head is the model's; else remove "
        "lm_head.weight from the safetensors"
    )


def export_dtype(source: str, setting: str) -> torch.dtype:
    """What ``CheckpointConfig.export_dtype`` means for a run that started from ``source``."""
    if setting == "source":
        config = read_config(source)
        setting = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, setting)


def copy_assets(source: str, target: str, dtype: torch.dtype) -> None:
    """Config, generation config and tokenizer of ``source`` beside the weights in ``target``.

    The config tells the weights' ``dtype``, as transformers loads them in what it says.
    """
    for name in ASSETS:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
    config = read_config(source)
    config.pop("torch_dtype", None)  # the name before transformers 5
    config["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(config, indent=2)
    (Path(target) / "config.json").write_text(text + "\n", encoding="utf-8")


def replace_folder(written: str, final: str) -> None:
    """Put a completely written folder in its place; an older one there goes only then."""
    old = f"{final}.old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(final):
        os.rename(final, old)
    os.rename(written, final)
    shutil.rmtree(old, ignore_errors=True)


def check_finite(module: torch.nn.Module, folder: str) -> None:
    """Refuse weights, read from ``folder``, with NaN or infinity.

    Raises:
        SdpoError: names the folder, the first such tensor and how many of its values are bad.
    """
    for name, p in module.named_parameters():
        tensor, name = local(p), name.replace("_checkpoint_wrapped_module.", "")
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise SdpoError(
                f"{folder}: {bad} of {tensor.numel()} values of {name} are NaN or infinite; "
                "the checkpoint is broken, take another copy of it"
            )


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """A Hugging Face folder's tokenizer, fit for training.

    Raises:
        SdpoError: there is no tokenizer, no chat template or no end-of-sequence token.
    """
    if not Path(folder).is_dir():
        raise SdpoError(f"{folder}: no such model folder; give a local Hugging Face folder")
    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make up an empty tokenizer for the model type
        raise SdpoError(
            f"{folder}: no tokenizer; copy the model's tokenizer.json and tokenizer_config.json "
            "there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SdpoError(
            f"{folder}: the tokenizer cannot be loaded ({str(error).splitlines()[0]}); copy the "
            "model's tokenizer.json and tokenizer_config.json there again"
        ) from error
    if not tokenizer.chat_template:
        raise SdpoError(
            f"{folder}: the tokenizer has no chat template; use an instruction-tuned model, or put "
            "a chat_template.jinja into the folder"
        )
    if tokenizer.eos_token_id is None:
        raise SdpoError(f"{folder}: the tokenizer names no eos_token; set it in its config")
    return tokenizer
