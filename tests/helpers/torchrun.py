"""torchrun from a process that has imported torch and torchtitan already.

    from helpers.torchrun import torchrun
    torchrun("-m", "sdpo.train", "reverse-kl", "--model", …, ranks=2)

torchrun imports torch once and each rank imports torchtitan: on two cores that takes ten seconds,
many times what a tiny run takes. Here one process imports them and forks torchrun's own agent
(``torch.distributed.launcher``), which forks the ranks; rendezvous, process groups and environment
are torchrun's. The tests of launch files, of killed runs and of the demo start torchrun itself.
"""

import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from helpers.environment import ENV


def torchrun(
    *program: str, ranks: int, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``-m MODULE ARG…`` or ``SCRIPT ARG…`` on ``ranks`` processes and wait for them.

    Args:
        env: set beside `ENV`.
    """
    server = _server()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = [f"/proc/{os.getpid()}/fd/{f.fileno()}" for f in (out, err)]
        request = {"program": program, "ranks": ranks, "env": dict(env or {}), "files": files}
        print(json.dumps(request), file=server.stdin, flush=True)
        code = json.loads(server.stdout.readline())
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(program, code, out.read(), err.read())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with this process, which holds its stdin."""
    return subprocess.Popen(
        [sys.executable, "-m", "helpers.torchrun"],
        env=ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def serve() -> None:
    """Fork an agent for each line of stdin; answer with its exit status."""
    from sdpo_parallel.torchtitan import cpu

    cpu.prepare()
    import sdpo.train.command
    import sdpo_parallel.torchtitan.engine
    import torchtitan.trainer  # noqa: F401  as building a model does

    for line in sys.stdin:
        agent = os.fork()
        if not agent:
            code = 1
            try:
                code = _launch(**json.loads(line))
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(agent, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _launch(program: list[str], ranks: int, env: dict[str, str], files: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ |= env
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
        elastic_launch(config, _run)(program)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run(program: list[str]) -> None:
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, os.path.dirname(program[0]))
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    serve()
