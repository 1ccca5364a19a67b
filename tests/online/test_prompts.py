"""Files of prompts, their errors, and the order in which prompts are drawn."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sdpo.conversations import Message
from sdpo.errors import DataError
from sdpo.online.prompts import Order, read_prompts


def test_a_text_file_has_a_prompt_in_each_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffWhy?\n\n  How? \r\nWhy?\nÜber \n".encode())
    found = read_prompts(path)
    assert [(p.id, p.messages) for p in found] == [
        ("1", (Message("user", "Why?"),)),
        ("3", (Message("user", "How?"),)),
        ("5", (Message("user", "Über"),)),
    ]


def test_rows_are_texts_or_conversations_with_or_without_ids(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    turns.append({"role": "user", "content": "c"})
    rows = [{"prompt": "Why?"}, {"id": "x", "prompt": turns}, {"prompt": "Why?"}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(path)
    assert [p.id for p in found] == ["1", "x"]
    assert [m.role for m in found[1].messages] == ["user", "assistant", "user"]
    pq.write_table(pa.table({"prompt": ["Why?", "How?"]}), tmp_path / "p.parquet")
    assert len(read_prompts(tmp_path / "p.parquet")) == 2


def test_a_system_message_is_put_before_prompts_that_have_none(tmp_path):
    path = tmp_path / "p.jsonl"
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "b"}]
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": own}) + "\n")
    assert [p.messages[0].content for p in read_prompts(path, "yours")] == ["yours", "mine"]
    assert read_prompts(path, "")[0].messages[0] == Message("system", "")
    assert read_prompts(path)[0].messages == (Message("user", "a"),)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", b"\n \n", "no prompts"),
        ("p.txt", b"\xff\xfe", "the prompts cannot be read (not UTF-8)"),
        ("none.txt", None, "the prompts cannot be read (No such file or directory)"),
        ("p.jsonl", b"", "the file is empty"),
        ("p.jsonl", b'{"text": "a"}\n', "prompt"),
        ("p.jsonl", b'{"prompt": []}\n', "the prompt has no messages"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "surrogate"),
        ("p.jsonl", b'["a"]\n', "where an object is needed"),
        (
            "p.jsonl",
            b'{"prompt": [{"role": "assistant", "content": "a"}]}\n',
            "the prompt ends with a message of role 'assistant'",
        ),
        (
            "p.jsonl",
            b'{"prompt": [{"role": "boss", "content": "a"}, {"role": "user", "content": "b"}]}\n',
            "unknown role 'boss'",
        ),
    ],
)
def test_what_is_no_prompt_is_named(name, content, says, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_prompts(tmp_path / name)
    assert says in str(error.value) and name in str(error.value)


def test_each_epoch_draws_all_prompts_in_an_order_of_its_own():
    order = Order(7, seed=42)
    first, second = order.take(0, 7), order.take(7, 7)
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert first == torch.randperm(7, generator=torch.Generator().manual_seed(42)).tolist()
    assert order.take(5, 4) == [*first[5:], *second[:2]]
    assert Order(7, seed=43).take(0, 7) != first
