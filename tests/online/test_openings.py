"""Probability of openings, against a plain forward pass of the model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdpo.conversations import Message
from sdpo.hindsight import HindsightConfig, encode
from sdpo.interactions import Interaction
from sdpo.online.openings import opening_mass
from sdpo_parallel.huggingface import load_tokenizer
from sdpo_parallel.transformers.engine import TransformersModel

OPENINGS = ("no, shorter", "the fox", "thanks")
INTERACTIONS = [
    Interaction(
        id=f"c{i}", prompt=(Message("user", question),), response="green apples", followup=followup
    )
    for i, (question, followup) in enumerate([("a story", "shorter"), ("list paris", "no thanks")])
]


@pytest.mark.parametrize("reads_tries", [True, False])
def test_the_mass_is_that_of_a_plain_forward_pass(models, reads_tries):
    folder = models("llama")
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, config = load_tokenizer(folder), HindsightConfig(template="\n\n({followup})")
    policy = TransformersModel(module)
    assert policy.reads_tries
    policy.reads_tries = reads_tries

    found = opening_mass(policy, tokenizer, INTERACTIONS, config, openings=OPENINGS)

    def mass(prompt: tuple[int, ...]) -> float:
        total = 0.0
        for opening in OPENINGS:
            ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
            logits = module(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            logp = logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
            total += logp.sum().exp().item()
        return total

    encoded = [encode(interaction, tokenizer, config) for interaction in INTERACTIONS]
    with torch.inference_mode():
        policy_masses = [mass(e.policy) for e in encoded]
        hindsight_masses = [mass(e.hindsight) for e in encoded]
    assert found.policy == pytest.approx(sum(policy_masses) / 2, rel=1e-3)
    assert found.hindsight == pytest.approx(sum(hindsight_masses) / 2, rel=1e-3)
    assert found.policy != pytest.approx(found.hindsight, rel=1e-2)
