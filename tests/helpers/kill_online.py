"""Kill runs that learn while they talk, resume them, and compare with an undisturbed run.

    python tests/helpers/kill_online.py --points 10 --seed 0

Each point kills a run on two ranks at a random moment, some of them between an update's two files,
once or twice, and resumes it. What was said and the losses must be the undisturbed run's: no
interaction is lost, none comes twice. Needs no GPU; about a minute a point.
"""

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from helpers import forked, online, runs, tiny  # noqa: E402

UPDATES, RANKS = 6, 2
PHASES = ("no_lists:3", "no_emojis:3")
OPTIONS = ("--checkpoint.interval", "2", "--evaluate.every", "3", "--teacher", "ema:0.8")
WORKER = str(Path(__file__).parent / "online_killed.py")


def resumed(model: str, prompts: str, out: Path) -> str:
    """Go on to the end; what it said."""
    argv = online.arguments(model, prompts, out, *OPTIONS, "--resume", phases=PHASES)
    result = forked.run(RANKS, "-m", "sdpo.online", *argv)
    runs.succeeded(result)
    return result.stderr


def killed(model: str, prompts: str, out: Path, update: int, moment: str) -> None:
    """Start or go on, and die there."""
    argv = online.arguments(model, prompts, out, *OPTIONS, "--resume", phases=PHASES)
    result = forked.run(RANKS, WORKER, str(update), moment, *argv)
    assert result.returncode, "it was to be killed"
    assert "SIGKILL" in result.stderr or "Signal 9" in result.stderr, result.stderr[-3000:]


def compare(undisturbed: Path, out: Path) -> None:
    """The same was said, once each, and the same was learnt."""
    before, after = online.records(undisturbed), online.records(out)
    assert len(after) == UPDATES * online.SMALL["batch.interactions-per-step"]
    assert len({r.id for r in after}) == len(after)
    assert [told(r) for r in before] == [told(r) for r in after]
    rows = runs.read_metrics(undisturbed), runs.read_metrics(out)
    runs.assert_same_trajectory(*rows, tolerance=1e-6)
    seen = online.evaluations(undisturbed), online.evaluations(out)
    assert seen[0] == seen[1]
    assert not list(out.rglob("*.partial"))


def told(record) -> tuple:
    """What must be the same; log-probabilities are, but for rounding."""
    return record.id, record.answer, record.followup, record.token_ids, record.version


def point(model: str, prompts: str, undisturbed: Path, out: Path, rng: random.Random) -> str:
    """Kill once or twice, resume, compare; one line of report."""
    moments = []
    update = 0
    for _ in range(rng.choice((1, 1, 2))):
        if update >= UPDATES - 1:
            break
        update = rng.randint(update + 1, UPDATES - 1)
        moments.append("between" if rng.random() < 0.3 else f"{rng.random() * 0.3:.3f}")
        killed(model, prompts, out, update, moments[-1])
    resumed(model, prompts, out)
    compare(undisturbed, out)
    return f"killed at {', '.join(moments)}: the same interactions and losses"


def prepare(folder: Path) -> tuple[str, str, Path]:
    """Model, prompts and an undisturbed run."""
    model = tiny.make_model(folder / "model", "qwen3")
    prompts = online.make_prompts(folder / "prompts.txt", 40)
    resumed(model, prompts, folder / "undisturbed")
    return model, prompts, folder / "undisturbed"


def main() -> None:
    """Random points."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        prepared = prepare(Path(name))
        for i in range(args.points):
            out = Path(name) / f"point-{i}"
            said = point(*prepared, out, random.Random(f"{args.seed} {i}"))
            print(f"{i + 1}/{args.points}", said, flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
