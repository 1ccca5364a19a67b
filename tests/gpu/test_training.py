"""Five training steps by every engine and attention that this GPU and its packages have."""

import pytest

from helpers import attentions

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("engine", "attention"), attentions.BOTH)
def test_five_steps_learn(engine, attention, models, tmp_path, monkeypatch):
    attentions.assert_learns(engine, attention, models("qwen3"), tmp_path, monkeypatch)
