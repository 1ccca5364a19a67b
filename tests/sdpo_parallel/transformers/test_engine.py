"""Models that transformers packs, and models that it does not; dropout; heads that are more."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    OPTConfig,
    Qwen3Config,
)

from sdpo.batching import pack
from sdpo_parallel.transformers.engine import TransformersModel, disable_dropout

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, intermediate_size=48),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
}
random_model = AutoModelForCausalLM.from_config


@pytest.mark.parametrize("kind", MODELS)
def test_a_packed_document_reads_as_it_does_alone(kind):
    model = TransformersModel(random_model(MODELS[kind]).eval())
    pairs = [
        (tuple(torch.randint(4, 64, (p,)).tolist()), tuple(torch.randint(4, 64, (r,)).tolist()))
        for p, r in ((5, 3), (2, 6), (7, 1))
    ]
    rows = pack(pairs, row_tokens=128)
    with torch.no_grad():
        packed = model.hidden_states(rows.tokens_BT, rows.positions_BT, rows.index_N)
        alone = [
            model.decoder(input_ids=torch.tensor([[*p, *r]]), use_cache=False).last_hidden_state[
                0, len(p) - 1 : -1
            ]
            for p, r in pairs
        ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    empty = model.hidden_states(rows.tokens_BT, rows.positions_BT, rows.index_N[:0])
    assert empty.shape == (0, 32)


def test_models_that_leak_are_not_packed():
    packs = {kind: TransformersModel(random_model(MODELS[kind])).packs for kind in MODELS}
    assert packs["qwen3"] and not packs["opt"] and not packs["bloom"]


def test_dropout_is_off_in_both_passes_and_no_reason_to_refuse_a_model():
    model = random_model(MODELS["gpt2"]).train()
    wrapped = TransformersModel(model)
    assert model.training
    tokens = torch.randint(4, 64, (1, 9))
    positions, index = torch.arange(9)[None], torch.arange(9)
    noisy = [wrapped.hidden_states(tokens, positions, index) for _ in range(2)]
    assert not torch.equal(*noisy)
    disable_dropout(model)
    quiet = [wrapped.hidden_states(tokens, positions, index) for _ in range(2)]
    assert torch.equal(*quiet)


def test_a_softcapped_head_is_refused():
    config = Gemma2Config(
        **SMALL,
        num_key_value_heads=2,
        intermediate_size=48,
        head_dim=8,
        final_logit_softcapping=30.0,
        attn_implementation="eager",
    )
    with pytest.raises(ValueError, match="softcap"):
        TransformersModel(random_model(config).eval())
