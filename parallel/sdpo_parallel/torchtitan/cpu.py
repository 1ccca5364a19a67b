"""What torchtitan 0.3.0 needs on a machine without an accelerator. torchtitan only.

``prepare`` must run before torchtitan is imported: its modules bind the device at import.
"""

import os
import types
import warnings

import torch


def prepare() -> None:
    """Make torch.cpu answer what torchtitan asks of an accelerator. A no-op where there is one."""
    if torch.cuda.is_available():
        return
    from torch import _utils
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

    # torchtitan.tools.utils falls back to "cuda" where no accelerator is found
    _utils._get_available_device_type = lambda: "cpu"
    # metrics and garbage collection ask for these; barrier(device_ids=...) refuses the string "cpu"
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = types.SimpleNamespace(name="cpu", total_memory=memory)
    for name, answer in {
        "get_device_name": "cpu",
        "get_device_properties": properties,
        "memory_stats": {},
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "current_device": 0,
    }.items():
        setattr(torch.cpu, name, lambda *_, answer=answer: answer)

    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # pin_memory: there is nothing to copy to

    if getattr(FSDPModule.set_gradient_divide_factor, "forces_sum", False):
        return
    set_factor = FSDPModule.set_gradient_divide_factor

    def set_factor_and_force_sum(self, factor: float) -> None:
        # a factor turns into PREMUL_SUM, which gloo rejects; torchtitan only ever sets 1.0
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    set_factor_and_force_sum.forces_sum = True  # pyright: ignore[reportFunctionMemberAccess]
    FSDPModule.set_gradient_divide_factor = set_factor_and_force_sum
