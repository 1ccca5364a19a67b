"""Tasks of lm-evaluation-harness, asked of a model while it trains; and runs that are handed them.

    sdpo online online … --evaluate.tasks ifeval --evaluate.every 4

The first scores are those before the first update; later ones are compared with them.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from sdpo_parallel.huggingface import load_tokenizer

from ..io.files import write_text
from ..online import command, store
from ..online.config import TasksConfig
from ..online.sampler import LocalSampler, RemoteSampler, Sampler
from ..online.tasks import data_files
from .benchmarks import BenchmarkConfig, Harness, Row, Scores, compare


def online(args: Sequence[str] | None = None) -> None:
    """`sdpo online …`."""
    command.main(args, Tasks)


def train_users(args: Sequence[str]) -> None:
    """`sdpo users train …`."""
    store.train(args, Tasks)


class Tasks:
    """The harness's tasks, asked of a model while it trains; ``step-N.json`` of a folder has each
    evaluation's scores, of every prompt.

    Args:
        batch: questions at a time, of a model in this process.

    Raises:
        SdpoError: the harness is not installed, or does not have a task.
    """

    def __init__(self, config: TasksConfig, folder: Path, batch: int):
        self.config, self.folder = config, folder
        files, settings = data_files(config.data), BenchmarkConfig(batch=batch)
        self.harness = Harness(folder, files, settings)
        self.harness.check(config.tasks)
        self.lm: Any = None

    def first(self, step: int) -> dict[str, Scores] | None:
        """The scores of the first evaluation up to a step, which later ones are compared with."""
        numbers = [path.stem.removeprefix("step-") for path in self.folder.glob("step-*.json")]
        there = [int(n) for n in numbers if n.isdigit() and int(n) <= step]
        if not there:
            return None
        kept = json.loads((self.folder / f"step-{min(there)}.json").read_text(encoding="utf-8"))
        return {task: Scores(**scores) for task, scores in kept["scores"].items()}

    def known(self, step: int) -> bool:
        """Scores are written down, of that step or of one before it."""
        return self.first(step) is not None

    def look(self, sampler: Sampler, folder: str, step: int) -> tuple[dict[str, float], str | None]:
        """What the sampler's model scores, beside what it did at first; written down. On the main
        rank.

        Args:
            folder: of its tokenizer.

        Returns:
            Metrics, and which scores have fallen, where that is to end the run.
        """
        with _numbers_kept(), self._asked(sampler, folder) as model:
            limit = self.config.limit
            found = [self.harness.look(model, task, limit) for task in self.config.tasks]
        scores = {name: one for some in found for name, one in some.items()}
        name, base = f"step-{step}", self.first(step - 1)
        rows = compare(({} if base is None else {"at first": base}) | {name: scores})
        rows = [row for row in rows if row.model == name]
        report = {
            "lm_eval": self.harness.version,
            "rows": [asdict(row) for row in rows],
            "scores": {task: asdict(one) for task, one in scores.items()},
        }
        write_text(self.folder / f"{name}.json", json.dumps(report) + "\n")
        metrics = {f"evaluate/benchmark/{r.task}/{r.metric}": r.score.value for r in rows}
        return metrics, fallen(rows) if self.config.regression == "stop" else None

    @contextmanager
    def _asked(self, sampler: Sampler, folder: str) -> Iterator[Any]:
        """What the harness asks, to get the sampler's answers."""
        if isinstance(sampler, RemoteSampler):
            from .asked import Asked  # an optional extra

            self.lm = self.lm or Asked(sampler, load_tokenizer(folder))
            yield self.lm
            return
        assert isinstance(sampler, LocalSampler)
        model, own = sampler.model, sampler.model.generation_config
        self.lm = self.lm or self.harness.held(model, folder)
        model.generation_config = _generation(folder, model.config)  # not the sampler's limits
        try:
            yield self.lm
        finally:
            model.generation_config = own


@contextmanager
def _numbers_kept() -> Iterator[None]:
    """The harness sets seeds; what the run draws is not to depend on it."""
    words, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(words)
    np.random.set_state(arrays)


def _generation(folder: str, config: Any) -> GenerationConfig:
    """What transformers would give to a model that it loads from the folder."""
    if (Path(folder) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def fallen(rows: Sequence[Row]) -> str | None:
    """Which scores are below those at first, with intervals that exclude zero."""
    told = [
        f"{row.task}'s {row.metric} changed by {100 * row.change.value:.1f} points, "
        f"[{100 * row.change.low:.1f}, {100 * row.change.high:.1f}]"
        for row in rows
        if row.verdict == "regressed" and row.change is not None
    ]
    return "; ".join(told) + " (evaluate.regression stop)" if told else None
