"""`sdpo signal` against transformers: full logits, one unpadded sequence at a time, float32."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import runs, tiny
from sdpo.analysis.signal import coloured
from sdpo.cli import main
from sdpo.hindsight import hindsight_prompt
from sdpo.interactions import read_interactions


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
