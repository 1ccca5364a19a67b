"""The example configs start the runs that their READMEs describe."""

import re
from pathlib import Path

import pytest

from helpers import tiny
from sdpo.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    "example, model, options, gib",
    [
        ("one_gpu", "qwen3-0.6b", ["--gpu-memory-gib", "16"], 13),
        ("one_node", "qwen3-8b", ["--ranks", "8", "--gpu-memory-gib", "80"], 61),
    ],
)
def test_the_memory_is_what_the_readme_says(example, model, options, gib, tmp_path, capsys):
    config = str(EXAMPLES / example / "run.toml")
    shape = tiny.make_shape(tmp_path, model)
    main(["train", "--config", config, "--model", shape, "--dry-run", *options])
    total = re.search(r"total\s*│\s*([\d.]+)", capsys.readouterr().out)
    assert total and round(float(total[1])) == gib
    said = (EXAMPLES / example / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"estimates {gib}(\.0)? GiB", said)
