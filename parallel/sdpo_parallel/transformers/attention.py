"""The attention of transformers' models over `Rows`: what a slot sees is `Sight`'s rule.

`install` puts a function of our own in place of SDPA's, under transformers' AttentionInterface. A
call that brings no `View` goes to SDPA as before, so that ``generate`` and other code notice
nothing. On a CPU it computes branch by branch, on a GPU by flex attention.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..branches import Plan, attend, plan
from ..rows import Kept, Rows

NAME = "sdpo"
BLOCK = 128
"""Slots of a block of flex attention's masks."""


class Unreadable(ValueError):
    """A layer attends in a way that `View` does not know, such as within a window."""


@dataclass(frozen=True)
class View:
    """What one pass's layers are told of its rows, as their keyword argument ``sdpo_view``."""

    masks: list[Plan] | BlockMask
    keep: Kept | None
    behind: Kept | None


def view(rows: Rows, keep: Kept | None, behind: Kept | None, dtype: torch.dtype) -> View:
    """How a pass over ``rows`` attends.

    Args:
        keep, behind: see `CausalModel.hidden_states`.
        dtype: of queries and keys.
    """
    sight = rows.sight if behind is None else rows.sight.behind(behind.rows)
    on_cpu = rows.tokens_BT.device.type == "cpu"
    return View(plan(sight, dtype) if on_cpu else sight.block_mask(BLOCK), keep, behind)


def install(model: PreTrainedModel) -> bool:
    """Let a model's layers take a `View`; False: it is not made for it."""
    layers = getattr(model.config.get_text_config(), "layer_types", None) or []
    if model.config._attn_implementation == NAME:
        return True
    if model.config._attn_implementation != "sdpa" or set(layers) - {"full_attention"}:
        return False
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME


def uninstall(model: PreTrainedModel) -> None:
    """Give a model SDPA back."""
    model.set_attn_implementation("sdpa")


NOTHING_OF = ("sliding_window", "softcap", "s_aux", "position_bias")
"""Options of attention that a `View` cannot heed."""


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sdpo_view: View | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(B, heads, T, H) queries, keys and values -> (B, T, heads, H)."""
    if sdpo_view is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    if found := [name for name in NOTHING_OF if options.get(name) is not None]:
        raise Unreadable(", ".join(found))
    key, value = _kept(module, key, value, sdpo_view)
    if isinstance(sdpo_view.masks, BlockMask):
        out, _ = flex_attention_forward(module, query, key, value, sdpo_view.masks, scaling=scaling)
        return out, None
    return attend(query, key, value, sdpo_view.masks, scaling).transpose(1, 2), None


def _kept(module: torch.nn.Module, key: Tensor, value: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """The keys and values that this pass sees."""
    layer: Any = module.layer_idx
    if view.keep is not None and not view.keep.closed:
        view.keep.layers[layer] = key.detach(), value.detach()
    if view.behind is None:
        return key, value
    keys, values = view.behind.layers[layer]
    return torch.cat([keys, key], 2), torch.cat([values, value], 2)
