"""All that a GPU can tell, in one command that fits in nine minutes and needs no network.

    python benchmarks/gpu_suite.py OUT [--minutes 9] [--triton-cache FOLDER]
    python benchmarks/gpu_suite.py OUT --dry-run       # tiny sizes on a CPU: does it still work?

Parts run one after another, the most valuable first, each in a process of its own with a limit:
one that fails, hangs or does not fit in what is left costs nothing else. OUT gets a few small
files: ``suite.json`` (what ran, what failed, what was skipped and why), ``suite.log`` (all output),
and JSON lines per benchmark, written as results come in. With a cache that ``triton_cache`` filled,
nothing of ours is compiled; ``suite.json`` says which kernels were all the same.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 10.0
"""A part is not started with less than this left."""
GRACE_SECONDS = 8.0
"""From a part's limit to its kill: time to say what had failed."""
TESTS = (sys.executable, *["-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"])
TOLD = ("--durations=10", "-v", "--tb=short", "-o", "faulthandler_timeout=60")
"""A run that is stopped has then said which tests had passed, and where the others hung."""
SIDE_BY_SIDE = ("-n", "12", "--dist", "worksteal") if find_spec("xdist") else ()
"""Compiling is most of the GPU tests' time, and runs on as many cores as there are."""
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum.per_second",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
NCU = (
    *["ncu", "--clock-control", "none", "--csv", "--launch-count", "20", "--metrics"],
    ",".join(METRICS),
    *("--kernel-name", "regex:stats_kernel|divergence_kernel|softmax_grad_kernel"),
    *(sys.executable, "-m", "benchmarks.profiling", "--once"),
)
"""Counters of our own kernels, where Nsight Compute is there; clocks stay as they are."""


@dataclass(frozen=True)
class Part:
    """One process of the suite."""

    name: str
    seconds: float
    """Time limit of the part."""
    command: tuple[str, ...]
    interpret: bool = False
    """Run Triton's kernels in its interpreter, as there is no GPU."""


@dataclass(frozen=True)
class Outcome:
    """Result of a part: ok, failed, timed out or skipped."""

    name: str
    status: str
    seconds: float
    why: str = ""


def parts(out: Path) -> list[Part]:
    """The parts, most valuable first. What compiles for every shape has a part of its own."""
    benchmark = partial(_benchmark, out)
    divergence = "divergence --dtype bfloat16 --distances --seconds"
    reverse, quick = "--kinds reverse_kl", "--only sdpo upstream 'Liger fused' TRL fla"
    qwen, llama = "--heads qwen3-8b --tokens 8192", "--heads llama-3.2-1b --tokens"
    half = "--dtype bfloat16"
    logprob = f"logprob --seconds 0.4 {half} {qwen} --only sdpo"
    step, few = "step --seconds 0.5 --models", "--no-liger --only sdpo 'full logits'"
    compiled = "--only sdpo torch.compile 'Liger chunked'"
    peaked = "--problem peaked --kinds reverse_kl jsd --only sdpo upstream TRL"
    peers = "--only sdpo 'sdpo fused' QuACK 'Liger SM90' 'Liger scaled'"
    return [
        benchmark(
            "reverse KL, Qwen3-8B", 90, f"{divergence} 0.4 {reverse} {quick} {qwen} 4096 1024"
        ),
        Part("gpu tests", 240, (*TESTS, *SIDE_BY_SIDE, *TOLD)),
        benchmark(
            "reverse KL, Llama-3.2-1B", 40, f"{divergence} 0.4 {reverse} {quick} {llama} 8192"
        ),
        benchmark("a peaked problem", 40, f"{divergence} 0.3 {peaked} {qwen}"),
        benchmark("step, 0.6B", 70, f"{step} qwen3-0.6b {few} --profile"),
        benchmark("profile", 40, "profiling"),
        benchmark(
            *("the other divergences", 60),
            f"{divergence} 0.3 --kinds jsd forward_kl {qwen} {quick}",
        ),
        benchmark("logprob", 45, f"{logprob} 'sdpo fused' Liger TRL"),
        benchmark("logprob, CuTe DSL", 60, f"logprob --seconds 0.4 {half} {llama} 4096 {peers}"),
        benchmark("ceilings", 30, "ceilings"),
        benchmark("tuning", 100, "tuning --seconds 0.2"),
        Part("ncu", 60, NCU),
        benchmark("step, 4B", 80, f"{step} qwen3-4b --checkpointing --interactions 8 {few}"),
        benchmark("compiled divergences", 90, f"{divergence} 0.4 {reverse} {qwen} {compiled}"),
        benchmark("compiled log-probabilities", 90, f"{logprob} torch.compile 'Apple CCE' QuACK"),
        benchmark("step, 0.6B, everyone", 90, f"{step} qwen3-0.6b"),
        benchmark(
            "float32, and errors over the distance",
            60,
            f"divergence --seconds 0.3 --dtype float32 {reverse} {llama} 4096",
        ),
    ]


def rehearsal(out: Path) -> list[Part]:
    """The same commands with tiny sizes, for a CPU. What compiles is rehearsed once."""
    benchmark = partial(_benchmark, out)
    tiny = "--seconds 0.01 --heads 1000x64 --tokens 32 --dtype bfloat16 --distances 0.1"
    small = "--head 300x32 --tokens 32"
    step = "step --profile --seconds 0.01 --models check --interactions 4 --prompt 16"
    tuning = benchmark("tuning", 300, f"tuning --seconds 0.01 {small} --chunk 8")
    return [
        benchmark(
            "divergence", 300, f"divergence {tiny} --kinds reverse_kl --problem gaussian peaked"
        ),
        benchmark("ceilings", 60, "ceilings --seconds 0.01 --head 300x32 --tokens 32 --chunk 8"),
        Part("gpu tests", 120, (*TESTS, "--collect-only")),
        benchmark("step", 120, step),
        benchmark("logprob", 300, f"logprob {tiny} --only sdpo TRL linear"),
        replace(tuning, interpret=True),
        benchmark("profile", 120, f"profiling {small}"),
        Part("ncu", 60, NCU),
    ]


def _benchmark(out: Path, name: str, seconds: float, line: str) -> Part:
    """A part that writes a file named after its module; ``line``: module and options."""
    module, *options = shlex.split(line)
    file = ("--out", str(out / f"{module}.jsonl"))
    return Part(name, seconds, (sys.executable, "-m", f"benchmarks.{module}", *file, *options))


def run(
    part: Part, seconds: float, log: Path, dry: bool, triton_cache: Path | None = None
) -> Outcome:
    """Run one part, and survive whatever it does."""
    if shutil.which(part.command[0]) is None:
        return Outcome(part.name, "skipped", 0.0, f"{part.command[0]} is not there")
    paths = [str(ROOT / p) for p in (".", "kernels", "parallel", "tests")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "" if dry else os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    }
    environment.pop("TRITON_INTERPRET", None)
    if triton_cache is not None:
        environment["TRITON_CACHE_DIR"] = str(triton_cache)
    if part.interpret:
        environment["TRITON_INTERPRET"] = "1"
    begin = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        print(f"\n=== {part.name}: {' '.join(part.command)}", file=file, flush=True)
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(min(part.seconds, seconds))
        except subprocess.TimeoutExpired:
            _end(process)
            spent = time.monotonic() - begin
            return Outcome(part.name, "timed out", spent, "what it had written stays")
    spent = time.monotonic() - begin
    if code:
        return Outcome(part.name, "failed", spent, f"exit status {code}; see {log.name}")
    return Outcome(part.name, "ok", spent)


def _end(process: subprocess.Popen) -> None:
    """Interrupts a process group, so that pytest says what had failed, and kills what is left."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _kernels(cache: Path) -> set[tuple[str, str]]:
    """(name, hash) of the compiled kernels that a Triton cache holds."""
    return {(file.stem, file.parent.name) for file in cache.glob("*/*.cubin")}


def main(
    out: Annotated[Path, tyro.conf.Positional],
    minutes: float = 9.0,
    dry_run: bool = False,
    triton_cache: Path | None = None,
) -> None:
    """Run the suite. Exits 1 if a part failed or timed out.

    Args:
        out: a folder for results; must be empty, or not there yet.
        minutes: for everything.
        dry_run: every part with tiny sizes on the CPU, Triton interpreted where it must run.
        triton_cache: a folder that `python -m benchmarks.triton_cache fill` left. It stays as it
            is: the parts use a copy, whose installation is a part.
    """
    if out.exists() and any(out.iterdir()):
        sys.exit(f"error: {out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    log, summary = out / "suite.log", out / "suite.json"
    end = time.monotonic() + 60 * minutes
    outcomes, told = [], {"dry_run": dry_run}
    with tempfile.TemporaryDirectory() as scratch:
        todo, cache = rehearsal(out) if dry_run else parts(out), None
        if triton_cache is not None:
            cache = Path(scratch, "triton")
            command = ("-m", "benchmarks.triton_cache", "install", triton_cache.resolve(), cache)
            todo.insert(0, Part("triton cache", 60, (sys.executable, *map(str, command))))
        for part in todo:
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                outcome = Outcome(part.name, "skipped", 0.0, "no time was left")
            else:
                outcome = run(part, left, log, dry_run, cache)
            outcomes.append(outcome)
            status = f"{outcome.status}, {outcome.seconds:.0f} s {outcome.why}"
            print(f"{outcome.name}: {status}", flush=True)
            if triton_cache is not None and cache is not None:
                carried, here = _kernels(triton_cache), _kernels(cache)
                anew = Counter(name for name, _ in here - carried)
                told |= dict(kernels_carried=len(carried), compiled_anew=anew)
            text = json.dumps(told | {"parts": [asdict(o) for o in outcomes]}, indent=1)
            summary.with_suffix(".tmp").write_text(text + "\n", encoding="utf-8")
            summary.with_suffix(".tmp").replace(summary)
    sys.exit(any(o.status in ("failed", "timed out") for o in outcomes))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
