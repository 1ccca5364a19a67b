"""`torchrun … -m sdpo.train RECIPE …` is `sdpo train RECIPE …` on each rank."""

from ..cli import run
from .command import main

run(main)
