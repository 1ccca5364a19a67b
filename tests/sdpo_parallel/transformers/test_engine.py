"""Models that transformers packs, and models that it does not; dropout; heads that are more."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3NextConfig,
)

from helpers import runs, tiny
from sdpo.batching import Batch, collate, pack
from sdpo.hindsight import Encoded, Truncated
from sdpo.objective import ReverseKL, SampledToken
from sdpo.step import two_pass_loss
from sdpo_kernels import reference
from sdpo_parallel.errors import SdpoError
from sdpo_parallel.rows import Rows
from sdpo_parallel.teacher import Mixture
from sdpo_parallel.transformers.engine import TransformersModel, disable_dropout, load_model

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, intermediate_size=48),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48),
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
        packed = model.hidden_states(rows)
        alone = [
            model.decoder(input_ids=torch.tensor([[*p, *r]]), use_cache=False).last_hidden_state[
                0, len(p) - 1 : -1
            ]
            for p, r in pairs
        ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    empty = model.hidden_states(replace(rows, index_N=rows.index_N[:0]))
    assert empty.shape == (0, 32)


DEEP = dict(vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
LEAKING = {
    "bloom": MODELS["bloom"],
    "qwen3-next": Qwen3NextConfig(
        **DEEP,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "lfm2": Lfm2Config(
        **DEEP,
        num_key_value_heads=2,
        intermediate_size=96,
        layer_types=["conv", "conv", "full_attention", "conv"],
    ),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("kind", LEAKING)
def test_models_that_leak_are_not_packed(kind, dtype):
    """Among them convolutions and linear attention, whose leak is smaller than bfloat16's noise."""
    assert not TransformersModel(random_model(LEAKING[kind], dtype=dtype)).packs


@DTYPES
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2", "opt"])
def test_others_are_packed_and_read_the_same_bits_behind_any_document(kind, dtype):
    model = TransformersModel(random_model(MODELS[kind], dtype=dtype).eval())
    assert model.packs
    before, document = torch.randint(64, (2, 23)), torch.randint(64, (41,))
    positions = torch.cat([torch.arange(23), torch.arange(41)])[None]
    with torch.no_grad():
        one, other = (
            model.hidden_states(
                Rows.of(torch.cat([b, document])[None], positions, torch.arange(23, 64))
            )
            for b in before
        )
    assert torch.equal(one, other) and one.abs().max() > 0


def test_dropout_is_off_in_both_passes_and_no_reason_to_refuse_a_model():
    model = random_model(MODELS["gpt2"]).train()
    wrapped = TransformersModel(model)
    assert model.training
    tokens = torch.randint(4, 64, (1, 9))
    positions, index = torch.arange(9)[None], torch.arange(9)
    noisy = [wrapped.hidden_states(Rows.of(tokens, positions, index)) for _ in range(2)]
    assert not torch.equal(*noisy)
    disable_dropout(model)
    quiet = [wrapped.hidden_states(Rows.of(tokens, positions, index)) for _ in range(2)]
    assert torch.equal(*quiet)


LIKE_LLAMA = dict(**SMALL, num_key_value_heads=2, intermediate_size=48)
HEADS = {
    "gemma2": Gemma2Config(**LIKE_LLAMA, head_dim=8, final_logit_softcapping=30.0),
    "cohere": CohereConfig(**LIKE_LLAMA, logit_scale=0.3),
    "granite": GraniteConfig(**LIKE_LLAMA, logits_scaling=1.7),
}


def with_large_logits(kind: str) -> PreTrainedModel:
    """Its largest logit is 21 and more, where a softcap of 30 bends."""
    model = random_model(HEADS[kind]).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=2.5)
        assert model(torch.randint(64, (1, 40))).logits.abs().max() > 21
    return model


def two_passes(n: int) -> Batch:
    """A micro-batch of ``n`` interactions of random tokens."""

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(64, (length,)).tolist())

    examples = [
        Encoded(
            id=str(i),
            policy=tokens(3 + i),
            hindsight=tokens(7 + i),
            response=tokens(5 + i),
            old_logprobs=None,
            ends=True,
            truncated=Truncated(),
        )
        for i in range(n)
    ]
    return collate([(e, 1 / n) for e in examples], row_tokens=64)


def own_log_probs(model: PreTrainedModel, batch: Batch, prompts: str) -> Tensor:
    """(N, V), a document at a time, by the model's own logits."""
    rows = getattr(batch, prompts)
    document = (rows.positions_BT == 0).flatten().cumsum(0)
    out = []
    for index in rows.index_N.split(batch.lengths):
        tokens = rows.tokens_BT.flatten()[document == document[index[0]]]
        start = len(tokens) - 1 - len(index)
        out.append(model(tokens[None]).logits[0, start:-1].log_softmax(-1))
    return torch.cat(out)


@pytest.mark.parametrize("kind", HEADS)
def test_softcaps_and_scales_are_trained_as_the_model_has_them(kind):
    model, batch = with_large_logits(kind), two_passes(4)
    parameters = dict(model.named_parameters())
    for objective in (ReverseKL(), SampledToken()):
        out = two_pass_loss(TransformersModel(model), batch, objective)
        found = torch.autograd.grad(out.loss, list(parameters.values()), allow_unused=True)
        logp = own_log_probs(model, batch, "policy")
        with torch.no_grad():
            logq = own_log_probs(model, batch, "hindsight")
        at_p, at_q = (reference.logprob(x, batch.targets_N) for x in (logp, logq))
        torch.testing.assert_close(out.stats.logp_student, at_p, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.stats.logp_teacher, at_q, rtol=1e-5, atol=1e-5)
        value = (
            reference.reverse_kl(logp, logq)
            if isinstance(objective, ReverseKL)
            else reference.policy_gradient(at_p, at_q - at_p)
        )
        mean = torch.stack([v.mean() for v in value.split(batch.lengths)]).mean()
        torch.testing.assert_close(out.loss, mean, rtol=1e-5, atol=1e-6)
        expected = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
        for name, one, other in zip(parameters, found, expected, strict=True):
            assert (one is None) == (other is None), name
            if one is not None:
                apart = (one - other).abs().max()
                assert apart <= 1e-4 * other.abs().max(), (name, apart)


def test_a_softcapped_model_trains_and_its_signal_is_its_own(tmp_path):
    """`sdpo train`, and Gemma 2 where transformers has no SDPA for it."""
    folder = tmp_path / "gemma2"
    sizes = {**tiny.SIZES, "head_dim": 16, "final_logit_softcapping": 30.0}
    random_model(Gemma2Config(**sizes)).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    data = tiny.make_interactions(tmp_path / "i.jsonl", 6)
    rows = runs.train("reverse-kl", str(folder), data, tmp_path / "run", "--engine", "transformers")
    assert len(rows) == 1 and rows[0]["grad_norm"] > 0
    exported = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert exported["final_logit_softcapping"] == 30.0
    head = load_model(str(tmp_path / "run" / "export")).lm_head()
    assert (head.softcap, head.temperature) == (30.0, 1.0)


def test_policy_and_teacher_must_make_logits_alike():
    gemma, cohere = (TransformersModel(with_large_logits(k)) for k in ("gemma2", "cohere"))
    with pytest.raises(SdpoError, match="softcap"):
        two_pass_loss(gemma, two_passes(1), ReverseKL(), cohere)
    with pytest.raises(SdpoError, match="softcap"):
        two_pass_loss(gemma, two_passes(1), ReverseKL(), Mixture(gemma, gemma, 0.5))
    mixed = two_pass_loss(cohere, two_passes(1), ReverseKL(), Mixture(cohere, cohere, 0.5))
    assert mixed.loss.isfinite()


def test_a_head_that_does_what_its_config_does_not_say_is_refused():
    """Logits of random weights are small: only what becomes of large ones tells."""
    model = random_model(MODELS["llama"])
    own = type(model).forward

    def softcapped(*args, **kwargs):
        out = own(model, *args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    model.forward = softcapped
    with pytest.raises(SdpoError, match="softcap and scale that its config names"):
        TransformersModel(model)
    biased = random_model(MODELS["llama"])
    biased.lm_head = torch.nn.Linear(32, 64)
    with pytest.raises(SdpoError, match="bias"):
        TransformersModel(biased)
