"""Sharing prefixes changes no loss, gradient or signal: against one sequence at a time."""

from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig

from helpers import runs, tiny
from sdpo.batching import Cursor, Example, collate
from sdpo.errors import SdpoError
from sdpo.hindsight import Encoded, Truncated
from sdpo.objective import (
    JSD,
    ForwardKL,
    Layout,
    ReverseKL,
    SampledToken,
    Streams,
    TopKReverseKL,
    total_loss,
)
from sdpo.step import two_pass_loss
from sdpo.train.trainer import RunState
from sdpo_parallel.build import build_engine
from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.engine import EngineConfig
from sdpo_parallel.rows import Kept, Sharing
from sdpo_parallel.transformers.engine import TransformersModel

KINDS = ("qwen3", "qwen3-tied", "llama")
OBJECTIVES = (
    SampledToken(centre=True),
    ReverseKL(ignore_first=1),
    ForwardKL(),
    JSD(beta=0.3),
    TopKReverseKL(k=3),
)
SHARING = ("none", "tries", "keys")
TOLERANCE = 1e-5


def example(policy: Sequence[int], note: Sequence[int], response: Sequence[int]) -> Encoded:
    return Encoded(
        id="a",
        policy=tuple(policy),
        hindsight=(*policy, *note),
        response=tuple(response),
        old_logprobs=None,
        ends=True,
        truncated=Truncated(),
        conversation="c",
    )


def turns(at: Sequence[tuple[list[int], list[int], list[int]]]) -> list[Encoded]:
    """A conversation: each turn's prompt holds all before it."""
    prompt, out = [], []
    for question, response, note in at:
        prompt = [*prompt, *question]
        out.append(example(prompt, note, response))
        prompt = [*prompt, *response]
    return out


ids = st.lists(st.integers(5, 9), min_size=1, max_size=6)
nested = st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=4).map(turns)
apart = st.builds(example, ids, st.lists(st.integers(5, 9), max_size=4), ids).map(lambda e: [e])
one_prompt = st.tuples(ids, st.lists(st.tuples(ids, ids), min_size=2, max_size=3)).map(
    lambda drawn: [example(drawn[0], note, response) for note, response in drawn[1]]
)
twice = nested.map(lambda es: es + es)
cut = st.tuples(
    nested, st.integers(1, 9)
).map(  # from the left, at other places in each pass
    lambda drawn: [
        Encoded(
            **{name: getattr(e, name) for name in ("id", "response", "old_logprobs", "ends")},
            truncated=e.truncated,
            policy=e.policy[-drawn[1] :],
            hindsight=e.hindsight[-drawn[1] - 1 :],
        )
        for e in drawn[0]
    ]
)
examples = st.lists(st.one_of(nested, apart, one_prompt, twice, cut), min_size=1, max_size=3).map(
    lambda groups: [e for group in groups for e in group]
)


def weighted(items: list[Encoded]) -> list[Example]:
    return [(e, (i + 1) / len(items)) for i, e in enumerate(items)]


@lru_cache
def model_of(kind: str) -> TransformersModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.make_config(kind), dtype=torch.float32)
    for name, p in model.named_parameters():
        if p.ndim > 1:  # peaky enough that the passes disagree
            p.data.mul_(4 if "embed" in name or "lm_head" in name else 2)
    return TransformersModel(model.eval())


def one_at_a_time(model: TransformersModel, items: list[Example], objective) -> tuple:
    """(loss, log-probabilities of both passes), by transformers alone."""

    def states(prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        tokens = torch.tensor([[*prompt, *response]])
        out = model.module.get_decoder()(input_ids=tokens, use_cache=False)
        return out.last_hidden_state[0, len(prompt) - 1 : -1]

    hidden = torch.cat([states(e.policy, e.response) for e, _ in items])
    with torch.no_grad():
        hindsight = torch.cat([states(e.hindsight, e.response) for e, _ in items])
    batch, head = collate(items, 64), model.lm_head().weight
    streams = Streams(hidden, head, hindsight, None, batch.targets_N)
    loss, stats = total_loss(
        objective, streams, Layout(batch.sequence_N, batch.offset_N, batch.weight_S)
    )
    return loss, stats.logp_student, stats.logp_teacher


def gradient(loss: Tensor, model: TransformersModel) -> Tensor:
    found = torch.autograd.grad(loss, list(model.module.parameters()))
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(items=examples, objective=st.sampled_from(OBJECTIVES), sharing=st.sampled_from(SHARING))
def test_losses_gradients_and_signals_are_those_of_one_sequence_at_a_time(
    kind, items, objective, sharing: Sharing
):
    model, items = model_of(kind), weighted(items)
    loss, student, teacher = one_at_a_time(model, items, objective)
    out = two_pass_loss(model, collate(items, 64, sharing=sharing), objective)
    torch.testing.assert_close(out.loss, loss, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(out.stats.logp_student, student, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(out.stats.logp_teacher, teacher, rtol=TOLERANCE, atol=TOLERANCE)
    found, expected = gradient(out.loss, model), gradient(loss, model)
    # a loss of almost nothing has a gradient of rounding
    assert (found - expected).norm() <= TOLERANCE * max(expected.norm(), 1.0)


TURNS = [([5, 6, 7], [8, 9, 5], [6, 6]), ([7, 7], [5, 8], [9]), ([6], [7, 9], [5, 5])]
CONVERSATION = weighted(turns(TURNS))


@pytest.mark.parametrize("wrong", ["end", "keys", "position"])
def test_a_defect_is_noticed(wrong):
    """The comparison above fails where a slot sees too much, hindsight reads the wrong keys, or a
    branch's positions do not go on from its stem's."""
    model = model_of("qwen3")
    other = weighted(turns([([5, 6, 8], [9, 9], [6, 7])]))
    batch = collate(CONVERSATION + other, 64, sharing="keys")
    expected = two_pass_loss(model, batch, ReverseKL()).loss
    if wrong == "end":
        batch.policy.end_BT.fill_(10**6)
    elif wrong == "keys":
        batch.hindsight.place_BT.sub_(3)
    else:
        batch.hindsight.positions_BT.sub_(1).clamp_(min=0)
    found = two_pass_loss(model, batch, ReverseKL()).loss
    assert abs(found - expected) > 100 * TOLERANCE * abs(expected)


@pytest.mark.parametrize("attention", ["branches", "dense"])
@pytest.mark.parametrize("checkpoint", ["none", "full"])
def test_torchtitan_reads_tries_too(attention, checkpoint, models, tmp_path):
    folder = models("qwen3-tied")
    reference = TransformersModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    loss, student, teacher = one_at_a_time(reference, CONVERSATION, ReverseKL())
    parallel = ParallelConfig(attention=attention, activation_checkpoint=checkpoint)
    config = EngineConfig(
        model=folder, run_folder=str(tmp_path), total_steps=1, max_tokens=256, parallel=parallel
    )
    with runs.as_alone():
        engine = build_engine("torchtitan", config, RunState(Cursor(1, 0), ""))
        engine.load()
        assert engine.sharing == "keys"
        norms = []
        for sharing in SHARING:
            with engine.context():
                batch = collate(CONVERSATION, 64, sharing=sharing)
                out = two_pass_loss(engine.policy, batch, ReverseKL())
                engine.backward(out.loss, last=True)
            torch.testing.assert_close(out.loss, loss, rtol=TOLERANCE, atol=TOLERANCE)
            found = out.stats.logp_student, out.stats.logp_teacher
            torch.testing.assert_close(found, (student, teacher), rtol=1e-5, atol=1e-5)
            norms.append(engine.clip_gradients())
            engine.discard()
        engine.close()
    assert norms == pytest.approx([gradient(loss, reference).norm().item()] * 3, rel=TOLERANCE)


def test_other_teachers_cannot_read_the_policys_keys():
    model, other = model_of("qwen3"), model_of("qwen3-tied")
    batch = collate(CONVERSATION, 64, sharing="keys")
    with pytest.raises(SdpoError, match="collate with sharing 'tries'"):
        two_pass_loss(model, batch, ReverseKL(), other)
    tries = collate(CONVERSATION, 64, sharing="tries")
    whole = collate(CONVERSATION, 64, sharing="none")
    found, expected = (two_pass_loss(model, b, ReverseKL(), other).loss for b in (tries, whole))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_model_that_cannot_read_tries_refuses_them():
    """One whose layers look back a few tokens only: a slot's distance is not its sequence's."""
    sizes = {**tiny.SIZES, "sliding_window": 4, "head_dim": 16}
    model = TransformersModel(AutoModelForCausalLM.from_config(MistralConfig(**sizes)))
    assert model.packs and not model.reads_tries
    assert model.module.config._attn_implementation == "sdpa"
    with pytest.raises(SdpoError, match="collate with sharing 'none'"):
        two_pass_loss(model, collate(CONVERSATION, 64, sharing="tries"), ReverseKL())
    assert two_pass_loss(model, collate(CONVERSATION, 64), ReverseKL()).loss.isfinite()


def test_other_code_notices_nothing():
    """``generate`` and a plain call compute as they did before the model was wrapped."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.make_config("llama")).eval()
    tokens = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 5]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])

    def read() -> tuple[Tensor, Tensor]:
        options = {"attention_mask": mask, "pad_token_id": 0}
        out = model.generate(tokens, max_new_tokens=6, do_sample=False, **options)
        return model(tokens, attention_mask=mask).logits, out

    before = read()
    assert TransformersModel(model).reads_tries
    assert all(torch.equal(a, b) for a, b in zip(read(), before, strict=True))


def test_kept_keys_are_kept_once_and_freed():
    """A block that the backward computes again keeps nothing."""
    model = TransformersModel(AutoModelForCausalLM.from_config(tiny.make_config("qwen3")).train())
    model.module.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(CONVERSATION, 64, sharing="keys")
    kept = Kept(batch.policy)
    hidden = model.hidden_states(batch.policy, keep=kept)
    assert len(kept.layers) == model.module.config.num_hidden_layers
    with torch.no_grad():
        model.hidden_states(batch.hindsight, behind=kept)
    kept.drop()
    hidden.sum().backward()
    assert not kept.layers
