"""Which attention the torchtitan engine computes with, and why. No torchtitan, no GPU needed here.

What a slot of a row sees is `Sight`'s rule, and every choice masks so:

    flex        a BlockMask; Triton kernels made by torch.compile
    flex_flash  the same BlockMask in blocks of (256, 128); FlashAttention 4 kernels (CuTe DSL)
    varlen      no mask: cumulative lengths of whole sequences, which begin where positions restart
                (``create_varlen_metadata_for_document``), and a causal window; FlashAttention 2, 3
                or 4 by device, or cuDNN where torch prefers it. It cannot read what shares prefixes
    branches    one branch of a row after the other by SDPA (`sdpo_parallel.branches`)
    dense       a (B, 1, T, T) boolean mask and SDPA; memory grows with T squared

What each needs is read off torchtitan 0.3.0 (``VarlenAttention``, ``get_attention_config``) and the
torch it runs on (``torch.nn.attention._fa3``, ``_fa4``).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..config import Attention
from ..errors import SdpoError

Backend = Literal["flex", "flex_flash", "varlen", "branches", "dense"]
FASTEST_FIRST: tuple[Backend, ...] = ("varlen", "flex_flash", "flex", "branches", "dense")

FA3, FA4 = "flash_attn_interface", "flash_attn.cute.interface"
_INSTALL = {
    FA3: "FlashAttention 3 (the hopper folder of Dao-AILab/flash-attention)",
    FA4: "FlashAttention 4 (pip install --pre flash-attn-4)",
}
# major compute capability -> kernels, and the module they come from (None: torch's own)
_VARLEN: dict[int, tuple[str, str | None]] = {
    8: ("FlashAttention 2", None),
    9: ("FlashAttention 3", FA3),
    10: ("FlashAttention 4", FA4),
}
_FLEX_FLASH: dict[int, tuple[str, str | None]] = {
    9: ("FlashAttention 4", FA4),
    10: ("FlashAttention 4", FA4),
}


@dataclass(frozen=True)
class Choice:
    """An attention and, for the log, the reason in one line."""

    backend: Backend
    why: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides which attentions work.

    Args:
        device_type: ``torch.device.type``.
        capability: of an NVIDIA GPU, by ``torch.cuda.get_device_capability``; None for any other.
        context: ranks that split every row (CP).
        installed: whether a module can be imported, as ``importable`` answers.
        compute_dtype: of q, k and v; the flash kernels know no float32.
        compiled: blocks are compiled, by whatever backend.
        shares: rows are to share prefixes.
    """

    device_type: str
    capability: tuple[int, int] | None
    context: int
    installed: Callable[[str], bool]
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compiled: bool = False
    shares: bool = False

    def obstacle(self, backend: Backend) -> str | None:
        """Why ``backend`` cannot train here; None: it can."""
        if backend == "dense":
            return None
        if backend == "branches":
            if self.device_type != "cpu":
                return "it is made for a CPU"
            if self.context > 1:
                return f"it is not split by context parallelism (context={self.context})"
            return "it cannot be compiled" if self.compiled else None
        if backend == "flex":
            return "flex attention has no backward on a CPU" if self.device_type == "cpu" else None
        if self.device_type == "cpu":
            return "it has no CPU kernels"
        if self.device_type != "cuda" or self.capability is None:
            return "it is known to work on NVIDIA GPUs only"
        if self.compute_dtype == "float32":
            return "its kernels compute in bfloat16, and compute_dtype is float32"
        if backend == "varlen" and self.context > 1:
            return f"torchtitan does not split it by context parallelism (context={self.context})"
        return self._missing_kernels(backend)

    def _missing_kernels(self, backend: Backend) -> str | None:
        assert self.capability is not None
        version = "{}.{}".format(*self.capability)
        table = _VARLEN if backend == "varlen" else _FLEX_FLASH
        if self.capability[0] not in table:
            return f"there are no kernels for compute capability {version}"
        name, module = table[self.capability[0]]
        if module is None or self.installed(module):
            return None
        return (
            f"compute capability {version} takes {name}, and its module {module} cannot be "
            f"imported: install {_INSTALL[module]}"
        )

    def describe(self, backend: Backend) -> str:
        """The kernels, for the log."""
        if backend == "varlen":
            assert self.capability is not None
            return f"packed documents by {_VARLEN[self.capability[0]][0]}"
        return {
            "flex_flash": "block masks by FlashAttention 4 (experimental in torch)",
            "flex": "block masks by torch.compile's Triton kernels",
            "branches": "SDPA of one branch after the other, for a CPU",
            "dense": "a dense (T, T) mask, as a reference",
        }[backend]


def choose_attention(setting: Attention, here: Machine) -> Choice:
    """What ``setting`` means here; ``auto`` is the first of FASTEST_FIRST that works.

    Raises:
        SdpoError: ``setting`` was asked for and cannot work; the message says what can.
    """
    if setting != "auto":
        if (obstacle := here.obstacle(setting)) is None:
            return Choice(setting, f"asked for: {here.describe(setting)}")
        works = ", ".join(b for b in FASTEST_FIRST if here.obstacle(b) is None)
        raise SdpoError(
            f"attention={setting}: {obstacle}; what works here: {works}, or auto, which chooses"
        )
    passed_over = []
    for backend in FASTEST_FIRST:
        obstacle = here.obstacle(backend)
        if backend == "varlen" and here.shares:
            obstacle = obstacle or "it cannot read shared prefixes (batch.share_prefix)"
        if backend == "flex_flash" and here.context > 1:  # torch needs T to divide by context x 256
            obstacle = obstacle or "its blocks of 256 ask for longer rows when context splits them"
        if obstacle is None:
            return Choice(backend, "; ".join([here.describe(backend), *passed_over]))
        passed_over.append(f"not {backend}, as {obstacle}")
    raise AssertionError("dense works anywhere")


def importable(module: str) -> bool:
    """Whether ``module`` imports: a package built for another torch is found, yet of no use."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True
