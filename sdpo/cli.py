"""`sdpo …`: each command is a module's function, imported when it is called."""

import os
import pkgutil
import sys
from collections.abc import Callable, Sequence

import tyro

from .errors import SdpoError

COMMANDS = {
    "data": ("", "conversation logs to interactions: prepare, inspect, validate, score, trace"),
    "train": ("evaluate.loop:main", "train a model on interactions; under torchrun on many GPUs"),
    "online": ("evaluate.tasks:online", "train a model on what users say to its own answers"),
    "serve": ("online.serving.command:serve", "start a vLLM server that online runs sample from"),
    "check-server": ("online.serving.command:check_server", "what a vLLM server lacks for a run"),
    "users": ("", "many users of one model: list, add, train, rollback, export, forget"),
    "snapshots": ("online.snapshots:command", "an online run's snapshots: list, export, restore"),
    "export": ("train.export:export", "write a checkpoint of a run as a Hugging Face folder"),
    "check-hindsight": (
        "analysis.check_hindsight:command",
        "whether a model uses follow-ups at all",
    ),
    "signal": (
        "analysis.signal:command",
        "what each follow-up says about each token of a response",
    ),
    "signal-cases": ("analysis.cases:command", "a model's answers to look at its signal in"),
    "evaluate": ("", "what a model is worth: preference, benchmarks, alpaca, arena, report"),
    "reproduce": ("reproduce.command:command", "an experiment of the paper, end to end"),
    "demo": ("demo.command:main", "the whole method on a real model, on any machine"),
}
DATA_COMMANDS = {
    "prepare": ("data.prepare.command:prepare_command", "turn logs into interactions"),
    "inspect": ("data.inspect.command:inspect_command", "look at interactions or logs"),
    "validate": ("data.validate:validate_command", "check every row against what training needs"),
    "score": ("analysis.score:score_command", "how much each follow-up says about its answer"),
    "trace": (
        "analysis.trace:trace_command",
        "where data went, and which checkpoints have read it",
    ),
}
USERS_COMMANDS = {
    "list": ("online.store:show", "who there is, and how far they are"),
    "add": ("online.store:add", "a user, and the phases that they go through"),
    "train": ("evaluate.tasks:train_users", "all users, in turn, as sdpo online does one"),
    "rollback": ("online.store:rollback", "put a user back to a snapshot"),
    "export": ("online.store:export", "a user's adapters, as a PEFT folder"),
    "forget": ("online.store:forget", "remove all that there is of a user"),
}
EVALUATE_COMMANDS = {
    "preference": ("evaluate.preference:command", "which of two models a persona prefers"),
    "benchmarks": ("evaluate.benchmarks:command", "lm-evaluation-harness, models side by side"),
    "report": ("evaluate.report:command", "one page and one JSON file of what was evaluated"),
    "alpaca": ("evaluate.alpaca:command", "AlpacaEval 2: raw and length-controlled win rate"),
    "arena": ("evaluate.arena:command", "Arena-Hard v2: win rate by category"),
}
"""Name -> function in this package, and what it does."""
GROUPS = {"data": DATA_COMMANDS, "users": USERS_COMMANDS, "evaluate": EVALUATE_COMMANDS}
BY_THEMSELVES = (
    "evaluate.loop:main",
    "evaluate.tasks:online",
    "demo.command:main",
    "evaluate.tasks:train_users",
)
"""Their arguments depend on a recipe or world: they parse them."""


def main(args: Sequence[str] | None = None) -> None:
    """Dispatch to a command; what the user can mend ends in one line and exit status 2."""
    args = sys.argv[1:] if args is None else list(args)
    prog, commands = "sdpo", COMMANDS
    if args and args[0] in GROUPS:
        prog, commands, args = f"sdpo {args[0]}", GROUPS[args[0]], args[1:]
    if not args or args[0] not in commands:
        asked_for_help = bool(args) and args[0] in ("-h", "--help")
        out = sys.stdout if asked_for_help else sys.stderr
        print(f"usage: {prog} COMMAND …   ({prog} COMMAND --help tells more)\n", file=out)
        for name, (_, says) in commands.items():
            print(f"  {name:15} {says}", file=out)
        raise SystemExit(0 if asked_for_help else 2)
    name, *rest = args
    command = pkgutil.resolve_name(f"{__package__}.{commands[name][0]}")
    if commands[name][0] in BY_THEMSELVES:
        run(lambda: command(rest))
    else:
        run(lambda: tyro.cli(command, prog=f"{prog} {name}", args=rest))


def run(command: Callable[[], object]) -> None:
    """Call ``command``; an SdpoError is printed in one line and ends with exit status 2."""
    try:
        command()
    except SdpoError as error:
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"sdpo: error: {rank}{error}", file=sys.stderr)
        raise SystemExit(2) from None
