"""A whole training step, both passes, backward and AdamW: ours against others' computation of it.

    python -m benchmarks.step [--models qwen3-0.6b qwen3-4b] [--out results.jsonl]

One model of transformers with random weights, the same interactions, the same objective and the
same optimizer for everyone; who is compared is in ``contenders``. Before anything is timed, each
contender's loss and gradients on a tiny model in float32 are held against float64.

Shapes: B interactions of a micro-batch, T tokens, N response tokens, V vocabulary, D hidden size.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from benchmarks.measure import (
    Spread,
    interleaved,
    machine,
    matmul_rate,
    peak_bytes,
    relative_error,
)
from benchmarks.models import QWEN3, TINY
from benchmarks.prediction import GPUS
from benchmarks.report import MIB, append, excuses, first_line, milliseconds
from benchmarks.step_contenders import (
    IGNORE_FIRST,
    Contender,
    Loss,
    ObjectiveName,
    contenders,
    full_logits,
    padded,
)
from sdpo.hindsight import Encoded
from sdpo_parallel.transformers.engine import choose_attention

LIMIT = 1e-4
"""Relative error of loss and gradients in float32 beyond which a contender is wrong."""


MODELS = QWEN3 | TINY


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The steps that are timed."""

    models: tuple[str, ...] = ()
    """Names in ``models.py``. Default: tiny on a CPU, qwen3-0.6b on a GPU."""
    objective: ObjectiveName = "sampled_token"
    interactions: int = 0
    """Interactions per step. Default: 8 on a CPU, 32 on a GPU."""
    prompt: int = 0
    """Median tokens of a prompt; its logarithm deviates by 0.7. Default: 48 on a CPU, 600 on a
    GPU. Responses have half of that, follow-ups an eighth."""
    micro_batch_tokens: int = 0
    """Slots of a micro-batch, padding included, for all contenders. Default: 2048, 16384."""
    checkpointing: bool = False
    """Activations are recomputed in the backward."""
    weights: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the model, its gradients and AdamW's state. auto: bfloat16 on a GPU."""
    seconds: float = 5.0
    """Seconds of timing per contender and model."""
    only: tuple[str, ...] = ()
    """Contenders whose names contain one of these. Default: all."""
    liger: bool = True
    """Everyone once more with Liger's norms, MLPs and rotary embeddings."""
    out: Path | None = None
    """JSON lines are appended to this file."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")

    @property
    def gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def resolved(self) -> "Settings":
        """With the device's defaults filled in."""
        d = (("qwen3-0.6b",), 32, 600, 16_384) if self.gpu else (("tiny",), 8, 48, 2048)
        weights = ("bfloat16" if self.gpu else "float32") if self.weights == "auto" else None
        return replace(
            self,
            models=self.models or d[0],
            interactions=self.interactions or d[1],
            prompt=self.prompt or d[2],
            micro_batch_tokens=self.micro_batch_tokens or d[3],
            weights=weights or self.weights,
        )


def interactions(settings: Settings, vocabulary: int, seed: int = 0) -> list[Encoded]:
    """Random tokens of log-normal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(median: float) -> tuple[int, ...]:
        scale = math.exp(0.7 * float(torch.randn((), generator=generator)))
        n = max(IGNORE_FIRST + 1, min(int(median * scale), int(6 * median)))
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    items = []
    for i in range(settings.interactions):
        prompt, response, followup = (tokens(settings.prompt / by) for by in (1, 2, 8))
        items.append(
            Encoded(
                id=str(i),
                policy=prompt,
                hindsight=prompt + followup,
                response=response,
                old_logprobs=None,
                ends=True,
                truncated=(False, False, False),
            )
        )
    return items


def build(name: str, settings: Settings, dtype: torch.dtype, liger: bool = False):
    """A model with random weights, on the device."""
    attention = choose_attention(settings.device, str(dtype).removeprefix("torch."))
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**MODELS[name]), dtype=dtype, attn_implementation=attention
        )
    model.train()
    if settings.checkpointing:
        model.gradient_checkpointing_enable()
    if liger:
        from sdpo_parallel.transformers.liger import apply_liger

        apply_liger(model)
    return model


def model_flops(model: PreTrainedModel, items: Sequence[Encoded]) -> float:
    """Flops that one step needs: padding, recomputation and logits of prompts do not count. Two per
    weight and token in a forward, four more in a backward; causal attention; the lm_head's matmuls
    at response tokens only, without a gradient for the hindsight pass."""
    config: Any = model.config
    head = config.vocab_size * config.hidden_size
    tied = config.tie_word_embeddings
    body = model.num_parameters() - head * (1 if tied else 2)
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    total = 0.0
    for e in items:
        n = len(e.response)
        for prompt, passes in ((e.policy, 3), (e.hindsight, 1)):
            t = len(prompt) + n
            total += passes * (2 * body * t + 2 * width * t * t)
        total += 8 * head * n
    return total


class Check:
    """Each contender's errors on a tiny model in float32, against full logits in float64.

    Made before Liger replaces transformers' rotary embeddings, whose float64 the truth needs.
    """

    def __init__(self, settings: Settings):
        small = dict(interactions=6, prompt=24, micro_batch_tokens=256, checkpointing=False)
        self.settings = replace(settings, **small)
        self.items = interactions(self.settings, MODELS["check"]["vocab_size"])
        exact = self._model(torch.float64)
        batches = padded(*self._to)
        self.true = _gradients(exact, full_logits(settings.objective), batches)

    @property
    def _to(self) -> tuple[list[Encoded], int, str]:
        return self.items, self.settings.micro_batch_tokens, self.settings.device

    def _model(self, dtype: torch.dtype, liger: bool = False):
        model = build("check", self.settings, torch.float32, liger)
        for name, p in model.named_parameters():
            if p.ndim > 1:  # peaky enough that the two passes disagree
                p.data.mul_(4 if "embed" in name or "lm_head" in name else 2)
        return model.to(dtype)

    def errors(self, contender: Contender) -> dict[str, float]:
        """Relative, of the loss and of all gradients together."""
        model = self._model(torch.float32, contender.liger)
        found = _gradients(model, contender.loss, contender.batches(*self._to))
        pairs = zip(("loss", "gradient"), found, self.true, strict=True)
        return {name: relative_error(ours, true) for name, ours, true in pairs}


def _chosen(settings: Settings) -> list[Contender]:
    wanted = settings.only or ("",)
    found = [c for c in contenders(settings.objective) if settings.liger or not c.liger]
    return [c for c in found if any(part in c.name for part in wanted)]


def _gradients(model: PreTrainedModel, loss: Loss, batches: Sequence[Any]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    values = []
    for batch in batches:
        value = loss(model, batch)
        value.backward()
        values.append(value.detach().double())
    parts = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.stack(values).sum(), torch.cat(parts)


def run(settings: Settings) -> list[dict[str, Any]]:
    """Check, measure, print and write; the rows."""
    settings = settings.resolved()
    console = Console(width=150)
    device = torch.device(settings.device)
    dtype = getattr(torch, settings.weights)
    about = machine(device)
    name = about["device"]
    peak = next((gpu.peak for gpu in GPUS.values() if gpu.name in name), None)
    rate = matmul_rate(device, dtype)
    console.print(
        f"{name}: {rate / 1e12:.3g} Tflop/s in a large {settings.weights} product"
        + (f", {peak / 1e12:.0f} by its datasheet, which MFU refers to" if peak else "")
    )
    check = Check(settings)
    rows = []
    for model_name in settings.models:
        if model_name not in MODELS:
            raise ValueError(f"--models: {model_name!r} is none of {', '.join(MODELS)}")
        mine = []
        for liger in (False, True):  # Liger's rotary embeddings replace transformers' for good
            new = []
            for row in _half(model_name, liger, check, settings, device, dtype):
                at = dict(benchmark="step", model=model_name, objective=settings.objective)
                at |= dict(weights=settings.weights, checkpointing=settings.checkpointing)
                row = at | row | dict(machine=about)
                if "seconds" in row:
                    flops = row["flops"] / row["seconds"]["step"]["median"]
                    row["mfu"] = flops / (peak or rate)
                    row["mfu_refers_to"] = "datasheet" if peak else "measured product"
                new.append(row)
            mine += new
            if settings.out is not None:
                append(settings.out, new)
            _free(settings)
        if mine:
            console.print(table(mine), *excuses(mine), sep="\n")
        rows += mine
    return rows


def _half(
    name: str,
    liger: bool,
    check: Check,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """The contenders of one model with Liger's kernels, or of one without."""
    chosen = [c for c in _chosen(settings) if c.liger == liger]
    rows = [_row(c, why) for c in chosen if (why := c.missing(settings.device)) is not None]
    chosen = [c for c in chosen if c.missing(settings.device) is None]
    if not chosen:
        return rows
    items = interactions(settings, MODELS[name]["vocab_size"])
    model = build(name, settings, dtype, liger)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=settings.gpu)
    flops = model_flops(model, items)
    steps, found = {}, {}
    for c in chosen:
        try:
            error = check.errors(c)
            if not max(error.values()) <= LIMIT:
                rows.append(_row(c, f"is wrong: {error}", "wrong") | dict(error=error))
                continue
            batches = c.batches(items, settings.micro_batch_tokens, settings.device)
            step = _stepper(model, optimizer, c, batches)
            step(None)  # AdamW's state is there from here on
            extra = peak_bytes(lambda step=step: step(None), device)
        except Exception as failure:  # whatever a contender may raise is its result
            rows.append(_row(c, first_line(failure), "failed"))
            continue
        finally:
            optimizer.zero_grad()
            _free(settings)
        steps[c.name] = step
        found[c.name] = dict(verdict="right", error=error, extra_bytes=extra, flops=flops)
    seconds = interleaved(steps, device, settings.seconds, least=3)
    tokens = sum(len(e.policy) + len(e.hindsight) + 2 * len(e.response) for e in items)
    for key, row in found.items():
        spread = Spread.of([sum(s) for s in seconds[key]])
        rate = dict(tokens=tokens, tokens_per_second=tokens / spread.median)
        rows.append(dict(contender=key) | row | rate | dict(seconds={"step": asdict(spread)}))
    return rows


def _row(contender: Contender, note: str, verdict: str = "unavailable") -> dict[str, Any]:
    return dict(contender=contender.name, verdict=verdict, note=note)


def _stepper(model, optimizer, contender: Contender, batches: Sequence[Any]) -> Callable:
    def step(_: Any) -> None:
        for batch in batches:
            contender.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _free(settings: Settings) -> None:
    gc.collect()
    if settings.gpu:
        torch.cuda.empty_cache()


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Contenders by time."""
    first = rows[0]
    timed = sorted((r for r in rows if "seconds" in r), key=lambda r: -r["tokens_per_second"])
    title = f"{first['model']}, {first['objective']}, weights in {first['weights']}"
    if timed:
        title += f", {timed[0]['tokens']:,} tokens of both passes a step"
    grid = Table(title=title, title_justify="left")
    refers = timed[0]["mfu_refers_to"] if timed else "datasheet"
    share = "MFU, %" if refers == "datasheet" else "of the product's rate, %"
    for column in ("", "step, ms", "tokens/s", share, "memory, MiB", "error loss", "gradient"):
        grid.add_column(column, justify="right" if column else "left")
    for row in timed:
        extra = row["extra_bytes"]
        errors = [f"{row['error'][k]:.1e}" if row["error"] else "" for k in ("loss", "gradient")]
        grid.add_row(
            row["contender"],
            milliseconds(row["seconds"]["step"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * row['mfu']:.1f}",
            "?" if extra is None else f"{extra / MIB:,.0f}",
            *errors,
        )
    return grid


def main(settings: Settings) -> None:
    """Run it."""
    run(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
