"""Recipes: functions that return a whole config."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import tyro

from sdpo_parallel.config import CheckpointConfig, Frozen, OptimizerConfig, ParallelConfig

from ..batching import BatchConfig
from ..hindsight import HindsightConfig
from ..objective import DPO, JSD, SFT, ForwardKL, ReverseKL, SampledToken
from .config import TrainConfig

ASK = tyro.MISSING
"""What is always the user's to say."""


def reverse_kl(model: str = ASK, data: str = ASK, out: str = "runs/reverse-kl") -> TrainConfig:
    """Reverse KL over the whole vocabulary: the stable choice, also in continual runs."""
    return TrainConfig(model=model, data=data, out=out, objective=ReverseKL())


def forward_kl(model: str = ASK, data: str = ASK, out: str = "runs/forward-kl") -> TrainConfig:
    """Forward KL over the whole vocabulary: covers everything that hindsight would say."""
    return TrainConfig(model=model, data=data, out=out, objective=ForwardKL())


def jsd(model: str = ASK, data: str = ASK, out: str = "runs/jsd") -> TrainConfig:
    """Jensen-Shannon divergence: between reverse and forward KL."""
    return TrainConfig(model=model, data=data, out=out, objective=JSD())


def paper_offline(
    model: str = ASK, data: str = ASK, out: str = "runs/paper-offline"
) -> TrainConfig:
    """The paper's runs on logs (WildChat, WildFeedback): sampled token, live teacher, 2 epochs.

    128 interactions per step, as in the published script; the paper says 32, which is
    ``--batch.interactions-per-step 32``.
    """
    return TrainConfig(
        model=model,
        data=data,
        out=out,
        objective=SampledToken(ignore_first=2),
        hindsight=HindsightConfig(
            template="paper-offline", max_hindsight_prompt_tokens=2048, truncation="paper"
        ),
        batch=BatchConfig(interactions_per_step=128, epochs=2),
        optimizer=OptimizerConfig(lr=2e-6, schedule="cosine", warmup_fraction=0.05),
    )


def qwen3_4b(model: str = ASK, data: str = ASK, out: str = "runs/qwen3-4b") -> TrainConfig:
    """The paper's Qwen3-4B run on logs, laid out for one node of 8 x 80 GB.

    FSDP2 over all 8 GPUs, selective activation checkpointing, micro-batches of 24,576 tokens:
    55 GiB per GPU at the peak, as `--dry-run --ranks 8 --gpu-memory-gib 80` estimates it.
    """
    return _laid_out(paper_offline(model, data, out), 24_576, "selective")


def qwen3_8b(model: str = ASK, data: str = ASK, out: str = "runs/qwen3-8b") -> TrainConfig:
    """The paper's Qwen3-8B run on logs, laid out for one node of 8 x 80 GB.

    FSDP2 over all 8 GPUs, selective activation checkpointing, micro-batches of 16,384 tokens:
    56 GiB per GPU at the peak, as `--dry-run --ranks 8 --gpu-memory-gib 80` estimates it.
    """
    return _laid_out(paper_offline(model, data, out), 16_384, "selective")


def olmo3_7b(model: str = ASK, data: str = ASK, out: str = "runs/olmo-3-7b") -> TrainConfig:
    """The paper's Olmo-3-7B runs on logs: the transformers engine, one device of 180 GB or more.

    The paper starts from two checkpoints, ``--model allenai/Olmo-3-7B-Instruct-SFT`` and
    ``--model allenai/Olmo-3-7B-Instruct-DPO``. torchtitan has no Olmo 3 model yet, and so no layout
    of several GPUs.
    """
    config = _laid_out(paper_offline(model, data, out), 8192, "full")
    return replace(config, engine="transformers")


def _laid_out(
    config: TrainConfig,
    micro_batch_tokens: int,
    activation_checkpoint: Literal["selective", "full"],
) -> TrainConfig:
    return replace(
        config,
        batch=replace(config.batch, micro_batch_tokens=micro_batch_tokens),
        parallel=ParallelConfig(activation_checkpoint=activation_checkpoint),
    )


def paper_online(model: str = ASK, data: str = ASK, out: str = "runs/paper-online") -> TrainConfig:
    """The paper's objective for fresh rollouts: centred advantages, PPO clip, constant rate.

    ``data`` holds one round of rollouts with the log-probabilities they were sampled with. 16
    interactions per step, as in the paper's runs on TL;DR prompts; on the larger HelpSteer2 set it
    took 32, which is ``--batch.interactions-per-step 32``.
    """
    return TrainConfig(
        model=model,
        data=data,
        out=out,
        objective=SampledToken(centre=True, ppo_clip=0.2),
        hindsight=HindsightConfig(
            template="paper-online", max_hindsight_prompt_tokens=2048, truncation="paper"
        ),
        batch=BatchConfig(interactions_per_step=16, epochs=1),
        optimizer=OptimizerConfig(
            lr=5e-6, schedule="constant", warmup_fraction=0.0, max_grad_norm=1.0
        ),
    )


def sft(model: str = ASK, data: str = ASK, out: str = "runs/sft") -> TrainConfig:
    """Supervised fine-tuning on the logged responses: what SDPO is compared with; one pass.

    ``--objective.target next`` imitates the response behind the follow-up instead.
    """
    return TrainConfig(model=model, data=data, out=out, objective=SFT())


def paper_sft(model: str = ASK, data: str = ASK, out: str = "runs/paper-sft") -> TrainConfig:
    """The paper's SFT baseline on logs: 32 interactions per step, 2 epochs, AdamW at 2e-6.

    Prompt and response are cut to 2,048 tokens each, and the schedule is a cosine, as in
    ``paper-offline``. The paper's script says 2,048 tokens; its program is not published.
    """
    offline = paper_offline(model, data, out)
    return replace(offline, objective=SFT(), batch=replace(offline.batch, interactions_per_step=32))


def dpo(model: str = ASK, data: str = ASK, out: str = "runs/dpo") -> TrainConfig:
    """Direct preference optimization: the response behind the follow-up over the one before it.

    beta 0.1, 64 pairs per step and a rate of 1e-6 as in arXiv:2305.18290, with AdamW for RMSprop
    and a warm-up over a tenth of the run.
    """
    return TrainConfig(
        model=model,
        data=data,
        out=out,
        objective=DPO(beta=0.1),
        teacher=Frozen(),
        batch=BatchConfig(interactions_per_step=64),
        optimizer=OptimizerConfig(lr=1e-6, schedule="constant", warmup_fraction=0.1),
    )


def demo(model: str = ASK, data: str = ASK, out: str = "runs/demo-toy/train") -> TrainConfig:
    """What ``sdpo demo --world toy`` trains with: reverse KL, and the rate of a tiny model."""
    return replace(
        reverse_kl(model, data, out),
        hindsight=HindsightConfig(
            max_prompt_tokens=160, max_hindsight_prompt_tokens=224, max_response_tokens=32
        ),
        batch=BatchConfig(interactions_per_step=16, row_tokens=256, micro_batch_tokens=8192),
        optimizer=OptimizerConfig(lr=1e-4, schedule="constant"),
        parallel=ParallelConfig(activation_checkpoint="none"),
        checkpoint=CheckpointConfig(interval=1000),
    )


def demo_sampled_token(
    model: str = ASK, data: str = ASK, out: str = "runs/demo-toy/train"
) -> TrainConfig:
    """The toy demo with the paper's objective, whose live teacher may collapse there."""
    return replace(demo(model, data, out), objective=SampledToken())


RECIPES: dict[str, Callable[..., TrainConfig]] = {
    "reverse-kl": reverse_kl,
    "forward-kl": forward_kl,
    "jsd": jsd,
    "paper-offline": paper_offline,
    "qwen3-4b": qwen3_4b,
    "qwen3-8b": qwen3_8b,
    "olmo-3-7b": olmo3_7b,
    "paper-online": paper_online,
    "sft": sft,
    "paper-sft": paper_sft,
    "dpo": dpo,
    "demo": demo,
    "demo-sampled-token": demo_sampled_token,
}
