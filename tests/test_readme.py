"""The README's Python runs as it stands."""

import re
from pathlib import Path

import torch

from helpers import tiny

README = Path(__file__).parent.parent / "README.md"


def test_the_loop_of_your_own_trainer(tmp_path, monkeypatch):
    short, whole = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    tiny.make_model(tmp_path / "model")
    tiny.make_interactions(tmp_path / "interactions.jsonl", 5)
    monkeypatch.chdir(tmp_path)
    scope = {"torch": torch}
    exec(whole, scope)
    assert all(p.grad is not None and p.grad.any() for p in scope["model"].parameters())
    code = [line.partition("#")[0].strip() for line in short.splitlines()]
    assert "\n".join(code) in whole, "the lines at the top are not those below"


def test_the_kernels_example(tmp_path):
    text = (README.parent / "kernels" / "README.md").read_text(encoding="utf-8")
    example, _ = re.findall(r"```python\n(.*?)```", text, re.S)  # the other needs ranks
    lm_head = torch.nn.Linear(8, 20, bias=False)
    hidden = torch.randn(6, 8, requires_grad=True)
    scope = {
        "lm_head": lm_head,
        "hidden": hidden,
        "hindsight_hidden": torch.randn(6, 8),
        "targets": torch.randint(20, (6,)),
        "weights": torch.rand(6),
    }
    exec(example, scope)
    assert hidden.grad is not None and lm_head.weight.grad is not None
