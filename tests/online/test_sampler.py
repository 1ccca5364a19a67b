"""Answers are drawn from the policy as it is, by what the run says and nothing else."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from helpers import runs, sampler_worker
from sdpo.chat import chat_format
from sdpo.conversations import Message
from sdpo.errors import SdpoError
from sdpo.online.sampler import InProcessSampler, SamplingConfig
from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.engine import Ranks
from sdpo_parallel.huggingface import load_tokenizer

OTHERS = {"do_sample": True, "temperature": 0.6, "top_k": 1, "top_p": 0.9}
OTHERS |= {"repetition_penalty": 1.3, "max_new_tokens": 2, "eos_token_id": 2, "pad_token_id": 0}
"""What the model's folder would have."""
TEXTS = ("hi", "please tell me " * 12, "a short story about the red fox", "apples " * 30)


class Engine:
    """Has weights, and trains nothing."""

    ranks, device = Ranks(), torch.device("cpu")

    def __init__(self, weights=()):
        self.held = dict(weights)

    def gather(self, value):
        return [value]

    def weights(self):
        yield from self.held.items()


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(models("qwen3"), folder)
    (folder / "generation_config.json").write_text(json.dumps(OTHERS))
    return str(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def chat(folder):
    return chat_format(load_tokenizer(folder))


@pytest.fixture(scope="module")
def prompts(chat):
    found = [chat.prompt_ids([Message("user", text)]) for text in TEXTS]
    assert max(map(len, found)) > 3 * min(map(len, found))
    return found


def made(folder, chat, **config):
    config = SamplingConfig(**{"max_new_tokens": 8, **config})
    return InProcessSampler(config, Engine(), folder, chat, ParallelConfig())  # pyright: ignore


@torch.no_grad()
def logits_of(model, prompt, ids):
    """(T, V), as the model gives them."""
    return model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()


def expected(logits_TV, temperature=1.0, top_p=1.0, top_k=0):
    """Log-probabilities, written out."""
    logp_TV = (logits_TV / temperature).log_softmax(-1)
    kept_TV = torch.ones_like(logp_TV, dtype=torch.bool)
    if top_k:
        kept_TV = logp_TV >= logp_TV.topk(top_k).values[:, -1:]
    sorted_TV, order_TV = logp_TV.masked_fill(~kept_TV, -torch.inf).sort(-1, descending=True)
    before_TV = sorted_TV.softmax(-1).cumsum(-1) - sorted_TV.softmax(-1)
    kept_TV &= torch.zeros_like(kept_TV).scatter(1, order_TV, before_TV < top_p)
    return logp_TV.masked_fill(~kept_TV, -torch.inf).log_softmax(-1)


def error(model, prompts, rollouts, **config):
    """The largest difference from what is expected."""
    worst = 0.0
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = torch.tensor(rollout.token_ids)
        logp_TV = expected(logits_of(model, prompt, rollout.token_ids), **config)
        own = logp_TV.gather(1, ids[:, None])[:, 0]
        worst = max(worst, float((own - torch.tensor(rollout.logprobs)).abs().max()))
    return worst


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.7},
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_the_distribution_that_was_asked_for(
    config, folder, chat, model, prompts
):
    """Of prompts of very different lengths in one batch, whatever generation_config.json says."""
    sampler = made(folder, chat, **config)
    rollouts = sampler.sample(prompts, [1, 2, 3, 4])
    assert {len(r.token_ids) for r in rollouts if not r.finished} == {8}
    assert error(model, prompts, rollouts, **config) < 1e-5
    other = {**config, "temperature": config.get("temperature", 1.0) * 0.6}
    assert error(model, prompts, rollouts, **other) > 1e-2, "the check tells temperatures apart"
    several = sampler.sample(prompts[:1] * 6, range(6))
    assert len({r.token_ids for r in several}) == 6, "top_k 1 would give one"


def test_a_sampler_that_went_by_the_models_own_generation_config_would_be_noticed(
    folder, chat, model, prompts
):
    sampler = made(folder, chat)
    own = GenerationConfig.from_pretrained(folder)
    own.update(max_new_tokens=8)
    sampler.generation = own
    assert error(model, prompts, sampler.sample(prompts, [1, 2, 3, 4])) > 1e-2


def test_an_answer_is_that_of_its_prompt_and_seed_in_any_batch_and_order(folder, chat, prompts):
    asked = [(p, seed) for p in prompts for seed in (3, 4)]
    whole = sampled(made(folder, chat), asked)
    assert len({ids for ids, _ in whole.values()}) == len(asked)
    for batch in (1, 3):
        again = sampled(made(folder, chat, batch=batch), asked[::-1])
        assert again.keys() == whole.keys()
        for key, (ids, logprobs) in again.items():
            assert ids == whole[key][0]
            assert logprobs == pytest.approx(whole[key][1], abs=1e-5)
    by_row = made(folder, chat)
    generate = by_row._generate
    by_row._generate = lambda some, seeds, greedy: generate(some, range(len(some)), greedy)
    assert sampled(by_row, asked) != sampled(by_row, asked[::-1]), "seeds by row are noticed"


def sampled(sampler, asked):
    """(prompt, seed) -> ids and log-probabilities."""
    rollouts = sampler.sample([p for p, _ in asked], [seed for _, seed in asked])
    keys = [(tuple(p), seed) for p, seed in asked]
    return {k: (r.token_ids, r.logprobs) for k, r in zip(keys, rollouts, strict=True)}


def test_greedy_answers_are_those_of_transformers(folder, chat, model, prompts):
    rollouts = made(folder, chat, temperature=0.3, top_k=3).sample(prompts, [0] * 4, greedy=True)
    plain = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    model.generation_config = plain
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
        assert out[0, len(prompt) :].tolist() == list(rollout.token_ids)
    assert error(model, prompts, rollouts) < 1e-5, "log-probabilities are the policy's own"


def test_answers_end_at_each_of_the_templates_ends_and_nowhere_else(folder, chat, prompts):
    asked, seeds = prompts * 2, range(8)
    endless = made(folder, SimpleNamespace(end_ids={447}), max_new_tokens=12).sample(asked, seeds)
    assert not any(r.finished for r in endless)
    ends = {endless[0].token_ids[4], endless[5].token_ids[7]}
    assert len(ends) == 2
    rollouts = made(folder, SimpleNamespace(end_ids=ends), max_new_tokens=12).sample(asked, seeds)
    seen = set()
    for whole, rollout in zip(endless, rollouts, strict=True):
        at = next((i for i, token in enumerate(whole.token_ids) if token in ends), None)
        assert rollout.finished == (at is not None)
        assert rollout.token_ids == whole.token_ids[: 12 if at is None else at + 1]
        assert len(rollout.logprobs) == len(rollout.token_ids)
        seen |= {rollout.token_ids[-1]} if rollout.finished else {None}
    assert seen == {*ends, None}


def test_sampled_tokens_follow_the_distribution(folder, chat, model, prompts):
    n, prompt = 4000, prompts[0]
    rollouts = made(folder, chat, max_new_tokens=1, batch=1000).sample([prompt] * n, range(n))
    counts_V = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=448)

    def chi_square(temperature):
        """In standard deviations from its mean; rare tokens are one bin."""
        (logits_V,) = logits_of(model, prompt, [0])
        wanted_V = n * (logits_V.double() / temperature).softmax(-1)
        common_V = wanted_V >= 5
        wanted = torch.cat([wanted_V[common_V], wanted_V[~common_V].sum()[None]])
        found = torch.cat([counts_V[common_V], counts_V[~common_V].sum()[None]])
        freedom = len(wanted) - 1
        assert freedom > 20
        return float(((found - wanted) ** 2 / wanted).sum() - freedom) / (2 * freedom) ** 0.5

    assert abs(chi_square(1.0)) < 3
    assert chi_square(0.9) > 6, "another temperature is noticed"


def test_a_weight_that_is_missing_or_not_known_is_an_error(folder, chat, model):
    weights = dict(model.state_dict())
    sampler = made(folder, chat)
    sampler.update(Engine(weights), 1)
    assert sampler.version == 1
    less = {name: w for name, w in weights.items() if name != "model.norm.weight"}
    with pytest.raises(SdpoError, match=r"the policy has no weight model\.norm\.weight, which"):
        sampler.update(Engine(less), 2)
    more = weights | {"model.extra.weight": torch.ones(2)}
    with pytest.raises(SdpoError, match=r"has no weight model\.extra\.weight, which the policy"):
        sampler.update(Engine(more), 2)
    assert sampler.version == 1


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied"])
def test_the_sampler_takes_over_the_transformers_engines_weights(kind, models, tmp_path):
    case = {"model": models(kind), "parallel": {}, "lora": {}}
    found = sampler_worker.compare("transformers", case, tmp_path)
    assert found["after"] < 1e-5 and found["before"] > 1e-2


def test_the_sampler_takes_over_weights_that_are_spread_over_ranks(models, tmp_path):
    """Sharded, tensor-parallel, tied, and with adapters merged."""
    lora = {"rank": 4, "alpha": 8}
    cases = [
        {"model": models("qwen3"), "parallel": {}, "lora": {}},
        {"model": models("qwen3-tied"), "parallel": {"tensor": 2}, "lora": {}},
        {"model": models("llama"), "parallel": {"tensor": 2}, "lora": lora},
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    runs.worker("sampler_worker.py", 2, str(tmp_path / "cases.json"), str(tmp_path))
    for found in json.loads((tmp_path / "found.json").read_text()):
        assert found["ranks"] == 2
        assert found["after"] < 1e-5 and found["before"] > 1e-2


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(setting, says):
    with pytest.raises(SdpoError, match=says):
        SamplingConfig(**setting)
