"""Recipes of `sdpo online`: functions that return a whole config."""

from collections.abc import Callable
from dataclasses import replace

import tyro

from sdpo_parallel.config import (
    CheckpointConfig,
    Frozen,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
)

from ..batching import BatchConfig
from ..hindsight import HindsightConfig
from ..objective import ForwardKL, SampledToken, TopKReverseKL
from ..train.safeguards import SafeguardConfig
from .config import BrakeConfig, EvaluateConfig, GuardConfig, OnlineConfig
from .sampler import SamplingConfig
from .users.config import RuleUser

ASK = tyro.MISSING
"""What is always the user's to say."""
TLDR = (
    "Summarise what the user gives you in one or two sentences. Begin with TL;DR: and write "
    "nothing besides the summary."
)
"""System message of the runs on TL;DR prompts, in our words."""


def recommended(
    model: str = ASK,
    prompts: str = ASK,
    phases: tuple[str, ...] = (),
    out: str = "runs/online",
) -> OnlineConfig:
    """Forward KL to a frozen teacher that is a little surer, a template without blame, brakes on.

    benchmarks/LOG.md says what was tried. Weights and optimizer are float32.
    """
    return OnlineConfig(
        model=model,
        prompts=prompts,
        phases=phases,
        out=out,
        objective=ForwardKL(hindsight_temperature=0.8),
        teacher=Frozen(),
        hindsight=HindsightConfig(template="wish"),
        batch=BatchConfig(interactions_per_step=16),
        optimizer=OptimizerConfig(
            lr=5e-6, schedule="constant", warmup_fraction=0.0, max_grad_norm=1.0
        ),
        safeguard=SafeguardConfig(probe_every=4),
        checkpoint=CheckpointConfig(interval=4),
        brakes=BrakeConfig(preference_drop=0.3, entropy_change=0.5, max_leaks=0.1),
    )


def paper_online_tldr(
    model: str = ASK,
    prompts: str = ASK,
    phases: tuple[str, ...] = ("concise_casual_beginner:16",),
    out: str = "runs/paper-online-tldr",
) -> OnlineConfig:
    """The paper's online runs on TL;DR prompts: 16 updates of 16, sampled token, centred, clip 0.2.

    As published where it says so, at temperature 1, as the paper means it: their code samples at
    0.6 and top-p 0.95 instead, which is ``--sampling.temperature 0.6 --sampling.top-p 0.95`` with
    ``--objective.ppo-clip None``.
    """
    return _paper(model, prompts, phases, out, batch=16, system=TLDR)


def paper_online_helpsteer(
    model: str = ASK,
    prompts: str = ASK,
    phases: tuple[str, ...] = (
        "no_emojis:16",
        "less_filler_praise_sycophancy:16",
        "answer_directly_reduce_formatting:16",
    ),
    out: str = "runs/paper-online-helpsteer",
) -> OnlineConfig:
    """The paper's online runs on HelpSteer2 prompts: three personas, 16 updates of 32 each."""
    config = _paper(model, prompts, phases, out, batch=32, system="")
    # their runs are chained by hand: the optimizer restarts, and the seed gives the same prompts
    return replace(config, phase_optimizer="restart", phase_prompts="repeat")


def _paper(
    model: str, prompts: str, phases: tuple[str, ...], out: str, *, batch: int, system: str
) -> OnlineConfig:
    return OnlineConfig(
        model=model,
        prompts=prompts,
        phases=phases,
        out=out,
        system=system,
        objective=SampledToken(centre=True, ppo_clip=0.2),
        hindsight=HindsightConfig(
            template="paper-online", max_hindsight_prompt_tokens=2048, truncation="paper"
        ),
        batch=BatchConfig(interactions_per_step=batch, seed=42),
        optimizer=OptimizerConfig(
            lr=5e-6, schedule="constant", warmup_fraction=0.0, max_grad_norm=1.0
        ),
        sampling=SamplingConfig(max_new_tokens=2048),
        guard=GuardConfig(injections="keep", max_followup_chars=0),
        evaluate=EvaluateConfig(prompts=256, every=3),
        checkpoint=CheckpointConfig(interval=3),
        safeguard=SafeguardConfig(probe_every=3),
    )


def paper_online_lora(
    model: str = ASK,
    prompts: str = ASK,
    phases: tuple[str, ...] = ("no_emojis:15",),
    out: str = "runs/paper-online-lora",
) -> OnlineConfig:
    """The authors' later loop: one interaction an update, LoRA 256, reverse KL on the top 20."""
    return OnlineConfig(
        model=model,
        prompts=prompts,
        phases=phases,
        out=out,
        objective=TopKReverseKL(k=20),
        hindsight=HindsightConfig(template="paper-online", max_prompt_tokens=2048),
        batch=BatchConfig(interactions_per_step=1, seed=1234),
        lora=LoraConfig(rank=256, alpha=512),
        optimizer=OptimizerConfig(
            lr=5e-6, eps=1e-6, schedule="constant", warmup_fraction=0.0, max_grad_norm=1.0
        ),
        sampling=SamplingConfig(max_new_tokens=2048),
        evaluate=EvaluateConfig(prompts=100, every=3),
        checkpoint=CheckpointConfig(interval=3),
        safeguard=SafeguardConfig(probe_every=3),
    )


def demo(
    model: str = ASK,
    prompts: str = ASK,
    phases: tuple[str, ...] = ("concise:5", "detailed:5"),
    out: str = "runs/demo/online",
) -> OnlineConfig:
    """What ``sdpo demo`` runs: a small model, short answers, two cores, users without praise.

    Temperature 0.5, as a model of 135 million parameters rambles at 1.
    """
    config = recommended(model, prompts, phases, out)
    return replace(
        config,
        hindsight=HindsightConfig(
            template="wish",
            max_prompt_tokens=256,
            max_hindsight_prompt_tokens=384,
            max_response_tokens=256,
        ),
        optimizer=replace(config.optimizer, lr=3e-5),
        user=RuleUser(praise=0.0),
        sampling=SamplingConfig(temperature=0.5, max_new_tokens=64, batch=64),
        batch=BatchConfig(interactions_per_step=12, row_tokens=512, micro_batch_tokens=4096),
        parallel=ParallelConfig(activation_checkpoint="none"),
        brakes=BrakeConfig(),
    )


RECIPES: dict[str, Callable[..., OnlineConfig]] = {
    "online": recommended,
    "paper-online-tldr": paper_online_tldr,
    "paper-online-helpsteer": paper_online_helpsteer,
    "paper-online-lora": paper_online_lora,
    "demo": demo,
}
