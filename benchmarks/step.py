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
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from benchmarks.measure import (
    OnDevice,
    Spread,
    interleaved,
    machine,
    matmul_rate,
    peak_bytes,
    relative_error,
)
from benchmarks.models import QWEN3, TINY
from benchmarks.prediction import GPUS
from benchmarks.profiling import kernel_table, profiled
from benchmarks.report import MIB, excuses, first_line, grid, milliseconds
from benchmarks.slots import slots
from benchmarks.step_contenders import (
    IGNORE_FIRST,
    Contender,
    Loss,
    ObjectiveName,
    contenders,
    full_logits,
    padded,
)
from benchmarks.traffic import model_flops, shape_of
from sdpo.hindsight import Encoded, Truncated
from sdpo_parallel.transformers.engine import choose_attention

LIMIT = 1e-4
"""Relative error of loss and gradients in float32 beyond which a contender is wrong."""
MODELS = QWEN3 | TINY


@dataclass(frozen=True, kw_only=True)
class Settings(OnDevice):
    """The steps that are timed."""

    models: tuple[str, ...] = ()
    """Names in ``models.py``. Default: tiny on a CPU, qwen3-0.6b on a GPU."""
    objective: ObjectiveName = "sampled_token"
    interactions: int = 0
    """Interactions per step. Default: 8 on a CPU, 32 on a GPU."""
    prompt: int = 0
    """Median tokens of a conversation's first prompt; its logarithm deviates by 0.7. Default: 48
    on a CPU, 600 on a GPU. Responses have half of that, follow-ups an eighth."""
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
    profile: bool = False
    """Also where each contender's step spends its time, kernel by kernel. Where they take much less
    than the step does, the GPU waited."""

    @property
    def gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def resolved(self) -> "Settings":
        """With the device's defaults filled in."""
        defaults = dict(models=("tiny",), interactions=8, prompt=48, micro_batch_tokens=2048)
        if self.gpu:
            defaults = dict(models=("qwen3-0.6b",), interactions=32, prompt=600)
            defaults |= dict(micro_batch_tokens=16_384)
        found = replace(self, **{k: getattr(self, k) or v for k, v in defaults.items()})
        if self.weights == "auto":
            found = replace(found, weights="bfloat16" if self.gpu else "float32")
        return found


def interactions(settings: Settings, vocabulary: int) -> list[Encoded]:
    """Random tokens of log-normal lengths. Every second interaction is the next turn of the one
    before it: its prompt is that one's with response and follow-up."""
    generator = torch.Generator().manual_seed(0)

    def tokens(median: float) -> tuple[int, ...]:
        scale = math.exp(0.7 * float(torch.randn((), generator=generator)))
        n = max(IGNORE_FIRST + 1, min(int(median * scale), int(6 * median)))
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    items: list[Encoded] = []
    said: tuple[int, ...] = ()
    for i in range(settings.interactions):
        prompt = items[-1].policy + items[-1].response + said if i % 2 else tokens(settings.prompt)
        response, followup = (tokens(settings.prompt / by) for by in (2, 8))
        said = followup
        items.append(
            Encoded(
                id=str(i),
                policy=prompt,
                hindsight=prompt + followup,
                response=response,
                old_logprobs=None,
                ends=True,
                truncated=Truncated(),
                conversation=str(i // 2),
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


def tokens(e: Encoded) -> tuple[int, int, int]:
    """Tokens in the policy's pass, in the hindsight pass, and in the response."""
    n = len(e.response)
    return len(e.policy) + n, len(e.hindsight) + n, n


def model_flops_of(
    model: str, items: Sequence[Encoded], settings: Settings, contender: Contender
) -> float:
    """What a step needs, of what a contender reads."""
    examples = [(e, 1.0) for e in items]
    whole = slots(examples, settings.micro_batch_tokens, "none", "conversation")
    shared = slots(examples, settings.micro_batch_tokens, "keys", "conversation")
    read = shared.shares_of(whole) if contender.reads_tries else (1.0, 1.0)
    return sum(sum(model_flops(shape_of(MODELS[model]), *tokens(e), read)) for e in items)


class Check:
    """Each contender's errors on a tiny model in float32, against full logits in float64.

    Made before Liger replaces transformers' rotary embeddings, whose float64 the truth needs.
    """

    def __init__(self, settings: Settings):
        small = dict(interactions=6, prompt=24, micro_batch_tokens=256, checkpointing=False)
        self.settings = replace(settings, **small)
        items = interactions(self.settings, MODELS["check"]["vocab_size"])
        self.given = items, self.settings.micro_batch_tokens, settings.device
        loss = full_logits(settings.objective)
        self.true = _gradients(self._model(torch.float64), loss, padded(*self.given))

    def _model(self, dtype: torch.dtype, liger: bool = False):
        model = build("check", self.settings, torch.float32, liger)
        for name, p in model.named_parameters():
            if p.ndim > 1:  # peaky enough that the two passes disagree
                p.data.mul_(4 if "embed" in name or "lm_head" in name else 2)
        return model.to(dtype)

    def errors(self, contender: Contender) -> dict[str, float]:
        """Relative, of the loss and of all gradients together."""
        model = self._model(torch.float32, contender.liger)
        found = _gradients(model, contender.loss, contender.batches(*self.given))
        pairs = zip(("loss", "gradient"), found, self.true, strict=True)
        return {name: relative_error(ours, true) for name, ours, true in pairs}


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
    about = machine(device)
    peak = next((gpu.peak for gpu in GPUS.values() if gpu.name in about["device"]), None)
    rate = matmul_rate(device, getattr(torch, settings.weights))
    console.print(
        f"{about['device']}: {rate / 1e12:.3g} Tflop/s in a large {settings.weights} product"
        + (f", {peak / 1e12:.0f} by its datasheet, which MFU refers to" if peak else "")
    )
    check = Check(settings)
    rows = []
    for name in settings.models:
        if name not in MODELS:
            raise ValueError(f"--models: {name!r} is none of {', '.join(MODELS)}")
        at = dict(benchmark="step", model=name, objective=settings.objective, machine=about)
        at |= dict(weights=settings.weights, checkpointing=settings.checkpointing)
        mine = []
        # Liger's rotary embeddings replace transformers' for good
        for liger in (False, True) if settings.liger else (False,):
            new = [at | row for row in _half(name, liger, check, settings, console)]
            for row in new:
                if "seconds" in row:
                    flops = row["flops"] / row["seconds"]["step"]["median"]
                    row["mfu"] = flops / (peak or rate)
                    row["mfu_refers_to"] = "datasheet" if peak else "measured product"
            settings.keep(new)
            mine += new
            _free(settings)
        if mine:
            console.print(table(mine), *excuses(mine), sep="\n")
        rows += mine
    return rows


def _half(
    name: str, liger: bool, check: Check, settings: Settings, console: Console
) -> list[dict[str, Any]]:
    """The contenders of one model with Liger's kernels, or of one without."""
    rows, ready = [], []
    for c in contenders(settings.objective):
        asked = not settings.only or any(part in c.name for part in settings.only)
        if asked and c.liger == liger:
            if (why := c.missing(settings.device)) is None:
                ready.append(c)
            else:
                rows.append(_row(c, why))
    if not ready:
        return rows
    items = interactions(settings, MODELS[name]["vocab_size"])
    model = build(name, settings, getattr(torch, settings.weights), liger)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=settings.gpu)
    lengths = [tokens(e) for e in items]
    total = sum(policy + hindsight for policy, hindsight, _ in lengths)
    device = torch.device(settings.device)
    steps, found = {}, {}
    for c in ready:
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
        flops = model_flops_of(name, items, settings, c)
        found[c.name] = dict(contender=c.name, verdict="right", error=error, extra_bytes=extra)
        found[c.name] |= dict(flops=flops)
    for key, rounds in interleaved(steps, device, settings.seconds, least=3).items():
        spread = Spread.of(map(sum, rounds))
        speed = dict(seconds={"step": asdict(spread)}, tokens_per_second=total / spread.median)
        rows.append(found[key] | speed | dict(tokens=total))
        if settings.profile:
            kernels = profiled(partial(steps[key], None), device)
            console.print(kernel_table(f"kernels of a step, {key}", kernels))
            rows[-1]["kernels"] = kernels
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
    refers = timed[0]["mfu_refers_to"] if timed else "datasheet"
    share = "MFU, %" if refers == "datasheet" else "of the product's rate, %"
    columns = "step, ms", "tokens/s", share, "memory, MiB", "error loss", "gradient"
    found = grid(title, "", *columns)
    for row in timed:
        extra = row["extra_bytes"]
        found.add_row(
            row["contender"],
            milliseconds(row["seconds"]["step"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * row['mfu']:.1f}",
            "?" if extra is None else f"{extra / MIB:,.0f}",
            *(f"{row['error'][name]:.1e}" for name in ("loss", "gradient")),
        )
    return found


if __name__ == "__main__":
    run(tyro.cli(Settings, description=__doc__))
