"""`sdpo signal`: the advantage of every response token, log q(y_t) - log p(y_t).

Reads each response with and without the follow-up, without training; writes one JSON row per
interaction and colours the first few in the terminal.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, TypedDict

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdpo_kernels import linear_logprob

from ..batching import BatchConfig, Rows, micro_batches, pack
from ..hindsight import Encoded, HindsightConfig, encode, load_tokenizer
from ..interactions import read_interactions
from ..io.files import written_whole
from ..step import CausalModel, score


class Signal(TypedDict):
    """One interaction's row; the lists are aligned, one entry per response token."""

    id: str
    token_ids: list[int]
    tokens: list[str]
    logp_policy: list[float]
    logp_hindsight: list[float]
    advantage: list[float]


def read(
    model: CausalModel,
    encoded: Sequence[Encoded],
    other_prompts: Sequence[Sequence[Sequence[int]]] = (),
    *,
    device: str = "cpu",
    batch_tokens: int = 8192,
) -> Iterator[tuple[Tensor, ...]]:
    """Each response's log-probabilities in nats, in the order of ``encoded``: without the
    follow-up, with it, and under each of its other prompts; (response tokens,) float32, on the CPU.

    Args:
        other_prompts: as many for each of ``encoded``, ids that its response follows; or none.
        batch_tokens: tokens of one pass computed at a time.
    """
    packing = BatchConfig(row_tokens=batch_tokens // 8 or 1, micro_batch_tokens=batch_tokens)
    done = zip(encoded, other_prompts or [()] * len(encoded), strict=True)
    for batch in micro_batches([(e, 1.0) for e in encoded], packing):
        batch = batch.to(device)
        stats = score(model, batch)
        passes = [stats.logp_student, stats.logp_teacher]
        members, others = zip(*islice(done, batch.weight_S.numel()), strict=True)
        for prompts in zip(*others, strict=True):
            pairs = [(p, e.response) for p, e in zip(prompts, members, strict=True)]
            passes.append(_log_probs(model, pack(pairs, packing.row_tokens), batch.targets_N))
        yield from zip(*(logp.cpu().split(batch.lengths) for logp in passes), strict=True)


@torch.no_grad()
def _log_probs(model: CausalModel, rows: Rows, targets_N: Tensor) -> Tensor:
    at = (t.to(targets_N.device) for t in (rows.tokens_BT, rows.positions_BT, rows.index_N))
    hidden_ND, head = model.hidden_states(*at), model.lm_head()
    return linear_logprob(hidden_ND, head.weight, targets_N, shard=head.shard).logp


def signals(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    *,
    device: str = "cpu",
    batch_tokens: int = 8192,
) -> Iterator[Signal]:
    """Rows in the order of ``encoded``. Log-probabilities in nats.

    Args:
        batch_tokens: tokens of one pass computed at a time.
    """
    passes = read(model, encoded, device=device, batch_tokens=batch_tokens)
    for e, (p, q) in zip(encoded, passes, strict=True):
        yield _row(e, tokenizer, p.tolist(), q.tolist())


def _row(e: Encoded, tokenizer: PreTrainedTokenizerBase, p: list[float], q: list[float]) -> Signal:
    return Signal(
        id=e.id,
        token_ids=list(e.response),
        tokens=[str(tokenizer.decode([t])) for t in e.response],
        logp_policy=p,
        logp_hindsight=q,
        advantage=[b - a for a, b in zip(p, q, strict=True)],
    )


def coloured(row: Signal, scale: float = 2.0) -> Text:
    """Tokens on green where hindsight would rather say them, on red where it would not."""
    out = Text()
    for token, advantage in zip(row["tokens"], row["advantage"], strict=True):
        strength = round(160 * min(abs(advantage) / scale, 1.0))
        colour = f"0,{strength},0" if advantage > 0 else f"{strength},0,0"
        out.append(token, style=f"on rgb({colour})")
    return out


def command(
    *,
    model: str,
    interactions: str,
    out: str,
    template: str = "paper-offline",
    max_prompt_tokens: int = 2048,
    max_hindsight_prompt_tokens: int = 4096,
    max_response_tokens: int = 2048,
    batch_tokens: int = 8192,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    show: int = 5,
) -> None:
    """What each follow-up says about each token of the response before it.

    Args:
        model: local Hugging Face folder of any causal LM.
        interactions: as `sdpo data prepare` writes them.
        out: JSONL to write, a row per interaction.
        template: hindsight template, a preset or a text with {followup}.
        max_prompt_tokens: longer prompts lose their left end.
        max_hindsight_prompt_tokens: the same for prompts with the follow-up.
        max_response_tokens: longer responses lose their right end.
        batch_tokens: tokens of one pass computed at a time.
        dtype: of the weights; auto is bfloat16 on a GPU, float32 on a CPU.
        show: how many interactions to print, coloured.
    """
    from sdpo_parallel.transformers.engine import load_model

    config = HindsightConfig(
        template=template,
        max_prompt_tokens=max_prompt_tokens,
        max_hindsight_prompt_tokens=max_hindsight_prompt_tokens,
        max_response_tokens=max_response_tokens,
    )
    data = read_interactions(interactions)
    tokenizer = load_tokenizer(model)
    policy = load_model(model, dtype=dtype)
    device = str(policy.module.device)
    encoded = [encode(i, tokenizer, config) for i in data]
    rows = signals(policy, tokenizer, encoded, device=device, batch_tokens=batch_tokens)
    rows = track(rows, description="reading twice", total=len(data))
    shown, written = _write(rows, Path(out), show)
    console = Console()
    if truncated := sum(any(e.truncated) for e in encoded):
        console.print(f"[yellow]{truncated} of {written} were truncated to the limits[/]")
    for row in shown:
        console.rule(Text(row["id"]))
        console.print(coloured(row))
    console.print(f"{written:,} rows -> {out}", markup=False, soft_wrap=True)


def _write(rows, out: Path, keep: int) -> tuple[list[Signal], int]:
    """Write all rows or no file; returns the first ``keep`` and the count."""
    kept, written = [], 0
    with written_whole(out) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            kept += [row] if written < keep else []
            written += 1
    return kept, written


def main(args: Sequence[str] | None = None) -> None:
    """Parse and run."""
    tyro.cli(command, prog="sdpo signal", args=args)
