"""Run under torchrun: train the cases of a JSON file one after the other; compare each export.

argv: cases, empty folder. Writes ``rows.json``: name -> rows of metrics.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from helpers import runs
from sdpo.train.config import TrainConfig, with_settings
from sdpo.train.trainer import train
from sdpo_parallel.rows import Rows
from sdpo_parallel.teacher import reshard
from sdpo_parallel.torchtitan.engine import TorchtitanEngine
from sdpo_parallel.torchtitan.mesh import init_distributed

SETTINGS = {
    "hindsight": {
        "max_prompt_tokens": 150,
        "max_hindsight_prompt_tokens": 250,
        "max_response_tokens": 60,
    },
    "batch": {"interactions_per_step": 6, "row_tokens": 256, "micro_batch_tokens": 768},
    # eps: above the rounding of a gradient, which Adam's first step would else scale up to lr
    "optimizer": {"lr": 3e-4, "max_grad_norm": 1.0, "eps": 1e-6},
    "parallel": {"compute_dtype": "float32"},
    "safeguard": {"probe_every": 2, "probe_interactions": 5},
}
TOKENS = torch.randint(5, 400, (2, 256), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-4


@torch.no_grad()
def logits(engine: TorchtitanEngine) -> torch.Tensor:
    """(B, T, V), whole on every rank."""
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    index = torch.arange(TOKENS.numel())
    with engine.context():
        h = engine.policy.hidden_states(Rows.of(TOKENS, positions, index))
        part = h @ engine.policy.lm_head().weight.T
    reshard(engine.module)
    if (group := engine.policy.tensor_group) is not None:
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        part = torch.cat(parts, dim=-1)
    return part.view(*TOKENS.shape, -1)


def compare_exports(engine: TorchtitanEngine, folder: str, **options) -> None:
    """``TorchtitanEngine.export``, and the trained logits next to those of transformers."""
    untouched = AutoModelForCausalLM.from_pretrained(engine.config.model, dtype=torch.float32)
    trained = logits(engine)
    export(engine, folder, **options)
    if engine.ranks.is_main:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            found, before = model(TOKENS).logits, untouched(TOKENS).logits
        apart = (found - trained).abs().max()
        limit = TOLERANCE if trained.dtype == torch.float32 else 0.1 * found.abs().max()
        assert apart < limit, apart
        assert (before - trained).abs().max() > 10 * TOLERANCE, "training moved nothing"
    if engine.config.lora.rank:
        export(engine, f"{folder}-peft", adapters=True)
        if engine.ranks.is_main:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(untouched, f"{folder}-peft")
            with torch.no_grad():
                found = adapted(TOKENS).logits
            assert (d := (found - trained).abs().max()) < TOLERANCE, ("PEFT", d)


def main(cases: str, out: str) -> None:
    init_distributed()
    work = json.loads(Path(cases).read_text())
    rows = {}
    for case in work["cases"]:
        print("case:", case["name"], file=sys.stderr)
        folder = Path(out) / "run"
        config = TrainConfig(model=case["model"], data=work["data"], out=str(folder))
        for settings in (SETTINGS, case["settings"]):
            config = with_settings(config, settings, case["name"])
        train(config)
        if dist.get_rank() == 0:
            rows[case["name"]] = runs.read_metrics(folder)
            shutil.rmtree(folder)
        dist.barrier()
    if dist.get_rank() == 0:
        (Path(out) / "rows.json").write_text(json.dumps(rows))
    leave()


if __name__ == "__main__":
    export, TorchtitanEngine.export = TorchtitanEngine.export, compare_exports
    # one process group for all cases
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    main(*sys.argv[1:])
