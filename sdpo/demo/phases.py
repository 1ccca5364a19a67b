"""The parts of a demo, announced and timed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class Phases:
    """What a demo goes through.

    Attributes:
        seconds: by part.
    """

    def __init__(self):
        self.console = Console()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce and time a part of the demo."""
        self.console.rule(name)
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
