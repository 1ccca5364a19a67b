"""Run under torchrun: what the ranks of a model for inference tell each other.

argv: model, folder for a file by rank.
"""

import json
import sys
from pathlib import Path

import pytest

from sdpo_parallel.build import build_inference
from sdpo_parallel.config import ParallelConfig
from sdpo_parallel.errors import SdpoError
from sdpo_parallel.inference import InferenceConfig

model, out = sys.argv[1:]
config = InferenceConfig(model=model, max_tokens=64, parallel=ParallelConfig(tensor=2))
inference = build_inference("torchtitan", config)
inference.load()
rank = inference.ranks.rank
called = []


def refuse() -> None:
    called.append(rank)
    raise SdpoError(f"refused by rank {rank}")


with pytest.raises(SdpoError) as refused:
    inference.on_main(refuse)
with pytest.raises(SdpoError) as differs:
    inference.check_agreement("the seed", rank)
inference.check_agreement("the model", model)
told = {
    "gathered": inference.gather(rank),
    "main": inference.on_main(lambda: f"from rank {rank}"),
    "refused": str(refused.value),
    "called": called,
    "differs": str(differs.value),
    "dtypes": sorted({str(p.dtype) for p in inference.model.module.parameters()}),
}
(Path(out) / f"{rank}.json").write_text(json.dumps(told))
inference.close()
