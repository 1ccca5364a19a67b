"""What `sdpo train RECIPE …` and its like are told: a recipe, a file of settings, and flags.

`sdpo/evaluate/loop.py` adds the flags of what a run is evaluated on, and runs it.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

from ..errors import SdpoError
from .config import AnyRun, TrainConfig, read_settings, with_settings, with_table

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
    command: Callable[..., AnyCommand],
    name: str,
    **beside: Any,
) -> AnyCommand:
    """A command that begins with a recipe, from its arguments; None: the process's.

    Args:
        kind: of the recipes' configs.
        command: made from a config, and ``beside``.
        name: ``sdpo``'s, for usage and errors.
        beside: the command's other settings, which a file has in tables of these names.
    """
    args = sys.argv[1:] if args is None else args
    configs, args, beside = starting_points(args, recipes, kind, name, **beside)
    says = {recipe: (made.__doc__ or "").partition("\n")[0] for recipe, made in recipes.items()}
    choices = {r: (says.get(r, ""), command(config, **beside)) for r, config in configs.items()}
    return tyro.extras.overridable_config_cli(choices, prog=f"sdpo {name}", args=args)


def starting_points(
    args: Sequence[str],
    recipes: Mapping[str, Callable[..., AnyRun]],
    kind: type[AnyRun],
    command: str,
    **beside: Any,
) -> tuple[dict[str, AnyRun], list[str], dict[str, Any]]:
    """The configs that flags then override, by name; the remaining arguments; and ``beside``.

    Without ``--config`` these are the recipes; with it, the one config that the file gives.

    Args:
        kind: of the configs.
        command: ``sdpo``'s, for errors.
        beside: settings that are no part of a config, and are tables of the file.

    Raises:
        SdpoError: the file cannot be used, or neither it nor the command line names a recipe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(args)
    if found.config is None:
        return {name: recipe() for name, recipe in recipes.items()}, rest, beside
    settings = read_settings(found.config)
    for name, base in beside.items():
        beside[name] = with_table(base, settings.pop(name, {}), found.config, name)
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
    return {name: config}, [name, *rest], beside
