"""A real vLLM server, on a CPU, that serves SmolLM2: answers, weights, adapters, a restart.

The stand-in of tests/online/serving has the server's traps as they were measured on it; here they
are looked for on the server itself.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from peft import LoraConfig as Peft
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import online, runs
from sdpo.chat import chat_format
from sdpo.cli import main
from sdpo.conversations import Message
from sdpo.errors import SdpoError
from sdpo.online.sampler import SamplingConfig
from sdpo.online.serving.check import Needs, complaints
from sdpo.online.serving.config import VLLM
from sdpo.online.serving.sampler import VLLMSampler
from sdpo.online.serving.server import Server
from sdpo_parallel.config import LoraConfig, ParallelConfig
from sdpo_parallel.engine import Ranks
from sdpo_parallel.huggingface import load_tokenizer

TEXTS = (
    "Name three rivers in Europe.",
    "What is a good way to learn to swim?",
    "Write a line about the sea.",
    "Why is the sky blue?",
)
RANK = 8
NEAR = 1e-3
"""Nats between the server's and transformers' log-probabilities, in float32."""
SPOILT = "model.layers.9.mlp.down_proj.weight"
COMMON = ["--sampling.temperature", "1.0", "--batch.interactions-per-step", "6"]
COMMON += ["--sampling.max-new-tokens", "24", "--hindsight.max-hindsight-prompt-tokens", "400"]
COMMON += ["--hindsight.max-prompt-tokens", "300", "--evaluate.prompts", "0"]
STARTS = 300.0
"""Seconds that a server may take to come up."""


class Process:
    """A server that `sdpo serve` starts."""

    def __init__(self, program: str, model: str, log: Path, *flags: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        self.argv = [sys.executable, "-m", "sdpo", "serve", model, "--vllm", program]
        self.argv += ["--port", str(self.port), "--dtype", "float32", *flags]
        self.argv += ["--", "--max-model-len", "2048", "--max-num-seqs", "32", "--enforce-eager"]
        self.start()

    def start(self) -> None:
        """Come up."""
        env = {**os.environ, **runs.ENV, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        env |= {"HF_HUB_OFFLINE": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.argv, env=env, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + STARTS
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        pytest.fail(f"no server: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """Gone, without a word."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def started(smollm2, vllm, tmp_path_factory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    server = Process(vllm, smollm2, log, "--lora-rank", str(RANK), "--adapters", "4")
    yield server
    server.kill()


@pytest.fixture
def server(started) -> Process:
    if not httpx.get(f"{started.url}/health").is_success:
        pytest.fail(f"the server has died: {started.log.read_text()[-3000:]}")
    return started


@pytest.fixture(scope="module")
def chat(smollm2):
    return chat_format(load_tokenizer(smollm2))


@pytest.fixture(scope="module")
def prompts(chat) -> list[list[int]]:
    """Short ones, and one that fills blocks of a prefix cache."""
    long = "Here is what happened. " + "It rained, and the river rose a little more. " * 40
    found = [list(chat.prompt_ids([Message("user", text)])) for text in (*TEXTS, long + "Why?")]
    assert len(found[0]) < 60 < 400 < len(found[-1])
    return found


class Engine:
    """Exports a model of transformers."""

    ranks, device = Ranks(), torch.device("cpu")

    def __init__(self, model):
        self.model = model

    def on_main(self, make):
        return make()

    def export(self, folder, *, adapters, dtype):
        assert dtype == "float32" and adapters == isinstance(self.model, PeftModel)
        self.model.save_pretrained(folder)


class Spoiler(Engine):
    """Exports a model without one of its tensors, or with another in its place."""

    def __init__(self, model, instead: Tensor | None = None):
        super().__init__(model)
        self.instead = {} if instead is None else {SPOILT: instead}

    def export(self, folder, **how):
        super().export(folder, **how)
        path = Path(folder) / "model.safetensors"
        tensors = load_file(path)
        del tensors[SPOILT]
        path.write_bytes(save(tensors | self.instead, {"format": "pt"}))


def model_of(folder, seed=0, size=0.0):
    """A folder's model, moved a little, so that it says other things in as good English."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters() if size else ():
            p.add_(size * p.std() * torch.randn(p.shape, generator=generator))
    return model


def adapted(folder, seed):
    """The folder's model with an adapter that says other things; seed 0: with one of zeros."""
    torch.manual_seed(seed)
    config = Peft(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(model_of(folder), config).eval()
    if seed:
        redraw(model, seed)
    return model


@torch.no_grad()
def redraw(model, seed) -> None:
    """Let the model's adapter say other things."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.normal_(0, 0.08, generator=generator)


@torch.no_grad()
def logprobs(model, prompt, ids) -> Tensor:
    """(T,) of the answer's tokens."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@torch.no_grad()
def greedy(model, prompt, n):
    """The likeliest answer, at most ``n`` tokens."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=n, do_sample=False,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
    )  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())


def made(server, engine, folder, out, chat, *, tokens=24, **settings) -> VLLMSampler:
    adapters = isinstance(engine.model, PeftModel)
    config = SimpleNamespace(
        sampling=SamplingConfig(max_new_tokens=tokens),
        model=folder,
        out=str(out),
        parallel=ParallelConfig(),
        lora=LoraConfig(rank=RANK if adapters else 0),
        hindsight=SimpleNamespace(max_prompt_tokens=1000),
    )
    servers = VLLM(urls=(server.url,), sync="adapters" if adapters else "weights", **settings)
    return VLLMSampler(config, servers, engine, chat)  # pyright: ignore


def agrees(model, sampler, prompts) -> None:
    """What is sampled has the model's log-probabilities, and what is likeliest is so for it."""
    for prompt, r in zip(prompts, sampler.sample(prompts, range(len(prompts))), strict=True):
        there = torch.tensor(r.logprobs)
        assert (logprobs(model, prompt, r.token_ids) - there).abs().max() < NEAR
    likeliest = sampler.sample(prompts, [0] * len(prompts), greedy=True)
    assert [r.token_ids for r in likeliest] == [greedy(model, p, 24) for p in prompts]


def call(server, method, *args):
    """One call of a `Server`, by itself."""

    async def alone():
        async with httpx.AsyncClient(timeout=120.0) as client:
            return await getattr(Server(server.url, client), method)(*args)

    return asyncio.run(alone())


async def lacks(server: Process, **needs) -> list[str]:
    async with httpx.AsyncClient() as client:
        return await complaints(Server(server.url, client), Needs(**needs))


def test_a_server_that_sdpo_starts_lacks_nothing(server):
    assert asyncio.run(lacks(server, tokens=2048)) == []
    assert asyncio.run(lacks(server, sync="adapters", rank=RANK)) == []
    found = "; ".join(asyncio.run(lacks(server, rank=64, tokens=4096, raw_logprobs=False)))
    assert all(flag in found for flag in ("--max-lora-rank", "--max-model-len", "processed"))


def test_whole_weights(server, smollm2, chat, prompts, tmp_path):
    first, other = model_of(smollm2), model_of(smollm2, seed=1, size=0.03)
    sampler = made(server, Engine(first), smollm2, tmp_path, chat)
    agrees(first, sampler, prompts)
    for version, model in ((1, other), (2, first)):
        sampler.update(Engine(model), version)  # pyright: ignore
        agrees(model, sampler, prompts)
    assert greedy(first, prompts[-1], 24) != greedy(other, prompts[-1], 24)


def test_the_same_seed_draws_the_same_answer(server, smollm2, chat, prompts, tmp_path):
    sampler = made(server, Engine(model_of(smollm2)), smollm2, tmp_path, chat)
    several = sampler.sample([prompts[0]] * 6, [1, 2, 3, 1, 2, 3])
    assert several[:3] == several[3:] and len({r.token_ids for r in several}) == 3


def test_a_request_in_flight_tells_which_weights_made_which_token(
    server, smollm2, chat, prompts, tmp_path
):
    first, other = model_of(smollm2), model_of(smollm2, seed=1, size=0.03)
    other.save_pretrained(tmp_path / "other")
    first.save_pretrained(tmp_path / "first")
    sampling = {"max_tokens": 160, "ignore_eos": True, "temperature": 1.0, "logprobs": 0, "seed": 5}

    async def swapped():
        async with httpx.AsyncClient(timeout=300.0) as client:
            s = Server(server.url, client)
            await s.load_weights(tmp_path / "first", "one", None)
            jobs = [
                asyncio.create_task(s.generate((await s.base())[0], p, sampling))
                for p in (prompts[0], prompts[-1])
            ]
            await asyncio.sleep(2.0)
            assert not any(job.done() for job in jobs), "too late to see anything"
            await s.load_weights(tmp_path / "other", "two", tmp_path / "first")
            return await asyncio.gather(*jobs)

    for prompt, out in zip((prompts[0], prompts[-1]), asyncio.run(swapped()), strict=True):
        one, two = out.spans
        assert (one.label, two.label) == ("one", "two")
        assert 0 == one.start < one.end == two.start < two.end == len(out.token_ids) == 160
        there = torch.tensor(out.logprobs)
        for span, model, not_model in ((one, first, other), (two, other, first)):
            part = slice(span.start, span.end)
            error = (logprobs(model, prompt, out.token_ids) - there)[part].abs().max()
            assert (
                error
                < NEAR
                < (logprobs(not_model, prompt, out.token_ids) - there)[part].abs().max()
            )
    call(server, "load_weights", tmp_path / "first", "one again", None)


def test_trap_5_a_server_survives_a_folder_that_it_cannot_load(server, smollm2, prompts, tmp_path):
    model = model_of(smollm2, seed=2, size=0.03)
    model.save_pretrained(tmp_path / "good")
    call(server, "load_weights", tmp_path / "good", "good", None)
    with pytest.raises(SdpoError, match="has its weights from before again"):
        call(server, "load_weights", tmp_path / "nowhere", "bad", tmp_path / "good")
    sampling = {"max_tokens": 12, "temperature": 0.0, "logprobs": 0}
    name, _ = call(server, "base")
    for prompt in (prompts[0], prompts[-1]):
        out = call(server, "generate", name, prompt, sampling)
        assert out.token_ids == greedy(model, prompt, 12) and out.spans[0].label == "good"
    found = asyncio.run(lacks(server, sync="adapters"))
    assert "its weights are 'good'" in "; ".join(found)
    call(server, "load_weights", Path(smollm2), "default", None)


def test_trap_6_weights_with_a_hole_or_of_another_shape_are_never_sent(
    server, smollm2, chat, prompts, tmp_path
):
    first, other = (model_of(smollm2, seed=seed, size=0.03) for seed in (3, 4))
    sampler = made(server, Engine(first), smollm2, tmp_path / "run", chat)

    def answers():  # one by one: what else is in a batch moves last bits
        return [sampler.sample([prompt], [0], greedy=True)[0] for prompt in prompts]

    answers()  # fills the prefix cache
    before, orders = answers(), given(server)
    assert [r.token_ids for r in before] == [greedy(first, p, 24) for p in prompts]
    shape = r"is \(3, 5\), where .* has \(576, 1536\)"
    for spoiler, says in (
        (Spoiler(other), "is missing"),
        (Spoiler(other, torch.zeros(3, 5)), shape),
    ):
        with pytest.raises(SdpoError, match=f"{SPOILT} {says}"):
            sampler.update(spoiler, 1)  # pyright: ignore
        assert given(server) == orders
        assert answers() == before
    sampler.close()

    # what comes of it otherwise: status 200, and a mixture of both answers
    Spoiler(other).export(tmp_path / "hole", adapters=False, dtype="float32")
    call(server, "load_weights", tmp_path / "hole", "hole", None)
    sampling = {"max_tokens": 24, "temperature": 0.0, "logprobs": 0}
    out = call(server, "generate", call(server, "base")[0], prompts[-1], sampling)
    there = torch.tensor(out.logprobs)
    not_other = (logprobs(other, prompts[-1], out.token_ids) - there).abs().max()
    other.get_parameter(SPOILT).data.copy_(first.get_parameter(SPOILT))
    assert (logprobs(other, prompts[-1], out.token_ids) - there).abs().max() < NEAR < not_other
    call(server, "load_weights", Path(smollm2), "default", None)


def given(server: Process) -> int:
    """Orders that a server has had, by its log: all but questions."""
    lines = server.log.read_text().splitlines()
    return sum('"POST /' in line and "/generate " not in line for line in lines)


def test_adapters_of_three_users_and_the_base_in_one_batch(server, smollm2, prompts, tmp_path):
    models = {f"user{seed}@1": adapted(smollm2, seed) for seed in range(4)}  # 0: as the base
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        call(server, "load_adapter", name, tmp_path / name)
    sampling = {"max_tokens": 24, "temperature": 0.0, "logprobs": 0}

    async def together():
        async with httpx.AsyncClient(timeout=300.0) as client:
            s = Server(server.url, client)
            asked = [(name, prompt) for prompt in prompts for name in models]
            return asked, await asyncio.gather(*(s.generate(n, p, sampling) for n, p in asked))

    asked, outs = asyncio.run(together())
    for (name, prompt), out in zip(asked, outs, strict=True):
        assert out.token_ids == greedy(models[name], prompt, 24), name
    base = model_of(smollm2)
    assert greedy(models["user0@1"], prompts[0], 24) == greedy(base, prompts[0], 24)
    assert len({greedy(m, prompts[0], 24) for m in models.values()}) == 4
    for name in models:
        call(server, "unload_adapter", name)


def test_adapters_after_each_update(server, smollm2, chat, prompts, tmp_path):
    zero = adapted(smollm2, 0)
    sampler = made(server, Engine(zero), smollm2, tmp_path, chat)
    agrees(zero, sampler, prompts)
    for version in (1, 2):
        model = adapted(smollm2, version)
        sampler.update(Engine(model), version)  # pyright: ignore
        agrees(model, sampler, prompts)
    assert len(call(server, "adapters")) == 1
    sampler.close()
    assert call(server, "adapters") == {}


Answer = tuple[tuple[int, ...], Tensor]
"""Token ids, and their log-probabilities."""


def same(one: Answer, other: Answer) -> bool:
    """Both come from the same weights."""
    return one[0] == other[0] and bool((one[1] - other[1]).abs().max() < NEAR)


def test_trap_3_more_adapters_than_a_server_holds(server, smollm2, chat, tmp_path):
    """Each is asked when the server has thrown it out, and reads its folder again; the folder of a
    version goes when its name has gone, and no earlier."""
    holds = int(call(server, "settings")["lora_config"]["max_cpu_loras"])
    model = adapted(smollm2, 1)
    text = "It rained, and the river rose a little more. " * 12 + "Why?"
    long = list(chat.prompt_ids([Message("user", text)]))
    assert 128 < len(long) < 256, "a whole block of the prefix cache, and some"
    samplers: list[VLLMSampler] = []
    due: dict[int, Answer] = {}

    def answers_as_it_should(user: int) -> None:
        (r,) = samplers[user].sample([long], [0], greedy=True)
        assert same((r.token_ids, torch.tensor(r.logprobs)), due[user]), (user, r.versions)

    def learns(user: int, version: int) -> None:
        redraw(model, seed=1000 * version + user)
        ids = greedy(model, long, 8)
        due[user] = ids, logprobs(model, long, ids)
        if version:
            samplers[user].update(Engine(model), version)  # pyright: ignore
        else:
            settings = {"tokens": 8, "patience": 20.0}
            out = tmp_path / str(user)
            samplers.append(made(server, Engine(model), smollm2, out, chat, **settings))
        answers_as_it_should(user)

    users = range(holds + 2)
    for user in users:
        learns(user, 0)
    for version in (1, 2):
        for user in users[:2]:
            learns(user, version)
    assert not any(same(*pair) for pair in combinations(due.values(), 2))
    for user in users:  # the one that was asked least recently
        answers_as_it_should(user)

    named = call(server, "adapters")
    assert named == {s.sent[-1].label: str(s.sent[-1].folder) for s in samplers}
    assert all((Path(folder) / "adapter_model.safetensors").is_file() for folder in named.values())
    for user, s in enumerate(samplers):
        kept = (1, 2) if user < 2 else (0,)  # the newest, and the one before
        assert {f.name for f in s.versions.root.iterdir()} == {f"{s.run}-{v}" for v in kept}
    for s in samplers:
        s.close()
    assert call(server, "adapters") == {} and not list(tmp_path.glob("*/serving"))


def test_a_run_goes_on_while_its_server_is_killed_and_started_again(server, smollm2, tmp_path):
    prompts = online.make_prompts(tmp_path / "prompts.txt", 24)
    (tmp_path / "run.toml").write_text(f'[sampler]\nkind = "VLLM"\nurls = ["{server.url}"]\n')
    out = tmp_path / "run"
    common = ["--engine", "transformers", *COMMON]
    how = {"phases": ("concise:3",)}
    argv = online.command(
        smollm2, prompts, out, "--config", str(tmp_path / "run.toml"), *common, **how
    )
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(argv, env={**os.environ, **runs.ENV}, stdout=log, stderr=log)
    wait_for(out / "rollouts" / "update-000001.parquet", run)
    server.kill()
    server.start()
    assert run.wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
    rows = runs.read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert max(row["sampler/gap"] for row in rows) < NEAR
    assert all(row["rollouts/staleness"] == 0 and row["seconds/sync"] >= 0 for row in rows)
    said = online.records(out)
    assert len({r.id for r in said}) == len(said) == 18
    assert len({r.prompt_id for r in said}) == 18
    assert [r.version for r in said] == [n for n in (0, 1, 2) for _ in range(6)]
    assert not (out / "serving").exists()

    again = online.command(
        smollm2, prompts, tmp_path / "again", *common, "--replay", str(out), **how
    )
    subprocess.run(again, env={**os.environ, **runs.ENV}, check=True, capture_output=True)
    for row, replayed in zip(rows, runs.read_metrics(tmp_path / "again"), strict=True):
        assert replayed["loss"] == pytest.approx(row["loss"], abs=1e-4)


def test_a_run_that_samples_while_it_trains_is_never_further_behind_than_it_may(
    server, smollm2, tmp_path
):
    prompts = online.make_prompts(tmp_path / "prompts.txt", 24)
    (tmp_path / "run.toml").write_text(
        f'[sampler]\nkind = "VLLM"\nurls = ["{server.url}"]\nstaleness = 1\n'
        '[objective]\nkind = "SampledToken"\nimportance_clip = 2.0\n'
    )
    common = ["--engine", "transformers", "--config", str(tmp_path / "run.toml"), *COMMON]
    rows = online.online(smollm2, prompts, tmp_path / "run", *common, phases=("concise:3",))
    assert [row["rollouts/staleness"] for row in rows] == [0, 1, 1]
    assert rows[0]["sampler/gap"] < NEAR < rows[2]["sampler/gap"] < 0.5
    said = online.records(tmp_path / "run")
    assert len({r.id for r in said}) == 18
    assert all(r.update - 2 <= v < r.update for r in said for v in r.versions)


def test_users_share_a_server_each_with_their_own_adapters(server, smollm2, tmp_path):
    # adapters do not stand on what the run before left
    call(server, "load_weights", Path(smollm2), "default", None)
    prompts = online.make_prompts(tmp_path / "prompts.txt", 24)
    (tmp_path / "run.toml").write_text(
        f'[sampler]\nkind = "VLLM"\nsync = "adapters"\nurls = ["{server.url}"]\n'
        f"[lora]\nrank = {RANK}\nalpha = 16.0\n"
    )
    options = ["--config", str(tmp_path / "run.toml"), *COMMON]
    options += ["--users", "alice=concise:2", "bob=detailed:2"]
    options += ["--optimizer.lr", "1e-3"]
    argv = online.arguments(smollm2, prompts, tmp_path / "store", *options, phases=())
    with runs.as_alone():
        main(["online", *argv])
    folders = {name: tmp_path / "store" / "users" / name for name in ("alice", "bob")}
    for folder in folders.values():
        rows = runs.read_metrics(folder)
        assert [row["step"] for row in rows] == [1, 2]
        # the second answers are of adapters that have learned: another's would not fit
        assert max(row["sampler/gap"] for row in rows) < NEAR
        assert {v for r in online.records(folder) for v in r.versions} == {0, 1}
        assert not (folder / "serving").exists()
    alice, bob = (load_file(f / "export" / "adapter_model.safetensors") for f in folders.values())
    assert any(not torch.equal(alice[name], bob[name]) for name in alice)
    assert call(server, "adapters") == {}


def wait_for(path: Path, run: subprocess.Popen) -> None:
    until = time.monotonic() + 300
    while not path.is_file():
        assert run.poll() is None and time.monotonic() < until, "the run ended early"
        time.sleep(0.2)
