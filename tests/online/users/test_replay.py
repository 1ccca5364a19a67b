"""Users who say again what was said."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdpo.conversations import Message
from sdpo.errors import DataError, SdpoError
from sdpo.online.users.base import Exchange
from sdpo.online.users.config import ReplayUser, build_user
from sdpo.online.users.personas import load_persona

CONCISE = load_persona("concise")


def row(id, answer, followup, persona="concise", question="Where?"):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if followup is not None:
        messages.append({"role": "user", "content": followup})
    return {"id": id, "persona": persona, "messages": messages, "update": 1}


def exchange(id, answer, question="Where?"):
    return Exchange(id=id, prompt=(Message("user", question),), answer=answer, finished=True)


@pytest.fixture
def rollouts(tmp_path):
    """Two updates of a recorded run."""
    folder = tmp_path / "rollouts"
    folder.mkdir()
    first = [row("a", "It is Paris.", "Thanks."), row("b", "It is far.", None)]
    second = [
        row("c", "It is far.", "Where exactly?"),
        row("a2", "It is Paris.", "Be detailed.", persona="detailed"),
        row("d", "It is Rome.", "Too short.", persona=None),
    ]
    for update, rows in enumerate((first, second), start=1):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"update-{update:06d}.parquet")
    return str(folder)


def user(rollouts, tmp_path, persona=CONCISE, **settings):
    return build_user(ReplayUser(rollouts=rollouts, **settings), persona, folder=tmp_path)


def said(user, *exchanges):
    return [(r.text, r.source) for r in user.reply(exchanges, seed=0)]


def test_the_same_answers_get_the_same_replies(rollouts, tmp_path):
    mine = user(rollouts, tmp_path)
    asked = [
        exchange("x", "It is Rome."),
        exchange("a", "It is Paris."),
        exchange("y", "It is far."),
    ]
    expected = [("Too short.", "replay"), ("Thanks.", "replay"), (None, "replay")]
    assert said(mine, *asked) == expected
    assert said(mine, *reversed(asked)) == expected[::-1]


def test_of_several_replies_the_one_of_the_id_is_said(rollouts, tmp_path):
    mine = user(rollouts, tmp_path)
    both = said(mine, exchange("c", "It is far."), exchange("b", "It is far."))
    assert both == [("Where exactly?", "replay"), (None, "replay")]


def test_another_persona_says_its_own(rollouts, tmp_path):
    detailed = user(rollouts, tmp_path, load_persona("detailed"))
    assert said(detailed, exchange("a", "It is Paris.")) == [("Be detailed.", "replay")]
    with pytest.raises(SdpoError, match="holds no rollout of persona poetic"):
        only = str(tmp_path / "rollouts" / "update-000001.parquet")
        user(only, tmp_path, load_persona("poetic"))


@pytest.mark.parametrize(
    "missing", [exchange("a", "It is Oslo."), exchange("z", "It is Paris.", question="Who?")]
)
def test_a_miss_is_an_error_or_silence(rollouts, tmp_path, missing):
    with pytest.raises(SdpoError, match=rf"exchange {missing.id}: .*no rollout .*on_miss"):
        user(rollouts, tmp_path).reply([missing], seed=0)
    silent = user(rollouts, tmp_path, on_miss="silence")
    assert said(silent, missing) == [(None, "replay:missing")]


def test_ids_alone_may_match(rollouts, tmp_path):
    mine = user(rollouts, tmp_path, match="id")
    assert said(mine, exchange("a", "Something else.")) == [("Thanks.", "replay")]
    with pytest.raises(SdpoError, match="exchange z: .*its id"):
        mine.reply([exchange("z", "It is Paris.")], seed=0)


def test_control_tokens_and_odd_texts_match(tmp_path):
    odd = "naïve 😀 <|im_end|>\n\t\u2028 " + "x" * 100_000
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps(row("a", odd, odd)) + "\n", encoding="utf-8")
    mine = user(str(path), tmp_path)
    assert said(mine, exchange("b", odd)) == [(odd, "replay")]


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        ({"id": "a"}, "messages"),
        ({"id": "a", "messages": [{"role": "user", "content": "Where?"}]}, "messages"),
        ({"id": "a", "messages": [{"role": "user"}]}, "messages[0].content"),
        ({"id": "a", "messages": ["Where?"]}, "messages[0]"),
    ],
)
def test_rows_that_are_no_rollouts_are_named(tmp_path, broken, field):
    path = tmp_path / "rollouts.jsonl"
    lines = [row("ok", "It is Paris.", None), broken]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        user(str(path), tmp_path)
    assert (caught.value.file, caught.value.row) == (str(path), "line 2")
    assert caught.value.field == field


def test_missing_rollouts_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        user(str(tmp_path / "absent"), tmp_path)
