"""Users who change their mind, and users with one wish after the other: curves over updates.

    python -m benchmarks.online flip MODEL PROMPTS FOLDER [--seeds 0 1 2] [--contenders NAME ...]
    python -m benchmarks.online complementary MODEL PROMPTS FOLDER
    python -m benchmarks.online flip MODEL PROMPTS FOLDER --only-report

Every run is `sdpo online demo` with another objective and teacher, and a user who goes by a rule;
one that is there already is not run again, one that was interrupted goes on, and of a finished one
no weights are kept. All answers are sampled, to prompts that were never trained on: an update's own
are new to the policy that answers them, and count as its measure. The report has, for each
contender and phase, the interactions after which half and 90 % of an update's answers please the
user, and of held-out answers the rate, what is left of the first wish, leaks, and the similarity
of question and answer, and at the end the perplexity of real text; the figure each persona's rate,
the range over seeds shaded.

flip is the paper's Figure 4 (arXiv:2603.12273) in small, complementary its Figure 6.
"""

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import matplotlib
import tyro
from rich.console import Console
from rich.table import Table

matplotlib.use("svg")
import matplotlib.pyplot as plt

from sdpo.demo.measure import perplexity
from sdpo.demo.run import curve
from sdpo.io.files import write_text
from sdpo.online.measures import Similarity

END = "end.json"
"""Of a finished run: what was measured of its last weights."""
PHASES = {
    "flip": ("concise", "detailed"),
    "complementary": ("concise", "clarification_first", "committing"),
}
SAMPLED = 'kind = "SampledToken"\ncentre = true'
REVERSE, FORWARD = (
    f'kind = "{kind}"\nhindsight_temperature = 0.8' for kind in ("ReverseKL", "ForwardKL")
)
CONTENDERS = {
    "sampled token, live": (SAMPLED, "live"),
    "reverse KL, live": (REVERSE, "live"),
    "reverse KL, EMA": (REVERSE, "ema:0.9"),
    "reverse KL, frozen": (REVERSE, "frozen"),
    "reverse KL, trust region": (REVERSE, "trust-region:0.5"),
    "forward KL, frozen": (FORWARD, "frozen"),
}
"""Name -> objective and teacher. The first is the paper's objective; its clip does nothing where
each answer is trained on once, by the policy that gave it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run, and where the runs are kept."""

    what: Annotated[Literal["flip", "complementary"], tyro.conf.Positional]
    model: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder."""
    prompts: Annotated[str, tyro.conf.Positional]
    """A file of prompts, as `sdpo online --prompts` takes it."""
    folder: Annotated[Path, tyro.conf.Positional]
    """Where the runs, the report and the figure go."""
    seeds: tuple[int, ...] = (0, 1, 2)
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    updates: int = 6
    """Of each phase."""
    held_out: int = 24
    """Prompts that are asked before the first update and at each phase's end."""
    interactions: int = 8
    """Of each update."""
    tokens: int = 64
    """Of an answer at most."""
    lr: float = 3e-5
    jobs: int = 1
    """Runs at a time; on a CPU give each one thread, OMP_NUM_THREADS=1."""
    config: Path | None = None
    """TOML file of further settings, the same for all; it must not hold an objective."""
    only_report: bool = False
    """Run nothing; report what is there."""


def arguments(settings: Settings, contender: str, seed: int, out: Path) -> list[str]:
    """Of `sdpo online` for one run."""
    phases = [f"{name}:{settings.updates}" for name in PHASES[settings.what]]
    common = settings.config.read_text(encoding="utf-8") if settings.config else ""
    objective, teacher = CONTENDERS[contender]
    file = out.with_suffix(".toml")
    file.write_text(f"{common}\n[objective]\n{objective}\n", encoding="utf-8")
    return [
        "demo",
        *("--config", str(file)),
        *("--model", settings.model, "--prompts", settings.prompts, "--out", str(out)),
        *("--phases", *phases, "--teacher", teacher),
        *("--optimizer.lr", str(settings.lr)),
        *("--batch.seed", str(seed)),
        *("--batch.interactions-per-step", str(settings.interactions)),
        *("--sampling.max-new-tokens", str(settings.tokens)),
        *("--evaluate.every", str(settings.updates), "--evaluate.decoding", "sampled"),
        *("--evaluate.prompts", str(settings.held_out)),
        *("--safeguard.probe-every", str(settings.updates)),
        # gigabytes each, of which only the last is looked at
        *("--checkpoint.interval", str(len(phases) * settings.updates)),
    ]


def run(settings: Settings) -> None:
    """All runs that are not there yet."""
    with ThreadPoolExecutor(settings.jobs) as pool:
        due = [(settings, c, seed) for seed in settings.seeds for c in settings.contenders]
        for _ in pool.map(lambda job: run_one(*job), due):
            pass


def run_one(settings: Settings, contender: str, seed: int) -> None:
    """One run, if it is not there yet."""
    out = folder_of(settings, contender, seed)
    if (out / END).is_file():
        return
    resume = ["--resume"] if (out / "config.json").is_file() else []
    recipe, *given = arguments(settings, contender, seed, out)
    argv = [sys.executable, "-m", "sdpo", "online", recipe, *resume, *given]
    print(f"{contender}, seed {seed}: {out}", file=sys.stderr)
    with open(out.with_suffix(".log"), "w", encoding="utf-8") as log:
        subprocess.run(argv, check=True, stdout=log, stderr=log)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        # two models that are loaded by threads of one process come out empty
        end = {"perplexity": alone.submit(perplexity, str(out / "export")).result()}
    for weights in ("checkpoints", "export"):
        shutil.rmtree(out / weights)
    write_text(out / END, json.dumps(end))


def folder_of(settings: Settings, contender: str, seed: int) -> Path:
    """Where a run is."""
    name = contender.replace(", ", "-").replace(" ", "-")
    return settings.folder / f"{settings.what}-{name}-{seed}"


def finished(settings: Settings, contender: str) -> list[Path]:
    """Folders of the seeds that have run to their end."""
    folders = [folder_of(settings, contender, seed) for seed in settings.seeds]
    return [out for out in folders if (out / END).is_file()]


def read_rows(path: Path) -> list[dict]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def similarities(similarity: Similarity | None, folders: list[Path], step: int) -> list[float]:
    """Mean similarity of question and answer in each run's evaluation after an update."""
    if similarity is None:
        return []
    said = [read_rows(out / "evaluations" / f"step-{step}.jsonl") for out in folders]
    return [fmean(similarity([r["prompt"] for r in s], [r["answer"] for r in s])) for s in said]


def crossing(rows: list[dict], persona: str, phase: int, share: float, each: int) -> str:
    """Interactions of a phase after which a persona's rate of an update's answers first reaches a
    share; "never" if it does not."""
    rates = [row["preference"][persona] for row in rows if row["phase"] == phase]
    first = next((i for i, rate in enumerate(rates) if rate >= share), None)
    return "never" if first is None else str(first * each)


def report(settings: Settings) -> Table:
    """For each contender a row before any update, and one at the end of each phase."""
    table = Table(
        "contender", "seeds", "after", "its rate", "to 50 %", "to 90 %", "first wish",
        "words", "leaks", "similarity", "perplexity",
    )  # fmt: skip
    personas, similarity = PHASES[settings.what], Similarity.load()
    for contender in settings.contenders:
        folders = finished(settings, contender)
        evaluations = [read_rows(out / "evaluations.jsonl") for out in folders]
        updates = [curve(out, personas) for out in folders]
        ppl = [read_rows(out / END)[0]["perplexity"] for out in folders]
        for phase, persona in enumerate(("nothing", *personas) if folders else ()):
            step = phase * settings.updates
            at = [next(e for e in rows if e["step"] == step) for rows in evaluations]
            rates, crossed = "", ["", ""]
            if phase:
                rates = spread([e["preference"][persona] for e in at])
                each = settings.interactions
                crossed = [
                    ", ".join(crossing(rows, persona, phase, share, each) for rows in updates)
                    for share in (0.5, 0.9)
                ]
            table.add_row(
                *(("", "") if phase else (contender, str(len(folders)))),
                persona,
                rates,
                *crossed,
                spread([e["preference"][personas[0]] for e in at]),
                spread([e["words"] for e in at], 0),
                spread([e["leaks"] for e in at]),
                spread(similarities(similarity, folders, step)),
                spread(ppl) if phase == len(personas) else "",
            )
    return table


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and least to greatest where there are several."""
    if not values:
        return ""
    told = f"{fmean(values):.{digits}f}"
    if len(values) == 1:
        return told
    return f"{told} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def figure(settings: Settings, path: Path) -> None:
    """A panel for each contender, a curve for each persona."""
    shown = [c for c in settings.contenders if finished(settings, c)]
    columns = min(max(len(shown), 1), 3)
    lines = max(-(-len(shown) // columns), 1)
    size = (3.1 * columns, 0.6 + 2.4 * lines)
    canvas, axes = plt.subplots(
        *(lines, columns), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, contender in zip(axes.flat, shown, strict=False):
        for persona in PHASES[settings.what]:
            rates: dict[int, list[float]] = defaultdict(list)
            for out in finished(settings, contender):
                # an update's answers are those of the policy before it
                rows = [(row["update"] - 1, row) for row in curve(out, [persona])]
                last = read_rows(out / "evaluations.jsonl")[-1]
                for step, row in (*rows, (last["step"], last)):
                    rates[step * settings.interactions].append(row["preference"][persona])
            x = sorted(rates)
            axis.plot(x, [fmean(rates[i]) for i in x], label=persona)
            low, high = ([f(rates[i]) for i in x] for f in (min, max))
            axis.fill_between(x, low, high, alpha=0.2)
        for phase in range(1, len(PHASES[settings.what])):
            axis.axvline(phase * settings.updates * settings.interactions, color="0.7", lw=1)
        axis.set(title=contender, xlabel="interactions", ylim=(0, 1))
    canvas.supylabel("share of answers to new prompts", fontsize="medium")
    handles, labels = axes[0][0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    canvas.savefig(path)
    plt.close(canvas)


def main(settings: Annotated[Settings, tyro.conf.arg(name="")]) -> None:
    """Run and report."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    if not settings.only_report:
        run(settings)
    Console(width=190).print(report(settings))
    figure(settings, settings.folder / f"{settings.what}.svg")


if __name__ == "__main__":
    tyro.cli(main)
