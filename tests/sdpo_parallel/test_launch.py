"""The launch files, as they are; SLURM's own commands are stood in for by scripts on the PATH."""

import contextlib
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from helpers import runs, tiny
from helpers.vllm_server import write_model

LAUNCH = Path(__file__).parents[2] / "parallel" / "launch"
TWO_NODES = """#!/usr/bin/env bash
[[ "$1" == --kill-on-bad-exit=1 ]] && shift
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""
ONE_NODE = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
ASKED_TO_STOP = """#!/usr/bin/env bash
mkdir -p "$OUT" && touch "$OUT/stopped"
exit 143
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then printf "localhost\\n%.0s" 1 2 3; else echo "$@" >> "$SCONTROL_LOG"; fi
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


def free_port(several: int = 1) -> int:
    """A port that is free, as are those behind it."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            sockets = [stack.enter_context(socket.socket()) for _ in range(several)]
            sockets[0].bind(("127.0.0.1", 0))
            port = sockets[0].getsockname()[1]
            for i, s in enumerate(sockets[1:], start=1):
                s.bind(("127.0.0.1", port + i))
            return port


def slurm() -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "RANKS": "1",
        "RDZV_PORT": str(free_port()),
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


SERVER = """#!/usr/bin/env python
import sys
from pathlib import Path
from helpers.vllm_server import Stub
flags = {name: sys.argv[sys.argv.index(name) + 1] for name in ("--host", "--port")}
Path(sys.argv[0]).with_name(f"served-{flags['--port']}").write_text(" ".join(sys.argv))
Stub(Path(sys.argv[2]), host=flags["--host"], port=int(flags["--port"])).forever()
"""
LEARNER = """#!/usr/bin/env bash
echo "$CUDA_VISIBLE_DEVICES: $@" >> "$SCONTROL_LOG"
curl -s "http://127.0.0.1:$PORT/health" || exit 1
"""


@pytest.mark.parametrize(
    ("script", "srun", "environment", "ranks"),
    [
        ("online_node.sh", "", {"GPUS": "4", "SERVE": "2"}, "--nproc-per-node=2"),
        ("online_slurm.sbatch", ONE_NODE, {"SLURM_GPUS_ON_NODE": "2"}, "--nnodes=2"),
    ],
)
def test_servers_are_up_before_the_run_begins_and_gone_after_it(
    script, srun, environment, ranks, tmp_path
):
    base = write_model(tmp_path / "model", 1)
    (tmp_path / "bin").mkdir()
    for name, text in (("vllm", SERVER), ("torchrun", LEARNER)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "more.toml").write_text("[sampling]\ntemperature = 1.0\n")
    port = free_port(2)
    environment |= {"PORT": str(port), "CONFIG": str(tmp_path / "more.toml"), "WAIT": "60"}
    environment |= {"VLLM_FLAGS": "--max-model-len 99", "PYTHONPATH": runs.ENV["PYTHONPATH"]}
    out = tmp_path / "run"
    arguments = ["online", "--model", str(base), "--out", str(out)]
    result = launch(script, arguments, tmp_path, srun=srun, **slurm() | environment)
    assert result.returncode == 0, result.stderr[-3000:]
    config = tomllib.loads((tmp_path / "run.servers.toml").read_text())
    assert config["sampling"] == {"temperature": 1.0} and config["sampler"]["kind"] == "VLLM"
    assert [url.rpartition(":")[2] for url in config["sampler"]["urls"]] == [
        str(port),
        str(port + 1),
    ]
    said = (tmp_path / "log").read_text()
    assert ranks in said and f"--config {out}.servers.toml --resume" in said
    for at in (port, port + 1):
        assert "--max-model-len 99" in (tmp_path / "bin" / f"served-{at}").read_text()
        with socket.socket() as s:
            assert s.connect_ex(("127.0.0.1", at)), "its server is still there"


def test_online_files_need_a_model_and_a_folder(tmp_path):
    for script in ("online_node.sh", "online_slurm.sbatch"):
        result = launch(script, ["online"], tmp_path, GPUS="2", **slurm())
        assert result.returncode == 2 and "--out" in result.stderr
    result = launch("online_node.sh", [], tmp_path, GPUS="1")
    assert result.returncode == 2 and "one must serve" in result.stderr


def test_slurm_needs_the_runs_folder(tmp_path):
    result = launch("slurm.sbatch", ["reverse-kl"], tmp_path, **slurm())
    assert result.returncode == 2 and "--out" in result.stderr
