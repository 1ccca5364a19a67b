"""Interactions and their file format."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.logs import write_lines
from sdpo.conversations import Message, ToolMessage, tool_calls_text, tool_message
from sdpo.errors import DataError
from sdpo.interactions import (
    Interaction,
    conversation_of,
    iter_interactions,
    read_interactions,
    write_interactions,
)

checked = settings(derandomize=True, deadline=None)


def interaction(**changed) -> Interaction:
    given = {"id": "i", "prompt": (Message("user", "x"),), "response": "y", "followup": "o"}
    return Interaction(**(given | changed))


ROW = {
    "prompt": [{"from": "human", "value": "x"}],
    "completion": {"from": "gpt", "value": "y"},
    "user_response": {"from": "human", "value": "o"},
}

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
some_text = any_text.filter(str.strip)
plain = st.builds(Message, st.sampled_from(["user", "assistant", "system", "tool"]), any_text)
json_values = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | any_text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(any_text, inner, max_size=2),
    max_leaves=4,
)
tool_calls = st.fixed_dictionaries(
    {"name": any_text, "arguments": st.dictionaries(any_text, json_values, max_size=2) | any_text}
).map(lambda function: {"id": "a", "function": function})
called = st.lists(tool_calls, min_size=1, max_size=2).map(tool_calls_text)
calling = st.builds(ToolMessage, st.just("assistant"), any_text, called)
results = st.builds(
    lambda text, of, name: tool_message("tool", text, tool_call_id=of, name=name),
    *[any_text, st.none() | any_text, st.none() | any_text],
)
messages = plain | calling | results


@st.composite
def interactions(draw) -> Interaction:
    ids = draw(st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4).map(tuple))
    logprob = st.floats(max_value=0, allow_nan=False, allow_infinity=False)
    n = len(ids or ())
    logprobs = st.none() | st.lists(logprob, min_size=n, max_size=n).map(tuple)
    return Interaction(
        id=draw(some_text),
        prompt=(*draw(st.lists(messages, max_size=3)), Message("user", draw(any_text))),
        response=draw(some_text),
        followup=draw(some_text),
        turn_id=draw(st.none() | st.integers(1 - 2**63, 2**63 - 1)),
        weight=draw(st.floats(0, allow_nan=False, allow_infinity=False)),
        response_token_ids=ids,
        response_logprobs=draw(logprobs) if ids else None,
        next_response=draw(st.none() | some_text),
    )


@given(written=st.lists(interactions(), min_size=1, max_size=4, unique_by=lambda i: i.id))
@settings(checked, max_examples=150)
def test_what_is_written_is_read(written, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "roundtrip.jsonl"
    assert write_interactions(path, written) == len(written)
    assert read_interactions(path) == written


def test_the_papers_row_shape(tmp_path):
    path = tmp_path / "new folder" / "i.jsonl"
    prompt = (Message("system", "s"), Message("user", "漢"))
    write_interactions(path, [interaction(prompt=prompt, turn_id=0), interaction(id="j", weight=2)])
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert first == (
        '{"id":"i","turn_id":0,"prompt":[{"from":"system","value":"s"},'
        '{"from":"human","value":"漢"}],"completion":{"from":"gpt","value":"y"},'
        '"user_response":{"from":"human","value":"o"}}'
    )
    assert json.loads(second).keys() == {"id", *ROW, "weight"}
    write_interactions(path, [interaction(next_response="z")])
    (after,) = read_interactions(path)
    assert json.loads(path.read_text())["next_completion"] == {"from": "gpt", "value": "z"}
    assert after.next_response == "z"


def test_rows_as_others_write_them(tmp_path):
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "x"}]
    row = {
        "prompt": chat,
        "completion": {"role": "assistant", "content": "y"},
        "user_response": {"role": "user", "content": "o"},
        "turn_id": None,
        "weight": None,
        "model": "ignored",
    }
    path = write_lines(tmp_path / "i.jsonl", row, ROW | {"completion": "y", "user_response": "o"})
    first, second = read_interactions(path)
    assert first == interaction(id="1", prompt=(Message("system", ""), Message("user", "x")))
    assert second == interaction(id="2")


def test_tool_calls_as_others_write_them(tmp_path):
    function = {"name": "w", "arguments": '{"city": "Bern", "unit": null}'}
    calls = [{"id": "a", "type": "function", "function": function}]
    chat = [
        {"role": "user", "content": "x", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "21 C", "tool_call_id": "a", "name": "w"},
    ]
    (found,) = read_interactions(write_lines(tmp_path / "i.jsonl", ROW | {"prompt": chat}))
    user, call, result = (message.for_template() for message in found.prompt)
    assert user == {"role": "user", "content": "x"}
    assert call["tool_calls"][0]["function"] == {"name": "w", "arguments": {"city": "Bern"}}
    assert (call["content"], result) == ("", chat[2])


def test_conversations_by_their_ids():
    def of(id: str, turn_id: int | None = None) -> str:
        return conversation_of(interaction(id=id, turn_id=turn_id))

    assert [of("c_3", 3), of("c_3~2", 3), of("c_1_2~10", 2)] == ["c", "c", "c_1"]
    assert [of("row_7", 3), of("a_b"), of("7"), of("row_7"), of("x_1~2")] == [
        *("row_7", "a_b", "7", "row", "x")
    ]


def test_a_published_prompt_may_end_with_an_answer(tmp_path):
    """Some of WildFeedback's do; the hindsight context is then appended to the answer."""
    (found,) = read_interactions(write_lines(tmp_path / "i.jsonl", ROW | {"prompt": [USER, GPT]}))
    assert [m.role for m in found.prompt] == ["user", "assistant"]


def test_reading_streams(tmp_path):
    stream = iter_interactions(write_lines(tmp_path / "i.jsonl", ROW, {}))
    assert next(stream) == interaction(id="1")
    with pytest.raises(DataError, match="line 2, field `prompt`"):
        next(stream)


USER, GPT = {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}
NAN, INF = float("nan"), float("inf")
IDS, LOGPROBS = "completion_token_ids", "completion_logprobs"
SYSTEM, CRITIC = {"from": "system", "value": "s"}, {"role": "critic", "content": ""}
# what is wrong with a row: (fields, the one that the error names, what it says of it)
BAD_FIELDS = {
    "prompt missing": ({"prompt": None}, "prompt", "found nothing (null or missing)"),
    "prompt as text": ({"prompt": "x"}, "prompt", "found text where a list"),
    "prompt empty": ({"prompt": []}, "prompt", "the prompt has no messages"),
    "prompt of answers": ({"prompt": [GPT]}, "prompt", "the prompt has no user message"),
    "system last": ({"prompt": [USER, SYSTEM]}, "prompt", "ends with a message of role 'system'"),
    "prompt of text": ({"prompt": ["x"]}, "prompt[0]", "found text where an object"),
    "sender unknown": ({"prompt": [{"from": "bot"}]}, "prompt[0].from", "unknown sender 'bot'"),
    "role unknown": ({"prompt": [CRITIC, USER]}, "prompt[0]", "unknown role 'critic'"),
    "calls a number": (
        {"prompt": [USER, GPT | {"tool_calls": 3}]},
        "prompt[1].tool_calls",
        "found a number where a list",
    ),
    "calls no JSON": (
        {"prompt": [USER, GPT | {"tool_calls": "[{"}]},
        "prompt[1].tool_calls",
        "not a list of tool calls",
    ),
    "a call without a name": (
        {"prompt": [USER, GPT | {"tool_calls": [{"id": "a"}]}]},
        "prompt[1].tool_calls",
        "a tool call without a function's name",
    ),
    "a result's name a number": (
        {"prompt": [USER, {"role": "tool", "content": "", "name": 3}]},
        "prompt[1].name",
        "found a number where text",
    ),
    "value a number": ({"prompt": [{"from": "human", "value": 1}]}, "prompt[0].value", "a number"),
    "completion blank": ({"completion": " \n"}, "completion", "whose response is empty"),
    "completion by the user": ({"completion": USER}, "completion", "of role 'user'"),
    "completion a number": ({"completion": 3}, "completion", "found a number where text"),
    "follow-up blank": ({"user_response": ""}, "user_response", "whose user response is empty"),
    "follow-up by the model": ({"user_response": GPT}, "user_response", "of role 'assistant'"),
    "next answer blank": ({"next_completion": " "}, "next_completion", "is empty"),
    "next answer by the user": ({"next_completion": USER}, "next_completion", "of role 'user'"),
    "turn_id text": ({"turn_id": "3"}, "turn_id", "found text, not an integer"),
    "weight NaN": ({"weight": NAN}, "weight", "the weight is nan"),
    "weight infinite": ({"weight": INF}, "weight", "the weight is inf"),
    "weight negative": ({"weight": -0.5}, "weight", "the weight is -0.5"),
    "weight huge": ({"weight": 10**400}, "weight", "too large"),
    "weight text": ({"weight": "1"}, "weight", "found text where a number"),
    "weight a boolean": ({"weight": True}, "weight", "found a boolean where a number"),
    "ids not a list": ({IDS: 5}, IDS, "a list is needed"),
    "ids empty": ({IDS: []}, IDS, "no token ids"),
    "id negative": ({IDS: [1, -1]}, f"{IDS}[1]", "-1 is not"),
    "id a float": ({IDS: [1.0]}, f"{IDS}[0]", "1.0 is not"),
    "id a boolean": ({IDS: [True]}, f"{IDS}[0]", "True is not"),
    "logprobs alone": ({LOGPROBS: [-1]}, LOGPROBS, "without the tokens"),
    "logprobs too few": ({IDS: [1, 2], LOGPROBS: [-1]}, LOGPROBS, "1 log-probabilities for 2"),
    "logprob positive": ({IDS: [1], LOGPROBS: [0.1]}, f"{LOGPROBS}[0]", "0.1 is not a log-prob"),
    "logprob NaN": ({IDS: [1], LOGPROBS: [NAN]}, f"{LOGPROBS}[0]", "nan is not"),
    "logprob infinite": ({IDS: [1], LOGPROBS: [-INF]}, f"{LOGPROBS}[0]", "-inf is not"),
    "logprob text": ({IDS: [1], LOGPROBS: ["-1"]}, f"{LOGPROBS}[0]", "found text where a number"),
    "id repeated": ({"id": "first"}, "id", "'first' is the id of line 1 too"),
    "id a list": ({"id": []}, "id", "found a list"),
}


@pytest.mark.parametrize("bad", BAD_FIELDS)
def test_bad_rows(tmp_path, bad):
    changed, name, problem = BAD_FIELDS[bad]
    path = write_lines(tmp_path / "i.jsonl", ROW | {"id": "first"}, ROW | changed)
    with pytest.raises(DataError) as caught:
        read_interactions(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2, field `{name}`: ")
    assert problem in message
    assert re.search(r"\. [A-Z].*\.$", message), f"says nothing of what to do: {message}"


def test_an_id_that_falls_back_to_a_taken_one_is_an_error(tmp_path):
    path = write_lines(tmp_path / "i.jsonl", ROW | {"id": "2"}, ROW)
    with pytest.raises(DataError, match="line 2, field `id`: '2' is the id of line 1 too"):
        read_interactions(path)


def test_files_that_are_no_interactions(tmp_path):
    path = tmp_path / "i.jsonl"
    with pytest.raises(DataError, match=re.escape(f"{path}: cannot be read")):
        read_interactions(path)
    path.write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        read_interactions(path)


@pytest.mark.parametrize(
    "changed", [{"id": ""}, {"weight": NAN}, {"prompt": ()}, {"prompt": (Message("tool", "t"),)}]
)
def test_no_bad_interaction_can_be_made(changed):
    with pytest.raises(DataError, match=f"field `{next(iter(changed))}"):
        interaction(**changed)


def test_an_exception_midway_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "i.jsonl"
    write_interactions(path, [interaction(id="old")])

    def breaks_off():
        yield from (interaction(id=str(i)) for i in range(1000))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_interactions(path, breaks_off())
    with pytest.raises(DataError, match="'a' is the id of two interactions"):
        write_interactions(path, [interaction(id="a"), interaction(id="a")])
    with pytest.raises(TypeError, match="surrogates"):
        write_interactions(path, [interaction(response="\ud83d")])
    assert [i.id for i in read_interactions(path)] == ["old"]
    assert list(tmp_path.iterdir()) == [path]
