"""What the demo reads of an online run."""

import json

from sdpo.conversations import Message
from sdpo.demo.run import curve
from sdpo.online.record import Record, write_update


def record(update: int, slot: int, answer: str, *, finished: bool = True) -> Record:
    return Record(
        id=f"{update}.{slot}",
        update=update,
        phase=update,
        persona="concise",
        prompt_id=f"{slot}",
        prompt=(Message("user", "Why?"),),
        answer=answer,
        followup=None,
        token_ids=(1,),
        logprobs=(-1.0,),
        finished=finished,
        versions=(update - 1,),
        reply_source="rule",
        dropped="silence",
        satisfied=True,
    )


def test_both_personas_judge_every_update(tmp_path):
    long = "because " * 60
    write_update(tmp_path, 1, [record(1, 0, "So."), record(1, 1, long)])
    write_update(tmp_path, 2, [record(2, 0, "So."), record(2, 1, "So.", finished=False)])
    metrics = [{"step": step, "entropy/policy": step / 2} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    first, second = curve(tmp_path, ("concise", "detailed"))
    assert (first["update"], first["phase"], first["entropy"]) == (1, 1, 0.5)
    assert first["preference"] == {"concise": 0.5, "detailed": 0.5}
    assert first["words"] == 30.5
    assert second["preference"] == {"concise": 0.5, "detailed": 0.0}
