"""Hindsight self-distillation with Hugging Face's `Trainer`.

    pip install ./kernels transformers accelerate
    python examples/hf_trainer.py --model FOLDER_OR_HUB_NAME --out FOLDER [--steps 10]

`Trainer` counts the labels of all micro-batches of a step and passes the number in, so that a
gradient accumulated over micro-batches of unequal length equals that of one large batch. It counts
a column named `labels`, and hands on other columns with `remove_unused_columns=False`.
"""

import argparse

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from sdpo_kernels import linear_reverse_kl, logit_options

CONVERSATIONS = [  # (what the user asked, the response, the follow-up)
    ("Tell me about foxes.", "The red fox is a mammal, and ...", "Shorter, please."),
    ("List five fruits.", "Apples.", "I said five!"),
]


def collate(rows):
    """Rows of token ids, ``prompt``, ``hindsight_prompt`` and ``response``, padded on the right."""
    batch = {}
    for prefix in ("", "hindsight_"):
        pairs = [(row[f"{prefix}prompt"], row["response"]) for row in rows]
        columns = {
            "input_ids": (0, [p + r for p, r in pairs]),
            "attention_mask": (0, [[1] * len(p + r) for p, r in pairs]),
            "labels": (-100, [[-100] * len(p) + r for p, r in pairs]),
        }
        for name, (padding, values) in columns.items():
            values = [torch.tensor(v) for v in values]
            batch[prefix + name] = pad_sequence(values, True, padding)
    return batch


class HindsightTrainer(Trainer):
    """Minimises KL(student || teacher), where the teacher is the model with the follow-up."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        unwrapped = self.accelerator.unwrap_model(model)
        lm_head = unwrapped.get_output_embeddings().weight
        options = logit_options(unwrapped.config)  # a softcap (Gemma) or scale (Cohere, Granite)

        def response_states(prefix):
            # through the model's own forward, which data parallel wrappers hook into; it
            # computes the logits of one position
            out = model(
                input_ids=inputs[f"{prefix}input_ids"],
                attention_mask=inputs[f"{prefix}attention_mask"],
                output_hidden_states=True,
                logits_to_keep=1,
            )
            predicts = inputs[f"{prefix}labels"][:, 1:] != -100
            return out.hidden_states[-1][:, :-1][predicts].to(lm_head.dtype)

        with torch.no_grad():
            teacher = response_states("hindsight_")
        student = response_states("")
        token_weights = torch.ones(len(student), device=student.device)
        if num_items_in_batch is None:
            token_weights = token_weights / max(len(student), 1)
        else:
            token_weights = token_weights / num_items_in_batch
            if self.args.average_tokens_across_devices:  # counted over ranks, whose mean is taken
                token_weights = token_weights * self.accelerator.num_processes
        out = linear_reverse_kl(student, lm_head, teacher, token_weights=token_weights, **options)
        loss = out.loss
        return (loss, {}) if return_outputs else loss


def dataset(tokenizer) -> list[dict[str, list[int]]]:
    """Token ids of every conversation's prompt, prompt with hindsight, and response."""

    def prompt(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(chat, add_special_tokens=False)

    return [
        {
            "prompt": prompt(asked),
            "hindsight_prompt": prompt(f"{asked}\n\nA later message of the user:\n{followup}"),
            "response": tokenizer.encode(response, add_special_tokens=False)
            + [tokenizer.eos_token_id],
        }
        for asked, response, followup in CONVERSATIONS
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--out", required=True, help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    trainer = HindsightTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        TrainingArguments(
            args.out,
            max_steps=args.steps,
            learning_rate=1e-5,
            logging_steps=1,
            remove_unused_columns=False,
        ),
        data_collator=collate,
        train_dataset=dataset(AutoTokenizer.from_pretrained(args.model)),
    )
    trainer.train()
