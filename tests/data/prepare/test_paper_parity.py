"""The paper's presets against the published rules, row by row: see `paper_rules`."""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings

from helpers import logs, paper_rules
from helpers.paper_rules import paper_wildchat, paper_wildfeedback, trainable
from sdpo.data.prepare.prepare import PrepareConfig, prepare
from sdpo.data.prepare.rules import PRESETS

Row = dict[str, Any]
Paper = Literal["paper-wildchat", "paper-wildfeedback"]

SPACES = [chr(point) for point in range(0x110000) if chr(point).isspace()]
# look like nothing, and are text to str.strip
UNSEEN = ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u180e", "\u00ad", "\x00", "\u0301"]
ODD_ROLES = ["system", "tool", "developer", "human", "gpt", "", None, "assistants", "use r"]
# i with and without dots, long s, full width: no `lower` makes an ASCII word of them
NEAR_ROLES = ["ASSİSTANT", "assıstant", "uſer", "ＵＳＥＲ", "user\u200b", "assistant\u0307"]
CASED_ROLES = [("User", "Assistant"), ("USER", "ASSISTANT"), ("\tuser ", "\u3000assistant\n")]
LANGUAGES = ["English", " English ", "ENGLISH", "EN", "en", "\u00a0En\n", "eN\x1f"]
OTHERS = ["French", None, "", " ", "englisch", "en-US", "eng", "ENGLİSH", "english\u200b", "e n"]


def spoken(letters: Iterable[str]) -> list[logs.Turn]:
    """u, a: a message of the user's, of the assistant's; s: of the system; b: a blank answer."""
    roles = {"u": "user", "a": "assistant", "s": "system", "b": "assistant", "n": "user"}
    texts = {"b": " \n", "n": None}
    return [(roles[x], texts.get(x, f"{x}{i}")) for i, x in enumerate(letters)]


def all_shapes(letters: str, longest: int) -> Iterator[tuple[str, ...]]:
    for length in range(longest + 1):
        yield from product(letters, repeat=length)


def at_limits() -> Iterator[list[logs.Turn]]:
    """Every message and every total one below, at and one above its limit, padded or not."""
    forms = ["{}", " {}\n", "\u2003{}", "{}\u200b"]
    for n, unit, form in product((4095, 4096, 4097), ("x", "😀"), forms):
        text = form.format(unit * n)
        yield [("user", text), ("assistant", "a"), ("user", "f"), ("assistant", "b")]
        yield [("user", "q"), ("assistant", text), ("user", "f")]
        yield [("user", "q"), ("assistant", "a"), ("user", text)]
    for total, unit, pad in product((99_999, 100_000, 100_001), ("x", "😀"), ("", " ")):
        yield adding_up_to(total, unit, pad)
        yield [("system", "s" * 9_000), *adding_up_to(total, unit, pad), ("user", "  ")]


def adding_up_to(total: int, unit: str, pad: str) -> list[logs.Turn]:
    sizes = [4_000] * ((total - 1) // 4_000)
    sizes.append(total - sum(sizes))
    return [(("user", "assistant")[i % 2], pad + unit * size + pad) for i, size in enumerate(sizes)]


def wildchat_turns() -> Iterator[logs.Turns]:
    yield from map(spoken, all_shapes("ua", 8))
    yield from map(spoken, all_shapes("uasbn", 4))
    yield from ([None, *spoken("uau"), None, *spoken("au")], [None, None, None], [], None)
    for char in SPACES + UNSEEN:
        asked, answered = ("user", f"{char}q{char} q{char}"), ("assistant", f"{char}a")
        yield [asked, ("assistant", char), answered, ("user", char * 3), ("user", f"f{char}")]
        yield [(f"{char}User", "q"), (f"assistant{char}", "a"), (f"{char}user{char}", "f")]
    for odd in ODD_ROLES + NEAR_ROLES:
        yield [(odd, "s"), *spoken("ua"), (odd, "t"), *spoken("ua"), (odd, "t"), ("user", "f")]
    for user, assistant in CASED_ROLES:
        yield [(user, "q"), (assistant, "a"), (user, "f"), (assistant, "b"), (user, "g")]
    yield from at_limits()


def wildchat_rows() -> list[Row]:
    rows = [logs.wildchat(f"c{i}", turns) for i, turns in enumerate(wildchat_turns())]
    for i, language in enumerate(LANGUAGES + OTHERS):
        rows.append(logs.wildchat(f"l{i}", spoken("uaua"), language))
    for id in (None, None, " ", "a_3", "ü:😀\n", "None"):
        rows.append(logs.wildchat(id, spoken("uauau")))
    return rows


def wildfeedback_rows() -> list[Row]:
    rows = [logs.wildfeedback(None, spoken(x)) for x in all_shapes("uasbn", 4)]
    rows += [logs.wildfeedback(None, spoken(x)) for x in all_shapes("ua", 8)]
    for char in SPACES + UNSEEN:
        turns = [("user", char), ("assistant", char), ("user", f"{char}q{char}")]
        answered = [("assistant", f"{char}a{char}"), ("user", f"{char}f{char}")]
        rows.append(logs.wildfeedback(None, [*turns, *answered, ("assistant", char), *answered]))
        rows.append(logs.wildfeedback(None, [*spoken("ua"), ("user", char), *spoken("ua")]))
    for odd in ["tool", "Human", " gpt", "user", "assistant", "", None]:
        turns = [(odd, "s"), *spoken("ua"), (odd, "t"), *spoken("uaua"), (odd, "t"), *spoken("u")]
        rows.append(logs.wildfeedback(None, turns))
    rows += [logs.wildfeedback(None, turns) for turns in at_limits()]
    rows += [logs.wildfeedback(None, [("user", "q" * 9_000), *spoken("auau")])]
    rows += [{"conversations": row["conversation"]} for row in rows[::3]]
    return [*rows, {"conversations": []}, {"conversation": []}, *rows[-2:]]


@pytest.fixture(scope="module")
def wildchat_log(tmp_path_factory) -> Path:
    """The adversarial WildChat log in three files of small row groups."""
    folder = tmp_path_factory.mktemp("wildchat")
    rows = wildchat_rows()
    for name, part in (("a", rows[:100]), ("b", rows[100:103]), ("c", rows[103:])):
        path = folder / f"{name}.parquet"
        path.write_bytes(logs.parquet("wildchat", part, rows_per_group=29))
    return folder


@pytest.fixture(scope="module")
def wildchat_dataset(wildchat_log) -> Dataset:
    return load(*(wildchat_log / f"{name}.parquet" for name in "abc"))


@pytest.fixture(scope="module")
def wildchat_expected(wildchat_dataset) -> list[Row]:
    return paper_wildchat(wildchat_dataset)


def load(*files: Path) -> Dataset:
    """With the columns that the oracle reads: decoding the others takes most of the time."""
    columns = ["conversation_id", "conversation", "language"]
    return Dataset(pa.concat_tables([pq.read_table(file, columns=columns) for file in files]))


def prepared(source: Path, preset: Paper, *, rules: Any = None, **settings: Any) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        config = PrepareConfig(inputs=(str(source),), out=str(out), preset=preset, **settings)
        prepare(config) if rules is None else prepare(config, rules=rules)
        return logs.rows_of(out)


def assert_same(rows: Sequence[Row], expected: Sequence[Row]) -> None:
    """Equal one by one; the first difference is shown, not a diff of thousands of rows."""
    for i, (row, wanted) in enumerate(zip(rows, expected, strict=False)):
        assert row == wanted, f"row {i}"
    assert len(rows) == len(expected)


# WildChat


def test_wildchat_gives_the_papers_rows(wildchat_log, wildchat_expected):
    assert len(wildchat_expected) > 500
    assert_same(prepared(wildchat_log, "paper-wildchat"), wildchat_expected)


def test_wildchat_given_file_by_file_is_shuffled_as_one_log(wildchat_log, tmp_path):
    files = [wildchat_log / f"{name}.parquet" for name in "cab"]
    out = tmp_path / "out.jsonl"
    inputs = tuple(map(str, files))
    prepare(PrepareConfig(inputs=inputs, out=str(out), preset="paper-wildchat", workers=2))
    assert_same(logs.rows_of(out), paper_wildchat(load(*files)))


@pytest.mark.parametrize(
    "limits",
    [
        {"most": 300, "enough_after": 100, "enough": 120},
        {"most": 300, "enough_after": 100, "enough": 200},
        {"most": 300, "enough_after": 0, "enough": 1},
        {"most": 100, "enough_after": 100, "enough": 10**6},
        {"most": 101, "enough_after": 100, "enough": 1},
        *({"most": most} for most in (1, 2, 37, 400)),
    ],
    ids=str,
)
def test_wildchat_stops_once_it_has_enough(limits, wildchat_log, wildchat_dataset):
    names = {"most": "max_conversations", "enough_after": "enough_after_conversations"}
    names["enough"] = "enough_interactions"
    changed = {names[name]: limit for name, limit in limits.items()}
    rules = dataclasses.replace(PRESETS["paper-wildchat"], **changed)
    expected = paper_wildchat(wildchat_dataset, **limits)
    assert_same(prepared(wildchat_log, "paper-wildchat", rules=rules), expected)


@pytest.mark.parametrize("id", [None, ""])
def test_wildchat_without_an_id_is_named_by_its_place(id, tmp_path):
    rows = [logs.wildchat(x, spoken("uau")) for x in ("a", id, "b", id)]
    path = logs.write(tmp_path / "log.parquet", "wildchat", rows)
    assert_same(prepared(path, "paper-wildchat"), paper_wildchat(load(path)))


def test_a_repeated_id_is_the_one_departure(tmp_path):
    rows = [logs.wildchat("same", spoken("uaua"[: 3 + i % 2] + "u")) for i in range(6)]
    path = logs.write(tmp_path / "log.parquet", "wildchat", rows)
    expected = paper_wildchat(load(path))
    seen: Counter[str] = Counter()
    for row in expected:
        seen[row["id"]] += 1
        if seen[row["id"]] > 1:
            row["id"] += f"~{seen[row['id']]}"
    assert seen.total() > len(seen)
    assert_same(prepared(path, "paper-wildchat"), expected)


odd_texts = st.text(st.sampled_from([*SPACES, *UNSEEN, *"ab😀"]), max_size=4)
long_texts = st.builds(
    lambda pad, unit, size: pad + unit * size + pad,
    st.sampled_from(["", " ", "\u2029"]),
    st.sampled_from("x😀"),
    st.sampled_from([4095, 4096, 4097]),
)
texts = st.one_of(st.text(max_size=5), odd_texts, odd_texts, st.none(), long_texts)
roles = st.one_of(
    st.sampled_from(["user", "assistant"] * 4 + ["system", " User", "ASSISTANT\n"]),
    st.sampled_from(ODD_ROLES + NEAR_ROLES),
)
conversations = st.one_of(
    st.none(), *2 * [st.lists(st.one_of(st.tuples(roles, texts)), max_size=14)]
)
generated = settings(
    max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@generated
@given(st.lists(st.tuples(conversations, st.sampled_from(LANGUAGES * 3 + OTHERS)), max_size=25))
def test_wildchat_of_any_conversations(drawn):
    rows = [logs.wildchat(f"c{i}", turns, language) for i, (turns, language) in enumerate(drawn)]
    with tempfile.TemporaryDirectory() as name:
        path = logs.write(Path(name) / "log.parquet", "wildchat", rows)
        assert_same(prepared(path, "paper-wildchat"), paper_wildchat(load(path)))


# WildFeedback


@pytest.mark.parametrize("container", ["json", "jsonl", "jsonl.gz"])
def test_wildfeedback_gives_the_papers_rows(container, tmp_path):
    rows = wildfeedback_rows()
    expected = paper_wildfeedback(rows)
    path = logs.write(tmp_path / f"log.{container}", "wildfeedback", rows)
    config = PrepareConfig(
        inputs=(str(path),), out=str(tmp_path / "out.jsonl"), preset="paper-wildfeedback"
    )
    report = prepare(config)
    kept = list(filter(trainable, expected))
    assert len(kept) > 500 and len(expected) > len(kept) + 50
    assert_same(logs.rows_of(tmp_path / "out.jsonl"), kept)
    assert report.interaction_drops["blank answer or follow-up"] == len(expected) - len(kept)


def test_wildfeedback_without_a_conversation(tmp_path):
    said = logs.wildfeedback(None, spoken("uau"))
    rows = [said, {"conversation": None}, {"conversations": None}, said]
    path = logs.write(tmp_path / "log.jsonl", "wildfeedback", rows)
    expected = paper_wildfeedback(rows)
    assert [row["id"] for row in expected] == ["0_1", "3_1"]
    assert_same(prepared(path, "paper-wildfeedback"), expected)


@generated
@given(st.lists(conversations, max_size=25), st.sampled_from(["conversation", "conversations"]))
def test_wildfeedback_of_any_conversations(drawn, column):
    rows = [{column: logs.wildfeedback(None, turns)["conversation"]} for turns in drawn]
    expected = list(filter(trainable, paper_wildfeedback(rows)))
    rows = [*rows, {column: []}]  # a file without rows is another matter
    with tempfile.TemporaryDirectory() as folder:
        path = logs.write(Path(folder) / "log.json", "wildfeedback", rows)
        assert_same(prepared(path, "paper-wildfeedback", format="wildfeedback"), expected)


# The oracle itself


def row_of(id: str, prompt: str, answer: str, follow_up: str) -> Row:
    """`prompt` names its messages, "u0 a1 u2"."""
    roles = {"u": "user", "a": "assistant"}
    said = [(roles[text[0]], text) for text in (*prompt.split(), answer, follow_up)]
    return logs.interaction(id, said)


@pytest.mark.parametrize(
    "letters, expected",
    [
        ("ua", []),
        ("uau", [row_of("c_1", "u0", "a1", "u2")]),
        ("aau", []),  # no history
        ("auau", [row_of("c_2", "u1", "a2", "u3")]),
        ("uaau", []),  # the history ends with the assistant
        ("uuau", [row_of("c_2", "u0", "a2", "u3")]),  # the first of a run
        ("usabu", [row_of("c_1", "u0", "a2", "u4")]),  # counted after cleaning
        (
            "uauauau",
            [
                row_of("c_1", "u0", "a1", "u2"),
                row_of("c_3", "u0 a1 u2", "a3", "u4"),
                row_of("c_5", "u0 a1 u2 a3 u4", "a5", "u6"),
            ],
        ),
        ("auauuuuau", [row_of("c_2", "u1", "a2", "u3"), row_of("c_7", "u3", "a7", "u8")]),
    ],
)
def test_the_oracle_by_hand(letters, expected):
    log = Dataset.from_list([logs.wildchat("c", spoken(letters))])
    assert paper_wildchat(log) == expected


def test_the_wildfeedback_oracle_by_hand():
    blank = logs.wildfeedback(None, spoken("uauabu"))  # an answer with nothing in it
    no_one = logs.wildfeedback(None, [*spoken("uaau")])  # this history ends with the assistant
    rows = paper_wildfeedback([{"conversation": None}, blank, no_one])
    assert rows[0] == row_of("1_1", "u0", "a1", "u2")
    assert rows[1]["completion"]["value"] == " \n" and not trainable(rows[1])
    assert rows[2] == row_of("2_2", "u0 a1", "a2", "u3")
    assert len(rows) == 3


def mutant(old: str, new: str) -> ModuleType:
    """The oracle with one change in its source."""
    source = Path(paper_rules.__file__).read_text("utf-8")
    assert source.count(old) == 1
    module = ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    return module


RUNS = 'history[-1]["from"] == message["from"]:\n            continue'


@pytest.mark.parametrize(
    "old, new",
    [
        ("[:i][-5:]", "[:i][-4:]"),
        ("[:i][-5:]", "[:i][-6:]"),
        ("alternating(messages[:i][-5:])", "alternating(messages[:i])[-5:]"),
        ("log.shuffle(seed=42)", "log"),
        ("log.shuffle(seed=42)", "log.shuffle(seed=43)"),
        ('(row["language"] or "").strip().lower()', '(row["language"] or "").lower()'),
        ('(row["language"] or "").strip().lower()', '(row["language"] or "").strip()'),
        ('(row["language"] or "")', '(row["language"] or "en")'),
        ('("english", "en")', '("english",)'),
        ('(message.get("role") or "").strip().lower()', '(message.get("role") or "").lower()'),
        ('(message.get("role") or "").strip().lower()', '(message.get("role") or "").strip()'),
        ('(message.get("content") or "").strip()', 'message.get("content") or ""'),
        ('(message.get("content") or "").strip()', '(message.get("content") or "").strip(" ")'),
        ("if content and role in NAMES:", "if role in NAMES:"),
        ("if content and role in NAMES:", "if content:"),
        ("len(messages) >= 3", "len(messages) >= 4"),
        ('"gpt": 4096, "human"', '"gpt": 4095, "human"'),
        ('"gpt": 4096, "human"', '"gpt": 4097, "human"'),
        ('"human": 4096', '"human": 4095'),
        ('"human": 4096', '"human": 4097'),
        ("if len(value) > most", "if len(value.encode()) > most"),
        ("total += len(value)\n", 'total += len(value.encode("utf-16-le")) // 2\n'),
        ('row["conversation_id"] or place', 'row["conversation_id"]'),
        (RUNS, RUNS.replace("continue", "history.pop()")),
        (RUNS, RUNS.replace("continue", "pass")),
        ('if not history and message["from"] == "gpt":', "if False:"),
        ('if history and history[-1]["from"] == "human":', "if history:"),
        ('"turn_id": i,', '"turn_id": i + 1,'),
    ],
)
def test_a_mutant_of_the_oracle_gives_other_wildchat_rows(
    old, new, wildchat_dataset, wildchat_expected
):
    try:
        rows = mutant(old, new).paper_wildchat(wildchat_dataset)
    except KeyError:  # a role that has no name
        return
    assert rows != wildchat_expected


@pytest.mark.parametrize(
    "old, new",
    [
        ("kept >= most", "kept > most"),
        ("kept >= enough_after", "kept > enough_after"),
        ("len(found) >= enough", "len(found) > enough"),
        (") >= enough)", ") >= enough) or len(found) >= enough"),
    ],
)
def test_a_mutant_of_the_stopping_rule_gives_other_rows(old, new):
    log = Dataset.from_list([logs.wildchat(f"c{i}", spoken("uau")) for i in range(12)])
    limits = [{"most": 5}, {"enough_after": 5, "enough": 3}, {"enough_after": 3, "enough": 5}]
    changed = mutant(old, new).paper_wildchat
    assert any(changed(log, **each) != paper_wildchat(log, **each) for each in limits)


SPOKEN = 'if message.get("from") in ("human", "gpt") and (message.get("value") or "").strip():'


@pytest.mark.parametrize(
    "old, new",
    [
        ("spoken[-5:]", "spoken[-4:]"),
        ("spoken[-5:]", "spoken[-6:]"),
        ("len(messages) >= 3", "len(messages) >= 4"),
        ('{"gpt": 4096})', '{"gpt": 4095})'),
        ('{"gpt": 4096})', '{"gpt": 4097})'),
        ("if len(value) > most", "if len(value.strip()) > most"),
        ("total += len(value)\n", "total += len(value.strip())\n"),
        (SPOKEN, SPOKEN.replace(' and (message.get("value") or "").strip()', "")),
        (SPOKEN, SPOKEN.replace('message.get("from") in ("human", "gpt") and ', "")),
        (RUNS, RUNS.replace("continue", "history.pop()")),
        ('if not history and message["from"] == "gpt":', "if False:"),
        ('"value": message["value"]}', '"value": (message["value"] or "").strip()}'),
        ("(spoken[-5:])", '(spoken[-5:] if spoken[-1:] and spoken[-1]["from"] == "human" else [])'),
        ('row.get("conversations") or', ""),
        ('or row.get("conversation")', ""),
        ("interaction(place,", "interaction(place + 1,"),
    ],
)
def test_a_mutant_of_the_oracle_gives_other_wildfeedback_rows(old, new):
    def rows(module: ModuleType) -> list[Row]:
        return list(filter(trainable, module.paper_wildfeedback(wildfeedback_rows())))

    assert rows(mutant(old, new)) != rows(paper_rules)
