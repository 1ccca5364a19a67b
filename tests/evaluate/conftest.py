"""What several tests evaluate on."""

import json

import pytest
from transformers import AutoModelForCausalLM

from helpers import tiny
from helpers.online import TASK
from sdpo.evaluate.benchmarks import BenchmarkConfig, Harness


@pytest.fixture(scope="session")
def questions(models, tmp_path_factory):
    """A file of rows whose right answers are those that the model gives."""
    folder, model = tmp_path_factory.mktemp("questions"), models("qwen3")
    path = tiny.make_questions(folder / "questions.jsonl", 24)
    harness = Harness(folder, {TASK: str(path)}, BenchmarkConfig())
    held = harness.held(AutoModelForCausalLM.from_pretrained(model), model)
    samples = harness._ask(TASK, None, model=held)["samples"][TASK]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for sample in samples:
        likely = max(range(5), key=lambda i: sample["filtered_resps"][i][0])
        rows[sample["doc_id"]]["answerKey"] = "ABCDE"[likely]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="package")
def pair(tmp_path_factory):
    """Folders of two tiny models, base and after."""
    folder = tmp_path_factory.mktemp("pair")
    return [tiny.make_model(folder / name, seed=n) for n, name in enumerate(("base", "after"))]
