"""All contenders of the whole step compute one loss, and its table says what it must."""

from dataclasses import replace

import pytest
import torch

from benchmarks import step
from benchmarks.models import TINY as SIZES
from benchmarks.report import read
from benchmarks.step import LIMIT, Check, Settings, build, interactions, tokens
from benchmarks.step_contenders import contenders, padded
from benchmarks.traffic import model_flops, shape_of

SMALL = dict(models=("check",), interactions=3, prompt=12, micro_batch_tokens=128)
TINY = Settings(**SMALL, seconds=0.001, device="cpu").resolved()


@pytest.mark.parametrize("objective", ["sampled_token", "reverse_kl"])
def test_every_contender_has_the_gradients_of_full_logits_in_float64(objective):
    check = Check(Settings(objective=objective, device="cpu").resolved())
    chosen = [c for c in contenders(objective) if not c.liger]
    assert len(chosen) == 5
    for c in chosen:
        error = check.errors(c)
        assert max(error.values()) <= LIMIT, (c.name, error)


def test_another_objective_or_forgotten_tokens_are_noticed():
    to = interactions(TINY, 512), TINY.micro_batch_tokens, "cpu"
    model = build("check", TINY, torch.float32)
    chosen = {c.name: c for c in contenders("reverse_kl")}["sdpo"]
    true = step._gradients(model, chosen.loss, chosen.batches(*to))
    mutants = [
        step._gradients(model, contenders("sampled_token")[0].loss, chosen.batches(*to)),
        step._gradients(
            model,
            step.full_logits("reverse_kl"),
            [x._replace(counted_BR=torch.ones_like(x.counted_BR)) for x in padded(*to)],
        ),
    ]
    for loss, gradient in mutants:
        assert step.relative_error(loss, true[0]) > LIMIT
        assert step.relative_error(gradient, true[1]) > LIMIT


def test_a_run_measures_everyone_on_the_same_tokens(tmp_path, capsys):
    out = tmp_path / "step.jsonl"
    rows = step.run(replace(TINY, out=out))
    assert read(out) == rows
    timed = [r for r in rows if "seconds" in r]
    assert [r["verdict"] for r in timed] == ["right"] * 5
    assert len({r["tokens"] for r in timed}) == 1
    flops = {r["contender"]: r["flops"] for r in timed}
    assert flops.pop("sdpo, prefixes shared") < 0.9 * flops["sdpo"] == 0.9 * max(flops.values())
    assert len(set(flops.values())) == 1
    absent = [r for r in rows if "note" in r]
    assert len(absent) == 5 and all("needs a GPU" in r["note"] for r in absent)
    assert "sdpo, not packed" in capsys.readouterr().out


def test_a_contender_that_raises_is_named_and_the_others_go_on(monkeypatch):
    def broken(model, batch):
        raise TypeError("no such argument")

    chosen = contenders("sampled_token")
    mended = [replace(c, loss=broken) if "TRL" in c.name else c for c in chosen]
    monkeypatch.setattr(step, "contenders", lambda objective: mended)
    rows = step.run(replace(TINY, liger=False))
    assert [r["verdict"] for r in rows].count("right") == 4
    (failed,) = (r for r in rows if r["verdict"] == "failed")
    assert failed["note"] == "TypeError: no such argument"


def test_every_second_interaction_is_the_next_turn_and_is_shared():
    first, second, alone = items = interactions(TINY, 512)
    said = first.hindsight[len(first.policy) :]
    assert second.policy == first.policy + first.response + said
    assert first.conversation == second.conversation != alone.conversation
    (chosen,) = (c for c in contenders("reverse_kl") if c.name == "sdpo, prefixes shared")
    (batch,) = chosen.batches(items, 2048, "cpu")
    # the first turn's row is the beginning of the second's, and hindsight's begin as the policy's
    policy = sum(len(e.policy) + len(e.response) for e in (second, alone))
    hindsight = sum(len(e.hindsight) - len(e.policy) + len(e.response) for e in items)
    assert batch.sharing == "keys" and batch.tokens <= policy + hindsight < batch.unshared


def test_rows_of_whole_sequences_are_read_without_views():
    """`not packed`: one padded row for each document."""
    model = build("check", TINY, torch.float32)
    (chosen,) = (c for c in contenders("reverse_kl") if c.name == "sdpo, not packed")
    (batch,) = chosen.batches(interactions(TINY, 512), 2048, "cpu")
    seen = []
    model.model.register_forward_pre_hook(
        lambda _, a, k: seen.append((k["input_ids"].shape, "sdpo_view" in k)), with_kwargs=True
    )
    chosen.loss(model, batch)
    assert [(shape[0], view) for shape, view in seen[-2:]] == [(3, False)] * 2


def test_flops_are_those_of_the_matmuls():
    model = build("check", TINY, torch.float32)
    (item,) = interactions(TINY, 512)[:1]
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    (policy, hindsight, n), width = tokens(item), 2 * 4 * 16
    assert (policy, n) == (len(item.policy) + n, len(item.response))
    expected = 6 * linear * policy + 2 * linear * hindsight + 8 * 512 * 64 * n
    expected += 6 * width * policy**2 + 2 * width * hindsight**2
    flops = sum(model_flops(shape_of(SIZES["check"]), policy, hindsight, n))
    assert flops == pytest.approx(expected, rel=0.02)  # norms' weights


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="--models: 'qwen9' is none of qwen3-0.6b"):
        step.run(Settings(models=("qwen9",), device="cpu"))
