"""`sdpo data …`: each command is a module's function, imported when it is called."""

import importlib
import sys
from collections.abc import Mapping, Sequence

import tyro

COMMANDS = {
    "prepare": ("sdpo.data.prepare.command", "turn conversation logs into interactions"),
    "inspect": (
        "sdpo.data.inspect.command",
        "look at interactions or logs: a table, JSON, a page with plots",
    ),
    "validate": ("sdpo.data.validate", "check interactions against what training needs, every row"),
    "score": ("sdpo.analysis.score", "with a model: how much each follow-up says about its answer"),
    "trace": (
        "sdpo.analysis.trace",
        "where a conversation or a user went, and which checkpoints have read it",
    ),
}


def main(args: Sequence[str] | None = None) -> None:
    """Parse and run."""
    name, args = chosen("sdpo data", COMMANDS, args)
    module = importlib.import_module(COMMANDS[name][0])
    tyro.cli(getattr(module, f"{name}_command"), prog=f"sdpo data {name}", args=args)


def chosen(
    program: str, commands: Mapping[str, tuple[str, str]], args: Sequence[str] | None
) -> tuple[str, list[str]]:
    """The command that `args` (None: the process's) begin with, and its own; else usage and exit.

    Args:
        commands: name -> (module, what it does).
    """
    args = sys.argv[1:] if args is None else list(args)
    if args and args[0] in commands:
        return args[0], args[1:]
    asked_for_help = bool(args) and args[0] in ("-h", "--help")
    out = sys.stdout if asked_for_help else sys.stderr
    print(f"usage: {program} COMMAND …   ({program} COMMAND --help tells more)\n", file=out)
    width = max(map(len, commands))
    for name, (_, says) in commands.items():
        print(f"  {name:{width}} {says}", file=out)
    raise SystemExit(0 if asked_for_help else 2)
