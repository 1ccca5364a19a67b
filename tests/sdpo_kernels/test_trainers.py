"""The programs of examples/: against full logits and the trainers' own losses."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.oracle import rel_err
from sdpo_kernels import reference

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments  # noqa: E402

from helpers import tiny  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *argv: str, monkeypatch: pytest.MonkeyPatch | None = None) -> dict:
    """The names that a program defines; with arguments, it also runs."""
    if monkeypatch is None:
        return runpy.run_path(str(EXAMPLES / name))
    monkeypatch.setattr(sys, "argv", [name, *argv])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def arguments(kind: type[TrainingArguments], folder: Path, **options) -> TrainingArguments:
    common = dict(
        output_dir=str(folder),
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return kind(**common, **options)


def mean_reverse_kl(
    model: PreTrainedModel,
    prompts: list[list[int]],
    hindsight_prompts: list[list[int]],
    responses: list[list[int]],
) -> Tensor:
    """By full logits, a sequence at a time, without padding."""
    values = []
    for prompt, hindsight_prompt, response in zip(
        prompts, hindsight_prompts, responses, strict=True
    ):
        logp, logq = (
            model(torch.tensor([p + response])).logits[0, len(p) - 1 : -1].log_softmax(-1)
            for p in (prompt, hindsight_prompt)
        )
        values.append(reference.reverse_kl(logp, logq.detach()))
    return torch.cat(values).mean()


def step_of(before: PreTrainedModel, after: PreTrainedModel) -> Tensor:
    """What a step changed, as one vector."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return torch.cat([(b - a).detach().flatten() for a, b in pairs]).double()


@pytest.mark.parametrize("kind", ["qwen3", "llama-tied"])
def test_the_loop_is_the_full_logits_loss_and_lowers_it(kind, models, monkeypatch, capsys):
    scope = example("plain_loop.py", "--model", models(kind), monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("step ")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(models(kind))
    sequences = scope["encode"](tokenizer)
    assert len({len(p) for p in sequences[0]}) == len({len(r) for r in sequences[2]}) == 2
    full = mean_reverse_kl(load(models(kind)), *sequences)
    assert abs(losses[0] - full) < 1e-5 * full + 5e-7  # as printed
    assert len(losses) == 10 and all(b < a for a, b in zip(losses, losses[1:], strict=False))


def rows(n: int) -> list[dict[str, list[int]]]:
    def ids(least: int, most: int) -> list[int]:
        return torch.randint(8, 448, (int(torch.randint(least, most, ())),)).tolist()

    return [
        {"prompt": ids(2, 6), "hindsight_prompt": ids(6, 12), "response": ids(1, 15)}
        for _ in range(n)
    ]


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_trainer_step_is_the_full_logits_step_however_it_is_accumulated(
    micro_batch, models, tmp_path
):
    pytest.importorskip("accelerate")
    scope = example("hf_trainer.py")
    data = rows(4)
    trained = load(models("qwen3"))
    args = arguments(
        TrainingArguments,
        tmp_path,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=4 // micro_batch,
    )
    trainer = scope["HindsightTrainer"](
        trained, args, data_collator=scope["collate"], train_dataset=data, eval_dataset=data
    )
    model = copy.deepcopy(trained)
    columns = [[row[k] for row in data] for k in ("prompt", "hindsight_prompt", "response")]
    loss = mean_reverse_kl(model, *columns)
    assert abs(trainer.evaluate()["eval_loss"] - loss) < 1e-5 * loss
    trainer.train()
    loss.backward()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(expected.parameters(), model.parameters(), strict=True):
            p -= 0.1 * q.grad
    assert rel_err(step_of(model, trained), step_of(model, expected)) < 1e-4
    assert abs(trainer.state.log_history[-2]["loss"] - loss) < 1e-4 * loss


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_lowers_the_loss(models, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    argv = ("--model", models("qwen3"), "--out", str(tmp_path), "--steps", "5")
    losses = losses_of(example("hf_trainer.py", *argv, monkeypatch=monkeypatch)["trainer"])
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_the_gkd_program_lowers_the_loss(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl.experimental.gkd")
    student, teacher = models("qwen3"), models("qwen3", seed=1)
    argv = ("--student", student, "--teacher", teacher, "--out", str(tmp_path), "--steps", "3")
    losses = losses_of(example("trl_gkd.py", *argv, monkeypatch=monkeypatch)["trainer"])
    assert len(losses) == 3 and losses[-1] < losses[0]


@pytest.mark.parametrize("items", [None, 7])
def test_trl_loss_and_step_are_trls_own(items, models, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    datasets = pytest.importorskip("datasets")
    scope = example("trl_gkd.py")
    tokenizer = tiny.make_tokenizer()
    conversation = [{"role": "user", "content": "tell me a story"}]
    data = datasets.Dataset.from_list(
        [
            {"messages": [*conversation, {"role": "assistant", "content": "the red fox " * k}]}
            for k in (1, 2, 5, 3)
        ]
    )
    start, losses, trained = load(models("qwen3")), [], []
    for trainer_of in (gkd.GKDTrainer, scope["FusedGKDTrainer"]):
        student = copy.deepcopy(start)
        args = arguments(
            gkd.GKDConfig,
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lmbda=0.0,
            beta=0.3,
        )
        trainer = trainer_of(
            model=student,
            teacher_model=load(models("qwen3", seed=1)),
            args=args,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
        )
        batch = next(iter(trainer.get_eval_dataloader()))
        assert (batch["labels"] == -100).any(1).all() and len(batch["labels"]) > 1
        with torch.no_grad():
            losses.append(trainer.compute_loss(student, batch, num_items_in_batch=items))
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        trained.append(student)
    theirs, ours = losses[:2], losses[2:]
    for a, b in zip(theirs, ours, strict=True):
        assert abs(a - b) < 1e-5 * a
    assert rel_err(step_of(start, trained[1]), step_of(start, trained[0])) < 1e-4
