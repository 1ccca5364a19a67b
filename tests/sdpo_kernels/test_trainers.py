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
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    PreTrainedModel,
    TrainingArguments,
)

from helpers import tiny  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *argv: str) -> dict:
    """The names that a program defines; with arguments, it also runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *argv])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__" if argv else None)


def load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """Tiny models by kind; also a scaled one, and a softcapped one with logits of 21 and more."""
    softcapped = dict(head_dim=16, final_logit_softcapping=30.0, query_pre_attn_scalar=16)
    configs = {
        "gemma2": lambda: Gemma2Config(**tiny.SIZES, **softcapped, tie_word_embeddings=False),
        "cohere": lambda: CohereConfig(**tiny.SIZES, logit_scale=0.3, tie_word_embeddings=False),
    }

    def get(kind: str, seed: int = 0) -> str:
        if kind not in configs:
            return models(kind, seed=seed)
        where = tmp_path_factory.mktemp(f"{kind}-{seed}")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configs[kind]())
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=1.5)
        assert model(torch.arange(40)[None]).logits.abs().max() > 21 * (kind == "gemma2")
        model.save_pretrained(where)
        tiny.make_tokenizer().save_pretrained(where)
        return str(where)

    return get


def arguments(kind: type[TrainingArguments], folder: Path, **options) -> TrainingArguments:
    return kind(
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
        **options,
    )


def mean_reverse_kl(model: PreTrainedModel, *sequences: list[list[int]]) -> Tensor:
    """By full logits, a sequence at a time, without padding. Prompts, hindsight prompts and
    responses."""
    values = []
    for prompt, hindsight_prompt, response in zip(*sequences, strict=True):
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


@pytest.mark.parametrize("kind", ["qwen3", "llama-tied", "gemma2", "cohere"])
def test_the_loop_is_the_full_logits_loss_and_lowers_it(kind, folder, capsys):
    model = folder(kind)
    scope = example("plain_loop.py", "--model", model)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("step ")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    sequences = scope["encode"](tokenizer)
    assert len({len(p) for p in sequences[0]}) == len({len(r) for r in sequences[2]}) == 2
    full = mean_reverse_kl(load(model), *sequences)
    assert abs(losses[0] - full) < 1e-5 * full + 5e-7  # as printed
    assert len(losses) == 10 and all(b < a for a, b in zip(losses, losses[1:], strict=False))


def rows(n: int) -> list[dict[str, list[int]]]:
    def ids(least: int, most: int) -> list[int]:
        return torch.randint(8, 448, (int(torch.randint(least, most, ())),)).tolist()

    return [
        {"prompt": ids(2, 6), "hindsight_prompt": ids(6, 12), "response": ids(1, 15)}
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    ("micro_batch", "kind"),
    [(1, "qwen3"), (2, "qwen3"), (4, "qwen3"), (2, "gemma2"), (2, "cohere")],
)
def test_a_trainer_step_is_the_full_logits_step_however_it_is_accumulated(
    micro_batch, kind, folder, tmp_path
):
    pytest.importorskip("accelerate")
    scope = example("hf_trainer.py")
    data = rows(4)
    trained = load(folder(kind))
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
    expected = torch.cat([-0.1 * p.grad.flatten() for p in model.parameters()]).double()
    assert rel_err(step_of(model, trained), expected) < 1e-4
    assert abs(trainer.state.log_history[-2]["loss"] - loss) < 1e-4 * loss


@pytest.mark.parametrize("name", ["hf_trainer.py", "trl_gkd.py"])
def test_the_program_lowers_the_loss(name, models, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("accelerate" if name == "hf_trainer.py" else "trl.experimental.gkd")
    argv = ["--model", models("qwen3")]
    if name == "trl_gkd.py":
        argv = ["--student", models("qwen3"), "--teacher", models("qwen3", seed=1)]
    trainer = example(name, *argv, "--out", str(tmp_path), "--steps", "4")["trainer"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("items", "kind"), [(None, "qwen3"), (7, "qwen3"), (7, "gemma2"), (7, "cohere")]
)
def test_trl_loss_and_step_are_trls_own(items, kind, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    datasets = pytest.importorskip("datasets")
    scope = example("trl_gkd.py")
    question = {"role": "user", "content": "tell me a story"}
    answers = [{"role": "assistant", "content": "the red fox " * k} for k in (1, 2, 5, 3)]
    data = datasets.Dataset.from_list([{"messages": [question, a]} for a in answers])
    start, losses, trained = load(folder(kind)), [], []
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
            teacher_model=load(folder(kind, seed=1)),
            args=args,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tiny.make_tokenizer(),
        )
        batch = next(iter(trainer.get_eval_dataloader()))
        assert (batch["labels"] == -100).any(1).all() and len(batch["labels"]) > 1
        with torch.no_grad():
            losses.append(trainer.compute_loss(student, batch, num_items_in_batch=items))
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        trained.append(student)
    for theirs, ours in zip(losses[:2], losses[2:], strict=True):
        assert abs(theirs - ours) < 1e-5 * theirs
    assert rel_err(step_of(start, trained[1]), step_of(start, trained[0])) < 1e-4
