"""What a vLLM server's workers need beyond vLLM. The server imports this file alone:

PYTHONPATH=.../serving/extension vllm serve ... --worker-extension-cls sdpo_vllm.Extension
"""


class Extension:
    """Mixed into vLLM's worker."""

    def repack_tied_head(self) -> bool:
        """Let a lm_head that is tied to the embeddings follow them; whether there was need.

        On a CPU vLLM multiplies by a packed copy of the lm_head, which loading weights leaves as
        it was: answers would come from the new body and the old head.
        """
        from vllm.model_executor.layers.utils import (  # pyright: ignore
            dispatch_cpu_unquantized_gemm,
        )
        from vllm.platforms import current_platform  # pyright: ignore

        head = getattr(self.model_runner.get_model(), "lm_head", None)  # pyright: ignore
        if head is None or not current_platform.is_cpu():
            return False
        layer = getattr(head, "base_layer", head)  # where adapters are on, they wrap it
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        return True
