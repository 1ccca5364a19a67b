"""One version's training step, for ``step_against``: a job comes in as JSON, then a step per line.

Imports nothing but what all versions have, from wherever PYTHONPATH says.

Shapes: see ``sdpo.batching``.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from sdpo import hindsight
from sdpo.batching import BatchConfig, micro_batches
from sdpo.hindsight import Encoded
from sdpo.objective import ReverseKL, SampledToken
from sdpo.step import two_pass_loss
from sdpo_parallel.transformers.engine import TransformersModel

OBJECTIVES = {"reverse_kl": ReverseKL, "sampled_token": SampledToken}
# three flags, before truncation was by structure
UNTRUNCATED = getattr(hindsight, "Truncated", lambda: (False, False, False))()


def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.manual_seed(job["seed"])
    if job["model"] is None:
        model = AutoModelForCausalLM.from_config(Qwen3Config(**job["config"]))
        for name, p in model.named_parameters():
            if p.ndim > 1:  # peaky enough that the two passes disagree
                p.data.mul_(4 if "embed" in name or "lm_head" in name else 2)
    else:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    policy = TransformersModel(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    objective = OBJECTIVES[job["objective"]](ignore_first=2)
    examples = [
        Encoded(
            id=str(i),
            policy=tuple(prompt),
            hindsight=tuple(hindsight),
            response=tuple(response),
            old_logprobs=None,
            ends=True,
            truncated=UNTRUNCATED,
        )
        for i, (prompt, hindsight, response) in enumerate(job["examples"])
    ]
    packing = BatchConfig(row_tokens=512, micro_batch_tokens=1024)
    batches = list(micro_batches([(e, 1 / len(examples)) for e in examples], packing))
    for _ in sys.stdin:
        wall, process = time.perf_counter(), time.process_time()
        losses = []
        for batch in batches:
            loss = two_pass_loss(policy, batch, objective).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        seconds = dict(process=time.process_time() - process, wall=time.perf_counter() - wall)
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad()
        found = dict(loss=float(torch.stack(losses).sum()))
        found |= dict(gradient=float(torch.stack(norms).norm()), **seconds)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
