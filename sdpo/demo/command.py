"""`sdpo demo`: which world it runs in."""

import argparse
from collections.abc import Sequence

import tyro


def main(args: Sequence[str]) -> None:
    """Run the demo of the world that ``--world`` names with the other arguments, its own."""
    asked = argparse.ArgumentParser("sdpo demo", add_help=False, allow_abbrev=False)
    asked.add_argument("--world", choices=("smollm2", "toy"), default="smollm2")
    world, rest = asked.parse_known_args(args)
    if world.world == "toy":
        from .toy.main import command
    else:
        from .main import command
    tyro.cli(command, prog="sdpo demo", args=rest)
