"""Real conversations read by a real model: against transformers, one sequence at a time."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import runs
from real.conftest import prepared
from sdpo.analysis.cases import AnswerOptions, signal_cases
from sdpo.analysis.options import ReaderOptions
from sdpo.analysis.signal import CompareOptions, read_signal
from sdpo.batching import BatchConfig, Cursor, collate, micro_batches
from sdpo.cli import main
from sdpo.hindsight import Encoded, HindsightConfig, encode
from sdpo.interactions import Interaction, read_interactions
from sdpo.step import score
from sdpo.train.trainer import RunState
from sdpo_parallel.build import build_engine
from sdpo_parallel.engine import EngineConfig
from sdpo_parallel.huggingface import load_tokenizer
from sdpo_parallel.rows import Rows
from sdpo_parallel.transformers.engine import load_model

COUNT, CHARACTERS = 24, 500
"""Interactions that are read, and their longest: this is to end in minutes."""


@pytest.fixture(scope="module")
def data(sharegpt, tmp_path_factory) -> str:
    """The first short interactions of the ShareGPT file, as `sdpo data prepare` makes them."""
    folder = tmp_path_factory.mktemp("sharegpt")
    whole, short = Path(prepared(sharegpt, folder, "all-turns", 600)), folder / "short.jsonl"
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    read = zip(lines, read_interactions(str(whole)), strict=True)
    rows = [line for line, i in read if characters(i) <= CHARACTERS]
    short.write_text("".join(rows[:COUNT]), encoding="utf-8")
    return str(short)


def characters(i: Interaction) -> int:
    """Characters of an interaction."""
    return sum(len(text) for text in (*(m.content for m in i.prompt), i.response, i.followup))


@pytest.fixture(scope="module")
def encoded(data, smollm2) -> list[Encoded]:
    tokenizer = load_tokenizer(smollm2)
    return [encode(i, tokenizer, HindsightConfig()) for i in read_interactions(data)]


@pytest.fixture(scope="module")
def expected(encoded, smollm2) -> list[tuple[Tensor, Tensor]]:
    """log p of every response token without and with the follow-up: float32 log-softmax of
    transformers' logits, a sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()

    @torch.no_grad()
    def log_probs(prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]

    return [(log_probs(e.policy, e.response), log_probs(e.hindsight, e.response)) for e in encoded]


def test_signal_equals_transformers(data, smollm2, encoded, expected, tmp_path):
    out = tmp_path / "signal.jsonl"
    main(["signal", "--model", smollm2, "--interactions", data, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [e.id for e in encoded] and len(rows) == COUNT
    for row, e, (policy, hindsight) in zip(rows, encoded, expected, strict=True):
        assert row["token_ids"] == list(e.response)
        for name, logp in (
            ("logp_policy", policy),
            ("logp_hindsight", hindsight),
            ("advantage", hindsight - policy),
        ):
            assert (torch.tensor(row[name]) - logp).abs().max() < 1e-4, (row["id"], name)
    moved = torch.cat([hindsight - policy for policy, hindsight in expected])
    assert moved.abs().mean() > 0.05, "follow-ups that say nothing would not tell the passes apart"


def test_the_torchtitan_engine_equals_transformers(smollm2, encoded, expected, tmp_path):
    config = EngineConfig(model=smollm2, run_folder=str(tmp_path), total_steps=1, max_tokens=2048)
    found = []
    with runs.as_alone():
        engine = build_engine("torchtitan", config, RunState(Cursor(1, 0), ""))
        engine.load()
        packing = BatchConfig(row_tokens=1024, micro_batch_tokens=4096)
        for batch in micro_batches(((e, 1.0) for e in encoded), packing):
            with engine.context():
                stats = score(engine.policy, batch)
            passes = (stats.logp_student, stats.logp_teacher)
            found += zip(*(logp.split(batch.lengths) for logp in passes), strict=True)
        engine.close()
    for e, ours, theirs in zip(encoded, found, expected, strict=True):
        for logp, other in zip(ours, theirs, strict=True):
            assert (logp - other).abs().max() < 1e-4, e.id


@torch.no_grad()
def test_bfloat16_states_are_the_same_bits_packed_and_one_a_row(smollm2, encoded):
    """In rows of one width, as other shapes may be summed in another order."""
    model = load_model(smollm2, dtype="bfloat16")
    assert model.packs
    batch = collate([(e, 1.0) for e in encoded[:5]], row_tokens=256).policy
    compared = 0
    for tokens_T, positions_T in zip(batch.tokens_BT, batch.positions_BT, strict=True):
        slots = torch.arange(len(tokens_T))
        packed = model.hidden_states(Rows.of(tokens_T[None], positions_T[None], slots))
        document_T = (positions_T == 0).cumsum(0)
        for document in document_T.unique():
            own = document_T == document
            if own.sum() > 1:  # not padding
                row = torch.where(own, tokens_T, 0), torch.where(own, positions_T, 0)
                alone = model.hidden_states(Rows.of(row[0][None], row[1][None], slots))
                assert torch.equal(alone[own], packed[own])
                compared += 1
    assert compared == 5 > len(batch.tokens_BT), "several documents to a row"


def test_a_real_models_signal_of_our_cases(smollm2, tmp_path):
    """Answers, numbers and figure as row R8 makes them: the file says what was read, and what
    docs/signal.md says of this model holds: what is irrelevant moves it, too."""
    data, out = tmp_path / "cases.jsonl", tmp_path / "signal.jsonl"
    signal_cases(smollm2, data, AnswerOptions(max_new_tokens=24))
    figure = tmp_path / "signal.svg"
    compare = CompareOptions(figure=str(figure), json_out=str(tmp_path / "signal.json"))
    found = read_signal(smollm2, str(data), str(out), ReaderOptions(), compare)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert found is not None and found.interactions == len(rows) == 14
    assert found.compared == ("irrelevant", "own") and list(found.kinds) == ["complaint", "praise"]
    for row, i in zip(rows, read_interactions(str(data)), strict=True):
        assert row["token_ids"] == list(i.response_token_ids or ()) and len(row["tokens"]) <= 24
    assert found.ratio is not None and found.ratio.low > 0.5, found.verdict
    own, none = (found.conditions[name]["mean_abs_advantage"].value for name in ("own", "none"))
    assert own > none > 0.1
    boxes = figure.read_text().count('id="token-')
    assert boxes == 4 * sum(len(row["tokens"]) for row in rows[:2])
