"""Every row's problem is found, placed and counted; what training takes passes."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, normalizers

from helpers import tiny
from helpers.logs import write_lines
from sdpo.data.validate import VERY_LONG, validate, validate_command
from sdpo.errors import DataError, SdpoError

CHAT = {"from": "human", "value": "question"}


def row(id: str | None = None, **fields) -> dict:
    good = {
        "prompt": [CHAT],
        "completion": {"from": "gpt", "value": "answer"},
        "user_response": {"from": "human", "value": "follow-up"},
        **fields,
    }
    return good if id is None else {"id": id, **good}


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "x.jsonl"


def model_of(tokenizer, models, folder: Path) -> str:
    """A model's folder with this tokenizer, but no weights."""
    tokenizer.save_pretrained(folder)
    shutil.copy(Path(models("qwen3")) / "config.json", folder)
    return str(folder)


def placed(file: Path, **options) -> list[tuple]:
    return [(f.severity, f.where, f.field) for f in validate(file, **options).findings]


def test_what_training_takes_passes(tmp_path, models, capsys):
    file = tiny.make_interactions(tmp_path / "x.jsonl", 20)
    validate_command(file, model=models("qwen3"))
    shown = capsys.readouterr().out
    assert "20 rows, training can use it" in shown and "error" not in shown


def test_all_bad_rows_are_named(file, capsys):
    bad_turn = [CHAT, {"from": "human", "value": 3}]
    write_lines(
        file,
        row("good"),
        b"{not json",
        row("b", completion={"from": "gpt", "value": " "}),
        row("c", prompt=bad_turn),
        row("d", user_response=None),
        row("good"),
        row("e", weight=-1),
        row("f", completion_token_ids=[1, -2]),
        [1],
        row("fine"),
    )
    found = validate(file)
    assert [(f.where, f.field) for f in found.findings] == [
        ("line 2", None),
        ("line 3", "completion"),
        ("line 4", "prompt[1].value"),
        ("line 5", "user_response"),
        ("line 6", "id"),
        ("line 7", "weight"),
        ("line 8", "completion_token_ids[1]"),
        ("line 9", None),
    ]
    assert found.rows == 10 and not found.trainable
    counts = found.counts("error")
    assert (counts["unreadable row"], counts["id: given twice"]) == (2, 1)
    assert counts["prompt: not as needed"] == 1 and sum(counts.values()) == 8
    with pytest.raises(SystemExit) as stop:
        validate_command(str(file), show=3)
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert "error: line 4, field `prompt[1].value`: found a number" in shown
    assert "line 5" not in shown and "and 5 more" in shown
    assert re.search(r"unreadable row +│ +2 │", shown)


AGAIN, GPT = {"from": "human", "value": "again\n"}, {"from": "gpt", "value": "a"}
MARKED = {"from": "human", "value": "<start_of_turn>"}


@pytest.mark.parametrize(
    ("fields", "field", "kind"),
    [
        ({"prompt": [CHAT, GPT]}, "prompt", "prompt: ends without a user message"),
        ({"completion": "y" * VERY_LONG}, None, "row: very long"),
        (
            {"prompt": [AGAIN], "user_response": " again"},
            "user_response",
            "user_response: repeats the prompt",
        ),
        ({"completion": "a<|im_end|>"}, "completion", "completion: control token"),
        ({"completion": "</think>so"}, "completion", "completion: control token"),
        ({"user_response": "[/INST]"}, "user_response", "user_response: control token"),
        ({"next_completion": "[/INST]"}, "next_completion", "next_completion: control token"),
        ({"prompt": [CHAT, MARKED]}, "prompt[1]", "prompt: control token"),
    ],
)
def test_warnings_do_not_stop_training(file, capsys, fields, field, kind):
    write_lines(file, row("a"), row("b", **fields))
    found = validate(file)
    assert placed(file) == [("warning", "line 2", field)]
    assert found.counts("warning") == {kind: 1} and found.trainable
    validate_command(str(file))
    assert "warning: line 2" in capsys.readouterr().out


LONGEST = "y" * (VERY_LONG - len("question") - len("follow-up"))


@pytest.mark.parametrize(
    "text", ["a <b> c", "x | y || z", "<s>struck</s>", "[INST", "a<|b c|>", LONGEST]
)
def test_ordinary_text_is_let_pass(file, text):
    assert validate(write_lines(file, row(completion=text))).findings == []


def test_weights_all_0(file):
    weights = [("warning", "every row", "weight")]
    assert placed(write_lines(file, row("a", weight=0), row("b", weight=0))) == weights
    assert placed(write_lines(file, row("a", weight=0), row("b", weight=0.5))) == []
    only_errors = [f.where for f in validate(write_lines(file, row("a", prompt=[]))).findings]
    assert only_errors == ["line 1"]


def test_errors_are_printed_before_warnings(file, capsys):
    write_lines(file, row("a", completion="<|im_end|>"), row("b", prompt=[]))
    with pytest.raises(SystemExit):
        validate_command(str(file), show=1)
    shown = capsys.readouterr().out
    assert "error: line 2" in shown and "warning: line 1" not in shown


def test_json_holds_every_finding(file, tmp_path):
    write_lines(file, *(row(str(i), prompt=[]) for i in range(30)), row("w", weight=0))
    with pytest.raises(SystemExit):
        validate_command(str(file), json=str(tmp_path / "new" / "v.json"), show=2)
    told = json.loads((tmp_path / "new" / "v.json").read_text())
    assert told["errors"] == {"prompt: not as needed": 30} and told["trainable"] is False
    assert told["warnings"] == {"weight: all 0": 1} and told["rows"] == 31
    assert len(told["findings"]) == 31
    assert told["findings"][4]["where"] == "line 5" and told["findings"][4]["field"] == "prompt"


def test_answers_without_tokens(file, models, capsys):
    write_lines(file, row("a"), row("b\x1b[2J"))
    assert placed(file, model=models("qwen3")) == []
    tokenless = tiny.make_tokenizer()
    tokenless.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    folder = model_of(tokenless, models, file.parent / "model")
    found = validate(file, model=folder)
    assert found.counts("error") == {"completion: no tokens": 2}
    assert found.findings[0].field == "completion"
    with pytest.raises(SystemExit):
        validate_command(str(file), model=folder)
    assert "interaction b␛[2J, field `completion`" in capsys.readouterr().out


def test_token_ids_outside_the_vocabulary(file, models):
    ids = {"a": [1, 447], "b": [1, 448, 2]}
    write_lines(file, *(row(id, completion_token_ids=tokens) for id, tokens in ids.items()))
    found = placed(file, model=models("qwen3"))
    assert found == [("error", "line 2", "completion_token_ids[1]")]
    assert placed(file) == []


def test_rows_that_the_token_limits_cut(file, models):
    words = "fox " * 2500
    write_lines(
        file,
        row("a", completion=words),
        row("b", prompt=[{"from": "human", "value": words}]),
        row("c", user_response=words + words),
        row("d"),
    )
    found = validate(file, model=models("qwen3"))
    sequences = {"policy prompt": 1, "hindsight prompt": 1, "response": 1}
    assert found.cut == {**sequences, "history": 0, "follow-up": 1, "question": 1}
    assert found.findings == []
    long_note = "{followup}" + "fox " * 5000
    found = validate(file, model=models("qwen3"), template=long_note)
    assert found.counts("error") == {"row: beyond the token limits": 4}


def test_what_the_models_own_marks_are_taken_for(file, models):
    end = tiny.make_tokenizer().eos_token_id
    write_lines(
        file,
        row("a", completion="<think>\nhm\n</think>\n\nfox"),
        row("b", completion="<think>hm</think>"),
        row("c", completion_token_ids=[7, end, end, 9]),
        row("d", completion_token_ids=[7, end]),
        row("e", user_response="what is <|pad|>?"),
    )
    found = validate(file, model=models("qwen3"))
    assert found.counts("error") == {"completion: no tokens": 1}
    assert found.counts("warning") == {
        "completion: thinking block": 2,
        "completion: control token": 2,
        "completion_token_ids: behind the end": 1,
        "user_response: control token": 1,
    }


def test_marks_of_the_model_alone_are_control_tokens_with_it(file, tmp_path):
    special = ["[pad]", "[turn]", "[/turn]"]
    template = "{% for m in messages %}[turn]{{ m.role }}: {{ m.content }}[/turn]{% endfor %}"
    tokenizer = tiny.make_tokenizer(chat_template=template, special=special, eos_token="[/turn]")
    tiny.make_model(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    write_lines(file, row("a", completion="it ends with [/turn]"))
    assert placed(file) == []
    assert placed(file, model=str(tmp_path / "m")) == [("warning", "line 1", "completion")]


def test_roles_that_the_chat_template_refuses(file, models, tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    write_lines(file, row("a"), row("b", prompt=[{"from": "system", "value": "be nice"}, CHAT]))
    found = validate(file, model=model_of(tokenizer, models, tmp_path / "model"))
    assert found.counts("error") == {"prompt: refused by the chat template": 1}
    assert (found.findings[0].where, found.findings[0].field) == ("line 2", "prompt")
    assert "no system" in found.findings[0].says


def test_what_cannot_be_read(file, tmp_path, models):
    for bad in (tmp_path / "no.jsonl", write_lines(tmp_path / "empty.jsonl")):
        with pytest.raises(DataError, match=re.escape(str(bad))):
            validate(bad)
    write_lines(file, row("a"))
    with pytest.raises(SdpoError, match="no such model folder"):
        validate(file, model=str(tmp_path / "none"))
    only_tokenizer = tmp_path / "t"
    tiny.make_tokenizer().save_pretrained(only_tokenizer)
    with pytest.raises(SdpoError, match=r"no model configuration.*config\.json"):
        validate(file, model=str(only_tokenizer))
    with pytest.raises(ValueError, match="followup"):
        validate(file, template="no field")


def test_a_model_without_an_end_of_sequence(file, models, tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = None
    folder = model_of(tokenizer, models, tmp_path / "model")
    with pytest.raises(SdpoError, match="eos_token"):
        validate(write_lines(file, row("a")), model=folder)


def test_a_log_is_to_be_prepared_first(tmp_path):
    log = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(DataError, match=r"\(messages\).*sdpo data prepare"):
        validate(write_lines(tmp_path / "log.jsonl", log))


def test_the_file_itself_is_not_written_over(file):
    before = write_lines(file, row("a")).read_bytes()
    with pytest.raises(ValueError, match="another name"):
        validate_command(str(file), json=str(file))
    assert file.read_bytes() == before
