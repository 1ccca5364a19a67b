"""A run's folder: new, resumed, locked; what metrics.jsonl keeps."""

import json
import subprocess
import sys

import pytest

from helpers import runs
from sdpo.batching import BatchConfig
from sdpo.errors import SdpoError
from sdpo.train.config import TrainConfig
from sdpo.train.run_folder import RunFolder, read_metrics


def config(out, **changes) -> TrainConfig:
    return TrainConfig(model="m", data="d", out=str(out), **changes)


def test_a_new_run_writes_its_config_and_refuses_a_second(tmp_path):
    out = tmp_path / "run"
    with RunFolder(str(out), config(out), resume=False) as run:
        run.open(0)
    assert json.loads((out / "config.json").read_text())["kind"] == "TrainConfig"
    with pytest.raises(SdpoError, match="already holds a run: pass --resume"):
        RunFolder(str(out), config(out), resume=False)
    with pytest.raises(SdpoError, match="engine: 'torchtitan' -> 'transformers'"):
        RunFolder(str(out), config(out, engine="transformers"), resume=True)
    whole = BatchConfig(unit="conversation")
    with pytest.raises(SdpoError, match="batch.unit: 'interaction' -> 'conversation'"):
        RunFolder(str(out), config(out, batch=whole), resume=True)
    stored = json.loads((out / "config.json").read_text())
    for later in ("unit", "share_prefix"):
        del stored["batch"][later]
    del stored["select"]  # a run from before there were these
    (out / "config.json").write_text(json.dumps(stored))
    for sharing in ("auto", "none"):
        RunFolder(str(out), config(out, batch=BatchConfig(share_prefix=sharing)), resume=True)
    (out / "config.json").unlink()
    (out / "checkpoints" / "step-3").mkdir(parents=True)
    with pytest.raises(SdpoError, match="config.json is gone: pass --resume"):
        RunFolder(str(out), config(out), resume=False)


def test_metrics_go_back_to_the_checkpoint_and_lose_a_half_written_line(tmp_path, capsys):
    out = tmp_path / "run"
    with RunFolder(str(out), config(out), resume=False) as run:
        run.open(0)
    assert not (out / "metrics.jsonl").exists() and not capsys.readouterr().err
    rows = "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 3))
    (out / "metrics.jsonl").write_text(rows + '{"step": 4, "lo')
    run.stopped.touch()
    with RunFolder(str(out), config(out), resume=True) as run:
        run.open(2)
    assert [r["step"] for r in read_metrics(out)] == [1, 2] and not run.stopped.exists()
    assert "from checkpoint step-2; steps 3 to 3 are done again" in capsys.readouterr().err
    with RunFolder(str(out), config(out), resume=True) as run:
        run.open(0)
    assert read_metrics(out) == []
    assert "the start (no checkpoint); steps 1 to 2 are done again" in capsys.readouterr().err


HOLD = """
import sys
from sdpo.train.config import TrainConfig
from sdpo.train.run_folder import RunFolder
with RunFolder(sys.argv[1], TrainConfig(model="m", data="d", out=sys.argv[1]), resume=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_jobs_cannot_train_in_one_folder(tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, out],
        env=runs.ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with (
        pytest.raises(SdpoError, match="another job is training in this folder"),
        RunFolder(out, config(out), resume=True),
    ):
        pass
    monkeypatch.setenv("RANK", "1")  # the main rank's lock is the job's
    with RunFolder(out, config(out), resume=True):
        pass
    monkeypatch.delenv("RANK")
    other.kill()  # a killed job holds nothing
    other.wait()
    with RunFolder(out, config(out), resume=True):
        pass
