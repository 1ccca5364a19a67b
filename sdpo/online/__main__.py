"""`torchrun … -m sdpo.online RECIPE …` is `sdpo online RECIPE …` on each rank."""

from ..cli import run
from .command import main

run(main)
