"""Users who change their mind, and users with one wish after the other: curves over updates.

    python -m benchmarks.online flip MODEL PROMPTS FOLDER [--seeds 0 1 2] [--teachers live frozen]
    python -m benchmarks.online complementary MODEL PROMPTS FOLDER
    python -m benchmarks.online flip MODEL PROMPTS FOLDER --only-report

Every run is `sdpo online`, with a user who goes by a rule; one that is there already is not run
again, one that was interrupted goes on. The report has, for each contender, the interactions after
which half and 90 % of held-out answers please the user, what is left of the first preference, and
leaks; and a figure with each persona's rate, the range over seeds shaded.

flip is the paper's Figure 4 (arXiv:2603.12273) in small, complementary its Figure 6.
"""

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import matplotlib
import tyro
from rich.console import Console
from rich.table import Table

matplotlib.use("svg")
import matplotlib.pyplot as plt

PHASES = {
    "flip": ("concise", "detailed"),
    "complementary": ("no_lists", "no_first_person", "concise"),
}
PAPER = "sampled token, live"
CONTENDERS = {
    PAPER: "live",
    "live": "live",
    "ema": "ema:0.9",
    "frozen": "frozen",
    "trust-region": "trust-region:0.5",
}
"""Name -> teacher. The first has the paper's objective, the others reverse KL."""
PAPERS = """\
[objective]
kind = "SampledToken"
centre = true
ppo_clip = 0.2
"""


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
    teachers: tuple[str, ...] = tuple(CONTENDERS)
    updates: int = 8
    """Of each phase."""
    every: int = 2
    """Updates between evaluations."""
    held_out: int = 32
    interactions: int = 16
    """Of each update."""
    tokens: int = 64
    """Of an answer at most."""
    config: Path | None = None
    """TOML file of further settings, the same for all; it must not hold an objective."""
    only_report: bool = False
    """Run nothing; report what is there."""


def arguments(settings: Settings, contender: str, seed: int, out: Path) -> list[str]:
    """Of `sdpo online` for one run."""
    phases = [f"{name}:{settings.updates}" for name in PHASES[settings.what]]
    common = settings.config.read_text(encoding="utf-8") if settings.config else ""
    file = out.with_suffix(".toml")
    file.write_text(common + (PAPERS if contender == PAPER else ""), encoding="utf-8")
    return [
        "demo",
        *("--config", str(file)),
        *("--model", settings.model, "--prompts", settings.prompts, "--out", str(out)),
        *("--phases", *phases, "--teacher", CONTENDERS[contender]),
        *("--batch.seed", str(seed)),
        *("--batch.interactions-per-step", str(settings.interactions)),
        *("--sampling.max-new-tokens", str(settings.tokens)),
        *("--evaluate.every", str(settings.every)),
        *("--evaluate.prompts", str(settings.held_out)),
        *("--safeguard.probe-every", str(settings.every)),
    ]


def run(settings: Settings) -> None:
    """All runs that are not there yet, one after the other."""
    for seed in settings.seeds:
        for contender in settings.teachers:
            out = folder_of(settings, contender, seed)
            if (out / "export").is_dir():
                continue
            resume = ["--resume"] if (out / "config.json").is_file() else []
            recipe, *given = arguments(settings, contender, seed, out)
            argv = [sys.executable, "-m", "sdpo", "online", recipe, *resume, *given]
            print(f"{contender}, seed {seed}: {out}", file=sys.stderr)
            subprocess.run(argv, check=True)


def folder_of(settings: Settings, contender: str, seed: int) -> Path:
    """Where a run is."""
    name = contender.replace(", ", "-").replace(" ", "-")
    return settings.folder / f"{settings.what}-{name}-{seed}"


def curves(settings: Settings, contender: str) -> list[list[dict]]:
    """Each finished seed's evaluations, in order."""
    found = []
    for seed in settings.seeds:
        out = folder_of(settings, contender, seed)
        if (out / "export").is_dir():
            lines = (out / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
            found.append([json.loads(line) for line in lines])
    return found


def crossing(rows: list[dict], persona: str, phase: int, share: float, each: int) -> float | None:
    """Interactions of a phase after which a persona's rate first reaches a share; None: never."""
    mine = [r for r in rows if r["phase"] == phase and r["step"] > 0]
    first = min((r["step"] for r in mine if r["preference"][persona] >= share), default=None)
    before = max((r["step"] for r in rows if r["phase"] < phase), default=0)
    return None if first is None else (first - before) * each


def report(settings: Settings) -> Table:
    """One row for each contender and phase."""
    table = Table(
        "contender", "seeds", "phase", "rate at its end", "to 50 %", "to 90 %", "first wish kept",
        "words", "leaks",
    )  # fmt: skip
    personas = PHASES[settings.what]
    for contender in settings.teachers:
        runs = curves(settings, contender)
        for phase, persona in enumerate(personas, start=1):
            if not runs:
                continue
            ends = [[r for r in rows if r["phase"] == phase][-1] for rows in runs]
            to = {
                share: [crossing(r, persona, phase, share, settings.interactions) for r in runs]
                for share in (0.5, 0.9)
            }
            table.add_row(
                contender,
                str(len(runs)),
                persona,
                spread([e["preference"][persona] for e in ends]),
                *(", ".join("never" if n is None else f"{n:.0f}" for n in to[s]) for s in to),
                spread([e["preference"][personas[0]] for e in ends]),
                spread([e["words"] for e in ends], 0),
                spread([e["leaks"] for e in ends]),
            )
    return table


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and least to greatest where there are several."""
    told = f"{fmean(values):.{digits}f}"
    if len(values) == 1:
        return told
    return f"{told} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def figure(settings: Settings, path: Path) -> None:
    """A panel for each contender, a curve for each persona."""
    shown = [c for c in settings.teachers if curves(settings, c)]
    size = (3.1 * max(len(shown), 1), 3.2)
    canvas, axes = plt.subplots(1, max(len(shown), 1), figsize=size, sharey=True, squeeze=False)
    for axis, contender in zip(axes[0], shown, strict=False):
        for persona in PHASES[settings.what]:
            rates: dict[int, list[float]] = defaultdict(list)
            for rows in curves(settings, contender):
                for row in rows:
                    at = row["step"] * settings.interactions
                    rates[at].append(row["preference"][persona])
            x = sorted(rates)
            axis.plot(x, [fmean(rates[i]) for i in x], label=persona)
            low, high = ([f(rates[i]) for i in x] for f in (min, max))
            axis.fill_between(x, low, high, alpha=0.2)
        for phase in range(1, len(PHASES[settings.what])):
            axis.axvline(phase * settings.updates * settings.interactions, color="0.7", lw=1)
        axis.set(title=contender, xlabel="interactions", ylim=(0, 1))
    axes[0][0].set_ylabel("share of held-out answers")
    axes[0][-1].legend(frameon=False)
    canvas.tight_layout()
    canvas.savefig(path)
    plt.close(canvas)


def main(settings: Annotated[Settings, tyro.conf.arg(name="")]) -> None:
    """Run and report."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    if not settings.only_report:
        run(settings)
    Console(width=150).print(report(settings))
    figure(settings, settings.folder / f"{settings.what}.svg")


if __name__ == "__main__":
    tyro.cli(main)
