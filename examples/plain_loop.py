"""Hindsight self-distillation in a plain loop: the model, reading the user's follow-up, teaches the
model that has not seen it.

    pip install ./kernels transformers
    python examples/plain_loop.py --model FOLDER_OR_HUB_NAME [--steps 10]

Hidden states and lm_head must have one dtype: autocast casts nothing in sdpo_kernels.
"""

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_kernels import linear_reverse_kl, logit_options

CONVERSATIONS = [  # (what the user asked, the response, the follow-up)
    ("Tell me about foxes.", "The red fox is a mammal, and ...", "Shorter, please."),
    ("List five fruits.", "Apples.", "I said five!"),
]


def encode(tokenizer) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Token ids of the prompts, of the prompts with hindsight, and of the responses."""

    def prompt(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(chat, add_special_tokens=False)

    hint = "\n\nA later message of the user:\n"
    prompts = [prompt(asked) for asked, _, _ in CONVERSATIONS]
    hindsight_prompts = [prompt(asked + hint + followup) for asked, _, followup in CONVERSATIONS]
    responses = [
        tokenizer.encode(response, add_special_tokens=False) + [tokenizer.eos_token_id]
        for _, response, _ in CONVERSATIONS
    ]
    return prompts, hindsight_prompts, responses


def response_states(model, tokenizer, prompts, responses) -> Tensor:
    """(N, D): the hidden states that predict the response tokens, of all sequences."""
    rows = {"input_ids": [p + r for p, r in zip(prompts, responses, strict=True)]}
    batch = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(model.device)
    hidden = model.get_decoder()(**batch).last_hidden_state
    spans = zip(hidden, prompts, responses, strict=True)
    return torch.cat([h[len(p) - 1 :][: len(r)] for h, p, r in spans])


def train(name: str, steps: int) -> list[float]:
    """The loss of each step."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    prompts, hindsight_prompts, responses = encode(tokenizer)
    n = sum(map(len, responses))
    token_weights = torch.full((n,), 1 / n, device=model.device)  # a mean over tokens
    options = logit_options(model.config)  # a softcap (Gemma) or scale (Cohere, Granite)
    losses = []
    for _ in range(steps):
        with torch.no_grad():
            teacher = response_states(model, tokenizer, hindsight_prompts, responses)
        student = response_states(model, tokenizer, prompts, responses)
        lm_head = model.get_output_embeddings().weight
        # without a lm_head of its own, the teacher uses the student's, as a constant
        out = linear_reverse_kl(student, lm_head, teacher, token_weights=token_weights, **options)
        loss = out.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {len(losses)}: loss {losses[-1]:.6f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    train(args.model, args.steps)
