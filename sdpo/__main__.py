"""`python -m sdpo …` is `sdpo …`."""

from .cli import main

main()
