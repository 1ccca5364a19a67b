"""`torchrun … -m sdpo.train RECIPE …` is `sdpo train RECIPE …` on each rank."""

import sys

from ..cli import main

main(["train", *sys.argv[1:]])
