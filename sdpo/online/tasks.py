"""Tasks of lm-evaluation-harness in an online run: what it needs of them. `sdpo.evaluate.tasks` has
them, and stands above this package; who starts a run hands it over.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..errors import SdpoError
from .config import OnlineConfig, TasksConfig
from .sampler import Sampler


class Tasks(Protocol):
    """What a run's policy is asked, and its scores in the run's folder. On the main rank."""

    def known(self, step: int) -> bool:
        """Scores are written down, of that step or of one before it."""
        ...

    def look(self, sampler: Sampler, folder: str, step: int) -> tuple[dict[str, float], str | None]:
        """Scores of a sampler's model, written down: metrics, and why the run must not go on.

        Args:
            folder: of its tokenizer.
        """
        ...


class MakeTasks(Protocol):
    """Makes the tasks of a run."""

    def __call__(self, config: TasksConfig, folder: Path, batch: int) -> Tasks:
        """With scores in a folder.

        Args:
            batch: questions at a time, of a model in this process.

        Raises:
            SdpoError: the harness is not installed, or does not have a task.
        """
        ...


def build_tasks(config: OnlineConfig, make: MakeTasks | None) -> Tasks | None:
    """Those of a run's config; None: it asks none, or replays a recording.

    Raises:
        SdpoError: nothing was handed over that makes them; and as ``make`` does.
    """
    if not config.evaluate.tasks or config.replay is not None:
        return None
    if make is None:
        raise SdpoError(
            "evaluate.tasks: `sdpo online` asks them; a program hands online() what does, "
            "tasks=sdpo.evaluate.tasks.Tasks"
        )
    return make(config.evaluate, Path(config.out) / "evaluations", config.sampling.batch)


def data_files(data: Sequence[str]) -> dict[str, str]:
    """What TASK=FILE says.

    Raises:
        SdpoError: there is no such file.
    """
    found = dict[str, str]()
    for text in data:
        task, _, file = text.partition("=")
        if not file or not Path(file).is_file():
            raise SdpoError(f"--data {text}: no such file; it is TASK=FILE")
        found[task] = file
    return found


def asked(config: TasksConfig) -> str:
    """What one evaluation asks, for a dry run.

    Raises:
        SdpoError: a file of data is not there.
    """
    files, most = data_files(config.data), list[int | None]()
    for task in config.tasks:
        rows = len(Path(files[task]).read_bytes().splitlines()) if task in files else None
        known = [n for n in (rows, config.limit) if n is not None]
        most.append(min(known, default=None))
    count = "all" if None in most else f"at most {sum(filter(None, most)):,}"
    return f"{count} prompts of tasks ({', '.join(config.tasks)}; of a group, of each of its tasks)"
