"""The environment of the processes that tests start."""

import os
from pathlib import Path

PATHS = [Path(__file__).parents[2] / p for p in (".", "kernels", "parallel", "tests")]
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
}
