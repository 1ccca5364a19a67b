"""docs/adding-an-objective.md, block by block: what it adds works, and nowhere else is touched."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.environment import ENV

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"`(\S+\.py)`\n.*?```python\n(.*?)```", re.S)
CHECK = """
import torch
from helpers import cases
from sdpo.objective import Jeffreys, Layout, Streams, total_loss
from sdpo_kernels import reference
from sdpo_kernels.divergence import linear_jeffreys

torch.manual_seed(0)
cases.FUNCTIONS["jeffreys"] = cases._pair(linear_jeffreys)
p = cases.problem(12, 151, 48, 0.1)
options = dict(temperature=0.8, softcap=6.0)
truth = cases.oracle("jeffreys", p, **options)
logp, logq = (
    reference.log_softmax(h.double(), p.weight.double(), **options) for h in (p.hidden, p.teacher)
)
both = reference.reverse_kl(logp, logq) + reference.forward_kl(logp, logq)
torch.testing.assert_close(truth["value"], both)
for impl, known in (("torch", False), ("torch", True), ("triton", True)):
    got = cases.evaluate("jeffreys", p, known=known, impl=impl, **options)
    cases.assert_matches_the_oracle("jeffreys", p, got, k=2.5, **options)
streams = Streams(p.hidden, p.weight, p.teacher, None, p.targets)
layout = Layout(torch.zeros(12, dtype=torch.long), torch.arange(12), torch.ones(1))
loss, _ = total_loss(Jeffreys(), streams, layout)
plain = cases.oracle("jeffreys", p)["value"].mean()
torch.testing.assert_close(loss.double(), plain, rtol=1e-4, atol=0)
"""


def test_the_documented_divergence_matches_its_definition(tmp_path):
    text = (ROOT / "docs" / "adding-an-objective.md").read_text(encoding="utf-8")
    blocks = [b for part in text.split("\n## ") for b in SECTION.findall(part)[:1]]
    places = [path for path, _ in blocks if path.startswith("kernels/")]
    assert len(places) == len(set(places)) == 4
    shutil.copytree(ROOT / "kernels" / "sdpo_kernels", tmp_path / "sdpo_kernels")
    (tmp_path / "sdpo").mkdir()
    (tmp_path / "sdpo" / "__init__.py").touch()
    for name in ("objective.py", "errors.py"):
        shutil.copy(ROOT / "sdpo" / name, tmp_path / "sdpo")
    for path, code in blocks:
        if not path.startswith("tests/"):
            changed = tmp_path / path.removeprefix("kernels/")
            changed.write_text(f"{changed.read_text()}\n\n{code}")
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "parallel", ROOT / "tests")))
    env = {**ENV, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-P", "-c", CHECK]
    result = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
