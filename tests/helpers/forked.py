"""torchrun, from a process that has imported torch and torchtitan already.

On two cores, torchrun and its ranks import for twenty seconds, and then train a tiny model for
five. Here one process imports; for each job it forks torchrun's own agent
(``torch.distributed.launcher``), which forks the ranks. Rendezvous, process groups and environment
are torchrun's. Launch files, killed runs and the demo are tested with torchrun itself.
"""

import functools
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile

from helpers.environment import ENV

IMPORTED = ("sdpo.train.command", "sdpo_parallel.torchtitan.engine", "torchtitan.trainer")
"""Last what torchtitan imports where it builds a model."""


def run(ranks: int, *program: str) -> subprocess.CompletedProcess[str]:
    """Run ``-m MODULE ARG…`` or ``SCRIPT ARG…`` on ``ranks`` processes, to the end."""
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        paths = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, err)]
        print(json.dumps([ranks, program, paths]), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(program, code, out.read(), err.read())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with this process, which holds its stdin."""
    argv = [sys.executable, "-m", "helpers.forked"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen(argv, env=ENV, **pipes)


def serve() -> None:
    """For each line of stdin fork an agent; print its exit status."""
    if importlib.util.find_spec("torchtitan"):  # the kernels' tests do without
        for name in IMPORTED:
            importlib.import_module(name)
    for line in sys.stdin:
        if not (agent := os.fork()):
            code = 1
            try:
                code = _launch(*json.loads(line))
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(agent, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _launch(ranks: int, program: list[str], paths: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    for descriptor, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="fork",
    )
    try:
        elastic_launch(config, _rank)(program)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _rank(program: list[str]) -> None:
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    serve()
