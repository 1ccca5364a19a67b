"""`torchrun … -m sdpo.online RECIPE …` is `sdpo online RECIPE …` on each rank."""

import sys

from ..cli import main

main(["online", *sys.argv[1:]])
