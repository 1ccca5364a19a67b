"""The suite survives its parts, keeps to its time, and every command of it exists."""

import importlib
import json
import os
import subprocess
import sys
import time

import pytest
import tyro

from benchmarks import gpu_suite
from benchmarks.gpu_suite import ROOT, Part, parts, rehearsal, run
from benchmarks.peers import DIVERGENCES, chosen
from helpers.runs import ENV

PYTHON = sys.executable


@pytest.mark.parametrize("which", [parts, rehearsal])
def test_the_options_of_every_part_are_known(which, tmp_path):
    for part in which(tmp_path):
        if part.command[1:2] != ("-m",) or not part.command[2].startswith("benchmarks."):
            continue
        module = importlib.import_module(part.command[2])
        settings = getattr(module, "DivergenceSettings", None) or module.Settings
        # exits where an option is unknown
        found = tyro.cli(settings, args=list(part.command[3:]))
        for kind in getattr(found, "kinds", ("logprob",)) if hasattr(found, "heads") else ():
            for only in found.only:
                relatives = DIVERGENCES if kind != "logprob" else ("logprob",)
                assert any(chosen((only,), k) for k in relatives), (part.name, only)


def test_the_real_parts_rehearse_every_benchmark():
    def modules(which):
        return {p.command[2] for p in which(ROOT) if p.command[1:2] == ("-m",)}

    assert modules(parts) == modules(rehearsal)


def test_a_part_that_fails_hangs_or_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "GRACE_SECONDS", 1.0)
    log = tmp_path / "suite.log"
    good = run(Part("good", 60, (PYTHON, "-c", "print('fine')")), 60, log, True)
    bad = run(Part("bad", 60, (PYTHON, "-c", "import sys; sys.exit('it broke')")), 60, log, True)
    sleep = "import time; time.sleep(60)"
    nest = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{sleep}'])"
    begin = time.monotonic()
    hung = run(Part("hung", 1.5, (PYTHON, "-c", nest)), 60, log, True)
    late = run(Part("late", 60, (PYTHON, "-c", nest)), 1.0, log, True)
    assert time.monotonic() - begin < 30
    gone = run(Part("gone", 60, ("no-such-program",)), 60, log, True)
    statuses = [o.status for o in (good, bad, hung, late, gone)]
    assert statuses == ["ok", "failed", "timed out", "timed out", "skipped"]
    text = log.read_text()
    assert "fine" in text and "it broke" in text and "no-such-program is not there" in gone.why


def test_the_summary_says_what_was_skipped(tmp_path, monkeypatch, capsys):
    two = [Part(n, 60, (PYTHON, "-c", "")) for n in ("first", "second")]
    monkeypatch.setattr(gpu_suite, "rehearsal", lambda out: two)
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(tmp_path / "a", minutes=0.01, dry_run=True)
    assert not stop.value.code
    told = json.loads((tmp_path / "a" / "suite.json").read_text())
    assert [p["status"] for p in told["parts"]] == ["skipped", "skipped"]
    assert "no time was left" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is not empty"):
        gpu_suite.main(tmp_path / "a", dry_run=True)


def test_parts_use_a_copy_of_a_carried_cache_and_what_they_compile_is_told(tmp_path, monkeypatch):
    carried = tmp_path / "carried"
    (carried / "ABC").mkdir(parents=True)
    (carried / "ABC" / "stats_kernel.cubin").write_bytes(b"")
    copy = "import os, shutil; at = os.environ['TRITON_CACHE_DIR']; shutil.copytree(%r, at)"
    add = "import os, pathlib; p = pathlib.Path(os.environ['TRITON_CACHE_DIR'], 'DEF'); p.mkdir(); "
    add += "(p / 'another_kernel.cubin').touch()"
    one = [Part("install's double", 60, (PYTHON, "-c", copy % str(carried)))]
    one += [Part("compiles", 60, (PYTHON, "-c", add))]
    monkeypatch.setattr(gpu_suite, "rehearsal", lambda out: one)
    # the real installation fails, as nobody says which Triton this is for, and nothing else does
    with pytest.raises(SystemExit):
        gpu_suite.main(tmp_path / "out", dry_run=True, triton_cache=carried)
    told = json.loads((tmp_path / "out" / "suite.json").read_text())
    statuses = {p["name"]: p["status"] for p in told["parts"]}
    assert statuses.pop("triton cache") == "failed"
    assert told["kernels_carried"] == 1 and told["compiled_anew"] == {"another_kernel": 1}
    assert os.listdir(carried) == ["ABC"]


@pytest.mark.slow
def test_the_rehearsal_passes(tmp_path):
    out = tmp_path / "out"
    command = [PYTHON, "benchmarks/gpu_suite.py", out, "--dry-run", "--minutes", "15"]
    environment = {k: v for k, v in ENV.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    told = json.loads((out / "suite.json").read_text())["parts"]
    log = (out / "suite.log").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log[-4000:]}"
    assert {p["status"] for p in told} <= {"ok", "skipped"}
    assert [p["name"] for p in told if p["status"] == "skipped"] in ([], ["ncu"])
    benchmarks = ["ceilings", "divergence", "logprob", "profiling", "step", "tuning"]
    assert set(os.listdir(out)) == {*(f"{b}.jsonl" for b in benchmarks), "suite.json", "suite.log"}
