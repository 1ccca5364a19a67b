"""README's commands and Python run as they stand, and the kernels' example does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from helpers import hub, runs, tiny

ROOT = Path(__file__).parents[1]
NAME = "Qwen/Qwen3-0.6B"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.fixture
def newcomer(models, tmp_path):
    """A newcomer's clone, and a hub that serves a tiny model under the name that README uses."""
    folder = Path(tiny.make_model(tmp_path / "on-the-hub"))
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 8192
    config.save_pretrained(folder)
    clone, commands = tmp_path / "clone", tmp_path / "bin"
    for path in (clone, commands):
        path.mkdir()
    (clone / "examples").symlink_to(ROOT / "examples")
    sdpo = commands / "sdpo"
    sdpo.write_text(f'#!/bin/sh\nexec {sys.executable} -m sdpo "$@"\n')
    sdpo.chmod(0o755)
    with hub.serve(NAME, folder) as (address, _):
        yield (
            clone,
            {
                **runs.ENV,
                "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
                "HF_ENDPOINT": address,
                "HF_HUB_CACHE": str(tmp_path / "cache"),
                "HF_HUB_OFFLINE": "0",
            },
        )


@pytest.mark.slow
def test_commands_and_python_as_pasted_one_after_the_other(newcomer):
    clone, env = newcomer
    commands = next(block for block in blocks("README.md", "") if "pip install" in block)
    _, installed, script = commands.partition("pip install -e '.[train]'\n")
    assert installed, "the environment of this test is what these lines make"
    (python,) = blocks("README.md", "python")
    check = "assert all(p.grad is not None and p.grad.any() for p in model.parameters())\n"
    for argv in (["bash", "-ec", script], [sys.executable, "-c", python + check]):
        result = subprocess.run(argv, cwd=clone, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert (clone / "runs/first/export/model.safetensors").is_file()
    assert len(runs.read_metrics(clone / "runs/first")) == 3
    assert len((clone / "signal.jsonl").read_text().splitlines()) == 24


def test_the_kernels_example(tmp_path):
    example, _ = blocks("kernels/README.md", "python")  # the other needs ranks
    lm_head = torch.nn.Linear(8, 20, bias=False)
    hidden = torch.randn(6, 8, requires_grad=True)
    scope = {
        "lm_head": lm_head,
        "student_hidden": hidden,
        "teacher_hidden": torch.randn(6, 8),
        "targets": torch.randint(20, (6,)),
        "token_weights": torch.rand(6),
    }
    exec(example, scope)
    assert hidden.grad is not None and lm_head.weight.grad is not None
