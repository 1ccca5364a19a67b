"""The launch files, as they are; SLURM's own commands are stood in for by scripts on the PATH."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import runs, tiny

LAUNCH = Path(__file__).parents[2] / "parallel" / "launch"
TWO_NODES = """#!/usr/bin/env bash
[[ "$1" == --kill-on-bad-exit=1 ]] && shift
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""
ASKED_TO_STOP = """#!/usr/bin/env bash
mkdir -p "$OUT" && touch "$OUT/stopped"
exit 143
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then echo localhost; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


@pytest.fixture
def arguments(models, tmp_path):
    data = tiny.make_interactions(tmp_path / "i.jsonl", 12)
    whole = runs.command("reverse-kl", models("qwen3"), data, tmp_path / "run")
    return whole[whole.index("train") + 1 :]


def launch(script: str, arguments: list[str], tmp_path: Path, *, srun: str = "", **environment):
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**runs.ENV, "PATH": path, "SCONTROL_LOG": str(tmp_path / "log"), **environment}
    return subprocess.run(
        [str(LAUNCH / script), *arguments], env=env, capture_output=True, text=True, timeout=300
    )


def test_one_node(arguments, tmp_path):
    result = launch("node.sh", arguments, tmp_path, RANKS="2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "export" / "config.json").is_file()
    again = launch("node.sh", arguments, tmp_path, RANKS="1")
    assert again.returncode == 0, "a finished run, started again, has nothing to do"


def slurm() -> dict[str, str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "RANKS": "1",
        "RDZV_PORT": str(port),
    }


def test_two_nodes_under_slurm(arguments, tmp_path):
    result = launch("slurm.sbatch", arguments, tmp_path, srun=TWO_NODES, **slurm())
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(runs.read_metrics(tmp_path / "run")) == 2
    manifest = (tmp_path / "run" / "checkpoints" / "step-2" / "manifest.json").read_text()
    assert '"shard": 2' in manifest
    assert not (tmp_path / "log").exists()


def test_a_stopped_run_queues_itself_again(arguments, tmp_path):
    out = str(tmp_path / "run")
    result = launch("slurm.sbatch", arguments, tmp_path, srun=ASKED_TO_STOP, OUT=out, **slurm())
    assert result.returncode == 0
    assert (tmp_path / "log").read_text() == "requeue 7\n"


def test_slurm_needs_the_runs_folder(tmp_path):
    result = launch("slurm.sbatch", ["reverse-kl"], tmp_path, **slurm())
    assert result.returncode == 2 and "--out" in result.stderr
