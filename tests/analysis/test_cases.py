"""Requests of ours, and a model's answers to them."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers import runs
from sdpo.analysis import cases
from sdpo.analysis.cases import AnswerOptions, requests, signal_cases
from sdpo.analysis.conditions import iter_cases
from sdpo.chat import chat_format
from sdpo.cli import main
from sdpo.errors import SdpoError
from sdpo.interactions import conversation_of, read_interactions


def test_seven_requests_with_praise_and_complaint_and_nothing_said_twice():
    made = requests()
    assert len(made) == 14 and len({r.prompt for r in made}) == 7
    assert [r.kind for r in made] == ["praise", "complaint"] * 7
    texts = [text for r in made for text in (r.followup, r.irrelevant)]
    assert len(set(texts)) == 28 and all(text == text.strip() != "" for text in texts)


def test_what_is_drawn_has_lengths_and_is_drawn_once():
    drawn = cases.draw(24, 1)
    assert drawn == cases.draw(24, 1) != cases.draw(24, 2)
    assert len({r.id for r in drawn}) == len({(r.prompt, r.kind) for r in drawn}) == 24
    plain = {r.id: r.prompt for r in requests()}
    for r in drawn:
        base = plain[r.id.partition("~")[0]]
        assert r.prompt.startswith(f"{base} ") and r.prompt.endswith(".")
    assert len(cases.draw(70, 0)) == 70
    with pytest.raises(SdpoError, match="1 to 70"):
        cases.draw(71, 0)


@torch.no_grad()
def greedy(model, prompt: list[int], ends, limit: int) -> list[int]:
    """The obvious computation."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and ids[-1] not in ends:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_answers_are_the_likeliest_tokens_whatever_the_models_config_says(models, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "cases.jsonl"
    shutil.copytree(models("qwen3"), folder)
    GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0).save_pretrained(
        folder
    )
    words = f"signal-cases --model {folder} --out {out} --max-new-tokens 9 --batch 3"
    main(words.split())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = chat_format(tokenizer)
    found = read_interactions(str(out))
    assert [i.id for i in found] == [r.id for r in requests()]
    for i in found:
        ids = greedy(model, chat.prompt_ids(i.prompt), chat.end_ids, 9)
        assert list(i.response_token_ids or ()) == ids
        assert i.response == tokenizer.decode(ids, skip_special_tokens=True)
    assert len({conversation_of(i) for i in found}) == 7


def test_the_file_says_what_is_irrelevant_and_the_seed_decides_what_is_drawn(models, tmp_path):
    options = AnswerOptions(temperature=1.0, max_new_tokens=6)
    paths = [tmp_path / name for name in "abc"]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        signal_cases(models("llama"), path, options, rows=5, seed=seed)
    first, again, other = (path.read_text() for path in paths)
    assert first == again != other
    by_id = {r.id: r for r in requests()}
    for case in iter_cases(str(paths[0]), swap=False, by="kind", seed=0):
        request = by_id[case.interaction.id.partition("~")[0]]
        assert case.texts["own"] == request.followup and case.kind == request.kind
        assert case.texts["irrelevant"] == request.irrelevant


def test_bad_options_are_refused(models, tmp_path, capsys):
    words = ["signal-cases", "--model", models("llama"), "--out", tmp_path / "out.jsonl"]
    assert "must be at least 0" in runs.refused(capsys, *words, "--temperature", "-1")
    assert "rows must be 1 to 70" in runs.refused(capsys, *words, "--rows", "0")
    assert not list(tmp_path.iterdir())
