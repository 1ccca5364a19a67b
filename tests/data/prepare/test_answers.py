"""Every kept answer stands behind the message it answered, and every other one is counted.

The oracle is slow and obvious: for each message of the assistant it walks back and forth through
the log as it was logged. It shares nothing with the extraction.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import logs
from helpers.logs import all_turns, write_lines
from sdpo.conversations import Message, ToolMessage
from sdpo.data.filters.guardrails import OFF, GuardrailConfig
from sdpo.data.manifest import find, manifest_path
from sdpo.data.prepare.config import PrepareConfig
from sdpo.data.prepare.prepare import prepare
from sdpo.data.prepare.report import Report
from sdpo.errors import SdpoError
from sdpo.interactions import Interaction, read_interactions

Said = list[Any]
CALL = {"id": "a", "type": "function", "function": {"name": "w", "arguments": '{"city":"Bern"}'}}
IMAGE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {}}]


def user(content: Any) -> dict:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict:
    return {"role": "assistant", "content": content} | more


def made(folder: Path, *talks: Said, name: str = "x.jsonl", **config) -> tuple[list, Report]:
    """Interactions and report of conversations in OpenAI's format, named c0, c1, ..."""
    rows = [{"id": f"c{i}", "messages": said} for i, said in enumerate(talks)]
    log = write_lines(folder / "log.jsonl", *rows)
    config = {"preset": "all-turns", "guardrails": OFF} | config
    report = prepare(PrepareConfig(inputs=(str(log),), out=str(folder / name), **config))
    return read_interactions(folder / name) if report.counts["interactions"] else [], report


def told(found: list[Interaction]) -> list[tuple[list[str], str, str]]:
    """(prompt's texts, answer, follow-up) of each."""
    return [([m.content for m in i.prompt], i.response, i.followup) for i in found]


# Single cases


def test_behind_a_blank_answer_the_prompt_ends_with_what_was_said_last(tmp_path):
    said = [user("Capital of France?"), assistant(""), user("Forget that. List three fruits.")]
    said += [assistant("Apple, pear, plum."), user("Shorter please.")]
    found, report = made(tmp_path, said)
    prompt = ["Capital of France?\n\nForget that. List three fruits."]
    assert told(found) == [(prompt, "Apple, pear, plum.", "Shorter please.")]
    assert report.interaction_drops == {"blank answer": 1}
    assert report.left_out == {"blank message": 1}


WEATHER = [
    user("Weather in Bern?"),
    assistant(None, tool_calls=[CALL]),
    {"role": "tool", "tool_call_id": "a", "content": "21 C"},
    assistant("It is 21 C in Bern."),
    user("In F please"),
    assistant("69.8 F."),
    user("Thanks"),
]


def test_answers_that_rest_on_a_tool_go_by_default(tmp_path):
    found, report = made(tmp_path, WEATHER)
    assert (found, report.drops) == ([], {})
    assert report.interaction_drops == {"makes a tool call": 1, "rests on a tool": 2}
    assert report.left_out == {"tool call": 1, "tool result": 1}


def test_behind_the_window_a_tool_is_forgotten_like_all_else(tmp_path):
    later = [user("u0"), assistant("a0"), user("u1"), assistant("a1"), user("u2")]
    found, _ = made(tmp_path, [*WEATHER, *later[1:]])
    assert told(found) == [
        (["In F please", "69.8 F.", "Thanks", "a0", "u1"], "a1", "u2"),
    ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_tools_are_kept_as_templates_read_them(tmp_path, name):
    found, report = made(tmp_path, WEATHER, name=name, tools="keep")
    first, second = found
    calls = (
        '[{"id": "a", "type": "function", '
        '"function": {"name": "w", "arguments": {"city": "Bern"}}}]'
    )
    prompt = (
        Message("user", "Weather in Bern?"),
        ToolMessage("assistant", "", tool_calls=calls),
        ToolMessage("tool", "21 C", tool_call_id="a"),
    )
    assert first.prompt == prompt and first.response == "It is 21 C in Bern."
    assert second.prompt[:3] == prompt
    assert prompt[1].for_template()["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert prompt[2].for_template() == {"role": "tool", "content": "21 C", "tool_call_id": "a"}
    assert (report.interaction_drops, report.left_out) == ({"makes a tool call": 1}, {})


def test_a_parquet_file_without_tools_has_the_papers_columns(tmp_path):
    made(tmp_path, [user("x"), assistant("y"), user("o")], name="x.parquet", tools="keep")
    turn = pq.read_schema(tmp_path / "x.parquet").field("prompt").type.value_type
    assert [field.name for field in turn] == ["from", "value"]


CALLS = {
    "a function and its role": [
        assistant(None, function_call={"name": "w", "arguments": "{}"}),
        {"role": "function", "name": "w", "content": "21 C"},
    ],
    "ShareGPT's roles": [
        {"role": "function_call", "content": '{"name": "w", "arguments": {}}'},
        {"role": "observation", "content": "21 C"},
    ],
    "items of the Responses API": [
        {"type": "function_call", "call_id": "a", "name": "w", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "21 C"},
    ],
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_tools_by_their_other_names(tmp_path, calls):
    said = [user("Weather?"), *calls, assistant("21 C."), user("Thanks")]
    found, report = made(tmp_path, said)
    assert (found, report.left_out) == ([], {"tool call": 1, "tool result": 1})
    assert report.interaction_drops == {"makes a tool call": 1, "rests on a tool": 1}
    (kept,) = made(tmp_path, said, tools="keep")[0]
    assert [m.role for m in kept.prompt] == ["user", "assistant", "tool"]
    (call,) = kept.prompt[1].for_template()["tool_calls"]
    assert call["function"] == {"name": "w", "arguments": {}}


@pytest.mark.parametrize("shape", ["messages", "sharegpt", "wildchat"])
def test_tool_calls_in_columns_are_seen(tmp_path, shape):
    """Parquet gives every message all fields, and every call the arguments of all."""
    rows = []
    for id, call in (
        ("c0", CALL | {"function": {"name": "w", "arguments": {"x": 1}}}),
        ("c1", None),
    ):
        row = logs.row(shape, id, logs.exchange(id, answers=2))
        key = next(k for k in ("messages", "conversations", "conversation") if k in row)
        row[key] = [m | {"tool_calls": None} for m in row[key]]
        row[key][1]["tool_calls"] = call and [call]
        rows.append(row)
    path = tmp_path / "log.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    report = prepare(all_turns(path, out=tmp_path / "x.jsonl"))
    assert {i.id[:2] for i in read_interactions(tmp_path / "x.jsonl")} == {"c1"}
    assert report.interaction_drops == {"makes a tool call": 1, "rests on a tool": 1}


def test_system_prompts_stand_first_whatever_the_window(tmp_path):
    talk = [turn for i in range(4) for turn in (user(f"u{i}"), assistant(f"a{i}"))]
    said = [{"role": "system", "content": "Answer in French."}, *talk]
    said.insert(7, {"role": "developer", "content": "Be brief."})  # behind u2, a2
    found, _ = made(tmp_path, said)
    assert [i.prompt[0] for i in found] == [
        *2 * [Message("system", "Answer in French.")],
        Message("system", "Answer in French."),
    ]
    assert [m.content for m in found[2].prompt[1:]] == ["u0", "a0", "u1", "a1", "u2"]
    found, report = made(tmp_path, [*said, user("u4")])
    last = found[3].prompt
    assert last[0].content == "Answer in French.\n\nBe brief."
    assert [m.content for m in last[1:]] == ["u1", "a1", "u2", "a2", "u3"]
    assert report.left_out == {}
    found, report = made(tmp_path, said, system="drop")
    assert {m.role for i in found for m in i.prompt} == {"user", "assistant"}
    assert report.left_out == {"system message": 2}


def test_parts_that_are_text_and_parts_that_are_not(tmp_path):
    texts = [{"type": "input_text", "text": "Hi"}], [{"type": "output_text", "text": "Hello"}]
    refused = [user("Do it"), assistant([{"type": "refusal", "refusal": "No."}]), user("Why?")]
    refused += [assistant(None, refusal="As I said."), user("Fine")]
    seen = [user(IMAGE), assistant("A cat."), user("Its colour?"), assistant("Grey."), user("Ah")]
    drawn = [
        user("Draw"),
        assistant([{"type": "image"}]),
        user("Nice"),
        assistant("Yes"),
        user("o"),
    ]
    found, report = made(
        tmp_path, [user(texts[0]), assistant(texts[1]), user("ok")], refused, seen, drawn
    )
    assert told(found) == [
        (["Hi"], "Hello", "ok"),
        (["Do it"], "No.", "Why?"),
        (["Do it", "No.", "Why?"], "As I said.", "Fine"),
    ]
    assert report.left_out == {"part image": 1, "part image_url": 1}
    assert report.interaction_drops == {
        "holds a part that is not text": 1,
        "rests on a part that is not text": 3,
    }


def test_an_odd_message_costs_its_turn_and_stops_nothing(tmp_path):
    odd = [7, "text", [], user({"a": 1}), user(3), {"content": "x"}, {"role": 5, "content": "x"}]
    talks = [[user("x"), assistant("y"), turn, assistant("z"), user("o")] for turn in odd]
    found, report = made(tmp_path, *talks, [user("x"), assistant("y"), None, user("o")])
    assert (found, report.drops) == ([], {})
    assert report.left_out == {
        "unknown role (none)": 3,
        "content that is a number": 1,
        "content that is an object": 1,
        "message that is a list": 1,
        "message that is a number": 1,
        "message that is text": 1,
    }


def test_unknown_roles_are_named_and_can_be_mapped(tmp_path):
    said = [user("Hi?"), {"role": "Laguna_S", "content": "An answer."}, user("In French.")]
    found, report = made(tmp_path, said)
    assert (found, report.drops) == ([], {"messages of unknown role": 1})
    assert report.left_out == {"unknown role Laguna_S": 1}
    strict = made(tmp_path, said, preset="strict")[1]
    assert strict.drops == {"messages of unknown role": 1}
    found, report = made(tmp_path, said, role_map=("laguna_s=assistant",))
    assert told(found) == [(["Hi?"], "An answer.", "In French.")]
    assert (report.drops, report.left_out) == ({}, {})
    with pytest.raises(SdpoError, match="role 'x' as 'robot': use one of user, assistant"):
        made(tmp_path, said, role_map=("x=robot",))
    with pytest.raises(SdpoError, match="role_map is 'x'"):
        made(tmp_path, said, role_map=("x",))


def test_what_stands_between_is_no_question_and_no_follow_up(tmp_path):
    critic = {"role": "critic", "content": "no"}
    _, report = made(
        tmp_path,
        [user("q"), critic, assistant("a"), user("o")],
        [user("q"), assistant("a"), critic, user("o")],
        [user("q"), assistant("a"), user(" "), assistant("b"), user("o")],
        [user("q"), assistant("a"), assistant("b"), user("o")],
        [assistant("a"), user("o"), assistant("b")],
    )
    assert report.counts["interactions"] == 0
    assert report.interaction_drops == {
        "no follow-up": 1,
        "blank follow-up": 1,
        "unknown role behind it": 1,
        "followed by the assistant or a tool": 1,
        "blank question": 1,
        "no question before it": 1,
        "behind another answer": 1,
        "rests on an unknown role": 1,
    }


def test_reasoning_is_left_out_and_counted(tmp_path):
    thought = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}]
    said = [user("q"), assistant("a", reasoning_content="hm"), user("o"), assistant(thought)]
    said += [{"type": "reasoning", "summary": []}, user("p")]
    found, report = made(tmp_path, said)
    assert told(found) == [(["q"], "a", "o"), (["q", "a", "o"], "b", "p")]
    assert report.left_out == {"reasoning": 3}


def test_a_thought_alone_is_no_answer(tmp_path):
    alone = [assistant("<think>hm</think>\n"), assistant("<think>hm, and cut")]
    talks = [[user("Q"), a, user("?"), assistant("<think>so</think> A"), user("F")] for a in alone]
    found, report = made(tmp_path, *talks)
    assert told(found) == [(["Q\n\n?"], "<think>so</think> A", "F")] * 2
    assert report.left_out == {"thought without an answer": 2}
    assert report.interaction_drops["blank answer"] == 2


def test_explained(tmp_path):
    made(tmp_path, WEATHER)
    (hit,) = find(str(tmp_path / "x.jsonl"), "c0")
    assert hit.unused == {"makes a tool call": 1, "rests on a tool": 2}
    assert hit.left_out == {"tool call": 1, "tool result": 1}


def test_papers_presets_have_none_of_these_options(tmp_path):
    for option in ({"tools": "keep"}, {"system": "keep"}):
        with pytest.raises(SdpoError, match="are for strict and all-turns"):
            made(tmp_path, WEATHER, preset="paper-wildchat", **option)


# The answer behind the follow-up


def test_the_answer_behind_the_follow_up_is_kept_where_it_is_asked_for(tmp_path):
    said = talk("uauaua") + [user("o")]
    plain, report = made(tmp_path, said)
    assert [i.next_response for i in plain] == [None] * 3
    row = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])
    assert "next_completion" not in row and "next_response" not in report.rules
    for name in ("y.jsonl", "z.parquet"):
        found, report = made(tmp_path, said, name=name, next_response=True)
        assert [(i.response, i.next_response) for i in found] == [("a1", "a3"), ("a3", "a5")]
        assert [replace(i, next_response=None) for i in found] == plain[:2]
        assert report.interaction_drops == {"no answer behind the follow-up": 1}
        assert report.rules["next_response"]


@pytest.mark.parametrize(
    "letters, kept",
    [
        ("uaua", True),
        ("uaua?", True),
        ("uasua", True),
        ("uau", False),
        ("uauA", False),
        ("uauua", False),
        ("uauaa", False),
        ("uauact", False),
        ("uauI", False),
        ("uauctau", False),
    ],
)
def test_it_stands_alone_directly_behind_it(letters, kept, tmp_path):
    found, report = made(tmp_path, talk(letters), tools="keep", next_response=True)
    first = [i for i in found if i.turn_id == 1]
    assert len(first) == kept
    assert kept or report.interaction_drops["no answer behind the follow-up"] >= 1


def test_the_papers_presets_keep_it_as_they_count_messages(tmp_path):
    said = [user("q"), assistant("y"), user("o"), {"role": "tool", "content": "t"}, assistant("z")]
    found, _ = made(tmp_path, said, preset="paper-wildchat", next_response=True, languages=("any",))
    assert [(i.response, i.next_response) for i in found] == [("y", "z")], "it closes up"
    assert not made(tmp_path, said[:3], preset="paper-wildchat", next_response=True)[0]


def test_ready_interactions_keep_theirs_where_it_is_asked_for(tmp_path):
    guards = GuardrailConfig(pii="regex")
    said = [user("q"), assistant("y"), user("o"), assistant("Write to ann@example.org")]
    (found,), _ = made(tmp_path, said, next_response=True)
    (without,), _ = made(tmp_path, said[:3], name="w.jsonl")
    both = [str(tmp_path / name) for name in ("x.jsonl", "w.jsonl")]
    out = tmp_path / "again.jsonl"
    options = dict(preset="all-turns", guardrails=guards)
    report = prepare(PrepareConfig(inputs=(both[0],), out=str(out), next_response=True, **options))
    assert [i.next_response for i in read_interactions(out)] == ["Write to <EMAIL_1>"]
    assert report.pii == {"email": 1}
    prepare(PrepareConfig(inputs=(both[0],), out=str(out), **options))
    assert read_interactions(out) == [replace(found, next_response=None)] == [without]
    config = PrepareConfig(inputs=(both[1],), out=str(out), next_response=True, **options)
    assert prepare(config).interaction_drops == {"no answer behind the follow-up": 1}


# Guardrails


def test_personal_data_is_replaced_in_all_that_is_kept(tmp_path):
    arguments = {"to": ["ann@example.org"], "card": 4111111111111111, "ann@example.org": None}
    call = CALL | {"function": {"name": "mail", "arguments": arguments | {"bob@example.org": 1}}}
    said = [
        {"role": "system", "content": "You serve ann@example.org"},
        user("Mail her"),
        assistant("", tool_calls=[call]),
        {"role": "tool", "tool_call_id": "a", "content": "sent to ANN@example.org"},
        assistant("Done"),
        user("Thanks"),
    ]
    guards = GuardrailConfig(pii="regex")
    (found,), report = made(tmp_path, said, tools="keep", guardrails=guards)
    system, _, called, result = found.prompt
    assert system.content == "You serve <EMAIL_1>" and result.content == "sent to <EMAIL_1>"
    assert called.for_template()["tool_calls"][0]["function"]["arguments"] == {
        "to": ["<EMAIL_1>"],
        "card": "<CARD_1>",
        "<EMAIL_2>": 1,
    }
    assert report.pii == {"card": 1, "email": 5}, "a key once more, with its value"
    again = prepare(all_turns(tmp_path / "x.jsonl", out=tmp_path / "again.parquet"))
    assert again.counts["ready_interactions"] == 1
    assert read_interactions(tmp_path / "again.parquet") == [found]


def test_a_shared_system_prompt_makes_no_near_duplicates(tmp_path):
    system = {"role": "system", "content": " ".join(f"word{i}" for i in range(500))}
    talks = [[system, user(f"what is {i}?"), assistant(f"it is {i}"), user("ok")] for i in range(3)]
    found, report = made(tmp_path, *talks, talks[0], guardrails=GuardrailConfig())
    assert len(found) == 3
    assert report.drops == {"duplicate": 1}


# The oracle


def kind_of(message: Any) -> str:
    if not isinstance(message, dict):
        return "junk"
    if message["role"] == "critic":
        return "junk"
    if isinstance(message["content"], list):
        return "image"
    if message.get("tool_calls"):
        return "call"
    if message["role"] in ("tool", "system"):
        return message["role"]
    return message["role"] if (message["content"] or "").strip() else "blank"


def turn_of(message: dict) -> dict:
    name = {"user": "human", "assistant": "gpt"}.get(message["role"], message["role"])
    turn = {"from": name, "value": (message["content"] or "").strip()}
    if message.get("tool_calls"):
        turn["calls"] = message["tool_calls"][0]["id"]
    if message.get("tool_call_id"):
        turn["of"] = message["tool_call_id"]
    return turn


def prompt_of(said: Said, i: int, tools: str) -> list[dict] | None:
    """The prompt of the answer said[i]; None if there is none that holds all it should."""
    system = [m["content"] for m in said[:i] if kind_of(m) == "system"]
    before = [m for m in said[:i] if kind_of(m) != "system"]
    allowed = ("user", "tool") if tools == "keep" else ("user",)
    if not before or kind_of(before[-1]) not in allowed:
        return None
    recent: Said = []
    while before and sum(kind_of(m) in ("user", "assistant") for m in recent) < 5:
        recent.insert(0, before.pop())
    missing = ("junk", "image") if tools == "keep" else ("junk", "image", "call", "tool")
    if any(kind_of(m) in missing for m in recent):
        return None
    while recent and kind_of(recent[0]) != "user":
        recent.pop(0)
    if not recent:
        return None
    prompt = [{"from": "system", "value": "\n\n".join(system)}] if system else []
    for turn in (turn_of(m) for m in recent if kind_of(m) != "blank"):
        plain = prompt and prompt[-1]["from"] == turn["from"] and turn["from"] != "tool"
        if plain and "calls" not in prompt[-1] and "calls" not in turn:
            prompt[-1]["value"] += "\n\n" + turn["value"]
        else:
            prompt.append(turn)
    return prompt


def next_of(after: Said) -> str | None:
    """The answer directly behind the follow-up, if nothing of the assistant's goes on with it."""
    kinds = [kind_of(m) for m in after[1:3]]
    goes_on = said_by_no_user(after[2]) if kinds[1:] else False
    return after[1]["content"].strip() if kinds[:1] == ["assistant"] and not goes_on else None


def said_by_no_user(message: Any) -> bool:
    known = isinstance(message, dict) and message["role"] in ("assistant", "tool")
    return known or kind_of(message) in ("call", "tool")


def rows_of(id: str, said: Said, tools: str, next_response: bool = False) -> list[dict]:
    rows = []
    for i, message in enumerate(said):
        if kind_of(message) != "assistant":
            continue
        prompt = prompt_of(said, i, tools)
        after = [m for m in said[i + 1 :] if kind_of(m) != "system"]
        if prompt is None or not after or kind_of(after[0]) != "user":
            continue
        n = sum(kind_of(m) in ("user", "assistant") for m in said[:i])
        texts = (prompt, message["content"].strip(), after[0]["content"].strip())
        if next_response:
            texts = (*texts, next_of(after))
        if texts[-1] is None:
            continue
        rows.append({"id": f"{id}_{n}", "turn_id": n, "texts": texts})
    return rows


def shown(interaction: Interaction) -> dict:
    prompt = []
    for message in interaction.prompt:
        turn = turn_of(message.for_template())
        prompt.append(turn)
    texts = (prompt, interaction.response, interaction.followup)
    if interaction.next_response is not None:
        texts = (*texts, interaction.next_response)
    return {"id": interaction.id, "turn_id": interaction.turn_id, "texts": texts}


TURNS = {
    "u": lambda n: user(f"u{n}"),
    "a": lambda n: assistant(f" a{n}\n"),
    "U": lambda n: user(" "),
    "A": lambda n: assistant(None),
    "?": lambda n: {"role": "critic", "content": f"?{n}"},
    "s": lambda n: {"role": "system", "content": f"s{n}"},
    "c": lambda n: assistant(f"c{n}" if n % 2 else None, tool_calls=[CALL | {"id": f"id{n}"}]),
    "t": lambda n: {"role": "tool", "content": f"t{n}" if n % 3 else "", "tool_call_id": f"id{n}"},
    "i": lambda n: user(IMAGE),
    "I": lambda n: assistant([{"type": "audio"}]),
    "x": lambda n: n,
}


def talk(letters: str) -> Said:
    return [TURNS[letter](n) for n, letter in enumerate(letters)]


def broken_up(n: int, odd: list[tuple[int, str]]) -> str:
    """n turns, the user's first, with others put in."""
    said = list("ua" * n)[:n]
    for place, letter in odd:
        said.insert(place % (len(said) + 1), letter)
    return "".join(said)


odd_turns = st.sampled_from([*TURNS, "ct", "uA", "aU"])
letters = st.builds(
    broken_up, st.integers(0, 11), st.lists(st.tuples(st.integers(0, 20), odd_turns), max_size=4)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(letters, min_size=20, max_size=40), st.sampled_from(["drop", "keep"]), st.booleans()
)
def test_any_conversations(drawn, tools, after):
    talks = [talk(each) for each in drawn]
    with tempfile.TemporaryDirectory() as name:
        asked = {"tools": tools, "next_response": after}
        found, report = made(Path(name), *talks, [user("x")], **asked)
        wanted = [r for i, said in enumerate(talks) for r in rows_of(f"c{i}", said, tools, after)]
        assert [shown(i) for i in found] == wanted
        fates = pq.read_table(manifest_path(Path(name) / "x.jsonl"))["decision"].to_pylist()
    counted = sum(report.interaction_drops.values()) + report.counts["interactions"]
    kept = [each for each, fate in zip(drawn, fates, strict=False) if fate == "kept"]
    assert counted == sum(each.count(letter) for each in kept for letter in "aAcI")
    lost = [each for each, fate in zip(drawn, fates, strict=False) if fate != "kept"]
    assert all("?" in each and not ({*each} & {*"aAcI"} and "u" in each) for each in lost)


@pytest.mark.parametrize(
    "letters, drop, keep",
    [
        ("uau", ["u0"], ["u0"]),
        ("uAuau", ["u0\n\nu2"], ["u0\n\nu2"]),
        ("uuau", ["u0\n\nu1"], ["u0\n\nu1"]),
        ("uaau", None, None),
        ("u?au", None, None),
        ("uctau", None, ["u0", "c1", "t2"]),
        ("suau", ["s0", "u1"], ["s0", "u1"]),
        ("uiau", None, None),
        ("?uau", None, None),
        ("iauau", None, None),
    ],
)
def test_the_oracle_by_hand(letters, drop, keep):
    for tools, wanted in (("drop", drop), ("keep", keep)):
        rows = rows_of("c", talk(letters), tools)
        assert [[turn["value"] for turn in row["texts"][0]] for row in rows] == [wanted] * bool(
            wanted
        )


def test_the_option_is_given_many_times():
    """As `--role-map a=user --role-map b=call`."""
    import tyro

    args = ["x", "--out", "y.jsonl", "--role-map", "a=user", "--role-map", "b=call"]
    config = tyro.cli(PrepareConfig, args=args)
    assert config.role_map == ("a=user", "b=call")
    assert {("a", "user"), ("b", "call")} <= set(config.rules().roles)
