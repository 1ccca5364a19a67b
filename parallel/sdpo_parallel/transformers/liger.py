"""Liger's Triton kernels in a model of transformers. Needs the liger extra."""

import os

from transformers import PreTrainedModel

from ..errors import SdpoError


def apply_liger(model: PreTrainedModel) -> None:
    """Swap RMSNorm, SwiGLU and rotary embeddings of ``model`` for Liger's, in place.

    By Liger's own patch of the model's type; its losses stay off, as SDPO has its own. Parameters
    and their names stay. The rotary embedding is a function of the model's module in transformers:
    every other model of the same type, and any built later, gets Liger's too.

    Raises:
        SdpoError: liger-kernel is not installed, does not know the model's type, or the model is
            on a CPU, where Triton's kernels do not run.
    """
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise SdpoError(
            f"liger needs liger-kernel ({error}): pip install 'sdpo[liger]', or set liger=False"
        ) from error
    kind = model.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise SdpoError(f"Liger has no kernels for model_type {kind!r}; set liger=False")
    if model.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SdpoError("liger: its kernels are Triton's and need a GPU; set liger=False")
    monkey_patch._apply_liger_kernel_to_instance(
        model,
        rope=True,
        rms_norm=True,
        swiglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )
