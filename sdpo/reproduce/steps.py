"""What reproducing a row takes: steps, which are commands of ours, and what each costs at most."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import tyro

from ..cli import BY_THEMSELVES, COMMANDS, DATA_COMMANDS, EVALUATE_COMMANDS
from ..errors import SdpoError
from ..evaluate.loop import Command
from ..io.files import write_text
from ..online.command import OnlineCommand
from ..online.config import OnlineConfig
from ..online.recipes import RECIPES as ONLINE
from ..train.command import parse
from ..train.config import TrainConfig
from ..train.recipes import RECIPES as TRAIN

FLOPS = 989e12 * 0.35
"""Operations a second that a GPU does in training: 35 % of an H100's dense bfloat16."""
TOKEN_SECONDS = 0.035
"""Seconds for one more token of every answer of a batch, in process."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step takes at most, reckoned and not measured.

    Attributes:
        gpu_hours: of an H100.
        calls: to servers that play users or judge.
        disk: GiB that stay.
    """

    gpu_hours: float = 0.0
    calls: int = 0
    disk: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            gpu_hours=self.gpu_hours + other.gpu_hours,
            calls=self.calls + other.calls,
            disk=self.disk + other.disk,
        )


def training(parameters: float, tokens: float, checkpoints: int = 1) -> Cost:
    """Of a run that reads so many tokens twice: 6 operations a parameter and token of the policy
    with its gradients, 2 of the hindsight pass. Checkpoints hold weights and AdamW in float32."""
    seconds = 8 * parameters * tokens / FLOPS
    disk = (checkpoints * 12 + 2) * parameters / 2**30
    return Cost(gpu_hours=seconds / 3600, disk=disk)


def answering(answers: int, tokens: int, batch: int = 32) -> Cost:
    """Of answers that are all as long as they may be."""
    return Cost(gpu_hours=answers / batch * tokens * TOKEN_SECONDS / 3600)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command.

    Attributes:
        argv: what follows ``sdpo``.
        makes: what is there when it is done.
        gpus: with more than one, `sdpo train` and `sdpo online` run under torchrun.
        config: settings for ``--config``, written as JSON before the command runs.
    """

    name: str
    argv: tuple[str, ...]
    makes: Path
    gpus: int = 1
    cost: Cost = field(default_factory=Cost)
    config: dict[str, Any] | None = None

    @property
    def config_file(self) -> Path:
        """Where ``config`` is written."""
        return self.makes.parent / f"{self.name}.config.json"

    @property
    def words(self) -> list[str]:
        """The command with its config, without the program."""
        extra = [] if self.config is None else ["--config", str(self.config_file)]
        return [*self.argv, *extra]

    def line(self) -> str:
        """The command as one would type it."""
        command, *rest = self.words
        if self.gpus > 1 and command in ("train", "online"):
            launch = f"torchrun --standalone --nproc-per-node {self.gpus} -m sdpo.{command}"
            return f"{launch} {shlex.join(rest)}"
        return f"sdpo {shlex.join(self.words)}"

    def check(self) -> None:
        """Parse the command as it would be run; nothing is run or read.

        Raises:
            SdpoError: it is none of ours, or a flag is wrong.
        """
        try:
            self._parse()
        except SystemExit:
            raise SdpoError(f"step {self.name} is no command: {self.line()}") from None

    def run(self) -> None:
        """Run the command, unless what it makes is there.

        Raises:
            SdpoError: it failed; the command says why.
        """
        if self.makes.exists():
            return
        self._write_config()
        command, *rest = self.words
        argv = [sys.executable, "-m", "sdpo", *self.words]
        if self.gpus > 1 and command in ("train", "online"):
            launch = ["-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc-per-node={self.gpus}", "-m", f"sdpo.{command}"]
            argv = [sys.executable, *launch, *rest]
        if command in ("train", "online") and list(_run_folder(rest).glob("checkpoints/step-*")):
            argv.append("--resume")
        env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if (status := subprocess.run(argv, env=env).returncode) != 0:
            raise SdpoError(
                f"step {self.name} ended with status {status}: {self.line()}. Start the same "
                "command again to go on from there"
            )

    def _write_config(self) -> None:
        if self.config is not None:
            write_text(self.config_file, json.dumps(self.config, indent=2) + "\n")

    def _parse(self) -> None:
        command, *rest = self.argv
        if command in ("train", "online"):
            kinds = {
                "train": (TRAIN, TrainConfig, Command),
                "online": (ONLINE, OnlineConfig, OnlineCommand),
            }
            recipes, kind, made = kinds[command]
            parse(rest, recipes, kind, made, command)  # pyright: ignore[reportArgumentType]
            return
        groups = {"data": DATA_COMMANDS, "evaluate": EVALUATE_COMMANDS}
        commands = COMMANDS
        if command in groups:
            commands, (command, *rest) = groups[command], rest
        target = commands[command][0]
        assert target not in BY_THEMSELVES
        function = resolve_name(f"sdpo.{target}")

        @wraps(function)
        def nothing(*args: object, **options: object) -> None:
            pass

        tyro.cli(nothing, prog=f"sdpo {command}", args=rest)


def _run_folder(rest: Sequence[str]) -> Path:
    return Path(rest[list(rest).index("--out") + 1])
