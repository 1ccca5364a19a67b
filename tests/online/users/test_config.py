"""Users as settings: flags, files, and what is installed."""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pytest
import tyro

from sdpo.errors import SdpoError
from sdpo.online.users.base import User
from sdpo.online.users.config import (
    AnyUser,
    BudgetConfig,
    RetryConfig,
    RuleUser,
    ServerUser,
    build_user,
)
from sdpo.online.users.personas import load_persona, personas
from sdpo.train.config import to_json

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A config with a user in it."""

    user: AnyUser = field(default_factory=RuleUser)


def test_flags_choose_a_user_and_set_it():
    assert tyro.cli(Run, args=[]) == Run()
    args = ["user:server-user", "--user.url", "http://x/v1", "--user.model", "m"]
    args += ["--user.budget.calls", "100", "--user.on-failure", "stop", "--user.retry.tries", "3"]
    expected = ServerUser(
        url="http://x/v1",
        model="m",
        on_failure="stop",
        budget=BudgetConfig(calls=100),
        retry=RetryConfig(tries=3),
    )
    assert tyro.cli(Run, args=args) == Run(user=expected)


@pytest.mark.parametrize("kind", get_args(AnyUser))
def test_every_setting_is_told_by_help(kind, capsys):
    words = {"ServerUser": "server-user", "RuleUser": "rule-user", "LocalUser": "local-user"}
    name = words.get(kind.__name__, "replay-user")
    with pytest.raises(SystemExit):
        tyro.cli(Run, args=[f"user:{name}", "--help"])
    said = capsys.readouterr().out
    for setting in kind.__dataclass_fields__:
        assert f"--user.{setting.replace('_', '-')}" in said


def test_a_rule_based_user_is_built(tmp_path):
    user: User = build_user(RuleUser(), load_persona("concise"), folder=tmp_path)
    assert user.persona.name == "concise"
    assert to_json(Run()) == {
        "kind": "Run",
        "user": {"kind": "RuleUser", "praise": 1.0, "irrelevant": 0.0},
    }
    user.close()


def test_waits_double_up_to_a_limit():
    retry = RetryConfig(first_wait=1.0, longest_wait=10.0)
    assert [retry.wait(n, 0.0, 1.0) for n in (1, 2, 3, 4, 5, 99, 5000)] == [1, 2, 4, 8, 10, 10, 10]
    assert retry.wait(3, 0.0, 0.0) == 2.0
    assert retry.wait(1, 7.0, 0.5) == 7.0
    assert retry.wait(4, 7.0, 1.0) == 8.0
    assert retry.wait(1, 10.1, 0.5) is None


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (RetryConfig, {"tries": 0}),
        (RetryConfig, {"timeout": 0.0}),
        (RetryConfig, {"longest_wait": -1.0}),
        (BudgetConfig, {"calls": 0}),
        (BudgetConfig, {"tokens": -5}),
    ],
)
def test_limits_are_positive(config, settings):
    (name,) = settings
    with pytest.raises(SdpoError, match=f"{name} must be positive"):
        config(**settings)


def test_personas_are_installed(tmp_path):
    """A wheel holds their files."""
    pytest.importorskip("hatchling", reason="builds a wheel")
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    prefix = "sdpo/online/users/personas/"
    assert {n.removeprefix(prefix) for n in names if n.startswith(prefix)} == {
        f"{name}.toml" for name in personas()
    }
