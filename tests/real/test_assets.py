"""The real parts are what the other tests take them for."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from real.assets import TOKENIZERS
from sdpo_parallel.huggingface import load_tokenizer


def test_smollm2_answers(smollm2):
    """A wrongly dequantized model would write nonsense."""
    tokenizer = load_tokenizer(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**asked, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, asked["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_has_a_chat_template_of_its_own(name, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder(name))
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hé?"}], tokenize=False)
    assert "Hé?" in said
    assert tokenizer.decode(tokenizer.encode(said, add_special_tokens=False)) == said
