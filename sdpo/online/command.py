"""What `sdpo online RECIPE …` is told, and what it would ask for.

`sdpo/evaluate/tasks.py` runs it, as it has the tasks that a run may be evaluated on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from ..train.command import parse
from ..train.config import local_models, to_json
from ..train.dry_run import parameter_count, show_memory
from .config import OnlineConfig
from .prompts import read_prompts
from .recipes import RECIPES
from .run import online, split
from .serving.config import InProcess
from .talk import due
from .tasks import MakeTasks, asked
from .users.personas import load_persona


@dataclass(frozen=True)
class OnlineCommand:
    """Train a model on what its users say to its own answers."""

    config: Annotated[OnlineConfig, tyro.conf.arg(name="")]
    file: Annotated[str | None, tyro.conf.arg(name="config", metavar="FILE")] = None
    """TOML file of settings, or the config.json of a run's folder; flags override what it says. It
    may name the recipe, too: ``recipe = "online"``."""
    dry_run: bool = False
    """Print the resolved config and how many answers, replies and tokens the run will take."""
    ranks: int = 1
    """World size that --dry-run estimates memory for."""
    gpu_memory_gib: float | None = None
    """Memory of one GPU: --dry-run then estimates what a rank needs, the sampler's copy of the
    model included, and fails if it does not fit."""
    resume: bool = False
    """Continue from the newest checkpoint in --out."""


def main(args: Sequence[str] | None = None, tasks: MakeTasks | None = None) -> None:
    """Parse and run; ``tasks`` as `online` takes it."""
    command = parse(args, RECIPES, OnlineConfig, OnlineCommand, "online")
    if command.dry_run:
        dry_run(command.config, ranks=command.ranks, gpu_memory_gib=command.gpu_memory_gib)
        return
    online(command.config, resume=command.resume, tasks=tasks)


def dry_run(config: OnlineConfig, *, ranks: int = 1, gpu_memory_gib: float | None = None) -> None:
    """Print the config and what the run will ask for, of a GPU's memory, too, where that is given;
    nothing is loaded but prompts, personas and the model's config.json.

    Raises:
        SdpoError: the prompts or a persona cannot be read; or as `show_memory` does.
    """
    console = Console()
    console.print_json(json.dumps(to_json(config)))
    training, held_out = split(read_prompts(config.prompts, config.system), config)
    per_update = config.batch.interactions_per_step
    table = Table("phase", "persona", "rule", "updates", "answers and replies")
    for number, phase in enumerate(config.schedule, start=1):
        persona = load_persona(phase.persona)
        rule = "yes" if persona.rule is not None else "no: a judge is needed"
        answers = phase.updates * per_update
        table.add_row(str(number), persona.name, rule, str(phase.updates), f"{answers:,}")
    console.print(table)
    looks = 1 + sum(due(config, update) for update in range(1, config.updates + 1))
    sampled = config.updates * per_update + looks * len(held_out)
    console.print(
        f"{len(training):,} prompts to train on, {len(held_out):,} held out; {sampled:,} answers "
        f"in all, at most {sampled * config.sampling.max_new_tokens:,} tokens"
    )
    if config.evaluate.tasks:
        console.print(f"{asked(config.evaluate)} at each of {looks:,} evaluations")
    if gpu_memory_gib is not None:
        local = local_models(config)
        beside = _sampler(local)
        show_memory(console, local, ranks, gpu_memory_gib=gpu_memory_gib, beside=beside)


def _sampler(config: OnlineConfig) -> dict[str, int]:
    """Bytes of the sampler on each rank: a copy of the model. What it keeps of answers while it
    makes them goes before activations come."""
    if not isinstance(config.sampler, InProcess):
        return {}
    item = 4 if config.parallel.resolve_dtype("cuda") == "float32" else 2
    return {"sampler's copy of the model": item * parameter_count(config.model)}
