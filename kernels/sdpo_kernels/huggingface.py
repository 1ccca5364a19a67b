"""What a Hugging Face config says of the way from the lm_head's output to the logits."""

from typing import Any, TypedDict


class LogitOptions(TypedDict):
    """Two of the keyword arguments that all functions share."""

    softcap: float | None
    temperature: float


def logit_options(config: Any) -> LogitOptions:
    """``softcap`` and ``temperature`` with which the functions see a model's own logits.

        linear_reverse_kl(hidden, lm_head, teacher, **logit_options(model.config))

    ``final_logit_softcapping`` (Gemma) is the softcap. ``logit_scale`` (Cohere) and
    ``lm_head_multiplier`` (Falcon-H1) multiply the logits, and ``logits_scaling`` divides them
    (Granite), except in HyperCLOVA X, where it multiplies. Only what such a config names is known:
    a model that scales otherwise needs its own arguments.

    Args:
        config: of transformers, or anything with such attributes.
    """
    if hasattr(config, "get_text_config"):  # where text is one of several parts
        config = config.get_text_config()

    def number(name: str) -> float | None:
        return getattr(config, name, None)

    divisor = number("logits_scaling") or 1.0
    if str(getattr(config, "model_type", "")).startswith("hyperclovax"):
        divisor = 1 / divisor
    for name in ("logit_scale", "lm_head_multiplier"):
        divisor /= number(name) or 1.0
    softcap = number("final_logit_softcapping") or number("logits_soft_cap")  # RecurrentGemma
    return LogitOptions(softcap=softcap or None, temperature=divisor)
