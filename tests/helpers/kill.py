"""Break runs in every way that clusters do, resume them, and compare with an undisturbed run.

    python tests/helpers/kill.py --points 20 --seed 0

Each point kills a run on two ranks at a random moment, or damages what it wrote, once or twice, and
resumes it. Its losses must equal the undisturbed run's, from the newest good checkpoint on; nothing
else may be lost; every interaction must be seen as often. Half of the points draw single
interactions, half whole conversations. Needs no GPU; about a minute a point.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from helpers import forked, runs, tiny  # noqa: E402

INTERVAL, STEPS, RANKS = 3, 14, 2
CONVERSATIONS = 35
"""As many steps of at least six interactions."""
OPTIONS = ["--checkpoint.interval", str(INTERVAL), "--checkpoint.keep", "2"]
OPTIONS += ["--teacher", "ema:0.8"]
UNITS = {"interaction": [], "conversation": ["--batch.unit", "conversation"]}
DAMAGES = ("truncate", "flip a bit")
WAYS = ("kill one", "kill all", "SIGTERM", *DAMAGES, "full disk")


class Run:
    """A training run that others disturb."""

    def __init__(self, model: str, data: str, out: Path, *options: str, ranks: int = RANKS):
        self.out, self.ranks = out, ranks
        self.interactions = len(Path(data).read_text().splitlines())
        given = ("reverse-kl", model, data, out, *OPTIONS, *options, "--resume")
        self.arguments, self.argv = runs.arguments(*given), runs.command(*given, ranks=ranks)

    @property
    def metrics(self) -> list[dict]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def done(self) -> bool:
        return (self.out / "export").exists()

    def checkpoints(self) -> list[int]:
        names = (p.name for p in (self.out / "checkpoints").glob("step-*"))
        return sorted(int(n[5:]) for n in names if n[5:].isdigit())

    def start(self, argv: list[str] | None = None) -> subprocess.Popen:
        return subprocess.Popen(
            argv or self.argv,
            env=runs.ENV,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> str:
        """Resume to the end; what it said."""
        result = forked.run(self.ranks or 1, "-m", "sdpo.train", *self.arguments)
        runs.succeeded(result)
        return result.stderr

    def until(self, process: subprocess.Popen, step: int, delay: float) -> None:
        """Wait until a step is logged, or the process ends; then a little longer."""
        while process.poll() is None and len(self.metrics) < step:
            time.sleep(0.005)
        time.sleep(delay)


def workers(process: subprocess.Popen) -> list[int]:
    """torchrun's children."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def kill(pids: list[int]) -> None:
    """SIGKILL to those that still are."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def disturb(run: Run, way: str, rng: random.Random) -> None:
    """Start or resume the run, and break it in one way at a random moment."""
    if way == "full disk":
        fill_disk(run)
        return
    process = run.start()
    seen = len(run.metrics)
    last = STEPS - 4
    step = rng.randint(min(seen + 1, last), last)
    if way in DAMAGES:
        step = max(step, INTERVAL + 2)
    run.until(process, step, delay=rng.random() * 0.1)
    if way == "kill one":
        kill(rng.sample(workers(process), 1))
    elif way == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        kill([process.pid, *workers(process)])
    _, told = process.communicate(timeout=120)
    if way == "SIGTERM" and not run.done:
        assert "go on with --resume" in told, told[-3000:]
        assert run.checkpoints()[-1] == run.metrics[-1]["step"], "SIGTERM saves where it stops"
    if way in DAMAGES and run.checkpoints():
        damage(run.out / "checkpoints" / f"step-{run.checkpoints()[-1]}", way, rng)


def damage(checkpoint: Path, way: str, rng: random.Random) -> None:
    """Spoil a random file of a checkpoint."""
    path = rng.choice([p for p in sorted(checkpoint.iterdir()) if p.stat().st_size])
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if way == "truncate":
        del content[at:]
    else:
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def fill_disk(run: Run) -> None:
    """Checkpoints go to a tmpfs with room for two and a half, in a mount namespace of its own."""
    folder = run.out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    kept = run.out / "kept"
    script = (
        f"cp -r {folder}/. {kept} && mount -t tmpfs -o size=5600k tmpfs {folder} && "
        f"cp -r {kept}/. {folder} && {shlex.join(run.argv)}; code=$?; "
        f"rm -rf {kept}/*; cp -r {folder}/. {kept}; exit $code"
    )
    kept.mkdir()
    process = run.start(["unshare", "-rm", "sh", "-c", script])
    _, told = process.communicate(timeout=300)
    assert process.returncode != 0 and "could not be written" in told, told[-3000:]
    assert " 0.0 MiB are free" in told, told[-3000:]
    shutil.rmtree(folder)
    kept.rename(folder)
    assert not list(folder.glob("*.partial")), "a failed save leaves nothing half-written"


def check(run: Run, undisturbed: list[dict], disturbances: list[str], rng: random.Random) -> str:
    """Disturb, resume, compare; one line of report."""
    lost = 0
    for way in disturbances:
        disturb(run, way, rng)
        if run.done:  # it was faster
            break
        saved = [0, *run.checkpoints()]
        if way in DAMAGES:
            saved = saved[:-1] or [0]
        again = len(run.metrics) - saved[-1]
        # since the newest good checkpoint, and one may be under way while steps go on
        assert 0 <= again <= INTERVAL * (3 if way in DAMAGES else 2), (way, again, saved)
        told = run.finish() if way == disturbances[-1] else ""
        if again and told:
            assert "are done again" in told, told[-2000:]
        lost += again
    if not run.done:
        run.finish()
    runs.assert_same_trajectory(undisturbed, run.metrics)
    newest = run.out / "checkpoints" / f"step-{STEPS}" / "manifest.json"
    assert json.loads(newest.read_text())["interactions_seen"] == run.interactions
    assert not list(run.out.rglob("*.partial"))
    return f"{' + '.join(disturbances)}: {lost} steps done again, the same losses"


def prepare(folder: Path, unit: str = "interaction") -> tuple[str, str, list[dict]]:
    """Model, data and the metrics of the undisturbed run that draws such units."""
    model = tiny.make_model(folder / "model", "qwen3")
    if unit == "interaction":
        data = tiny.make_interactions(folder / "i.jsonl", 6 * STEPS)
    else:
        data = tiny.make_conversations(folder / "i.jsonl", CONVERSATIONS)
    run = Run(model, data, folder / "undisturbed", *UNITS[unit])
    run.finish()
    assert len(run.metrics) == STEPS
    return model, data, run.metrics


def main() -> None:
    """Random points."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = {unit: prepare(folder / unit, unit) for unit in UNITS}
        for point in range(args.points):
            rng = random.Random(f"{args.seed} {point}")
            ways = [WAYS[point % len(WAYS)]]
            if rng.random() < 0.3:
                ways.append(rng.choice(WAYS[:5]))
            # each way in turn with each unit
            unit = tuple(UNITS)[(point + point // len(WAYS)) % len(UNITS)]
            model, data, undisturbed = prepared[unit]
            run = Run(model, data, folder / f"point-{point}", *UNITS[unit])
            told = check(run, undisturbed, ways, rng)
            print(f"{point + 1}/{args.points}", f"{unit}:", told, flush=True)
            shutil.rmtree(run.out)


if __name__ == "__main__":
    main()
