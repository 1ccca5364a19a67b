"""`pip install ./kernels` by itself: torch and triton, nothing else."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers.environment import ENV

KERNELS = Path(__file__).parents[2] / "kernels"
CALL = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from sdpo_kernels import linear_reverse_kl
hidden, lm_head = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
weights = torch.full((6,), 1 / 6)
out = linear_reverse_kl(hidden, lm_head, hidden.detach() + 1, token_weights=weights)
out.loss.backward()
assert hidden.grad.abs().sum() > 0 and lm_head.grad.abs().sum() > 0
print(*(f for m in list(sys.modules.values()) if (f := getattr(m, "__file__", None))), sep="\\n")
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip installs from ./kernels."""
    folder = tmp_path_factory.mktemp("target")
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    pip = [sys.executable, "-m", "pip", "install", *offline, "--target", str(folder)]
    subprocess.run([*pip, str(KERNELS)], check=True, capture_output=True)
    return folder


def test_it_requires_torch_and_triton_only_and_is_typed(target):
    assert {p.name.partition("-")[0] for p in target.iterdir()} == {"sdpo_kernels"}
    assert (target / "sdpo_kernels" / "py.typed").exists()
    (about,) = importlib.metadata.distributions(path=[str(target)])
    assert {Requirement(text).name for text in about.requires or []} == {"torch", "triton"}
    assert about.metadata["Name"] == "sdpo-kernels"
    assert about.metadata["License-Expression"] == "Apache-2.0"


def test_it_works_where_only_torch_and_triton_are_installed(target, tmp_path):
    for name in distributions("torch", "triton"):
        for entry in top_level(name):
            if not (tmp_path / entry.name).exists():
                (tmp_path / entry.name).symlink_to(entry)
    # -I -S: no PYTHONPATH, no site-packages
    argv = [sys.executable, "-I", "-S", "-c", CALL, str(target), str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    result = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # torch.ops and torch.classes are no files, and say so by a relative name
    imported = [p for line in result.stdout.splitlines() if (p := Path(line)).is_absolute()]
    assert target / "sdpo_kernels" / "divergence.py" in imported
    allowed = (target / "sdpo_kernels", tmp_path, Path(os.__file__).parent)
    assert not [p for p in imported if not any(map(p.is_relative_to, allowed))]


def test_the_folder_kernels_does_not_hide_hugging_faces_package(tmp_path):
    """A folder without __init__.py gives way to a package of its name, wherever that is found."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = "import sys; sys.path.insert(1, sys.argv[1]); import kernels; print(kernels.__file__)"
    argv = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(argv, env=ENV, cwd=KERNELS.parent, capture_output=True, text=True).stdout
    assert out.strip() == str(tmp_path / "kernels" / "__init__.py")


def distributions(*roots: str) -> set[str]:
    """The installed distributions that these need, themselves included."""
    found, pending = set(), {(root, "") for root in roots}
    while pending:
        name, extra = at = pending.pop()
        found.add(at)
        for text in importlib.metadata.requires(name) or []:
            r = Requirement(text)
            if r.marker is None or r.marker.evaluate({"extra": extra}):
                pending |= {(r.name, e) for e in ("", *r.extras)} - found
    return {name for name, _ in found}


def top_level(name: str) -> set[Path]:
    """What a distribution puts into site-packages."""
    distribution = importlib.metadata.distribution(name)
    parts = {f.parts[0] for f in distribution.files or []} - {"..", "__pycache__", "bin"}
    return {Path(str(distribution.locate_file(p))) for p in parts}
