"""What `sdpo train RECIPE …` and its like are told: a recipe, a file of settings, and flags.

`sdpo/evaluate/loop.py` adds the flags of what a run is evaluated on, and runs it.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

from ..errors import SdpoError
from .config import AnyRun, TrainConfig, read_settings, with_settings

AnyCommand = TypeVar("AnyCommand")


@dataclass(frozen=True)
class TrainCommand:
    """Train a model on interactions."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    file: Annotated[str | None, tyro.conf.arg(name="config", metavar="FILE")] = None
    """TOML file of settings, or the config.json of a run's folder; flags override what it says. It
    may name the recipe, too: ``recipe = "paper-offline"``."""
    dry_run: bool = False
    """Print the resolved config, data counts, parameters and estimated memory; do not train."""
    ranks: int = 1
    """World size that --dry-run estimates memory for."""
    gpu_memory_gib: float | None = None
    """Memory of one GPU: --dry-run then fails if the estimate does not fit."""
    resume: bool = False
    """Continue from the newest checkpoint in --out."""


def parse(
    args: Sequence[str] | None,
    recipes: Mapping[str, Callable[..., AnyRun]],
    kind: type[AnyRun],
    command: Callable[[AnyRun], AnyCommand],
    name: str,
) -> AnyCommand:
    """A command that begins with a recipe, from its arguments; None: the process's.

    Args:
        kind: of the recipes' configs.
        command: made from a config.
        name: ``sdpo``'s, for usage and errors.
    """
    configs, args = starting_points(sys.argv[1:] if args is None else args, recipes, kind, name)
    says = {recipe: (made.__doc__ or "").partition("\n")[0] for recipe, made in recipes.items()}
    choices = {recipe: (says.get(recipe, ""), command(c)) for recipe, c in configs.items()}
    return tyro.extras.overridable_config_cli(choices, prog=f"sdpo {name}", args=args)


def starting_points(
    args: Sequence[str],
    recipes: Mapping[str, Callable[..., AnyRun]],
    kind: type[AnyRun],
    command: str,
) -> tuple[dict[str, AnyRun], list[str]]:
    """The configs that flags then override, by name, and the remaining arguments.

    Without ``--config`` these are the recipes; with it, the one config that the file gives.

    Args:
        kind: of the configs.
        command: ``sdpo``'s, for errors.

    Raises:
        SdpoError: the file cannot be used, or neither it nor the command line names a recipe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(args)
    if found.config is None:
        return {name: recipe() for name, recipe in recipes.items()}, rest
    settings = read_settings(found.config)
    recipe = settings.pop("recipe", None)
    if rest and rest[0] in recipes:
        recipe, *rest = rest
    if recipe is None and "kind" in settings:
        name, config = "run", with_settings(None, settings, found.config, kind)
    elif isinstance(recipe, str) and recipe in recipes:
        name, config = recipe, with_settings(recipes[recipe](), settings, found.config, kind)
    else:
        problem = "no recipe" if recipe is None else f"recipe {recipe!r} unknown"
        known = ", ".join(recipes)
        raise SdpoError(
            f'{found.config}: {problem}; write recipe = "NAME" there, or `sdpo {command} NAME '
            f"--config {found.config}`, NAME being one of {known}"
        )
    return {name: config}, [name, *rest]
