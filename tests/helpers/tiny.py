"""Tiny real models, tokenizers and logs that tests make for themselves."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from benchmarks.models import QWEN3

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
TEXT = (
    "please tell me a short story about the red fox who lives in paris and eats green apples "
    "thanks no shorter longer list five things user message hindsight context improve response"
)
WORDS = TEXT.split()


SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def make_tokenizer(
    pad_is_eos: bool = False,
    *,
    chat_template: str = CHAT_TEMPLATE,
    eos_token: str = "<|im_end|>",
    special: Sequence[str] = SPECIAL,
    plain: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a Qwen-like chat template: any text round-trips.

    Args:
        plain: added tokens that the tokenizer does not call special.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 8, trainer)
    tokenizer.add_tokens(list(plain))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token="<|im_end|>" if pad_is_eos else special[0],
        chat_template=chat_template,
    )


SIZES = dict(
    vocab_size=448,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)


def make_config(kind: str, **sizes: int) -> PretrainedConfig:
    """qwen3, qwen3-tied, llama, llama-tied, of these sizes or tiny."""
    family, _, tied = kind.partition("-")
    sizes = {**SIZES, **sizes, "tie_word_embeddings": bool(tied)}
    if family == "qwen3":
        return Qwen3Config(**{"head_dim": 24, **sizes})
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    return LlamaConfig(**sizes, rms_norm_eps=1e-5, rope_parameters=rope)


def make_model(
    folder: Path, kind: str = "qwen3", *, pad_is_eos: bool = False, seed: int = 0
) -> str:
    """A random model with peaky logits, and its tokenizer."""
    model = AutoModelForCausalLM.from_config(make_config(kind))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        std = 0.2 if "embed" in name or "lm_head" in name else 0.1
        p.data.normal_(0.0 if p.ndim > 1 else 1.0, std, generator=generator)
    model.save_pretrained(folder)
    make_tokenizer(pad_is_eos).save_pretrained(folder)
    return str(folder)


def make_shape(folder: Path, name: str) -> str:
    """A folder with nothing but the config.json of a real Qwen3, e.g. qwen3-8b."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "qwen3", **QWEN3[name]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def text(rng: random.Random, low: int, high: int) -> str:
    """Some words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_interactions(path: Path, n: int, seed: int = 0, *, next_response: bool = False) -> str:
    """``n`` triples of very mixed lengths; with ``next_response`` also the answers behind them."""
    rng, more = random.Random(seed), random.Random(seed + 1)
    rows = []
    for i in range(n):
        prompt = [{"role": "user", "content": text(rng, 1, 20)}]
        if rng.random() < 0.4:
            prompt.append({"role": "assistant", "content": text(rng, 1, 10)})
            prompt.append({"role": "user", "content": text(rng, 1, 10)})
        rows.append(
            {
                "id": f"c{i}",
                "prompt": prompt,
                "completion": {"role": "assistant", "content": text(rng, 1, 30)},
                "user_response": {"role": "user", "content": text(rng, 1, 12)},
            }
        )
        if next_response:
            rows[-1]["next_completion"] = text(more, 1, 30)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def make_conversations(path: Path, n: int, seed: int = 0) -> str:
    """``n`` conversations of one to five interactions, each of which reads all before it."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        prompt = [{"role": "user", "content": text(rng, 1, 8)}]
        for turn in range(rng.randint(1, 5)):
            response = {"role": "assistant", "content": text(rng, 1, 8)}
            followup = {"role": "user", "content": text(rng, 1, 6)}
            row = {"id": f"c{i}_{turn}", "turn_id": turn, "prompt": prompt}
            rows.append(row | {"completion": response, "user_response": followup})
            prompt = [*prompt, response, followup]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def make_questions(path: Path, n: int, seed: int = 0) -> Path:
    """Rows as CommonsenseQA's on the hub."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        choices = {"label": list("ABCDE"), "text": [text(rng, 1, 3) for _ in range(5)]}
        row = {"id": str(i), "question": text(rng, 3, 9), "choices": choices}
        rows.append(row | {"question_concept": "x", "answerKey": rng.choice("ABCDE")})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
