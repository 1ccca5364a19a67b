"""Self-distillation on logged conversations: the user's next message teaches the model.

Read interactions, encode each with and without its follow-up, collate them into packed batches, and
distil the policy towards its own hindsight:

    encoded = [encode(i, tokenizer, HindsightConfig()) for i in read_interactions(path)]
    batch = collate([(e, 1 / len(encoded)) for e in encoded], row_tokens=8192)
    two_pass_loss(model, batch, ReverseKL()).loss.backward()

Names are imported on first use: worker processes import this package and must not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batching import collate
    from .hindsight import HindsightConfig, encode
    from .interactions import Interaction, read_interactions
    from .objective import DPO, JSD, SFT, ForwardKL, ReverseKL, SampledToken, TopKReverseKL
    from .step import two_pass_loss

__version__ = "0.2.0"
__all__ = [
    "DPO",
    "JSD",
    "SFT",
    "ForwardKL",
    "HindsightConfig",
    "Interaction",
    "ReverseKL",
    "SampledToken",
    "TopKReverseKL",
    "collate",
    "encode",
    "read_interactions",
    "two_pass_loss",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("interactions", "hindsight", "batching", "objective", "step"):
            if hasattr(found := import_module(f".{module}", __name__), name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
