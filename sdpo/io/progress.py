"""The progress bar of a command that knows how much there is to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(
    says: str, total: int, *, done: int = 0, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar with counts and the time that is left; call what it gives with how many more are done.

    Args:
        says: text before the bar.
        done: how many are done from the beginning.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), disable=not shown) as bar:
        yield partial(bar.advance, bar.add_task(says, total=total, completed=done))
