"""`sdpo train RECIPE …`, and `torchrun … -m sdpo.train RECIPE …` on one node or many."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from .config import TrainConfig
from .recipes import RECIPES
from .trainer import train


@dataclass(frozen=True)
class TrainCommand:
    """Train a model on interactions."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the resolved config, data counts, parameters and estimated memory; do not train."""
    ranks: int = 1
    """Ranks that --dry-run estimates memory for."""
    gpu_memory_gib: float | None = None
    """Memory of a GPU: --dry-run then refuses what is estimated not to fit."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""


def main(args: Sequence[str] | None = None) -> None:
    """Parse and run."""
    recipes = {
        name: ((recipe.__doc__ or "").partition("\n")[0], TrainCommand(recipe()))
        for name, recipe in RECIPES.items()
    }
    command = tyro.extras.overridable_config_cli(recipes, prog="sdpo train", args=args)
    if command.dry_run:
        from .dry_run import dry_run

        dry_run(command.config, ranks=command.ranks, gpu_memory_gib=command.gpu_memory_gib)
        return
    train(command.config, resume=command.resume)


if __name__ == "__main__":
    from ..cli import run

    run(main)
