"""A user played by a tiny model, which babbles; its sampling is what is looked at."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from sdpo.conversations import Message
from sdpo.errors import SdpoError
from sdpo.online.users.base import Exchange
from sdpo.online.users.by_model import ModelUser, _Gumbel
from sdpo.online.users.config import LocalUser, build_user
from sdpo.online.users.personas import load_persona

LONG = {"max_chars": 10_000, "max_new_tokens": 24}


def exchange(i, answer=None):
    prompt = (Message("user", "tell me a story " * (i + 1)),)
    return Exchange(id=f"e{i}", prompt=prompt, answer=answer or "the red fox", finished=True)


def user(folder, **settings):
    config = LocalUser(model=folder, **LONG | settings)
    made = build_user(config, load_persona("concise"), folder=None)  # pyright: ignore
    assert isinstance(made, ModelUser)
    return made


def texts(model_user, exchanges, seed=0):
    """What the model wrote, cut or not: tiny models rarely end."""
    rows = []
    read_all = model_user._tokenizer.decode

    def listening(ids, **options):
        rows.append(list(ids))
        return read_all(ids, **options)

    model_user._tokenizer.decode = listening
    replies = model_user.reply(exchanges, seed=seed)
    model_user._tokenizer.decode = read_all
    assert len(replies) == len(rows) == len(exchanges)
    return rows


@pytest.fixture(scope="module")
def folder(models):
    return models("qwen3")


def test_replies_hang_on_the_exchange_and_the_seed_alone(folder):
    """Neither order nor batching nor padding changes what is drawn."""
    exchanges = [exchange(i) for i in range(6)]
    together = texts(user(folder, batch=6), exchanges)
    alone = texts(user(folder, batch=1), exchanges)
    assert alone == together
    order = [3, 0, 5, 1, 4, 2]
    shuffled = texts(user(folder, batch=4), [exchanges[i] for i in order])
    assert shuffled == [together[i] for i in order]
    assert texts(user(folder), exchanges, seed=1) != together


def test_the_models_own_generation_config_is_not_used(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    greedy = texts(user(folder, temperature=0), [exchange(1)])
    sampled = texts(user(folder, temperature=1.0), [exchange(1)])
    assert greedy != sampled
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.2, repetition_penalty=5.0, min_length=40
    )
    other = tmp_path / "other"
    model.save_pretrained(other)
    user(folder)._tokenizer.save_pretrained(other)
    assert (other / "generation_config.json").exists()
    assert texts(user(str(other), temperature=0), [exchange(1)]) == greedy
    assert texts(user(str(other), temperature=1.0), [exchange(1)]) == sampled


def test_noise_draws_as_softmax_does():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draw = _Gumbel([f"row {i}" for i in range(8_000)])
    drawn = draw(torch.zeros(8_000, 0), logits.expand(8_000, 4)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 8_000
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.02, rtol=0)


def test_no_draw_leaves_what_was_filtered_out(seed):
    logits = torch.full((64, 1000), -torch.inf)
    kept = torch.randint(1000, (64, 1))
    logits.scatter_(1, kept, torch.randn(64, 1))
    drawn = _Gumbel([f"{seed} {i}" for i in range(64)])(torch.zeros(64, 0), logits).argmax(-1)
    assert torch.equal(drawn, kept[:, 0])


def test_top_k_and_top_p_are_used(folder):
    greedy = texts(user(folder, temperature=0), [exchange(1)])
    assert texts(user(folder, temperature=1.0, top_k=1), [exchange(1)]) == greedy
    assert texts(user(folder, temperature=1.0, top_p=1e-9), [exchange(1)]) == greedy


def test_a_reply_that_never_ends_is_truncated(folder):
    played = user(folder, max_new_tokens=2)
    replies = played.reply([exchange(i) for i in range(3)], seed=0)
    assert [(r.text, r.source) for r in replies] == [(None, "model:truncated")] * 3
    with pytest.raises(SdpoError, match=rf"{folder}, exchange e0: the reply is truncated"):
        user(folder, max_new_tokens=2, on_failure="stop").reply([exchange(0)], seed=0)


def test_an_ended_reply_is_read(folder):
    """With the end of a turn made likely, replies end at once or are what stands before."""
    played = user(folder)
    end = min(played._chat.end_ids)
    with torch.no_grad():
        played._model.lm_head.weight[end] = 0
        head = played._model.lm_head
        played._model.lm_head = _EndsAfter(head, end, tokens=3)
    rng = random.Random(0)
    replies = played.reply([exchange(rng.randrange(4)) for _ in range(4)], seed=0)
    assert {r.source for r in replies} <= {"model", "model:empty"}
    assert any(r.text for r in replies)


class _EndsAfter(torch.nn.Module):
    """An lm_head that ends every row after so many tokens."""

    def __init__(self, head, end, tokens):
        super().__init__()
        self.head, self.end, self.tokens, self.calls = head, end, tokens, 0

    def forward(self, hidden):
        logits = self.head(hidden)
        self.calls += 1
        logits[..., self.end] = 1e9 if self.calls > self.tokens else -1e9
        return logits


def test_long_exchanges_are_shown_in_part(folder):
    played = user(folder, max_prompt_tokens=900)
    ids = played._prompt(exchange(0, "apples " * 20_000))
    assert 100 < len(ids) <= 900
    with pytest.raises(SdpoError, match="exchange e0: .*max_prompt_tokens is 20: raise it"):
        user(folder, max_prompt_tokens=20).reply([exchange(0)], seed=0)


def test_thinking_is_off_where_the_template_knows_it(folder):
    played = user(folder)
    ids = played._prompt(exchange(0))
    assert played._tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")


def test_a_template_that_refuses_system_messages_gets_none(folder, tmp_path):
    from helpers.tiny import CHAT_TEMPLATE

    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)
    tokenizer = user(folder)._tokenizer
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    tokenizer.save_pretrained(other)
    played = user(str(other))
    shown = played._tokenizer.decode(played._prompt(exchange(0)))
    assert shown.startswith("<|im_start|>user\n") and "one sentence" in shown


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"top_k": -1}, "top_k must not be negative"),
        ({"batch": 0}, "batch must be positive"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive"),
    ],
)
def test_settings_are_checked(settings, problem):
    with pytest.raises(SdpoError, match=problem):
        LocalUser(model="m", **settings)
