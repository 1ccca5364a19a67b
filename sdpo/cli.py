"""`sdpo …`: each command is a module's `main`, imported when it is called."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from .data.cli import chosen
from .errors import SdpoError

COMMANDS = {
    "data": (
        "sdpo.data.cli",
        "conversation logs to interactions: prepare, inspect, validate, score, trace",
    ),
    "train": (
        "sdpo.train.command",
        "train a model on interactions; run it under torchrun on many GPUs",
    ),
    "export": ("sdpo.train.export", "write a checkpoint of a run as a Hugging Face folder"),
    "check-hindsight": (
        "sdpo.analysis.check_hindsight",
        "whether a model makes use of follow-ups at all",
    ),
    "signal": ("sdpo.analysis.signal", "what each follow-up says about each token of a response"),
    "demo": ("sdpo.demo.main", "the whole method on a tiny chat world, on any machine"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Dispatch to a command; what the user can mend ends in one line and exit status 2."""
    name, args = chosen("sdpo", COMMANDS, args)
    module = importlib.import_module(COMMANDS[name][0])
    run(lambda: module.main(args))


def run(command: Callable[[], object]) -> None:
    """Call ``command``; an SdpoError is printed in one line and ends with exit status 2."""
    try:
        command()
    except SdpoError as error:
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"sdpo: error: {rank}{error}", file=sys.stderr)
        raise SystemExit(2) from None
