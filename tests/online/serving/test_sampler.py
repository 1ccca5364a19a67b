"""Answers come from the weights that were asked for, whatever a server does. The stand-in has each
of vLLM's traps; a test of one shows first that it is there."""

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch

from helpers.vllm_server import (
    BLOCK,
    END,
    OTHER,
    SAMPLING,
    WEIGHT,
    StandInNccl,
    serving,
    write_adapter,
    write_model,
)
from sdpo.errors import SdpoError
from sdpo.online.sampler import SamplingConfig
from sdpo.online.serving.config import VLLM
from sdpo.online.serving.sampler import VLLMSampler
from sdpo.online.serving.server import Server
from sdpo.online.serving.sync import Nccl, sync_of
from sdpo_parallel.config import LoraConfig, ParallelConfig
from sdpo_parallel.engine import Ranks

SHORT, LONG = [5, 9, 77], list(range(3, 3 + 2 * BLOCK))
BASE = 1


class Engine:
    """Exports weights whose number is ``value``."""

    ranks, device = Ranks(), torch.device("cpu")

    def __init__(self, value: int = BASE, **tensors):
        self.value, self.tensors = value, tensors

    def on_main(self, make):
        return make()

    def weights(self):
        yield OTHER, torch.zeros(2, 3)
        yield WEIGHT, torch.tensor([float(self.value)])

    def export(self, folder, *, adapters, dtype):
        assert dtype == "float32"
        if adapters:
            write_adapter(Path(folder), self.value)
        else:
            write_model(Path(folder), self.value, **self.tensors)


@pytest.fixture
def base(tmp_path):
    return write_model(tmp_path / "base", BASE)


@pytest.fixture
def made(base, tmp_path):
    """Makes a sampler of stand-ins."""

    def make(*stubs, engine=None, sampling=None, **settings):
        names = {"sync": "weights", "patience": 3.0, "timeout": 10.0} | settings
        config = SimpleNamespace(
            sampling=sampling or SamplingConfig(max_new_tokens=8),
            model=str(base),
            out=str(tmp_path / "run"),
            parallel=ParallelConfig(),
            lora=LoraConfig(rank=4 if names["sync"] == "adapters" else 0),
            hindsight=SimpleNamespace(max_prompt_tokens=1000),
        )
        servers = VLLM(urls=tuple(stub.url for stub in stubs), **names)
        chat = SimpleNamespace(end_ids={END})
        return VLLMSampler(config, servers, engine or Engine(), chat)  # pyright: ignore

    return make


def answered(sampler, *prompts):
    """The number of the body, and that of the head, behind each answer."""
    prompts = prompts or (SHORT, LONG)
    rollouts = sampler.sample(prompts, range(len(prompts)))
    assert all(r.finished and r.logprobs == (-0.5,) * 3 for r in rollouts)
    return [r.token_ids[:2] for r in rollouts]


def call(stub, method, *args):
    """One call of a `Server`, by itself."""

    async def alone():
        async with httpx.AsyncClient() as client:
            return await getattr(Server(stub.url, client), method)(*args)

    return asyncio.run(alone())


def said(stub, model, prompt=SHORT, **more):
    """What a client hears that takes no care."""
    sampling = {"max_tokens": 8, "stop_token_ids": [END]} | more
    return call(stub, "generate", str(model), prompt, sampling).token_ids[:2]


def test_answers_are_cut_where_their_limits_say(base, made):
    with serving(base) as stub:
        sampler = made(stub)
        for limits, sent in (((), [8, 8]), ((3, 1280), [3, 1280])):
            stub.calls.clear()
            sampler.answers([SHORT, LONG], [0, 1], greedy=True, limits=limits)
            asked = [body for path, body in stub.calls if path.endswith("/generate")]
            by_length = sorted(asked, key=lambda body: len(body["token_ids"]))
            assert [body["sampling_params"]["max_tokens"] for body in by_length] == sent
        sampler.close()


# Whole weights


def test_each_update_answers_with_its_own_weights(base, made):
    with serving(base) as stub:
        sampler = made(stub)
        assert answered(sampler) == [(1, 1), (1, 1)]
        for version in (1, 2, 5):
            sampler.update(Engine(10 * version), version)
            assert answered(sampler) == [(10 * version,) * 2] * 2
            assert sampler.sample([SHORT], [0])[0].versions == (version,) * 3
        assert len(list(sampler.versions.root.iterdir())) == 2  # the newest, and the one before
        sampler.close()
        assert not sampler.versions.root.exists()


def test_trap_4_a_tied_head_follows_the_body(base, made, tmp_path):
    with serving(base) as stub:
        folder = write_model(tmp_path / "new", 7)
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        assert httpx.post(f"{stub.url}/collective_rpc", json=rpc).status_code == 200
        assert said(stub, base) == (7, 1), "the stand-in has no trap"
        sampler = made(stub)
        sampler.update(Engine(8), 1)
        assert answered(sampler) == [(8, 8), (8, 8)]


def test_trap_4_a_server_without_the_extension_is_refused(base, made):
    with serving(base, extension=False) as stub, pytest.raises(SdpoError, match="extension"):
        made(stub)


def test_a_prefix_cache_of_old_weights_is_cleared(base, made, tmp_path):
    with serving(base) as stub:
        assert said(stub, base, LONG) == (1, 1)
        rpc = {"method": "reload_weights"}
        rpc["kwargs"] = {"weights_path": str(write_model(tmp_path / "new", 7))}
        httpx.post(f"{stub.url}/collective_rpc", json=rpc)
        assert said(stub, base, LONG)[0] == 1, "the stand-in has no trap"
        sampler = made(stub)
        answered(sampler)
        sampler.update(Engine(8), 1)
        assert answered(sampler, LONG) == [(8, 8)]


def test_trap_5_after_a_failed_load_the_old_weights_are_back(base, made, tmp_path):
    with serving(base) as stub:
        sampler = made(stub)
        sampler.update(Engine(4), 1)
        stub.fail_reload = 1
        with pytest.raises(SdpoError, match="has its weights from before again"):
            sampler.update(Engine(5), 2)
        assert not stub.paused and said(stub, base) == (4, 4)
    with serving(base) as stub:  # what comes of it otherwise
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": "/nowhere"}}
        assert httpx.post(f"{stub.url}/collective_rpc", json=rpc).status_code == 500
        with pytest.raises(Exception, match="EngineDead"):
            said(stub, base)
        assert stub.dead


def test_trap_5_a_server_that_cannot_go_back_stays_paused(base, made):
    with serving(base) as stub:
        sampler = made(stub)
        stub.fail_reload = 2
        with pytest.raises(SdpoError, match="restart it"):
            sampler.update(Engine(5), 1)
        assert stub.paused and not stub.dead


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"model.new.weight": torch.zeros(1)}, "model.new.weight is not in"),
        ({OTHER: torch.zeros(3, 3)}, r"is \(3, 3\), where .* has \(2, 3\)"),
    ],
)
def test_trap_5_weights_of_other_shapes_are_never_sent(base, made, tensors, says):
    with serving(base) as stub:
        sampler = made(stub)
        with pytest.raises(SdpoError, match=says):
            sampler.update(Engine(5, **tensors), 1)
        assert said(stub, base) == (1, 1)
        assert stub.count("/pause") == 1  # of the first weights


def test_trap_6_weights_with_a_hole_are_never_sent(base, made, tmp_path, monkeypatch):
    class Forgetful(Engine):
        def export(self, folder, **how):
            super().export(folder, **how)
            from safetensors.torch import save_file

            save_file({OTHER: torch.zeros(2, 3)}, Path(folder) / "model.safetensors")

    with serving(base) as stub:
        Forgetful(7).export(tmp_path / "hole", adapters=False, dtype="float32")
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "hole")}}
        assert httpx.post(f"{stub.url}/collective_rpc", json=rpc).status_code == 200
        assert said(stub, base) == (1, 1), "the stand-in has no trap"
        sampler = made(stub)
        with pytest.raises(SdpoError, match="model.body.weight is missing"):
            sampler.update(Forgetful(7), 1)


def test_a_file_that_is_not_whole_is_never_sent(base, made):
    class Cut(Engine):
        def export(self, folder, **how):
            super().export(folder, **how)
            path = Path(folder) / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-4])

    with serving(base) as stub:
        sampler = made(stub)
        with pytest.raises(SdpoError, match="not a whole safetensors file"):
            sampler.update(Cut(7), 1)


# Adapters


def test_trap_1_the_base_is_an_adapter_too(base, made, tmp_path):
    with serving(base) as stub:
        call(stub, "load_adapter", "a", write_adapter(tmp_path / "a", 6))
        assert said(stub, base) == (6, 6), "the stand-in has no trap"
        sampler = made(stub, sync="adapters", engine=Engine(0))
        assert answered(sampler) == [(0, 0), (0, 0)]
        asked = [body["model"] for path, body in stub.calls if path.endswith("generate")]
        assert str(base) not in asked[1:]


def test_trap_2_new_adapters_have_new_names_and_folders(base, made, tmp_path):
    with serving(base) as stub:
        folder = write_adapter(tmp_path / "a", 6)
        call(stub, "load_adapter", "a", folder)
        assert said(stub, "a", LONG) == (6, 6)
        call(stub, "unload_adapter", "a")
        stub.held.clear()
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_config.json").unlink()
        folder.rmdir()
        call(stub, "load_adapter", "a", write_adapter(folder, 7))
        assert said(stub, "a", LONG)[0] == 6, "the stand-in has no trap"
        sampler = made(stub, sync="adapters", engine=Engine(0))
        for version in (1, 2, 3):
            sampler.update(Engine(10 + version), version)
            assert answered(sampler) == [(10 + version,) * 2] * 2


def test_trap_3_folders_go_after_their_names(base, made, tmp_path):
    with serving(base, slots=1) as stub:
        sampler = made(stub, sync="adapters", engine=Engine(0))
        for version in range(1, 6):
            sampler.update(Engine(10 + version), version)
            assert len(stub.adapters) == 1
            assert answered(sampler, SHORT) == [(10 + version,) * 2]
            for name in list(stub.adapters):  # whoever asks for what there is
                assert said(stub, name) == (10 + version,) * 2
        assert not stub.dead
        sampler.close()
        assert not stub.adapters and not sampler.versions.root.exists()
    with serving(base, slots=1) as stub:  # what comes of it otherwise
        for value in (6, 7):
            call(stub, "load_adapter", str(value), write_adapter(tmp_path / str(value), value))
        (tmp_path / "6" / "adapter_model.safetensors").unlink()
        with pytest.raises(Exception, match="EngineDead"):
            said(stub, "6")


def test_adapters_of_a_killed_process_of_the_run_are_unloaded(base, made, tmp_path):
    with serving(base) as stub:
        made(stub, sync="adapters", engine=Engine(3))
        (old,) = stub.adapters
        call(stub, "load_adapter", "another's", write_adapter(tmp_path / "x", 9))
        sampler = made(stub, sync="adapters", engine=Engine(4))
        assert old not in stub.adapters and "another's" in stub.adapters
        assert answered(sampler) == [(4, 4)] * 2


# From GPU to GPU


@pytest.fixture
def nccl(monkeypatch):
    stand_in = StandInNccl()
    monkeypatch.setattr(
        "sdpo.online.serving.sampler.sync_of", lambda kind, base, dtype: Nccl(base, dtype, stand_in)
    )
    return stand_in


def test_weights_come_from_gpu_to_gpu(base, made, nccl):
    with serving(base, nccl=nccl) as one, serving(base, nccl=nccl, workers=2) as other:
        sampler = made(one, other, sync="nccl", engine=Engine(3))
        for version in (1, 2):
            assert answered(sampler, *[LONG] * 8) == [(sampler.version + 2 + 1,) * 2] * 8
            sampler.update(Engine(version + 3), version)
        assert answered(sampler, *[LONG] * 8) == [(5, 5)] * 8
        assert len(nccl.groups) == 1, "one group serves all updates"
        assert not sampler.versions.root.exists()
        kinds = [path.rpartition("/")[2] for path, _ in one.calls if path.startswith("POST")]
        swap = ["pause", "start_weight_update", "update_weights", "finish_weight_update", "resume"]
        at = kinds.index("pause")
        assert kinds[at : at + 5] == swap


def test_a_restarted_server_joins_a_new_group_with_the_next_update(base, made, nccl, capsys):
    with serving(base, nccl=nccl) as one, serving(base, nccl=nccl) as other:
        sampler = made(one, other, sync="nccl", engine=Engine(3))
        other.stop()
        other.start()
        before = other.count("generate")
        assert answered(sampler, *[SHORT] * 6) == [(3, 3)] * 6
        assert other.count("generate") - before <= 6, "its answers were thrown away"
        sampler.update(Engine(4), 1)
        assert len(nccl.groups) == 2
        assert said(other, base) == said(one, base) == (4, 4)
        other.stop()
        sampler.update(Engine(5), 2)
        assert "left out" in capsys.readouterr().err
        assert answered(sampler, *[SHORT] * 6) == [(5, 5)] * 6
        assert len(nccl.groups) == 3


def test_nccl_needs_gpus_and_a_server_that_takes_it(base, made, nccl, tmp_path):
    with pytest.raises(SdpoError, match="needs GPUs"):
        sync_of("nccl", tmp_path, "float32")
    with serving(base) as stub, pytest.raises(SdpoError, match="--weight-transfer-config"):
        made(stub, sync="nccl")


# Sampling


def test_trap_7_nothing_is_left_to_the_models_folder(base, made):
    with serving(base, generation_config="auto") as stub:
        assert said(stub, base)[0] < 0, "the stand-in has no trap"
        with pytest.raises(SdpoError, match="--generation-config vllm"):
            made(stub)
    with serving(base) as stub:
        sampler = made(stub)
        stub.generation_config = "auto"  # and should it be, nothing is left out
        assert answered(sampler) == [(1, 1)] * 2


def test_what_is_drawn_is_what_the_run_says(base, made):
    drawn = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_new_tokens": 6}
    with serving(base, logprobs_mode="processed_logprobs") as stub:
        sampler = made(stub, sampling=SamplingConfig(**drawn))
        sampler.sample([SHORT, LONG], [3, 2**64 - 1])
        sampler.sample([SHORT], [3], greedy=True)
        first, second, greedy = (
            body["sampling_params"] for path, body in stub.calls if path.endswith("generate")
        )
    for name, value in drawn.items():
        assert first[{"max_new_tokens": "max_tokens"}.get(name, name)] == value
    assert {first["seed"], second["seed"]} == {3, 2**63 - 1}  # vLLM takes 63 bits
    assert (greedy["temperature"], greedy["top_p"], greedy["top_k"]) == (0.0, 1.0, 0)
    assert first.keys() == greedy.keys() >= SAMPLING


def test_raw_logprobs_are_refused_where_they_are_not_those_of_the_draw(base, made):
    with serving(base) as stub:
        for other in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}):
            with pytest.raises(SdpoError, match="--logprobs-mode processed_logprobs"):
                made(stub, sampling=SamplingConfig(max_new_tokens=8, **other))


def test_an_answer_that_is_cut_says_so(base, made):
    with serving(base) as stub:
        sampler = made(stub, sampling=SamplingConfig(max_new_tokens=2))
        (rollout,) = sampler.sample([SHORT], [0])
        assert not rollout.finished and rollout.token_ids == (1, 1)


# Servers that come and go


def test_answers_keep_the_order_of_their_prompts(base, made):
    with serving(base, delay=0.01) as one, serving(base, delay=0.002) as other:
        sampler = made(one, other, concurrency=3)
        prompts = [[n] for n in range(3, 43)]
        sampler.sample(prompts, range(40))
        asked = [
            (body["token_ids"][0], body["sampling_params"]["seed"])
            for stub in (one, other)
            for path, body in stub.calls
            if path.endswith("generate")
        ]
        assert sorted(asked) == [(n + 3, n) for n in range(40)]
        assert 1 < one.most_at_once <= 3 and 1 < other.most_at_once <= 3


def test_a_busy_server_is_asked_again(base, made):
    with serving(base, busy=5) as stub:
        assert answered(made(stub), *[SHORT] * 4) == [(1, 1)] * 4


def test_a_restarted_server_gets_the_weights_before_it_answers(base, made):
    with serving(base) as stub:
        sampler = made(stub)
        sampler.update(Engine(9), 1)
        stub.stop()
        stub.start()
        assert said(stub, base) == (1, 1)
        assert answered(sampler) == [(9, 9)] * 2  # its first answers are thrown away
    with serving(base) as stub:
        adapters = made(stub, sync="adapters", engine=Engine(3))
        stub.stop()
        stub.start()
        assert answered(adapters) == [(3, 3)] * 2


def test_adapters_are_not_put_on_what_another_run_left(base, made):
    with serving(base) as stub:
        made(stub).update(Engine(9), 1)
        with pytest.raises(SdpoError, match=f"its weights are '{stub.label}'.*start it again"):
            made(stub, sync="adapters")
        assert not stub.count("load_lora_adapter")
        stub.stop()
        stub.start()
        assert answered(made(stub, sync="adapters", engine=Engine(3))) == [(3, 3)] * 2


@pytest.mark.parametrize("sync", ["weights", "adapters"])
def test_a_server_that_leaves_in_the_middle_and_comes_back(base, made, sync):
    with serving(base, delay=0.05) as stub:
        sampler = made(stub, sync=sync, concurrency=2, patience=20.0)
        sampler.update(Engine(9), 1)

        def restart():
            time.sleep(0.2)
            stub.stop()
            time.sleep(0.5)
            stub.start()

        thread = threading.Thread(target=restart)
        thread.start()
        assert answered(sampler, *[[n] for n in range(3, 27)]) == [(9, 9)] * 24
        thread.join()


def test_others_answer_for_one_that_is_gone(base, made):
    with serving(base) as stub, serving(base) as other:
        sampler = made(stub, other)
        other.stop()
        sampler.update(Engine(9), 1)
        assert answered(sampler, *[SHORT] * 6) == [(9, 9)] * 6
        other.start()
        stub.stop()
        assert answered(sampler, *[SHORT] * 6) == [(9, 9)] * 6
        other.stop()


def test_when_all_are_gone_the_run_stops_and_says_what_to_do(base, made):
    with serving(base) as stub:
        sampler = made(stub, patience=0.3)
        stub.stop()
        with pytest.raises(SdpoError, match=r"cannot be reached.*resume the run"):
            sampler.sample([SHORT], [0])


def test_a_refused_prompt_ends_the_run(base, made):
    with serving(base) as stub:
        sampler = made(stub)
        stub.max_len = 20
        with pytest.raises(SdpoError, match="maximum context length"):
            sampler.sample([LONG], [0])


def test_another_runs_weights_are_not_taken_for_ours(base, made, tmp_path):
    with serving(base) as stub:
        sampler = made(stub)
        made(stub, engine=Engine(5), folder=str(tmp_path / "another run's"))
        assert answered(sampler) == [(1, 1)] * 2


def test_a_server_left_paused_by_a_killed_run_goes_on(base, made):
    with serving(base) as stub:
        httpx.post(f"{stub.url}/pause?mode=keep")
        assert answered(made(stub, sync="adapters", engine=Engine(2))) == [(2, 2)] * 2


def test_a_key_goes_with_every_call(base, made, monkeypatch):
    with serving(base) as stub:
        with pytest.raises(SdpoError, match="A_KEY is not set"):
            made(stub, key_variable="A_KEY")
        monkeypatch.setenv("A_KEY", "secret")
        assert answered(made(stub, key_variable="A_KEY")) == [(1, 1)] * 2
        assert set(stub.keys[-5:]) == {"Bearer secret"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"urls": ()}, "at least one"),
        ({"urls": ("localhost:8000",)}, "http://"),
        ({"urls": ("http://a/v1",)}, "path"),
        ({"urls": ("http://a", "http://a")}, "twice"),
        ({"concurrency": 0}, "positive"),
    ],
)
def test_settings_that_cannot_be_meant(settings, says):
    with pytest.raises(SdpoError, match=says):
        VLLM(**settings)
    assert replace(VLLM(), sync="adapters").sync == "adapters"
