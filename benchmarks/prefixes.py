"""What is saved by reading each shared prefix once: slots, and the time of real steps.

    python -m benchmarks.prefixes MODEL INTERACTIONS [--unit conversation] [--steps 5]
    python -m benchmarks.prefixes MODEL INTERACTIONS --count-only [--conversations 400]

The first draws steps of real interactions and takes each with rows that hold whole sequences and
with rows that share prefixes, by turns, in one process, with the same weights: passes, backward,
clipping and AdamW, whose learning rate is too small to move a weight. Nothing counts unless loss
and gradient norm agree. On a CPU times are the process's, which neighbours on a machine move less
than the clock on the wall. The second only counts slots, by cost: a slot of the policy's pass has a
backward and counts three, one of hindsight's counts one.

Both kinds of rows are read by one engine and its attention. Where whole sequences would be read by
flash-attn (`--batch.share-prefix none` on a GPU), that is not what is compared here.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Spread, machine
from benchmarks.report import Output, grid
from benchmarks.slots import Slots, UnitName, count, summed
from benchmarks.step_contenders import IGNORE_FIRST, OBJECTIVES, ObjectiveName
from sdpo.batching import Batch, BatchConfig, Cursor, Example, assign, collate
from sdpo.hindsight import HindsightConfig, encode
from sdpo.interactions import Interaction, conversation_of, read_interactions
from sdpo.step import two_pass_loss
from sdpo.train.config import TEACHER
from sdpo.train.trainer import RunState
from sdpo_parallel.build import EngineName, build_engine
from sdpo_parallel.config import Live, OptimizerConfig, ParallelConfig, Teacher
from sdpo_parallel.engine import Engine, EngineConfig
from sdpo_parallel.huggingface import load_tokenizer
from sdpo_parallel.rows import Sharing

LIMIT = 1e-4
"""Relative difference of loss or gradient norm beyond which the two do not compute the same."""


@dataclass(frozen=True, kw_only=True)
class Settings(Output):
    """The steps that are taken, or what is counted."""

    model: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder; counting needs no more of it than its tokenizer."""
    data: Annotated[Path, tyro.conf.Positional]
    """Interactions as `sdpo data prepare` writes them."""
    unit: UnitName = "interaction"
    """What a step draws: single interactions, or conversations with all their turns."""
    steps: int = 5
    rounds: int = 1
    """How often each step is taken either way; the fastest counts."""
    per_step: int = 8
    """Interactions of a step; of conversations, as many as make so many turns."""
    seed: int = 0
    """Of the order in which they are drawn."""
    count_only: bool = False
    """No step is taken: slots are counted, and the model's weights are not read."""
    conversations: int = 400
    """With ``count_only``: the first so many of the file; 0: all."""
    engine: EngineName = "transformers"
    teacher: Annotated[Teacher, TEACHER] = field(default_factory=Live)
    """A live one reads on the policy's keys and values; of others each pass shares by itself."""
    objective: ObjectiveName = "sampled_token"
    micro_batch_tokens: int = 8192
    row_tokens: int = 8192
    """Of rows with whole sequences."""
    activation_checkpoint: Literal["none", "selective", "full"] = "none"

    def __post_init__(self):
        for name in ("steps", "rounds", "per_step", "micro_batch_tokens", "row_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def packing(self) -> BatchConfig:
        return BatchConfig(
            interactions_per_step=self.per_step,
            row_tokens=self.row_tokens,
            micro_batch_tokens=self.micro_batch_tokens,
        )


# ---- which interactions --------------------------------------------------------------------------
def draw(items: Sequence[Interaction], settings: Settings) -> list[list[Interaction]]:
    """The interactions of each step.

    Raises:
        ValueError: there are too few.
    """
    groups: dict[Any, list[Interaction]] = {}
    for n, item in enumerate(items):
        name = conversation_of(item) if settings.unit == "conversation" else n
        groups.setdefault(name, []).append(item)
    names = list(groups)
    order = iter(np.random.default_rng(settings.seed).permutation(len(names)))
    steps: list[list[Interaction]] = []
    for _ in range(settings.steps):
        step: list[Interaction] = []
        while len(step) < settings.per_step:
            if (at := next(order, None)) is None:
                short = f"{len(items)} interactions are too few for {settings.steps} steps"
                raise ValueError(f"{settings.data}: {short}; take fewer, or smaller ones")
            step += groups[names[at]]
        steps.append(step)
    return steps


def first_conversations(items: Iterable[Interaction], most: int) -> list[Interaction]:
    """The interactions of the first ``most`` conversations; of all, if it is 0."""
    kept: dict[str, list[Interaction]] = {}
    for item in items:
        name = conversation_of(item)
        if name in kept or not most or len(kept) < most:
            kept.setdefault(name, []).append(item)
    return [item for group in kept.values() for item in group]


def examples_of(items: Sequence[Interaction], tokenizer: Any) -> list[Example]:
    """Tokens, and weights normalised over them."""
    total = sum(i.weight for i in items) or 1.0
    return [(encode(i, tokenizer, HindsightConfig()), i.weight / total) for i in items]


# ---- steps ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Taken:
    """One step, once."""

    seconds: float
    loss: float
    norm: float


@dataclass(frozen=True)
class Both:
    """One step with whole sequences and with shared prefixes."""

    interactions: int
    responses: int
    """Response tokens."""
    slots: tuple[Slots, Slots]
    whole: Taken
    shared: Taken

    @property
    def ratio(self) -> float:
        """How many times the response tokens per second."""
        return self.whole.seconds / self.shared.seconds

    def check(self) -> None:
        """Raises:
        ValueError: the two did not compute the same.
        """
        for name in ("loss", "norm"):
            a, b = getattr(self.whole, name), getattr(self.shared, name)
            if not abs(a - b) <= LIMIT * abs(a):
                raise ValueError(f"the two steps differ: {name} {a}, with shared prefixes {b}")


def engine_of(settings: Settings, longest: int, folder: str) -> Engine:
    """Raises:
    ValueError: its rows cannot share prefixes.
    """
    config = EngineConfig(
        model=settings.model,
        run_folder=folder,
        total_steps=1,
        max_tokens=longest,
        # AdamW's whole work, which leaves float32 weights as they are
        optimizer=OptimizerConfig(lr=1e-30, warmup_fraction=0.0, schedule="constant"),
        parallel=ParallelConfig(activation_checkpoint=settings.activation_checkpoint),
        teacher=settings.teacher,
    )
    engine = build_engine(settings.engine, config, RunState(Cursor(1, 0), ""))
    engine.load()
    if engine.sharing == "none":
        raise ValueError(f"{settings.model}: prefixes cannot be shared; stderr says why")
    return engine


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: the process's on a CPU, those on the wall on a GPU."""
    if device.type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def take(engine: Engine, batches: Sequence[Batch], objective: Any) -> Taken:
    """Passes, backward, clipping and AdamW."""
    now = clock(engine.device)
    begin, losses = now(), []
    for m, batch in enumerate(batches):
        with engine.context():
            out = two_pass_loss(engine.policy, batch, objective, engine.teacher)
            engine.backward(out.loss, last=m == len(batches) - 1)
        losses.append(out.loss.detach())
    norm = engine.clip_gradients()
    engine.update(0)
    seconds = now() - begin
    return Taken(seconds, float(torch.stack(losses).sum()), float(norm))


def compare(
    engine: Engine, steps: Sequence[Sequence[Example]], settings: Settings
) -> Iterator[Both]:
    """Every step both ways, by turns. The first of each kind of row is a warm-up, of the shortest
    interaction, and not measured."""
    objective = OBJECTIVES[settings.objective](ignore_first=IGNORE_FIRST)
    ways: tuple[Sharing, Sharing] = ("none", engine.sharing)

    def prepared(step: Sequence[Example], sharing: Sharing) -> tuple[list[Batch], Slots]:
        layout = engine.row_multiple, sharing
        assigned = assign(step, 1, settings.packing, *layout)
        batches = [collate(mine, settings.row_tokens, *layout) for mine in assigned.of(0)]
        found = [unit for ranks in assigned.micro_batches for unit in ranks[0]]
        moved = [batch.to(engine.device) for batch in batches]
        return moved, summed(found, sharing, settings.unit)

    shortest = min((e for step in steps for e in step), key=lambda e: len(e[0].hindsight))
    for sharing in ways:
        take(engine, prepared([(shortest[0], 1.0)], sharing)[0], objective)
    for n, step in enumerate(steps):
        ready = [prepared(step, sharing) for sharing in ways]
        taken: tuple[list[Taken], list[Taken]] = [], []
        for turn in range(n, n + settings.rounds):
            for i in (0, 1) if turn % 2 == 0 else (1, 0):
                taken[i].append(take(engine, ready[i][0], objective))
        whole, shared = (min(some, key=lambda t: t.seconds) for some in taken)
        both = Both(
            interactions=len(step),
            responses=sum(len(e.response) for e, _ in step),
            slots=(ready[0][1], ready[1][1]),
            whole=whole,
            shared=shared,
        )
        both.check()
        yield both


# ---- telling ------------------------------------------------------------------------------------
def table_of_slots(found: Sequence[Slots], title: str) -> Table:
    """One row for each way to share."""
    columns = "policy tokens", "hindsight tokens", "cost 3P + H", ""
    table = grid(title, "shared", "by", *columns, left=2)
    for s in found:
        unit = "" if s.sharing == "none" else s.unit
        sizes = (f"{n:,}" for n in (s.policy, s.hindsight, s.cost))
        table.add_row(s.sharing, unit, *sizes, f"{found[0].cost / s.cost:.2f}x")
    return table


def table_of_steps(found: Sequence[Both], title: str) -> Table:
    """Each step, then all of them together, whose ratio is that of their sums."""
    columns = "interactions", "response tokens", "slots by cost", "whole, s", "shared, s"
    columns += "whole, tokens/s", "shared, tokens/s", "shared / whole"
    table = grid(title, "step", *columns)

    def add(name: str, some: Sequence[Both], ratio: str) -> None:
        responses = sum(b.responses for b in some)
        whole, shared = sum(b.whole.seconds for b in some), sum(b.shared.seconds for b in some)
        table.add_row(
            name,
            f"{sum(b.interactions for b in some)}",
            f"{responses:,}",
            f"{_costs(some, 0) / _costs(some, 1):.2f}x",
            *(f"{x:.2f}" for x in (whole, shared)),
            *(f"{responses / x:.2f}" for x in (whole, shared)),
            ratio,
        )

    for n, both in enumerate(found, 1):
        add(str(n), [both], f"{both.ratio:.3f}")
    table.add_section()
    add("all", found, f"{overall(found):.3f}")
    return table


def overall(found: Sequence[Both]) -> float:
    """The ratio of response tokens per second over all steps."""
    return sum(b.whole.seconds for b in found) / sum(b.shared.seconds for b in found)


def _costs(found: Sequence[Both], which: int) -> int:
    return sum(b.slots[which].cost for b in found)


# ---- the command ---------------------------------------------------------------------------------
def run(settings: Settings) -> list[dict[str, Any]]:
    """Count or measure, print and write; the rows."""
    console = Console(width=150)
    tokenizer = load_tokenizer(settings.model)
    items = read_interactions(settings.data)
    at = dict(benchmark="prefixes", model=settings.model, data=settings.data.name)
    if settings.count_only:
        some = first_conversations(items, settings.conversations)
        rows = _counted(console, examples_of(some, tokenizer), settings)
        at |= dict(machine=machine(torch.device("cpu")))
    else:
        steps = [examples_of(step, tokenizer) for step in draw(items, settings)]
        rows, device = _measured(console, steps, settings)
        at |= dict(machine=machine(device))
    rows = [at | row for row in rows]
    settings.keep(rows)
    return rows


def _counted(
    console: Console, examples: Sequence[Example], settings: Settings
) -> list[dict[str, Any]]:
    number = len({e.conversation for e, _ in examples})
    found = count(examples, settings.micro_batch_tokens)
    size = f"{len(examples):,} interactions of {number:,} conversations"
    console.print(table_of_slots(found, f"{settings.data.name}: {size}"))
    whole = found[0]
    about = dict(kind="count", verdict="counted", contender="sdpo", conversations=number)
    about |= dict(interactions=len(examples), responses=sum(len(e.response) for e, _ in examples))
    shares = (dict(zip(("policy", "hindsight"), s.shares_of(whole), strict=True)) for s in found)
    return [
        about | asdict(s) | dict(cost=s.cost, read=read)
        for s, read in zip(found, shares, strict=True)
    ]


def _measured(
    console: Console, steps: Sequence[Sequence[Example]], settings: Settings
) -> tuple[list[dict[str, Any]], torch.device]:
    flat = [e for step in steps for e, _ in step]
    longest = max(max(len(e.policy), len(e.hindsight)) + len(e.response) for e in flat)
    found: list[Both] = []
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(settings, longest, folder)
        sharing, device = engine.sharing, engine.device
        for both in compare(engine, steps, settings):
            found.append(both)
            last = f"whole {both.whole.seconds:.2f} s, shared {both.shared.seconds:.2f} s"
            console.print(f"step {len(found)} of {len(steps)}: {last}, {both.ratio:.3f}x")
        engine.close()
    about = machine(device)
    kind = "process time" if device.type == "cpu" else "time on the wall"
    title = f"{settings.model}, {settings.objective}, engine {settings.engine}, sharing {sharing}, "
    title += f"unit {settings.unit}: {kind} on {about['device']}, {about['threads']} threads"
    console.print(table_of_steps(found, title))
    spread = Spread.of(b.ratio for b in found)
    console.print(
        f"response tokens/s, shared over whole: {overall(found):.3f} over all steps; of a step "
        f"median {spread.median:.3f}, quartiles {spread.low:.3f} to {spread.high:.3f}, "
        f"{min(b.ratio for b in found):.3f} to {max(b.ratio for b in found):.3f}"
    )
    at = dict(kind="steps", verdict="right", contender="sdpo", unit=settings.unit, sharing=sharing)
    at |= dict(engine=settings.engine, objective=settings.objective)
    responses = sum(b.responses for b in found)
    row = at | dict(
        over_all=overall(found),
        ratio=asdict(spread),
        by_cost=_costs(found, 0) / _costs(found, 1),
        response_tokens_per_second={
            "whole": responses / sum(b.whole.seconds for b in found),
            "shared": responses / sum(b.shared.seconds for b in found),
        },
        steps=[asdict(b) | dict(ratio=b.ratio, slots=list(map(asdict, b.slots))) for b in found],
    )
    return [row], device


if __name__ == "__main__":
    run(tyro.cli(Settings, description=__doc__))
