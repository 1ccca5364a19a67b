"""Interactions: their file format, and their extraction against an oracle of the paper's rules."""

import json
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo.conversations import Conversation, DataError, Message
from sdpo.interactions import (
    PRESETS,
    Drop,
    ExtractionRules,
    Interaction,
    examine,
    extract,
    iter_interactions,
    prepare,
    read_interactions,
    write_interactions,
)

PAPER = PRESETS["paper-wildchat"]
ALL_TURNS = PRESETS["all-turns"]

# Small enough limits that generated conversations fall on both sides of each of them.
TIGHT = replace(PAPER, max_conversation_chars=30, max_assistant_chars=12, max_user_chars=9)

MESSAGE_TYPE = pa.struct({"content": pa.string(), "role": pa.string()})


def conversation(*messages: tuple[str, str], **known) -> Conversation:
    known = {"id": "c", "source": "log:0", "language": "English", "has_language": True} | known
    return Conversation(messages=tuple(Message(*m) for m in messages), **known)


def alternating(n: int, **known) -> Conversation:
    """u0, a1, u2, a3, ..."""
    turns = [("user", f"u{i}") if i % 2 == 0 else ("assistant", f"a{i}") for i in range(n)]
    return conversation(*turns, **known)


def interaction(**changed) -> Interaction:
    given = {"id": "i", "prompt": (Message("user", "x"),), "completion": "y", "user_response": "o"}
    return Interaction(**(given | changed))


def contents(prompt) -> list[str]:
    return [message.content for message in prompt]


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_wildchat(path: Path, rows: list[dict]) -> Path:
    columns = {
        "conversation_id": pa.array([row["id"] for row in rows], pa.string()),
        "conversation": pa.array([row["turns"] for row in rows], pa.list_(MESSAGE_TYPE)),
        "language": pa.array([row["language"] for row in rows], pa.string()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def wildchat_row(id: str, n: int = 3, language: str | None = "English") -> dict:
    turns = alternating(n).messages
    said = [{"role": m.role, "content": f"{id} {m.content}"} for m in turns]
    return {"id": id, "turns": said, "language": language}


# The oracle: the paper's rules, one row after the other, on plain dictionaries.


def oracle_history(turns: list[dict], i: int, most: int) -> list[dict] | None:
    first = i - most if i > most else 0
    while first < i and turns[first]["from"] == "gpt":
        first += 1
    history = []
    for j in range(first, i):
        if len(history) == 0 or turns[j]["from"] != history[-1]["from"]:
            history.append(turns[j])
    if len(history) == 0 or history[-1]["from"] == "gpt":
        return None
    return history


def oracle_row(row: dict, rules: ExtractionRules) -> tuple[str, list[dict], int]:
    """("kept" or the reason of the drop, its rows, answers without a history)."""
    language = row["language"]
    if language is None or language.strip().lower() not in ("english", "en"):
        return "language", [], 0
    turns, total, longest_answer, longest_question = [], 0, 0, 0
    for message in row["turns"] or []:
        who = {"user": "human", "assistant": "gpt"}.get((message["role"] or "").strip().lower())
        said = (message["content"] or "").strip()
        if who is None or said == "":
            continue
        turns.append({"from": who, "value": said})
        total += len(said)
        if who == "gpt":
            longest_answer = max(longest_answer, len(said))
        else:
            longest_question = max(longest_question, len(said))
    if len(turns) < 3:
        return "too few messages", [], 0
    if total > rules.max_conversation_chars:
        return "conversation too long", [], 0
    if longest_answer > rules.max_assistant_chars:
        return "assistant message too long", [], 0
    if longest_question > rules.max_user_chars:
        return "user message too long", [], 0
    rows, unusable = [], 0
    for i in range(len(turns) - 1):
        if turns[i]["from"] == "gpt" and turns[i + 1]["from"] == "human":
            history = oracle_history(turns, i, 5)
            if history is None:
                unusable += 1
                continue
            out = {"id": f"{row['id']}_{i}", "turn_id": i, "prompt": history}
            rows.append(out | {"completion": turns[i], "user_response": turns[i + 1]})
    return "kept", rows, unusable


def oracle_prepare(rows: list[dict], rules: ExtractionRules) -> tuple[list[dict], Counter, int]:
    """(rows of the file, outcomes of the conversations read, answers without a history)."""
    out, outcomes, unusable = [], Counter(), 0
    for at in np.random.default_rng(42).permutation(len(rows)):
        outcome, found, missing = oracle_row(rows[at], rules)
        outcomes[outcome] += 1
        out += found
        unusable += missing
        if outcome == "kept":
            early = outcomes["kept"] >= rules.enough_after_conversations
            if outcomes["kept"] >= rules.max_conversations:
                break
            if early and len(out) >= rules.enough_interactions:
                break
    return out, outcomes, unusable


roles = st.sampled_from(["user", "assistant"] * 4 + ["User ", " ASSISTANT", "system", "tool", None])
texts = st.text(alphabet="abé漢😀 \n\u00a0", max_size=6) | st.sampled_from(
    ["", " \n", None, "x" * 9, " " + "x" * 10, "x" * 12, "x" * 13]
)
turns = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), max_size=14)
languages = st.sampled_from(["English"] * 6 + ["en", " ENGLISH ", "French", "Englisch", "", None])
rows = st.fixed_dictionaries({"turns": turns, "language": languages})
checked = settings(derandomize=True, deadline=None)


def as_rows(path: Path, interactions: list[Interaction]) -> list[dict]:
    assert write_interactions(path, interactions) == len(interactions)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@given(row=rows)
@settings(checked, max_examples=300)
def test_extraction_follows_the_paper(row, tmp_path_factory):
    row["id"] = "c"
    said = [(m["role"] or "", m["content"] or "") for m in row["turns"]]
    found = examine(conversation(*said, language=row["language"]), TIGHT)
    outcome, expected, unusable = oracle_row(row, TIGHT)
    assert (found.dropped or "kept", found.without_history) == (outcome, unusable)
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    assert as_rows(path, list(found.interactions)) == expected
    assert tuple(read_interactions(path) if expected else []) == found.interactions


@given(
    rows=st.lists(rows, min_size=1, max_size=14),
    cuts=st.sets(st.integers(1, 13)),
    stops=st.fixed_dictionaries(
        {
            "max_conversations": st.integers(1, 8),
            "enough_interactions": st.integers(0, 6),
            "enough_after_conversations": st.integers(0, 5),
        }
    ),
)
@settings(checked, max_examples=100)
def test_preparation_follows_the_paper_through_parquet(rows, cuts, stops, tmp_path_factory):
    rules = replace(PAPER, max_conversation_chars=60, max_assistant_chars=12, **stops)
    folder = tmp_path_factory.mktemp("rows")
    rows = [row | {"id": f"c{i}"} for i, row in enumerate(rows)]
    edges = [0, *sorted(cut for cut in cuts if cut < len(rows)), len(rows)]
    for n, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        write_wildchat(folder / f"part-{n:02}.parquet", rows[start:end])

    interactions, report = prepare(folder, rules)

    expected, outcomes, unusable = oracle_prepare(rows, rules)
    assert as_rows(folder / "out.jsonl", interactions) == expected
    assert (report.files, report.rows) == (len(edges) - 1, len(rows))
    assert report.conversations_read == outcomes.total()
    assert report.conversations_kept == outcomes.pop("kept", 0)
    assert {str(reason): n for reason, n in report.drops.items()} == outcomes
    assert report.answers_without_history == unusable
    assert report.interactions == len(interactions)


# Single rules, with values worked out by hand


def test_the_presets_are_the_papers_numbers():
    assert (
        ExtractionRules(
            history_messages=5,
            languages=("english", "en"),
            min_messages=3,
            max_conversation_chars=100_000,
            max_assistant_chars=4096,
            max_user_chars=4096,
            shuffle_seed=42,
            max_conversations=15_000,
            enough_interactions=50_000,
            enough_after_conversations=14_000,
        )
        == PAPER
    )
    off = {f.name: getattr(ALL_TURNS, f.name) for f in fields(ALL_TURNS)}
    assert off.pop("history_messages") == 5
    assert not any(off.values())


def test_a_plain_conversation():
    found = extract(alternating(8), PAPER)
    assert [(i.id, i.turn_id) for i in found] == [("c_1", 1), ("c_3", 3), ("c_5", 5)]
    assert [i.completion for i in found] == ["a1", "a3", "a5"]
    assert [i.user_response for i in found] == ["u2", "u4", "u6"]
    assert [contents(i.prompt) for i in found] == [
        ["u0"],
        ["u0", "a1", "u2"],
        ["u0", "a1", "u2", "a3", "u4"],
    ]


def test_history_is_the_last_five_messages_from_a_user_message_on():
    last = extract(alternating(11), PAPER)[-1]
    assert (last.turn_id, contents(last.prompt)) == (9, ["u4", "a5", "u6", "a7", "u8"])
    run = conversation(*[("user", f"u{i}") for i in range(6)], ("assistant", "a"), ("user", "o"))
    (found,) = extract(run, PAPER)
    assert contents(found.prompt) == ["u1"], "of a run within the last five, the first stays"


def test_an_answer_that_follows_an_answer_has_no_history():
    found = examine(
        conversation(("user", "u"), ("assistant", "a"), ("assistant", "b"), ("user", "o")), PAPER
    )
    assert (found.dropped, found.interactions, found.without_history) == (None, (), 1)
    opening = conversation(("assistant", "a"), ("user", "u"), ("assistant", "b"))
    assert examine(opening, PAPER).without_history == 1


def test_indices_count_cleaned_messages():
    (found,) = extract(
        conversation(
            ("system", "s"),
            ("user", " "),
            ("User", " x "),
            ("tool", "t"),
            ("ASSISTANT ", "\ty\n"),
            ("user", "o\u00a0"),
        ),
        PAPER,
    )
    assert (found.id, contents(found.prompt), found.completion) == ("c_1", ["x"], "y")
    assert found.user_response == "o"


def test_each_drop_has_its_reason_and_its_limit_is_inclusive():
    rules = replace(PAPER, max_conversation_chars=20, max_assistant_chars=8, max_user_chars=6)

    def dropped(*lengths: int, **known) -> Drop | None:
        said = [(r, "x" * n) for r, n in zip(["user", "assistant"] * 4, lengths, strict=False)]
        return examine(conversation(*said, **known), rules).dropped

    assert dropped(6, 8, 6) is None
    assert dropped(6, 8) is Drop.TOO_FEW_MESSAGES
    assert dropped(6, 9, 5) is Drop.ASSISTANT_TOO_LONG
    assert dropped(7, 8, 5) is Drop.USER_TOO_LONG
    assert dropped(6, 8, 6, 1) is Drop.TOO_LONG
    assert dropped(6, 8, 6, language=None) is Drop.LANGUAGE
    assert dropped(6, 8, 6, language="French") is Drop.LANGUAGE
    assert dropped(6, 8, 6, language=" EN ") is None
    assert dropped(6, 8, 6, language=None, has_language=False) is None


def test_all_turns_drops_nothing():
    long = conversation(("user", "x" * 9999), ("assistant", "y" * 99_999), ("user", "o"))
    assert len(extract(replace(long, language="French"), ALL_TURNS)) == 1
    assert examine(conversation(), ALL_TURNS).dropped is None


@pytest.mark.parametrize(
    "rule", [{"history_messages": 0}, {"max_conversations": 0}, {"languages": ("English",)}]
)
def test_rules_that_make_no_sense(rule):
    with pytest.raises(ValueError, match=next(iter(rule))):
        ExtractionRules(**rule)


# Preparation


@pytest.mark.parametrize("n", [1, 10, 1500])
def test_the_order_is_that_of_hugging_faces_shuffle(tmp_path, n):
    datasets = pytest.importorskip("datasets")
    ids = [f"c{i}" for i in range(n)]
    write_wildchat(tmp_path / "c.parquet", [wildchat_row(id) for id in ids])
    interactions, _ = prepare(tmp_path, PAPER)
    shuffled = datasets.Dataset.from_dict({"id": ids}).shuffle(seed=42)["id"]
    assert [i.id for i in interactions] == [f"{id}_1" for id in shuffled]


def test_the_order_is_pinned(tmp_path):
    write_wildchat(tmp_path / "c.parquet", [wildchat_row(str(i)) for i in range(6)])
    shuffled, _ = prepare(tmp_path, PAPER)
    assert [i.id[0] for i in shuffled] == list("325410")
    first, report = prepare(tmp_path, replace(PAPER, max_conversations=2))
    assert [i.id[0] for i in first] == list("32")
    assert (report.conversations_read, report.conversations_kept) == (2, 2)
    logged, _ = prepare(tmp_path, ALL_TURNS)
    assert [i.id[0] for i in logged] == list("012345")


def test_files_of_several_formats_are_read_each_as_what_it_is(tmp_path):
    parquet = write_wildchat(tmp_path / "a.parquet", [wildchat_row("w", language="French")])
    chat = [{"role": m.role, "content": m.content} for m in alternating(5).messages]
    messages = write_rows(tmp_path / "b.jsonl", {"messages": chat})
    ready = tmp_path / "c.jsonl"
    kept = [interaction(id="r1", weight=0.5), interaction(id="r2", completion="y" * 9999)]
    write_interactions(ready, kept)

    interactions, report = prepare([parquet, messages, ready], PAPER)

    assert interactions[:2] == kept, "ready triples pass unchanged, whatever the rules"
    assert {i.id for i in interactions[2:]} == {"b-1_1", "b-1_3"}, "no language column, no filter"
    assert report.drops == {Drop.LANGUAGE: 1}
    assert (report.files, report.rows, report.conversations_kept) == (3, 2, 1)
    assert (report.ready_interactions, report.interactions) == (2, 4)


def test_ready_triples_are_validated(tmp_path):
    path = write_rows(tmp_path / "r.jsonl", TRIPLE, TRIPLE | {"completion": " "})
    with pytest.raises(DataError, match="line 2, field `completion`"):
        prepare(path, PAPER)


def test_repeated_conversation_ids_give_unique_interaction_ids(tmp_path):
    rows = [wildchat_row("c"), wildchat_row("c"), wildchat_row("c_1~2"), wildchat_row("c")]
    write_wildchat(tmp_path / "c.parquet", rows)
    write_interactions(tmp_path / "r.jsonl", [interaction(id="c_1~2")])
    interactions, report = prepare(tmp_path, ALL_TURNS)
    assert [i.id for i in interactions] == ["c_1~2", "c_1", "c_1~3", "c_1~2_1", "c_1~4"]
    assert report.renamed_ids == 2
    assert write_interactions(tmp_path / "out.jsonl", interactions) == 5


def test_the_stop_rule_spares_the_later_rows(tmp_path):
    write_wildchat(tmp_path / "c.parquet", [wildchat_row(f"c{i}", 5) for i in range(9)])
    rules = replace(ALL_TURNS, enough_interactions=3, enough_after_conversations=4)
    interactions, report = prepare(tmp_path, rules)
    assert [i.id for i in interactions][-2:] == ["c3_1", "c3_3"]
    assert (report.rows, report.conversations_read, report.conversations_kept) == (9, 4, 4)
    _, report = prepare(tmp_path, replace(rules, enough_interactions=10))
    assert report.conversations_kept == 5, "the limit is reached, not passed"
    interactions, report = prepare(tmp_path, replace(rules, max_conversations=2))
    assert (len(interactions), report.conversations_read) == (4, 2)


# The file format

TRIPLE = {
    "prompt": [{"from": "human", "value": "x"}],
    "completion": {"from": "gpt", "value": "y"},
    "user_response": {"from": "human", "value": "o"},
}

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
some_text = any_text.filter(str.strip)
messages = st.builds(Message, st.sampled_from(["user", "assistant", "system"]), any_text)


@st.composite
def interactions(draw) -> Interaction:
    ids = draw(st.none() | st.lists(st.integers(0, 2**31), min_size=1, max_size=4).map(tuple))
    logprob = st.floats(max_value=0, allow_nan=False, allow_infinity=False)
    n = len(ids or ())
    logprobs = st.none() | st.lists(logprob, min_size=n, max_size=n).map(tuple)
    return Interaction(
        id=draw(some_text),
        prompt=(*draw(st.lists(messages, max_size=3)), Message("user", draw(any_text))),
        completion=draw(some_text),
        user_response=draw(some_text),
        turn_id=draw(st.none() | st.integers()),
        weight=draw(st.floats(0, allow_nan=False, allow_infinity=False)),
        completion_token_ids=ids,
        completion_logprobs=draw(logprobs) if ids else None,
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
        '{"id": "i", "turn_id": 0, "prompt": [{"from": "system", "value": "s"}, '
        '{"from": "human", "value": "漢"}], "completion": {"from": "gpt", "value": "y"}, '
        '"user_response": {"from": "human", "value": "o"}}'
    )
    assert json.loads(second).keys() == {"id", *TRIPLE, "weight"}


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
    path = write_rows(tmp_path / "i.jsonl", row, TRIPLE | {"completion": "y", "user_response": "o"})
    first, second = read_interactions(path)
    assert first == interaction(id="1", prompt=(Message("system", ""), Message("user", "x")))
    assert second == interaction(id="2")


def test_reading_streams(tmp_path):
    stream = iter_interactions(write_rows(tmp_path / "i.jsonl", TRIPLE, {}))
    assert next(stream) == interaction(id="1")
    with pytest.raises(DataError, match="line 2, field `prompt`"):
        next(stream)


USER, GPT = {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}
NAN, INF = float("nan"), float("inf")
BAD_FIELDS = {
    "prompt missing": ({"prompt": None}, "prompt", "found nothing (null or missing)"),
    "prompt as text": ({"prompt": "x"}, "prompt", "found text where a list"),
    "prompt empty": ({"prompt": []}, "prompt", "the prompt has no messages"),
    "prompt ends in an answer": ({"prompt": [USER, GPT]}, "prompt", "ends with a message of role"),
    "prompt of text": ({"prompt": ["x"]}, "prompt[0]", "found text where an object"),
    "sender unknown": ({"prompt": [{"from": "bot"}]}, "prompt[0].from", "unknown sender 'bot'"),
    "role unknown": (
        {"prompt": [{"role": "tool", "content": ""}, USER]},
        "prompt[0]",
        "unknown role 'tool'",
    ),
    "value a number": ({"prompt": [{"from": "human", "value": 1}]}, "prompt[0].value", "a number"),
    "completion blank": ({"completion": " \n"}, "completion", "whose response is empty"),
    "completion by the user": ({"completion": USER}, "completion", "of role 'user'"),
    "completion a number": ({"completion": 3}, "completion", "found a number where text"),
    "response blank": (
        {"user_response": {"from": "human", "value": ""}},
        "user_response",
        "whose user response is empty",
    ),
    "response by the model": ({"user_response": GPT}, "user_response", "of role 'assistant'"),
    "turn_id text": ({"turn_id": "3"}, "turn_id", "found text, not an integer"),
    "weight NaN": ({"weight": NAN}, "weight", "the weight is NaN"),
    "weight infinite": ({"weight": INF}, "weight", "the weight is inf"),
    "weight negative": ({"weight": -0.5}, "weight", "the weight is -0.5"),
    "weight huge": ({"weight": 10**400}, "weight", "too large"),
    "weight text": ({"weight": "1"}, "weight", "found text where a number"),
    "weight a boolean": ({"weight": True}, "weight", "found a boolean where a number"),
    "ids not a list": ({"completion_token_ids": 5}, "completion_token_ids", "a list is needed"),
    "ids empty": ({"completion_token_ids": []}, "completion_token_ids", "no token ids"),
    "id negative": ({"completion_token_ids": [1, -1]}, "completion_token_ids[1]", "-1 is not"),
    "id a float": ({"completion_token_ids": [1.0]}, "completion_token_ids[0]", "1.0 is not"),
    "id a boolean": ({"completion_token_ids": [True]}, "completion_token_ids[0]", "True is not"),
    "logprobs alone": ({"completion_logprobs": [-1]}, "completion_logprobs", "without the tokens"),
    "logprobs too few": (
        {"completion_token_ids": [1, 2], "completion_logprobs": [-1]},
        "completion_logprobs",
        "1 log-probabilities for 2 token ids",
    ),
    "logprob positive": (
        {"completion_token_ids": [1], "completion_logprobs": [0.1]},
        "completion_logprobs[0]",
        "0.1 is not a log-probability",
    ),
    "logprob NaN": (
        {"completion_token_ids": [1], "completion_logprobs": [NAN]},
        "completion_logprobs[0]",
        "NaN is not",
    ),
    "logprob infinite": (
        {"completion_token_ids": [1], "completion_logprobs": [-INF]},
        "completion_logprobs[0]",
        "-inf is not",
    ),
    "logprob text": (
        {"completion_token_ids": [1], "completion_logprobs": ["-1"]},
        "completion_logprobs[0]",
        "found text where a number",
    ),
    "id repeated": ({"id": "first"}, "id", "'first' is the id of line 1 too"),
    "id a list": ({"id": []}, "id", "found a list"),
}


@pytest.mark.parametrize("bad", BAD_FIELDS)
def test_bad_rows(tmp_path, bad):
    changed, name, problem = BAD_FIELDS[bad]
    path = write_rows(tmp_path / "i.jsonl", TRIPLE | {"id": "first"}, TRIPLE | changed)
    with pytest.raises(DataError) as caught:
        read_interactions(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2, field `{name}`: ")
    assert problem in message
    assert re.search(r"\. [A-Z].*\.$", message), f"says nothing of what to do: {message}"


def test_an_id_that_falls_back_to_a_taken_one_is_an_error(tmp_path):
    path = write_rows(tmp_path / "i.jsonl", TRIPLE | {"id": "2"}, TRIPLE)
    with pytest.raises(DataError, match="line 2, field `id`: '2' is the id of line 1 too"):
        read_interactions(path)


def test_files_that_are_no_interactions(tmp_path):
    path = tmp_path / "i.jsonl"
    with pytest.raises(DataError, match=re.escape(f"{path}: cannot be read")):
        read_interactions(path)
    path.write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        read_interactions(path)
    path.write_text(json.dumps(TRIPLE) + "\n" + json.dumps(TRIPLE)[:-5])
    with pytest.raises(DataError, match=r"line 2, column \d+: broken JSON"):
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
    with pytest.raises(UnicodeEncodeError):
        write_interactions(path, [interaction(completion="\ud83d")])
    assert [i.id for i in read_interactions(path)] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_writing_replaces_the_file_in_one_step(tmp_path):
    path = tmp_path / "i.jsonl"
    write_interactions(path, [interaction(id="old")])

    def watched():
        yield interaction(id="new")
        assert [i.id for i in read_interactions(path)] == ["old"]

    assert write_interactions(path, watched()) == 1
    assert [i.id for i in read_interactions(path)] == ["new"]
