"""The paper's rows: every command is one of ours, and numbers are found where they lie."""

import json
from pathlib import Path

import pytest
from transformers import Olmo3Config

from helpers import online, tiny
from sdpo.cli import main
from sdpo.errors import SdpoError
from sdpo.online.recipes import RECIPES
from sdpo.reproduce import results
from sdpo.reproduce.rows import ROWS, Setup, find_row
from sdpo.reproduce.steps import Cost, Step, training


@pytest.mark.parametrize("miniature", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_a_dry_run_of_every_row(row, miniature, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["reproduce", row, "--dry-run", *(["--miniature"] if miniature else [])])
    out = capsys.readouterr().out
    assert "GPU hours" in out and out.count("\nsdpo ") + out.count("\ntorchrun ") >= 2
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing"
    if not miniature and find_row(row).needs:
        assert "still to be named" in out


@pytest.mark.parametrize("row", [name for name in ROWS if name != "R8"])  # which trains nothing
def test_runs_fit_the_machines_that_they_are_for(row, tmp_path, capsys):
    """Eight GPUs of 80 GB, and for Olmo 3 one of 180: by the dry run of each command itself."""
    prompts = online.make_prompts(tmp_path / "p.txt", 600)
    steps = find_row(row).steps(Setup(out=tmp_path, gpus=8, prompts=prompts))
    runs = [step for step in steps if step.argv[0] in ("train", "online")]
    assert runs
    for step in runs:
        argv = list(step.argv)
        name = argv[argv.index("--model") + 1]
        folder = tmp_path / Path(name).name
        if "Olmo-3" in name:  # whose other sizes are transformers' defaults
            config = Olmo3Config(vocab_size=100_278, max_position_embeddings=65_536)
            config.save_pretrained(folder)
        else:
            tiny.make_shape(folder, folder.name.lower())
        argv[argv.index("--model") + 1] = str(folder)
        memory = 80 if step.gpus == 8 else 180
        main([*argv, "--dry-run", "--ranks", str(step.gpus), "--gpu-memory-gib", str(memory)])
        assert "estimated memory per rank" in capsys.readouterr().out


def test_what_a_row_needs_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["reproduce", "r1"])
    assert "R1 needs --log" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["reproduce", "R10"])
    assert "no row is called R10; there are R1: table 2" in capsys.readouterr().err


def test_a_command_that_is_none_is_found_before_anything_runs(tmp_path):
    for argv in (("train", "no-such-recipe"), ("online", "demo", "--no-such-flag", "1")):
        step = Step(name="bad", argv=argv, makes=tmp_path / "out")
        with pytest.raises(SdpoError, match="step bad is no command"):
            step.check()


def test_a_step_that_fails_is_named_and_one_that_is_done_is_not_run(tmp_path):
    gone = ("evaluate", "report", str(tmp_path / "gone"), "--out", str(tmp_path / "report"))
    step = Step(name="report", argv=gone, makes=tmp_path / "report" / "report.html")
    with pytest.raises(SdpoError, match="step report ended with status 2"):
        step.run()
    step.makes.parent.mkdir()
    step.makes.touch()
    step.run()


def test_settings_that_flags_cannot_hold_are_written_beside(tmp_path):
    setup = Setup(out=tmp_path, prompts="p.txt", user="http://h/v1#big", judge="http://h/v1#big")
    run = find_row("R6").steps(setup)[0]
    run._write_config()
    assert json.loads(run.config_file.read_text())["user"]["model"] == "big"
    assert run.words[-2:] == ["--config", str(run.config_file)]
    assert run.cost.calls == 48 * 16


def test_held_out_prompts_are_asked_as_those_of_training(tmp_path):
    for name in ("R5", "R6", "R7"):
        run, look, *_ = find_row(name).steps(Setup(out=tmp_path, prompts="p.txt", held_out="h.txt"))
        system = look.argv[look.argv.index("--system") + 1]
        assert system == RECIPES[run.argv[1]]().system


def test_snapshots_that_are_exported_take_room(tmp_path):
    _, look, *_ = find_row("R6").steps(Setup(out=tmp_path))
    assert look.cost.disk == pytest.approx(4 * 4.0e9 / 2**30)
    _, look, *_ = find_row("R7").steps(Setup(out=tmp_path))
    assert look.cost.disk == pytest.approx(2 * 4 * 8.2e9 / 2**30)


def test_every_target_is_read_of_what_a_step_makes(tmp_path):
    """A target that no step feeds would always be missing."""
    for name, row in ROWS.items():
        for small in (None, "SmolLM2"):
            setup = Setup(out=tmp_path / name, small=small)
            fed = {step.makes.parent for step in row.steps(setup)}
            fed |= {step.makes for step in row.steps(setup)}
            for target in row.targets(setup):
                places = [c.cell_contents for c in target.read.__closure__ or ()]
                paths = [p.parent if p.suffix else p for p in places if hasattr(p, "parent")]
                assert paths and all(p in fed for p in paths), (name, target.says, paths)


def test_numbers_are_read(tmp_path):
    rates = [(0, 0.1), (3, 0.6), (6, 0.95), (9, 0.4), (12, 0.05)]
    rows = [{"step": s, "preference": {"a": r}} for s, r in rates]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert results.curve(tmp_path, "a", 9)() == 40
    assert results.reached(tmp_path, "a", 0.9, per_update=16)() == 6 * 16
    assert results.fell_below(tmp_path, "a", 0.5, after=6, per_update=16)() == 3 * 16
    assert results.rose_above(tmp_path, "a", 0.5, after=6, per_update=16)() is None
    compared = [
        {"persona": "a", "first": "x", "by": "rule", "wins": {"rate": {"value": 0.2}}},
        {"persona": "a", "first": "base told a", "by": "judge", "wins": {"rate": {"value": 1.0}}},
        {"persona": "a", "first": "x", "by": "judge", "wins": {"rate": {"value": 0.7}}},
    ]
    (tmp_path / "preference.json").write_text(json.dumps({"compared": compared}))
    assert results.won(tmp_path, "a")() == 70
    assert results.won(tmp_path, "b")() is None
    assert results.bench(tmp_path, "ifeval", "x", "base")() is None


def test_costs_are_reckoned():
    cost = training(8e9, 1e9, checkpoints=2)
    assert cost.gpu_hours == pytest.approx(8 * 8e9 * 1e9 / (989e12 * 0.35) / 3600)
    assert (cost + Cost(calls=3)).calls == 3
    assert cost.disk == pytest.approx(26 * 8e9 / 2**30)
