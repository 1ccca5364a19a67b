"""What SDPO is compared with, as whole runs: SFT on either answer, and DPO."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import runs, tiny
from sdpo.batching import collate
from sdpo.errors import SdpoError
from sdpo.hindsight import HindsightConfig, encode
from sdpo.interactions import read_interactions, write_interactions
from sdpo.objective import DPO, SFT, ReverseKL
from sdpo.online.recipes import RECIPES as ONLINE
from sdpo.step import two_pass_loss
from sdpo.train.config import TrainConfig
from sdpo.train.dry_run import load_of
from sdpo_parallel.config import EMA, Frozen
from sdpo_parallel.huggingface import load_tokenizer
from sdpo_parallel.transformers.engine import TransformersModel

N = 31
BASELINES = {"sft": [], "next": ["--objective.target", "next"], "dpo": ["--objective.beta", "0.5"]}
RECIPE = {"sft": "sft", "next": "sft", "dpo": "dpo"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "i.jsonl"
    return tiny.make_interactions(path, N, next_response=True)


def train(name: str, model: str, data: str, out, *options: str, ranks: int = 0) -> list[dict]:
    return runs.train(RECIPE[name], model, data, out, *BASELINES[name], *options, ranks=ranks)


@torch.no_grad()
def logp_of(model, tokenizer, interaction, response: str) -> torch.Tensor:
    """log p of each token of a response as transformers reads it alone, with full logits."""
    chat = [{"role": m.role, "content": m.content} for m in interaction.prompt]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    ids = tokenizer(prompt + response + "<|im_end|>", return_tensors="pt")["input_ids"]
    n = len(tokenizer(response + "<|im_end|>")["input_ids"])
    logp = torch.log_softmax(model(ids).logits.double(), -1)[0, -n - 1 : -1]
    return logp.gather(1, ids[0, -n:, None])[:, 0]


@pytest.mark.parametrize("name", BASELINES)
def test_both_engines_on_any_ranks_train_what_plain_transformers_computes(
    name, data, models, tmp_path
):
    model = models("qwen3-tied")
    titan = train(name, model, data, tmp_path / "a")
    other = train(name, model, data, tmp_path / "b", "--engine", "transformers")
    ranks = train(name, model, data, tmp_path / "c", "--batch.micro-batch-tokens", "256", ranks=2)
    assert len(titan) == -(-N // 6)
    for rows in (other, ranks):
        runs.assert_same_trajectory(titan, rows, tolerance=1e-4)

    # all in one step, so that the order plays no part
    options = ["--batch.interactions-per-step", str(N), "--engine", "transformers"]
    (row,) = train(name, model, data, tmp_path / "d", *options)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), load_tokenizer(model)
    both = [
        [logp_of(plain, tokenizer, i, r) for r in (i.response, i.next_response)]
        for i in read_interactions(data)
    ]
    losses = {
        "sft": -torch.stack([y.mean() for y, _ in both]).mean(),
        "next": -torch.stack([z.mean() for _, z in both]).mean(),
        "dpo": torch.tensor(2.0).log(),
    }
    assert row["loss"] == pytest.approx(losses[name].item(), rel=1e-5)
    read = {"sft": [0], "next": [1], "dpo": [0, 1]}[name]
    assert row["response/tokens"] == sum(len(pair[k]) for pair in both for k in read)
    assert not any(n.startswith("advantage/") or n.endswith("y/hindsight") for n in row)


def test_dpo_is_the_published_loss_with_another_reference(data, models, tmp_path):
    """Beside a reference that is not the start: loss, accuracy and margin of all pairs."""
    model, reference = models("qwen3-tied"), models("qwen3-tied", seed=3)
    options = ["--teacher", f"frozen:{reference}", "--batch.interactions-per-step", str(N)]
    rows = [
        train("dpo", model, data, tmp_path / engine, *options, "--engine", engine)[0]
        for engine in ("torchtitan", "transformers")
    ]
    tokenizer, margins = load_tokenizer(model), []
    ours, theirs = (AutoModelForCausalLM.from_pretrained(m) for m in (model, reference))
    for i in read_interactions(data):
        assert i.next_response is not None
        ratio = [
            (logp_of(ours, tokenizer, i, r) - logp_of(theirs, tokenizer, i, r)).sum()
            for r in (i.next_response, i.response)
        ]
        margins.append(0.5 * (ratio[0] - ratio[1]))
    margin = torch.stack(margins)
    loss = torch.nn.functional.softplus(-margin).mean().item()
    accuracy = (margin > 0).double().mean().item()
    assert 0.2 < accuracy < 0.8 and loss > 1, "the pairs tell models apart"
    for row in rows:
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["preference/accuracy"] == pytest.approx(accuracy)
        assert row["preference/margin"] == pytest.approx(margin.mean().item(), abs=1e-3)


@pytest.mark.parametrize(("name", "second"), [("sft", 0), ("next", 0), ("dpo", 1)])
def test_sft_has_no_second_pass_and_no_rows_for_one(
    name, second, data, models, tmp_path, monkeypatch
):
    """Each pass of a micro-batch, by whether it has a gradient: that of plain SFT has one."""
    passes = []
    read = TransformersModel.hidden_states

    def counted(model, rows, **kept):
        passes.append((torch.is_grad_enabled(), rows.tokens_BT.numel(), kept.get("keep")))
        return read(model, rows, **kept)

    monkeypatch.setattr(TransformersModel, "hidden_states", counted)
    options = ["--engine", "transformers", "--safeguard.probe-interactions", "0"]
    options += ["--batch.micro-batch-tokens", "2048"]
    rows = train(name, models("qwen3"), data, tmp_path / "r", *options)
    began = next(i for i, (gradient, *_) in enumerate(passes) if gradient)
    del passes[:began]  # the engine tries whether the model can read shared prefixes
    assert [gradient for gradient, *_ in passes] == [True, *[False] * second] * len(rows)
    assert all(kept is None for *_, kept in passes), "keys are kept that nobody reads"
    tokens = [r["tokens_per_second"] * r["seconds"] for r in rows]
    slots = [t / (1 - r["balance/padding"]) for t, r in zip(tokens, rows, strict=True)]
    assert sum(n for _, n, _ in passes) == pytest.approx(sum(slots))


@pytest.mark.parametrize("name", BASELINES)
def test_a_run_goes_on_in_another_layout(name, data, models, tmp_path):
    model, out = models("qwen3-tied"), tmp_path / "run"
    options = ["--checkpoint.interval", "1", "--checkpoint.keep", "0", "--batch.epochs", "1.5"]
    whole = train(name, model, data, tmp_path / "whole", *options)
    train(name, model, data, out, *options)
    for step in range(4, len(whole) + 1):  # as if it had stopped after three
        shutil.rmtree(out / "checkpoints" / f"step-{step}")
    train(name, model, data, out, *options, "--parallel.context", "2", "--resume", ranks=2)
    rows = runs.read_metrics(out)
    runs.assert_same_trajectory(whole, rows, tolerance=1e-4)
    assert rows[4]["loss"] != whole[3]["loss"]
    last = out / "checkpoints" / f"step-{len(whole)}" / "manifest.json"
    manifest = json.loads(last.read_text())
    assert manifest["interactions_seen"] == round(N * 1.5) and manifest["layout"]["context"] == 2


@pytest.mark.parametrize("name", ["next", "dpo"])
def test_a_file_without_the_answer_behind_the_follow_up_is_refused(
    name, data, models, tmp_path, capsys
):
    rows = read_interactions(data)
    rows[7] = replace(rows[7], next_response=None)
    path = tmp_path / "some.jsonl"
    write_interactions(path, rows)
    run = runs.arguments(RECIPE[name], models("qwen3"), str(path), tmp_path / "r", *BASELINES[name])
    for options in ([], ["--dry-run"]):
        told = runs.refused(capsys, "train", *run, *options)
        assert f"{path}, interaction c7, field `next_completion`: missing" in told, told
        assert "--next-response" in told
    runs.train("sft", models("qwen3"), str(path), tmp_path / "y")


def test_a_thought_alone_behind_the_follow_up_is_no_answer(data, models, tmp_path, capsys):
    rows = read_interactions(data)
    rows[3] = replace(rows[3], next_response="<think>a story</think>")
    path = tmp_path / "some.jsonl"
    write_interactions(path, rows)
    run = runs.arguments("dpo", models("qwen3"), str(path), tmp_path / "r")
    assert "interaction c3" in runs.refused(capsys, "train", *run)
    runs.train("sft", models("qwen3"), str(path), tmp_path / "y")


def test_teachers_that_an_objective_has_no_use_for_are_refused():
    config = TrainConfig(model="m", data="d", out="o")
    for wrong in (
        {"objective": SFT(), "teacher": EMA()},
        {"objective": SFT(), "teacher": Frozen()},
    ):
        with pytest.raises(SdpoError, match="SFT has no second pass"):
            replace(config, **wrong)
    for teacher in ({}, {"teacher": EMA()}):
        with pytest.raises(SdpoError, match="DPO compares with a reference"):
            replace(config, objective=DPO(), **teacher)
    with pytest.raises(SdpoError, match="reads no follow-ups"):
        replace(ONLINE["online"](), objective=SFT())


def test_in_a_loop_of_ones_own(data, models):
    """SFT passes over a batch that was collated for hindsight; DPO needs one of pairs."""
    folder = models("qwen3")
    tokenizer, config = load_tokenizer(folder), HindsightConfig()
    policy, reference = (
        TransformersModel(AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32))
        for f in (folder, models("qwen3", seed=3))
    )
    rows = read_interactions(data)[:4]

    def batch_of(reading, sharing="none"):
        examples = [(encode(i, tokenizer, config, reading=reading), 0.25) for i in rows]
        return collate(examples, 512, sharing=sharing, reading=reading)

    both, alone, pairs = map(batch_of, ("hindsight", "response", "pair"))
    a, b = (two_pass_loss(policy, batch, SFT()) for batch in (both, alone))
    torch.testing.assert_close(a.loss, b.loss)
    assert both.hindsight.tokens_BT.numel() and not alone.hindsight.tokens_BT.numel()
    whole, tries = (
        two_pass_loss(policy, batch_of("pair", s), DPO(), reference) for s in ("none", "tries")
    )
    torch.testing.assert_close(whole.loss, tries.loss)
    assert batch_of("pair", "tries").tokens < 0.8 * pairs.tokens, "a pair's prompt is read once"
    for objective, batch in ((DPO(), both), (ReverseKL(), alone), (ReverseKL(), pairs)):
        with pytest.raises(SdpoError, match="was not collated for"):
            two_pass_loss(policy, batch, objective, reference)
    with pytest.raises(SdpoError, match="needs a reference"):
        two_pass_loss(policy, pairs, DPO())


def test_the_dry_run_tells_what_is_read(data, models, tmp_path, capsys):
    shown = {}
    for name in BASELINES:
        run = runs.arguments(RECIPE[name], models("qwen3"), data, tmp_path / name, *BASELINES[name])
        runs.main(["train", *run, "--dry-run"])
        shown[name] = capsys.readouterr().out
        assert "hindsight prompt, tokens" not in shown[name] and "response, tokens" in shown[name]
        assert "kept keys and values:" not in shown[name]
    assert "0 of 62" in shown["dpo"] and "0 of 31" in shown["sft"]
    config = TrainConfig(model=models("qwen3"), data=data, out="o")
    loads = [load_of(replace(config, objective=o)) for o in (ReverseKL(), SFT())]
    loads.append(load_of(replace(config, objective=DPO(), teacher=Frozen())))
    assert [load.hindsight_tokens for load in loads] == [16384, 0, 16384]
    assert [load.max_tokens for load in loads] == [6144, 4096, 4096]
