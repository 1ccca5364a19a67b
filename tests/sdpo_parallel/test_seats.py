"""Many users' adapters at one engine."""

import json

import pytest

from helpers import runs

LORA = {"rank": 4, "alpha": 8}


@pytest.mark.slow
def test_users_take_turns_and_each_trains_as_if_alone(models, tmp_path):
    """Sharded adapters, and tensor-parallel ones."""
    cases = [
        {"model": models("qwen3"), "parallel": {}, "lora": LORA},
        {"model": models("llama"), "parallel": {"tensor": 2}, "lora": LORA},
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    runs.worker("seats_worker.py", 2, str(tmp_path / "cases.json"), str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 4
    for rank in found:
        size = rank.pop("bytes")
        assert size > 0 and rank == dict.fromkeys(("alone", "differ", "moved", "others_stay"), True)
