"""`sdpo demo`: each world has flags of its own."""

import pytest

from sdpo.cli import main
from sdpo.demo.main import DemoConfig
from sdpo.errors import SdpoError


@pytest.mark.parametrize(
    ("world", "has", "has_not"),
    [
        ([], "--model", "--objective"),
        (["--world", "smollm2"], "--model", "--objective"),
        (["--world", "toy"], "--objective", "--model"),
    ],
)
def test_a_worlds_flags(world, has, has_not, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *world, "--help"])
    said = capsys.readouterr().out
    assert not stop.value.code and has in said and has_not not in said


def test_an_unknown_world(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--world", "moon"])
    assert stop.value.code == 2 and "moon" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"questions": 0},
        {"questions": 65},
        {"conversations": 0},
        {"updates": 0},
        {"max_tokens": 0},
        {"answers": 0},
    ],
)
def test_settings_that_measure_nothing_are_refused(changes):
    with pytest.raises(SdpoError, match=next(iter(changes))):
        DemoConfig(**changes)
