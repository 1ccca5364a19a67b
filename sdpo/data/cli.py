"""`sdpo data …`: each command is a module's function, imported when it is called."""

import importlib
import sys
from collections.abc import Sequence

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
    args = sys.argv[1:] if args is None else list(args)
    if not args or args[0] not in COMMANDS:
        asked_for_help = bool(args) and args[0] in ("-h", "--help")
        out = sys.stdout if asked_for_help else sys.stderr
        print("usage: sdpo data COMMAND …   (sdpo data COMMAND --help tells more)\n", file=out)
        for name, (_, says) in COMMANDS.items():
            print(f"  {name:8} {says}", file=out)
        raise SystemExit(0 if asked_for_help else 2)
    name = args[0]
    module = importlib.import_module(COMMANDS[name][0])
    tyro.cli(getattr(module, f"{name}_command"), prog=f"sdpo data {name}", args=args[1:])
