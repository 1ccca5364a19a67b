"""Run under torchrun: the sampler takes over weights that are spread over the ranks.

argv: a JSON file of cases, [{"model", "parallel", "lora"}], and an empty folder.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from sdpo.batching import Cursor
from sdpo.chat import chat_format
from sdpo.online.sampler import InProcessSampler, SamplingConfig
from sdpo.train.trainer import RunState
from sdpo_parallel.build import build_engine
from sdpo_parallel.config import LoraConfig, ParallelConfig
from sdpo_parallel.engine import Engine, EngineConfig
from sdpo_parallel.huggingface import load_tokenizer

PROMPTS = [[5, 9, 77], list(range(10, 60)), [100, 200, 300, 5, 6]]


@torch.no_grad()
def trained(engine: Engine) -> None:
    """Move all that is trained, as an update would, but far."""
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.1).add_(0.01)


@torch.no_grad()
def error(folder: str, rollouts: list) -> float:
    """How far log-probabilities are from those of the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worst = 0.0
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        ids = torch.tensor([[*prompt, *rollout.token_ids]])
        logp = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        own = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
        worst = max(worst, float((own - torch.tensor(rollout.logprobs)).abs().max()))
    return worst


def compare(name: str, case: dict, folder: Path) -> dict[str, float]:
    """Errors before the sampler took over the trained weights, and after."""
    parallel = ParallelConfig(**case["parallel"])
    config = EngineConfig(
        model=case["model"],
        run_folder=str(folder / "run"),
        total_steps=1,
        max_tokens=128,
        parallel=parallel,
        lora=LoraConfig(**case["lora"]),
    )
    engine = build_engine(name, config, RunState(Cursor(4, 0), ""))  # pyright: ignore
    engine.load()
    chat = chat_format(load_tokenizer(case["model"]))
    sampling = SamplingConfig(max_new_tokens=6)
    sampler = InProcessSampler(sampling, engine, case["model"], chat, parallel)
    trained(engine)
    before = sampler.sample(PROMPTS, [1, 2, 3])
    sampler.update(engine, 3)
    after = sampler.sample(PROMPTS, [1, 2, 3])
    engine.export(str(folder / "export"))
    for version, rollouts in ((0, before), (3, after)):
        assert {v for r in rollouts for v in r.versions} == {version}
    told = {
        "before": error(str(folder / "export"), before),
        "after": error(str(folder / "export"), after),
        "ranks": engine.ranks.world_size,
    }
    engine.checkpoints.finish()
    return told


def main() -> None:
    """All cases, one after the other."""
    cases, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = [
        compare("torchtitan", case, out / str(i))
        for i, case in enumerate(json.loads(cases.read_text()))
    ]
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
