"""`sdpo signal` against transformers: full logits, one unpadded sequence at a time, float32."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import runs, tiny
from sdpo.analysis.conditions import Case, iter_cases, write_cases
from sdpo.analysis.effects import Tally
from sdpo.analysis.figure import draw
from sdpo.analysis.signal import coloured
from sdpo.cli import main
from sdpo.hindsight import hindsight_prompt
from sdpo.interactions import read_interactions
from sdpo.io.figures import figure_bytes


def direct(model, tokenizer, messages, completion):
    """log-probabilities of the right-stripped completion and EOS, by the obvious computation."""
    chat = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(completion.rstrip(), add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].float()
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return answer, logp.gather(-1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("kind", "pad_is_eos"),
    [("qwen3", False), ("qwen3-tied", True), ("llama", True), ("llama-tied", False)],
)
def test_signal_equals_a_direct_computation(kind, pad_is_eos, models, tmp_path):
    folder = models(kind, pad_is_eos=pad_is_eos)
    data = tiny.make_interactions(tmp_path / "i.jsonl", 23, seed=5)
    out = tmp_path / "signal.jsonl"
    arguments = f"signal --model {folder} --interactions {data} --out {out} --batch-tokens 900"
    main(arguments.split())
    rows = [json.loads(line) for line in out.read_text().splitlines()]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    interactions = read_interactions(data)
    assert [r["id"] for r in rows] == [i.id for i in interactions]
    for row, i in zip(rows, interactions, strict=True):
        answer, policy = direct(model, tokenizer, i.prompt, i.response)
        noted = hindsight_prompt(i.prompt, i.followup, "paper-offline")
        _, hindsight = direct(model, tokenizer, noted, i.response)
        assert row["token_ids"] == answer and "".join(row["tokens"]) == tokenizer.decode(answer)
        for name, expected in (
            ("logp_policy", policy),
            ("logp_hindsight", hindsight),
            ("advantage", hindsight - policy),
        ):
            assert (torch.tensor(row[name]) - expected).abs().max() < 1e-4, name


@pytest.mark.parametrize("kind", ["qwen3", "llama-tied"])
def test_every_condition_equals_a_direct_computation(kind, models, tmp_path):
    """And numbers and figure are made of what is written."""
    folder = models(kind)
    rows = read_interactions(tiny.make_interactions(tmp_path / "i.jsonl", 20, seed=6))
    data, out = tmp_path / "named.jsonl", tmp_path / "signal.jsonl"
    named = {"irrelevant": "the red fox lives in paris"}
    write_cases(data, (Case(interaction=i, followups=named, kind=i.id[-1]) for i in rows))
    words = f"signal --model {folder} --interactions {data} --out {out} --seed 2 --rows 7"
    words += f" --json {tmp_path / 'signal.json'} --figure {tmp_path / 'signal.svg'} --scale paper"
    main(words.split())
    found = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cases = iter_cases(str(data), swap=True, by="kind", seed=2)
    moved, tally = {}, Tally()
    for row, case in zip(found, cases, strict=True):
        i = case.interaction
        _, policy = direct(model, tokenizer, i.prompt, i.response)
        assert row["id"] == i.id and row["kind"] == i.id[-1]
        under = {}
        for name, text in case.texts.items():
            noted = hindsight_prompt(i.prompt, text, "paper-offline")
            _, hindsight = direct(model, tokenizer, noted, i.response)
            assert row["conditions"][name]["followup"] == text
            under[name] = row["conditions"][name]["advantage"]
            assert (torch.tensor(under[name]) - (hindsight - policy)).abs().max() < 1e-4, name
        assert row["advantage"] == under["own"]
        moved |= {name: moved.get(name, 0) + sum(map(abs, a)) for name, a in under.items()}
        tally.add(under, conversation=row["conversation"], kind=row["kind"])
    assert len({round(total, 3) for total in moved.values()}) == 4, "conditions differ"

    effects = tally.effects(2)
    told = json.loads((tmp_path / "signal.json").read_text())
    expected = json.loads(json.dumps(asdict(effects)))
    assert {name: told[name] for name in expected} == expected
    assert told["verdict"] == effects.verdict and told["dtype"] == "float32 and float32"
    drawn = figure_bytes(draw(found[:7], scale="paper"), ".svg")
    assert (tmp_path / "signal.svg").read_bytes() == drawn


def test_a_killed_comparison_goes_on_and_another_seed_is_refused(models, tmp_path, capsys):
    data = tiny.make_interactions(tmp_path / "i.jsonl", 70)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    words = ["signal", "--model", models("qwen3"), "--interactions", data]
    words += ["--json", str(tmp_path / "signal.json")]
    main([*words, "--out", str(whole)])
    numbers = (tmp_path / "signal.json").read_text()

    def killed_at_the_end(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sdpo.analysis.signal._write", killed_at_the_end)
        main([*words, "--out", str(killed)])
    journal = tmp_path / "killed.jsonl.partial"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:40]))  # in the first chunk's middle
    told = runs.refused(capsys, *words, "--out", killed, "--seed", "1")
    assert "differs from this one in seed (0 then, 1 now)" in told
    assert "compared (true then, null now)" in runs.refused(capsys, *words[:5], "--out", killed)
    main([*words, "--out", str(killed)])
    assert "39 of 70 interactions have been read already" in capsys.readouterr().err
    assert killed.read_bytes() == whole.read_bytes() and not journal.exists()
    assert (tmp_path / "signal.json").read_text() == numbers


def test_a_figure_of_another_format_is_refused_before_anything_is_read(tmp_path, capsys):
    words = ["signal", "--model", "none", "--interactions", "none", "--out", tmp_path / "out"]
    assert "must end in .svg or .png" in runs.refused(capsys, *words, "--figure", "a.pdf")


def test_colours_follow_the_sign():
    row = dict(tokens=["good", "bad"], advantage=[2.0, -2.0])
    text = coloured(row)  # pyright: ignore[reportArgumentType]
    backgrounds = [span.style for span in text.spans]
    assert backgrounds == ["on rgb(0,160,0)", "on rgb(160,0,0)"]


def test_nothing_half_written_is_left_behind(models, tmp_path, capsys):
    data = tmp_path / "i.jsonl"
    tiny.make_interactions(data, 3)
    with data.open("a") as f:
        f.write('{"prompt": \n')
    out = tmp_path / "signal.jsonl"
    with pytest.raises(SystemExit, match="2"):
        main(f"signal --model {models('qwen3')} --interactions {data} --out {out}".split())
    assert "line 4" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["i.jsonl"]


@pytest.mark.parametrize("command", ["signal", "data score", "check-hindsight"])
def test_log_probabilities_that_are_not_finite_are_refused(command, models, tmp_path, capsys):
    """Finite weights whose logits overflow."""
    folder = tmp_path / "model"
    shutil.copytree(models("qwen3"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 1e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    data = tiny.make_interactions(tmp_path / "i.jsonl", 20)
    words = [*command.split(), "--model", folder, "--interactions", data]
    words += ["--json" if command == "check-hindsight" else "--out", tmp_path / "out"]
    told = runs.refused(capsys, *words)
    assert "interaction c0: its log-probabilities are not finite" in told
    assert "Try --dtype float32" in told
    assert not list(tmp_path.glob("out*"))
