"""`sdpo evaluate benchmarks`: EleutherAI's lm-evaluation-harness on models, side by side.

Each model's answers to a task are kept in the output's folder, so that a killed command goes on
where it was. The first model is the base that others are compared with, prompt by prompt.
"""

import contextlib
import difflib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from sdpo_parallel.huggingface import load_tokenizer

from .. import __version__
from ..chat import chat_format
from ..errors import SdpoError
from ..io.files import sha256, write_text
from ..online.tasks import data_files
from .intervals import Estimate, mean, ratio
from .models import Model, find_model, same_names_refused
from .preference import told

FILE = "benchmarks.json"
PRESETS = {
    "paper": ("ifeval", "mmlu_pro", "truthfulqa_mc1", "hellaswag", "commonsense_qa"),
    "quick": ("ifeval",),
    "regression": ("ifeval", "truthfulqa_mc1", "commonsense_qa"),
}
"""Tasks by what they are for: the paper's (tables 2 and 6); a first look; what training must not
spoil."""
QUICK = 100
"""Prompts of each task that the preset "quick" asks."""
Verdict = Literal["regressed", "unchanged", "improved"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """How the harness asks. What is left out is as the task says."""

    limit: int | None = None
    """Ask so many prompts of each task, from its beginning; None: all, or 100 under "quick"."""
    fewshot: int | None = None
    """Examples before each question; None: as the task says."""
    chat_template: bool = True
    """Whether questions are put into the model's chat template."""
    system: str | None = None
    """Text of a system message."""
    max_new_tokens: int | None = None
    """Longer answers are cut; None: as the task says."""
    batch: int = 16
    """Questions at a time, of a model in this process."""
    concurrency: int = 16
    """Questions at a time, of a server."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the weights of a model in this process; auto: as its folder has them, float32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model did on one task.

    Attributes:
        metrics: metric -> what each prompt gave: a number, or [hits, chances].
        higher_is_better: of each metric.
    """

    metrics: dict[str, list[Any]]
    higher_is_better: dict[str, bool]

    def estimate(self, metric: str) -> Estimate:
        """The task's score, over all prompts."""
        values = self.metrics[metric]
        if isinstance(values[0], list):
            return ratio(*zip(*values, strict=True))
        return mean(values)

    def change(self, metric: str, base: "Scores") -> Estimate:
        """This model's score less the base's, of the same prompts."""
        mine, theirs = self.metrics[metric], base.metrics[metric]
        if isinstance(mine[0], list):
            hits = [one[0] - other[0] for one, other in zip(mine, theirs, strict=True)]
            return ratio(hits, [one[1] for one in mine])
        return mean([one - other for one, other in zip(mine, theirs, strict=True)])


def verdict(change: Estimate, *, higher_is_better: bool = True) -> Verdict:
    """What a change's interval says at its level: "unchanged" where it holds zero, however wide it
    is."""
    low, high = change.low, change.high
    if not higher_is_better:
        low, high = -high, -low
    return "improved" if low > 0 else "regressed" if high < 0 else "unchanged"


def command(
    models: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    out: str,
    config: tyro.conf.OmitArgPrefixes[BenchmarkConfig],
    preset: Literal["paper", "quick", "regression"] = "regression",
    tasks: tuple[str, ...] = (),
    data: tuple[str, ...] = (),
) -> None:
    """Run benchmarks on models, and compare all others with the first.

    Args:
        models: folders, runs, RUN@SNAPSHOT, adapters, names on the hub, or URL#MODEL; NAME= before
            one names it.
        out: folder for the report and for what has been answered.
        preset: tasks to run.
        tasks: tasks of the harness to run in place of a preset's.
        data: TASK=FILE, for tasks whose data is not to come from the hub: JSON lines as the hub has
            them.
    """
    harness = Harness(Path(out), data_files(data), config)
    limit = config.limit if config.limit or preset != "quick" or tasks else QUICK
    names = tasks or PRESETS[preset]
    harness.check(names)
    scores, problems = dict[str, dict[str, Scores]](), list[str]()
    found = list[Model]()
    for text in models:
        try:
            found = same_names_refused([*found, find_model(text, Path(out))])
        except SdpoError as error:
            if text == models[0]:  # nothing to compare with
                raise
            problems.append(str(error))
    for model in found:
        scores[model.name] = {}
        for task in names:
            try:
                scores[model.name] |= harness.run(model, task, limit)
            except SdpoError as error:
                problems.append(f"{model.name}, {task}: {error}")
    report = {
        "kind": "benchmarks",
        "sdpo": __version__,
        "lm_eval": harness.version,
        "models": [asdict(model) | {"identity": model.identity} for model in found],
        "settings": asdict(config) | {"limit": limit, "preset": None if tasks else preset},
        "data": {task: {"file": f, "sha256": sha256(f)} for task, f in harness.files.items()},
        "rows": [asdict(row) for row in compare(scores)],
        "problems": problems,
    }
    write_text(Path(out) / FILE, json.dumps(report, indent=2) + "\n")
    show(report, Console())
    if problems:
        raise SdpoError("; ".join(problems) + f". All else is in {Path(out) / FILE}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one model; ``change`` and ``verdict`` against the first model."""

    task: str
    metric: str
    model: str
    prompts: int
    score: Estimate
    change: Estimate | None = None
    verdict: Verdict | None = None


def compare(scores: Mapping[str, Mapping[str, Scores]]) -> list[Row]:
    """All models' metrics, each beside the first model's."""
    base, *_ = scores
    rows = list[Row]()
    for task in dict.fromkeys(task for own in scores.values() for task in own):
        of_base = scores[base].get(task)
        for model, own in scores.items():
            if task not in own:
                continue
            for metric, values in own[task].metrics.items():
                row = Row(
                    task=task,
                    metric=metric,
                    model=model,
                    prompts=len(values),
                    score=own[task].estimate(metric),
                )
                if model != base and of_base is not None:
                    change = own[task].change(metric, of_base)
                    better = own[task].higher_is_better[metric]
                    said = verdict(change, higher_is_better=better)
                    row = replace(row, change=change, verdict=said)
                rows.append(row)
    return rows


class Harness:
    """lm-evaluation-harness, with an output folder.

    Args:
        files: task -> file of its data.

    Raises:
        SdpoError: the harness is not installed, or a task does not exist.
    """

    def __init__(self, out: Path, files: Mapping[str, str], config: BenchmarkConfig):
        self.out, self.files, self.config = out, dict(files), config
        try:
            import lm_eval  # an optional extra
        except ImportError as error:
            raise SdpoError(
                f"benchmarks need lm-evaluation-harness ({error}): pip install 'sdpo[eval]'"
            ) from None
        self.version = lm_eval.__version__
        self._simple_evaluate: Any = lm_eval.simple_evaluate
        self._tasks = self._own = _all_tasks()
        if files:
            self.check(list(files))
            self._own = type(self._tasks)(
                include_path=str(self._overrides()), include_defaults=False
            )

    def check(self, names: Sequence[str]) -> None:
        """Refuse tasks that the harness does not have."""
        there = self._tasks.all_tasks
        for name in names:
            if name not in there:
                near = ", ".join(difflib.get_close_matches(name, there)) or "none like it"
                raise SdpoError(f"lm-evaluation-harness has no task {name}; it has {near}")

    def run(self, model: Model, task: str, limit: int | None) -> dict[str, Scores]:
        """A model's scores on a task, or on all that a group of tasks has; from the output's folder
        where it has been there before.

        Raises:
            SdpoError: the task's data or the model cannot be had, or the folder holds scores of
                other settings.
        """
        path = self.out / "benchmarks" / model.name / f"{task}.json"
        header = {
            "model": model.identity,
            "task": task,
            "limit": limit,
            "settings": {k: v for k, v in asdict(self.config).items() if k in _DECIDE},
            "data": sha256(self.files[task]) if task in self.files else None,
            "lm_eval": self.version,
        }
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["header"] != header:
                changed = [name for name in header if kept["header"].get(name) != header[name]]
                raise SdpoError(
                    f"{path} holds scores of another {' and '.join(changed)}: delete it, or use "
                    "another --out"
                )
        else:
            results = self._evaluate(model, task, limit)
            kept = {
                "header": header,
                "scores": {k: asdict(v) for k, v in scores_of(results).items()},
            }
            write_text(path, json.dumps(kept) + "\n")
        return {name: Scores(**one) for name, one in kept["scores"].items()}

    def _evaluate(self, model: Model, task: str, limit: int | None) -> Mapping[str, Any]:
        if self.config.chat_template and not model.url:
            chat_format(load_tokenizer(model.tokenizer))  # an error that names the folder
        cache = self.out / "benchmarks" / model.name / "answers"
        cache.parent.mkdir(parents=True, exist_ok=True)
        with _telling(task, model.where):
            return self._ask(task, limit, use_cache=str(cache), **self._model(model))

    def look(self, model: Any, task: str, limit: int | None) -> dict[str, Scores]:
        """The scores of a model in this process as it is now; nothing is kept.

        Args:
            model: as `held` gives it.

        Raises:
            SdpoError: the task's data cannot be had.
        """
        with _telling(task, "the model in training"):
            return scores_of(self._ask(task, limit, model=model))

    def held(self, model: PreTrainedModel, folder: str) -> Any:
        """A model in this process, as the harness wants it.

        Args:
            folder: of its tokenizer.
        """
        from lm_eval.models.huggingface import HFLM

        make: Any = HFLM  # a registry hides its arguments
        return make(
            pretrained=model, tokenizer=load_tokenizer(folder), batch_size=self.config.batch
        )

    def _ask(self, task: str, limit: int | None, **model: Any) -> Mapping[str, Any]:
        config = self.config
        more = {"max_gen_toks": config.max_new_tokens} if config.max_new_tokens else None
        return self._simple_evaluate(
            **model,
            tasks=[task],
            num_fewshot=config.fewshot,
            limit=limit,
            batch_size=config.batch,
            apply_chat_template=config.chat_template,
            system_instruction=config.system,
            gen_kwargs=more,
            task_manager=self._own if task in self.files else self._tasks,
            bootstrap_iters=0,
            log_samples=True,
        )

    def _model(self, model: Model) -> dict[str, Any]:
        """Which of the harness's classes runs a model, and its arguments."""
        if model.url:
            args = {
                "base_url": f"{model.url.rstrip('/')}/chat/completions",
                "model": model.model,
                "num_concurrent": self.config.concurrency,
                "max_retries": 5,
                "timeout": 3600,
            }
            return {"model": "local-chat-completions", "model_args": args}
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.config.dtype
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        args = {"pretrained": model.model, "dtype": dtype}
        if model.tokenizer != model.model:  # adapters
            args |= {"pretrained": model.tokenizer, "peft": model.model}
        return {"model": "hf", "model_args": args, "device": device}

    def _overrides(self) -> Path:
        """A folder of tasks that differ from the harness's in where their data is."""
        folder = self.out / "tasks"
        for name, file in self.files.items():
            entry = self._tasks.task_index[name]
            asked, split = _asked(entry.yaml_path)
            # the file holds the questions and, where any are wanted, the examples before them
            splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
            own = {
                **splits,
                asked: split,
                "fewshot_split": split,
                "include": str(entry.yaml_path),
                "task": name,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: str(Path(file).resolve())}},
            }
            write_text(folder / f"{name}.yaml", yaml.safe_dump(own))
        return folder


@cache
def _all_tasks() -> Any:
    """The harness's own tasks: thousands of files are looked through, once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


_DECIDE = ("fewshot", "chat_template", "system", "max_new_tokens", "dtype")
"""Settings on which answers depend."""


def scores_of(results: Mapping[str, Any]) -> dict[str, Scores]:
    """What each prompt gave, of the harness's results with samples.

    Metrics that are no mean over prompts are left out.
    """
    found = dict[str, Scores]()
    for task, samples in results["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        metrics, better = dict[str, list[Any]](), dict[str, bool]()
        for key, whole in results["results"][task].items():
            metric, _, kept_by = key.partition(",")
            own = [s for s in samples if s.get("filter", kept_by) == kept_by and metric in s]
            values = [_value(sample[metric]) for sample in own]
            if not values or None in values or not isinstance(whole, int | float):
                continue
            metrics[metric] = values
            better[metric] = results["higher_is_better"][task].get(metric) is not False
            one = Scores(metrics=metrics, higher_is_better=better)
            if abs(one.estimate(metric).value - whole) > 1e-6:
                del metrics[metric], better[metric]
        found[task] = Scores(metrics=metrics, higher_is_better=better)
    return found


def _value(value: Any) -> float | list[float] | None:
    """A prompt's number, or its hits and chances."""
    if isinstance(value, list) and all(isinstance(v, bool) for v in value):
        return [float(sum(value)), float(len(value))]
    return float(value) if isinstance(value, bool | int | float) else None


def _asked(path: Any) -> tuple[str, str]:
    """Which field of a task names the split that it asks its questions of, and the split."""
    from lm_eval.tasks._yaml_loader import load_yaml

    task = load_yaml(path, resolve_func=False)
    name = "test_split" if task.get("test_split") else "validation_split"
    return name, task.get(name) or "test"


@contextlib.contextmanager
def _telling(task: str, where: str) -> Iterator[None]:
    """Errors of the harness as the user's: what is missing, and what to do."""
    try:
        yield
    except (ConnectionError, FileNotFoundError, LookupError) as error:
        first = str(error).strip().splitlines()[0]
        if "nltk" in str(error).lower() or "punkt" in str(error):
            raise SdpoError(
                "the task needs nltk's punkt_tab: python -m nltk.downloader punkt_tab, or name its "
                "folder in the environment variable NLTK_DATA"
            ) from None
        raise SdpoError(
            f"{first}. Give the task's data with --data {task}=FILE, or let the hub be reached"
        ) from None
    except NotImplementedError as error:
        raise SdpoError(
            f"{where}: a chat server cannot run the task ({error}); give the model's folder"
        ) from None


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a table for each task: all models' scores, and below them the changes."""
    for (task, prompts), rows in groupby(report["rows"], lambda r: (r["task"], r["prompts"])):
        cells = defaultdict[str, dict[str, str]](dict)  # metric -> model -> text
        for row in rows:
            lines = [told(row["score"])]
            if row["change"]:
                lines += [told(row["change"]), row["verdict"]]
            cells[row["metric"]][row["model"]] = "\n".join(lines)
        models = list(dict.fromkeys(model for scores in cells.values() for model in scores))
        several = len(models) > 1
        title = f"{task}, {prompts:,} prompts, %"
        title += "; below, changes from the first model" if several else ""
        table = Table("", *models, title=title, title_justify="left", show_lines=several)
        for metric, scores in cells.items():
            table.add_row(metric, *(scores.get(model, "-") for model in models))
        console.print(table)
