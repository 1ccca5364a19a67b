"""TRL's `GKDTrainer` without full logits.

    pip install ./kernels 'trl>=1.16,<1.17'
    python examples/trl_gkd.py --student MODEL --teacher MODEL --out FOLDER [--steps 10]

The loss equals TRL's `generalized_jsd_loss`, which it computes from the full logits of two models,
prompts and padding included. `beta` 0 and 1 are `linear_forward_kl` and `linear_reverse_kl` here.
On R ranks TRL 1.16 divides by the tokens of all ranks and data parallelism then takes their mean,
so that its gradient is R times too small. This one equals it; multiply `token_weights` by
`self.accelerator.num_processes` to correct that.

Both models' logits must have one softcap and one scale, as those of a family have.
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from sdpo_kernels import linear_jsd, logit_options

CONVERSATIONS = [
    ("Tell me about foxes.", "The red fox is a mammal of the family Canidae."),
    ("List five fruits.", "Apples, pears, plums, figs, limes."),
]


class FusedGKDTrainer(GKDTrainer):
    """GKD whose loss is computed from hidden states."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        predicts = inputs["labels"][:, 1:] != -100
        options, teachers = (
            logit_options(self.accelerator.unwrap_model(m).config)
            for m in (model, self.teacher_model)
        )
        if options != teachers:
            raise ValueError(f"the student's logits have {options}, the teacher's {teachers}")

        def states_and_lm_head(model):
            lm_head = self.accelerator.unwrap_model(model).get_output_embeddings().weight
            out = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                output_hidden_states=True,
                logits_to_keep=1,
            )
            return out.hidden_states[-1][:, :-1][predicts].to(lm_head.dtype), lm_head

        student = states_and_lm_head(model)
        self.teacher_model.eval()
        with torch.no_grad():
            teacher = states_and_lm_head(self.teacher_model)
        n = predicts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        token_weights = torch.ones(len(student[0]), device=student[0].device) / n
        options |= {"beta": self.beta, "token_weights": token_weights}
        loss = linear_jsd(*student, *teacher, **options).loss
        return (loss, {}) if return_outputs else loss


def dataset() -> Dataset:
    """Conversations as TRL expects them."""
    conversations = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": response}]
        for asked, response in CONVERSATIONS
    ]
    return Dataset.from_dict({"messages": conversations})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--student", required=True, help="a folder or a name on the hub")
    parser.add_argument("--teacher", required=True, help="a model with the student's vocabulary")
    parser.add_argument("--out", required=True, help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    trainer = FusedGKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32),
        args=GKDConfig(
            output_dir=args.out,
            max_steps=args.steps,
            learning_rate=1e-5,
            lmbda=0.0,  # the dataset's responses; > 0 samples some from the student
            logging_steps=1,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=dataset(),
        processing_class=AutoTokenizer.from_pretrained(args.student),
    )
    trainer.train()
