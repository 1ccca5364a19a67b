"""`sdpo train --dry-run`: what a run would be, before anything is loaded.

Memory is an estimate per rank from the model's shape; activations are the rough part.
"""

import json
from collections import Counter
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_kernels import tuning
from sdpo_parallel.hf_folder import read_config

from .batching import steps_in
from .hindsight import encode, load_tokenizer
from .run_folder import to_json
from .trainer import TrainConfig, load_data

SAMPLE = 512
"""Interactions tokenized to tell lengths and truncation."""


def parameter_count(folder: str) -> tuple[int, int, int]:
    """(all parameters, those of the largest layer, those of embeddings and head)."""
    read_config(folder)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    edges = {
        id(p): p.numel()
        for e in (model.get_input_embeddings(), model.get_output_embeddings())
        for p in e.parameters()
    }
    total = sum(p.numel() for p in model.parameters())
    outside = sum(edges.values())
    return total, (total - outside) // max(config.num_hidden_layers, 1), outside


def memory_per_rank(
    config: TrainConfig, ranks: int, parameters: tuple[int, int, int]
) -> dict[str, float]:
    """Bytes by part, for a rank of ``ranks`` on an accelerator; see ``parameter_count``."""
    total, layer, edges = parameters
    replicate = config.parallel.replicate
    if ranks % replicate:
        raise ValueError(f"replicate={replicate} does not divide --ranks {ranks}")
    shards = 1 if config.engine == "transformers" else ranks // replicate
    model = read_config(config.model)
    item = 4 if config.parallel.compute_dtype == "float32" else 2
    # residual stream kept per layer, and what a layer keeps inside it where nothing is recomputed
    kept = {"full": 1, "selective": 8, "none": 24}[config.parallel.activation_checkpoint]
    activations = (
        config.batch.micro_batch_tokens
        * model["hidden_size"]
        * item
        * (model["num_hidden_layers"] * kept + 24)
    )
    # a chunk's logits of both passes; dW in float32 until it is rounded for the backward
    logits = config.objective.chunk_bytes or tuning.CHUNK_BYTES["cuda"]
    head = logits + (4 + item) * model["vocab_size"] * model["hidden_size"]
    return {
        "parameters (float32)": 4 * total / shards,
        "gradients (float32)": 4 * total / shards,
        "AdamW state (float32)": 8 * total / shards,
        "gathered layers": item * (2 * layer + edges) if shards > 1 else 0.0,
        "activations": float(activations),
        "head chunks and dW": float(head),
    }


def dry_run(config: TrainConfig, *, ranks: int) -> None:
    """Print the resolved config, the data, the model and the memory estimate."""
    console = Console()
    console.print_json(json.dumps(to_json(config)))
    interactions = load_data(config)
    tokenizer = load_tokenizer(config.model)
    sample = [encode(i, tokenizer, config.hindsight) for i in interactions[:SAMPLE]]
    cut = Counter(
        part
        for e in sample
        for part, lost in zip(("policy", "hindsight", "response"), e.truncated, strict=True)
        if lost
    )
    table = Table("what", "value", title="dry run", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("interactions", f"{len(interactions):,}")
    table.add_row("steps", f"{steps_in(len(interactions), config.batch):,}")
    lengths = {
        "policy prompt": [len(e.policy) for e in sample],
        "hindsight prompt": [len(e.hindsight) for e in sample],
        "response": [len(e.response) for e in sample],
    }
    for name, values in lengths.items():
        table.add_row(f"{name}, tokens: mean, max", f"{mean(values):,.0f}, {max(values):,}")
    for part in ("policy", "hindsight", "response"):
        table.add_row(f"truncated, {part}", f"{cut[part]} of {len(sample)}")
    parameters = parameter_count(config.model)
    table.add_row("parameters", f"{parameters[0]:,}")
    console.print(table)
    memory = memory_per_rank(config, ranks, parameters)
    table = Table("part", "GiB", title=f"estimated memory per rank, {ranks} ranks")
    table.columns[1].justify = "right"
    for part, size in (memory | {"total": sum(memory.values())}).items():
        table.add_row(part, f"{size / 2**30:,.2f}")
    console.print(table)
