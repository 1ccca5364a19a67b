"""`sdpo train --dry-run`: a run's config, data and memory, before anything is loaded.

Memory is estimated from config.json alone; the data is tokenized only where the folder also holds
weights and a tokenizer.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from statistics import mean
from typing import Literal, get_args

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_kernels import default_chunk_bytes, default_grad_bytes
from sdpo_parallel.build import check_support
from sdpo_parallel.config import Frozen, ParallelConfig
from sdpo_parallel.huggingface import load_tokenizer
from sdpo_parallel.memory import USABLE, Load, ModelShape, estimate, host_bytes, kept_bytes

from ..batching import Stream, unit_of
from ..errors import SdpoError
from ..hindsight import Encoded, Truncated, encode
from .config import RunConfig, TrainConfig, local_models, to_json
from .loader import load_interactions
from .shares import Read, sharing_of, slots_read, why_not
from .trainer import engine_config

SAMPLE = 512
"""Interactions tokenized to estimate lengths and truncation."""
GIB = 2**30
DEGREES = (1, 2, 4, 8)
"""Tensor and context degrees of the alternatives; their product stays within a node of 8."""
Checkpoint = Literal["none", "selective", "full"]
LABELS = {
    "parameters": "parameters (float32)",
    "gradients": "gradients (float32)",
    "optimizer": "optimizer (AdamW state, float32)",
}


def parameter_count(folder: str) -> int:
    """Parameters of the model that config.json describes."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def load_of(config: RunConfig, sample: Sequence[Encoded] = ()) -> Load:
    """The fullest micro-batch: every slot of its larger pass used; the shares of response tokens
    and of the hindsight pass are those of ``sample``, or without one what the limits allow where
    nothing is shared."""
    h, b, sharing = config.hindsight, config.batch, sharing_of(config)
    response, longest = h.max_response_tokens, config.max_tokens
    alone = h.max_prompt_tokens + response
    second = {"hindsight": h.max_hindsight_prompt_tokens + response, "pair": alone}
    read = Read(alone, second.get(config.objective.reading, 0))
    if sample:
        read = slots_read(
            sample, config, sharing, conversations=config.batch.unit == "conversation"
        )
        read_all = [part for e in sample for part in e.sequences]
        response = sum(len(e.response) for e in read_all)
        longest = max(max(len(e.policy), len(e.hindsight)) + len(e.response) for e in read_all)
    tokens = max(b.micro_batch_tokens, longest)
    larger = max(read.policy, read.hindsight)
    return Load(
        tokens=tokens,
        hindsight_tokens=round(tokens * read.hindsight / larger),
        sharing=sharing,
        response_tokens=round(tokens * response / larger),
        row_tokens=tokens if sharing != "none" else min(max(b.row_tokens, longest), tokens),
        max_tokens=config.max_tokens,
        chunk_bytes=config.objective.chunk_bytes or default_chunk_bytes(torch.device("cuda")),
        grad_bytes=default_grad_bytes(torch.device("cuda")),
    )


def memory_per_rank(
    config: RunConfig,
    ranks: int,
    load: Load,
    parallel: ParallelConfig | None = None,
    beside: Mapping[str, int] = {},
) -> dict[str, int]:
    """Bytes by part and in total, of a rank on an accelerator.

    Args:
        parallel: another layout than the config's.
        beside: bytes of what else it holds.

    Raises:
        SdpoError: the layout does not fit the number of ranks or the model.
    """
    parallel = parallel or config.parallel
    model = ModelShape.from_config(config.model)
    settings = (config.lora, config.teacher)
    frozen = config.teacher.folder if isinstance(config.teacher, Frozen) else None
    other = ModelShape.from_config(frozen) if frozen else None
    more = dict(beside)
    if config.engine == "transformers":
        ranks = 1
        if parallel.activation_checkpoint != "none":  # transformers knows one kind
            parallel = replace(parallel, activation_checkpoint="full")
        if parallel.resolve_dtype("cuda") != "float32":
            more["autocast's copies of the weights"] = round(2 * model.parameters())
    parts = estimate(model, parallel, *settings, ranks=ranks, load=load, teacher_model=other)
    total = parts.pop("total") + sum(more.values())
    return {**parts, **more, "total": total}


def layouts(config: RunConfig, ranks: int) -> list[ParallelConfig]:
    """The config's layout with other tensor and context degrees; what cannot run is left out."""
    if config.engine == "transformers":
        return [config.parallel]
    return [
        replace(config.parallel, tensor=t, context=c)
        for t, c in product(DEGREES, DEGREES)
        if t * c <= DEGREES[-1] and ranks % (t * c * config.parallel.replicate) == 0
    ]


def alternatives(
    config: RunConfig,
    ranks: int,
    sample: Sequence[Encoded] = (),
    beside: Mapping[str, int] = {},
) -> dict[ParallelConfig, int]:
    """Bytes in total of each layout under each activation_checkpoint."""
    totals, loads = {}, {}
    for layout, kind in product(layouts(config, ranks), get_args(Checkpoint)):
        other = replace(layout, activation_checkpoint=kind)
        run = replace(config, parallel=other)
        if (sharing := sharing_of(run)) not in loads:
            loads[sharing] = load_of(run, sample)
        with suppress(SdpoError):  # the degree does not divide the model's sizes
            parts = memory_per_rank(config, ranks, loads[sharing], other, beside)
            totals[other] = parts["total"]
    return totals


def refuse_what_does_not_fit(
    config: RunConfig,
    parts: dict[str, int],
    others: dict[ParallelConfig, int],
    gpu_memory_gib: float,
) -> None:
    """Refuse a run whose estimate exceeds ``USABLE`` of the memory.

    Raises:
        SdpoError: names the parts of the estimate, largest first, and what to change.
    """
    usable = USABLE * gpu_memory_gib * GIB
    if parts["total"] <= usable:
        return
    largest = sorted(((n, p) for p, n in parts.items() if p != "total" and n), reverse=True)
    told = ", ".join(f"{part} {size / GIB:.1f}" for size, part in largest)
    change = ["--ranks (more of them)", "parallel.tensor", "parallel.context"]
    if config.parallel.activation_checkpoint != "full":
        change.append("parallel.activation_checkpoint full")
    change.append(f"batch.micro_batch_tokens below {config.batch.micro_batch_tokens}")
    if not config.parallel.cpu_offload:
        change.append("parallel.cpu_offload")
    if parts["kept keys and values"]:
        change.append("batch.share_prefix none")
    fitting = [
        f"tensor={p.tensor} context={p.context} activation_checkpoint={p.activation_checkpoint} "
        f"({size / GIB:.1f} GiB)"
        for p, size in others.items()
        if size <= usable
    ]
    found = f"; of the layouts above, {fitting[0]} would fit" if fitting else ""
    raise SdpoError(
        f"the run needs {parts['total'] / GIB:.1f} GiB on each rank, and {usable / GIB:.1f} of "
        f"{gpu_memory_gib:g} GiB are taken as usable ({USABLE:.0%}): {told}. Change "
        f"{', '.join(change[:-1])} or {change[-1]}{found}"
    )


def dry_run(config: TrainConfig, *, ranks: int, gpu_memory_gib: float | None = None) -> None:
    """Print the resolved config, the data, the model and the memory estimate.

    Raises:
        SdpoError: as `show_memory` does; or the data cannot be read.
    """
    console = Console()
    console.print_json(json.dumps(to_json(config)))
    config = local_models(config)
    ModelShape.from_config(config.model)  # names what is missing
    sample: list[Encoded] = []
    if any(Path(config.model).glob("*.safetensors")):
        sample = _show_data(console, config)
    else:
        console.print(f"{config.model} has no weights: memory alone, from config.json")
    show_memory(console, config, ranks, sample, gpu_memory_gib=gpu_memory_gib)


def show_memory(
    console: Console,
    config: RunConfig,
    ranks: int,
    sample: Sequence[Encoded] = (),
    *,
    gpu_memory_gib: float | None = None,
    beside: Mapping[str, int] = {},
) -> None:
    """Print the memory estimate of a rank.

    Args:
        config: with models as local folders.
        beside: bytes of what else a rank holds.

    Raises:
        SdpoError: the engine does not compute the model, or not on so many ranks; or, raised last,
            the estimate is more than fits ``gpu_memory_gib``.
    """
    check_support(config.engine, engine_config(config, total_steps=1), ranks)
    console.print(f"parameters: {parameter_count(config.model):,}")
    load = load_of(config, sample)
    parts = memory_per_rank(config, ranks, load, beside=beside)
    others = alternatives(config, ranks, sample, beside)
    _show_parts(console, config, parts, ranks, load)
    _show_alternatives(console, config, others, gpu_memory_gib)
    if gpu_memory_gib is not None:
        refuse_what_does_not_fit(config, parts, others, gpu_memory_gib)


def _show_data(console: Console, config: TrainConfig) -> list[Encoded]:
    """Print what the interactions look like; returns those that were tokenized."""
    tokenizer = load_tokenizer(config.model)
    selection = load_interactions(config, tokenizer)
    interactions = selection.interactions
    if config.select.selects:
        console.print(f"{config.data}: {selection}", markup=False, soft_wrap=True)
    reading = config.objective.reading
    sample = [
        encode(i, tokenizer, config.hindsight, reading=reading) for i in interactions[:SAMPLE]
    ]
    sequences = [part for e in sample for part in e.sequences]
    table = Table("what", "value", title="dry run", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("interactions", f"{len(interactions):,}")
    stream = Stream((unit_of(i, config.batch) for i in interactions), config.batch)
    if config.batch.unit == "conversation":
        sizes = f"{stream.sizes.mean():,.1f}, {stream.sizes.max():,}"
        table.add_row("interactions of a conversation: mean, max", sizes)
    table.add_row("steps", f"{stream.steps:,}")
    lengths = {
        "policy prompt": [len(e.policy) for e in sequences],
        "hindsight prompt": [len(e.hindsight) for e in sequences],
        "response": [len(e.response) for e in sequences],
    }
    if reading != "hindsight":
        del lengths["hindsight prompt"]
    for name, values in lengths.items():
        table.add_row(f"{name}, tokens: mean, max", f"{mean(values):,.0f}, {max(values):,}")
    for part in Truncated._fields:
        cut = sum(getattr(e.truncated, part) for e in sequences)
        table.add_row(f"truncated, {part}", f"{cut} of {len(sequences)}")
    console.print(table)
    _show_shares(console, config, sample)
    return sample


def _show_shares(console: Console, config: TrainConfig, sample: Sequence[Encoded]) -> None:
    """Print what the two passes read of the sample, with and without sharing prefixes."""
    if reason := why_not(config):
        console.print(f"prefixes are not shared: {reason}")
        return
    sharing = sharing_of(config)
    reads = {
        "no prefixes": slots_read(sample, config, "none", conversations=False),
        "by interaction": slots_read(sample, config, sharing, conversations=False),
        "by conversation": slots_read(sample, config, sharing, conversations=True),
    }
    whole, *_ = reads.values()
    title = f"tokens read of {len(sample):,} interactions"
    names = ("shared", "policy P", "hindsight H", "saved", "3 P + H", "fewer")
    table = Table(*names, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, read in reads.items():
        saved = whole.policy + whole.hindsight - read.policy - read.hindsight
        numbers = (read.policy, read.hindsight, saved, read.cost)
        table.add_row(name, *(f"{n:,}" for n in numbers), f"{whole.cost / read.cost:.2f}x")
    console.print(table)


def _show_parts(
    console: Console, config: RunConfig, parts: dict[str, int], ranks: int, load: Load
) -> None:
    title = f"estimated memory per rank, {ranks} ranks"
    table = Table("part", "GiB", title=title, title_justify="left")
    table.columns[1].justify = "right"
    *_, last, _ = parts
    for part, size in parts.items():
        table.add_row(LABELS.get(part, part), f"{size / GIB:,.2f}", end_section=part == last)
    console.print(table)
    console.print(
        f"at the peak of a step; micro-batches of {load.tokens:,} tokens, {load.response_tokens:,} "
        "of them of responses"
    )
    model, parallel = ModelShape.from_config(config.model), config.parallel
    if kept := kept_bytes(model, parallel, load=load):
        console.print(
            f"kept keys and values: {kept / GIB:,.2f} GiB between the policy's pass and the "
            f"objective, {'within' if parts['kept keys and values'] else 'below'} the peak; "
            "--batch.share-prefix none does without"
        )
    host = host_bytes(model, parallel, config.lora, config.teacher, ranks=ranks, load=load)
    if host:
        console.print(f"in host memory, per rank: {host / GIB:,.1f} GiB")


def _show_alternatives(
    console: Console,
    config: RunConfig,
    others: dict[ParallelConfig, int],
    gpu_memory_gib: float | None,
) -> None:
    usable = math.inf if gpu_memory_gib is None else USABLE * gpu_memory_gib * GIB
    title = "total in GiB by activation_checkpoint"
    table = Table("tensor", "context", *get_args(Checkpoint), title=title, title_justify="left")
    for degrees, row in groupby(others.items(), lambda item: (item[0].tensor, item[0].context)):
        cells = []
        for layout, size in row:
            cell = f"{size / GIB:,.1f}" + (" too much" if size > usable else "")
            cells.append(f"{cell} (this run)" if layout == config.parallel else cell)
        table.add_row(*map(str, degrees), *cells)
    console.print(table)
    if gpu_memory_gib is not None:
        console.print(f"too much: more than {USABLE:.0%} of {gpu_memory_gib:g} GiB")
