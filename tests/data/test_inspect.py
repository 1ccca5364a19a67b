"""What is in a file, said alike by the table, the JSON and the page."""

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import logs, tiny
from helpers.logs import write_lines
from sdpo.chat import chat_format
from sdpo.data.inspect import inspection
from sdpo.data.inspect import page as inspect_page
from sdpo.data.inspect import tables as inspect_tables
from sdpo.data.inspect.command import inspect_command
from sdpo.data.inspect.inspection import inspect
from sdpo.data.inspect.page import to_html
from sdpo.data.manifest import manifest_path, report_path
from sdpo.data.prepare.config import PrepareConfig
from sdpo.data.prepare.prepare import prepare
from sdpo.data.prepare.write import MANIFEST
from sdpo.errors import DataError
from sdpo.interactions import read_interactions

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "br", "img", "link", "input", "hr"}
COUNTS = {"conversations_examined": 6, "conversations_kept": 3, "interactions": 4}
TEXTS = ["short", "a longer answer " * 9, EVIL, "\x1b[2Jgone"]


def row(id: str, turn: int, completion: str = "answer", **fields) -> dict:
    prompt = [{"from": "human", "value": f"question of {id}"}]
    if turn > 1:
        prompt += [{"from": "gpt", "value": "before"}, {"from": "human", "value": "and then?"}]
    return {
        "id": id,
        "turn_id": turn,
        "prompt": prompt,
        "completion": {"from": "gpt", "value": completion},
        "user_response": {"from": "human", "value": f"follow-up {EVIL}"},
        **fields,
    }


def manifest_row(place: int, id: str, decision: str = "kept", **fields) -> dict:
    blank = dict(source_file="log.parquet", language="English", model="gpt-4", messages=3)
    return {"conversation_id": id, "row": place, "decision": decision, **blank, **fields}


def write_report(path: Path, **fields) -> None:
    report = {
        "version": 2,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "preset": "strict",
        "rules": {"max_assistant_chars": 150, "max_user_chars": None},
        "counts": COUNTS,
        "drops": {"too long": 1, "near-duplicate": 2},
        "interaction_drops": {"injection": 4},
        "left_out": {"unknown role critic": 7},
        "pii": {"email": 17},
        "guards": {"moderation": "no such column"},
        "bad_rows": ["log.parquet, row 9: <b>broken</b>"],
        **fields,
    }
    report_path(path).write_text(json.dumps(report), encoding="utf-8")


@pytest.fixture
def prepared(tmp_path) -> Path:
    """Four interactions of three conversations, with their manifest and report."""
    ids = [("a_1", 1), ("a_3", 3), ("b_1", 1), ("b_1~2", 1)]
    rows = [row(id, turn, text) for (id, turn), text in zip(ids, TEXTS, strict=True)]
    path = write_lines(tmp_path / "x.jsonl", *rows)
    copy = {"decision": "near-duplicate", "duplicate_of": "log.parquet:0"}
    manifest = [
        manifest_row(0, "a", user="u1", messages=5, interaction_ids=["a_1", "a_3"]),
        manifest_row(1, "c", "too long", user="u9", language="Dutch"),
        manifest_row(2, "d", **copy),
        manifest_row(3, "b", user="u2", language=None, interaction_ids=["b_1"]),
        manifest_row(4, "b", language="French", model=EVIL, interaction_ids=["b_1~2"]),
        manifest_row(5, "e", **copy),
    ]
    pq.write_table(pa.Table.from_pylist(manifest, MANIFEST), manifest_path(path))
    write_report(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer().save_pretrained(folder)
    return str(folder)


class Page(HTMLParser):
    """Checks nesting and collects what a browser would load, run or show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_counts_come_from_the_manifest(prepared):
    found = inspect(prepared)
    assert (found.interactions, found.conversations, found.users) == (4, 3, 2)
    origins = found.origins
    assert origins.languages == {"English": 2, "unknown": 1, "French": 1}  # dropped ones are not in
    assert origins.models == {"gpt-4": 3, EVIL: 1}
    assert origins.without_user == 1
    assert origins.top_users == {"1": 2 / 4}  # there are no ten users
    assert (origins.messages.min, origins.messages.max) == (3, 5)
    copies = origins.duplicates["near-duplicate"]
    assert (copies.conversations, copies.conversation_id) == (2, "d")
    assert (copies.source, copies.duplicate_of) == ("log.parquet:2", "log.parquet:0")
    assert found.preparation.drops == {"near-duplicate": 2, "too long": 1}
    assert found.notes == []


def test_without_a_manifest_the_ids_tell_conversations(tmp_path):
    rows = [row("a_1", 1), row("a_3", 3), row("b_1", 1), row("b_1~2", 1), row("1_2_x", 5)]
    found = inspect(write_lines(tmp_path / "x.jsonl", *rows))
    assert (found.conversations, found.users, found.origins) == (3, None, None)
    assert found.turns["interactions per conversation"].max == 2
    Page(to_html(found))
    assert [name in " ".join(found.notes) for name in ("x.manifest", "x.report")] == [True, True]


def test_a_report_about_another_file_is_not_shown(prepared):
    with prepared.open("a") as file:
        file.write(json.dumps(row("new_1", 1)) + "\n")
    found = inspect(prepared)
    assert found.preparation is None and found.origins is None
    assert "changed since" in found.notes[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}'])
def test_a_broken_report_is_named(prepared, text):
    report_path(prepared).write_text(text)
    with pytest.raises(DataError, match=r"x\.report\.json.*[Pp]repare again"):
        inspect(prepared)
    write_report(prepared, version=3)
    with pytest.raises(DataError, match="its version is 3, not 2"):
        inspect(prepared)


def test_a_report_of_0_1_is_read(prepared):
    path = report_path(prepared)
    report = {
        key: value for key, value in json.loads(path.read_text()).items() if key != "left_out"
    }
    path.write_text(json.dumps(report | {"version": 1}))
    found = inspect(prepared).preparation
    assert (found.drops, found.left_out) == ({"near-duplicate": 2, "too long": 1}, {})


def test_a_broken_manifest_is_named(prepared):
    manifest_path(prepared).write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"x\.manifest\.parquet.*[Pp]repare again"):
        inspect(prepared)
    pq.write_table(pa.table({"user": ["u"]}), manifest_path(prepared))
    with pytest.raises(DataError, match=r"x\.manifest\.parquet.*[Pp]repare again"):
        inspect(prepared)


def test_lengths_in_characters(prepared):
    answers = inspect(prepared).characters["answer y"]
    lengths = [len(text) for text in TEXTS]
    assert (answers.min, answers.max) == (min(lengths), max(lengths))
    assert answers.median == np.median(lengths) and answers.mean == np.mean(lengths)


@pytest.mark.parametrize("largest", [0, 1, 40, 41, 100_000])
def test_a_histogram_holds_every_number_once(largest, seed):
    numbers = np.random.default_rng(seed).integers(0, largest + 1, 500)
    numbers[:2] = 0, largest
    lengths = inspection._lengths(numbers)
    assert sum(lengths.counts) == 500
    for low, high, n in zip(lengths.edges[:-1], lengths.edges[1:], lengths.counts, strict=True):
        last = high == lengths.edges[-1]  # numpy's last bin is closed
        assert n == ((numbers >= low) & (numbers < high + last)).sum()


def test_tokens_are_counted_as_training_sees_them(prepared, tokenizer):
    tokens = inspect(prepared, tokenizer=tokenizer).tokens
    model_tokenizer = tiny.make_tokenizer()
    rows = read_interactions(prepared)
    chat = chat_format(model_tokenizer)
    policy = [len(chat.prompt_ids(i.prompt)) for i in rows]
    response = [len(chat.response_ids(i.response)[0]) for i in rows]
    assert tokens.lengths["policy prompt"].mean == np.mean(policy)
    assert tokens.lengths["response"].max == max(response)
    assert tokens.lengths["hindsight prompt"].min > tokens.lengths["policy prompt"].min
    assert tokens.cut == {"policy prompt": 0, "hindsight prompt": 0, "response": 0}


def test_tokens_beyond_the_limits_are_counted(tmp_path, tokenizer):
    long = row("long_1", 1, "fox " * 3000)
    long["prompt"][0]["value"] = "fox " * 3000
    path = write_lines(tmp_path / "x.jsonl", long, row("b_1", 1))
    tokens = inspect(path, tokenizer=tokenizer).tokens
    assert tokens.cut == {"policy prompt": 1, "hindsight prompt": 0, "response": 1}


def test_of_many_interactions_a_draw_is_tokenized(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(inspection, "MOST_TOKENIZED", 25)
    path = write_lines(tmp_path / "x.jsonl", *(row(f"c{i}_1", 1, "fox " * i) for i in range(1, 30)))
    drawn = inspect(path, tokenizer=tokenizer, sample_seed=1)
    assert drawn.tokens.interactions == 25
    assert "25 interactions (seed 1), not on all 29" in drawn.notes[-1]
    assert inspect(path, tokenizer=tokenizer, sample_seed=1).tokens == drawn.tokens
    assert inspect(path, tokenizer=tokenizer, sample_seed=2).tokens != drawn.tokens


def test_prompts_that_the_template_refuses_are_counted(tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}x"
    )
    tokenizer.save_pretrained(tmp_path / "t")
    path = write_lines(tmp_path / "x.jsonl", row("a_1", 1), row("a_3", 3))
    tokens = inspect(path, tokenizer=str(tmp_path / "t")).tokens
    assert (tokens.refused, tokens.interactions) == (1, 2)
    path = write_lines(tmp_path / "y.jsonl", row("a_3", 3))
    assert inspect(path, tokenizer=str(tmp_path / "t")).tokens.lengths == {}


def test_weights(tmp_path):
    rows = [row("a_1", 1), row("a_3", 3, weight=0), row("b_1", 1, weight=4)]
    weights = inspect(write_lines(tmp_path / "x.jsonl", *rows)).weights
    assert (weights.min, weights.mean, weights.max, weights.zero) == (0, 5 / 3, 4, 1)
    assert inspect(write_lines(tmp_path / "y.jsonl", *rows[:1])).weights is None


def test_samples_are_the_first_or_a_seeded_draw(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *(row(f"c{i}_1", 1) for i in range(50)))

    def ids(**options) -> list[str]:
        return [s.id for s in inspect(path, samples=3, **options).samples]

    assert ids() == ["c0_1", "c1_1", "c2_1"]
    assert ids(sample_seed=0) == ids(sample_seed=0) != ids(sample_seed=1)
    assert len(inspect(path, samples=99, sample_seed=0).samples) == 50
    assert inspect(path, samples=0, sample_seed=0).samples == []
    places = [int(id[1:-2]) for seed in range(200) for id in ids(sample_seed=seed)]
    assert 20 < np.mean(places) < 29  # uniform over 0 ... 49
    draws = [ids(sample_seed=seed) for seed in range(20)]
    assert all(d == sorted(d, key=lambda id: int(id[1:-2])) for d in draws)


def test_long_samples_are_cut(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", row("a_1", 1, "y" * 9_000))
    shown = inspect(path).samples[0].completion
    assert shown.startswith("yyy") and shown.endswith("… (9,000 characters)") and len(shown) < 4_100


def test_table_json_and_page_say_the_same(prepared, tokenizer, capsys):
    json_path, html_path = prepared.parent / "new" / "i.json", prepared.parent / "new" / "i.html"
    inspect_command(str(prepared), tokenizer=tokenizer, json=str(json_path), html=str(html_path))
    table = capsys.readouterr().out
    told = json.loads(json_path.read_text(encoding="utf-8"))
    page = " ".join(Page(html_path.read_text(encoding="utf-8")).texts)
    for name, n in {**told["characters"], **told["turns"], **told["tokens"]["lengths"]}.items():
        line = next(line for line in table.splitlines() if f"│ {name}" in line)
        figures = [inspect_tables.number(n[key]) for key in ("min", "median", "mean", "p95", "max")]
        assert re.findall(r"\d[\d,.]*", line.partition(name)[2]) == figures
        assert re.search(r"\s+".join(figures), page)
    made, origins = told["preparation"], told["origins"]
    told_of_making = (made[name] for name in ("drops", "pii", "interaction_drops", "left_out"))
    for counts in (*told_of_making, origins["languages"]):
        for name, n in counts.items():
            assert re.search(rf"│ {name} +│ +{n} │", table)
            assert re.search(rf"{name}\s+-?{n}\b", page)
    for text in (*made["guards"].items(), ("near-duplicate, such as d", ""), ("examined", "6")):
        assert re.search(r".*".join(map(re.escape, text)), table)
        assert re.search(r"[\s\S]*".join(map(re.escape, text)), page)
    for sample in told["samples"]:
        assert sample["completion"] in page
        assert sample["completion"].split()[0] in table


def test_the_page_loads_and_runs_nothing(prepared, tokenizer):
    html = to_html(inspect(prepared, tokenizer=tokenizer, samples=4))
    page = Page(html)
    assert "script" not in page.tags and "link" not in page.tags and page.tags.count("svg") == 3
    assert not re.search(r"(https?:)?//", html)
    loading = [v for k, v in page.attributes if k.split(":")[-1] in ("href", "src", "data")]
    assert all(v.startswith("#") for v in loading)
    texts = "".join(page.texts)
    assert texts.count(EVIL) >= 5 and "<b>broken</b>" in texts
    assert texts.count("␛[2Jgone") == 1
    assert html == to_html(inspect(prepared, tokenizer=tokenizer, samples=4))


def test_a_terminal_is_not_sent_control_characters(prepared, capsys):
    inspect_command(str(prepared), samples=4)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "␛[2Jgone" in shown


def test_the_waterfall_ends_at_the_kept(prepared):
    bars = inspect_page._waterfall(inspect(prepared).preparation)
    assert [(bar["name"], bar["n"]) for bar in bars] == [
        ("examined", 6),
        ("near-duplicate", -2),
        ("too long", -1),
        ("kept", 3),
    ]
    assert [round(bar["left"]) for bar in bars] == [0, 67, 50, 0]
    assert [round(bar["width"]) for bar in bars] == [100, 33, 17, 50]


def test_many_languages_are_summed_up():
    counts = {f"l{i}": 100 - i for i in range(20)}
    shown = inspect_tables.most(counts)
    assert len(shown) == 13 and shown["8 more"] == sum(100 - i for i in range(12, 20))
    bars = inspect_page._bars(counts)
    assert bars[-1]["name"] == "8 more"
    assert sum(bar["width"] for bar in bars) == pytest.approx(100)


def test_what_cannot_be_asked_for(prepared):
    before = prepared.read_bytes()
    for out in (prepared, manifest_path(prepared), report_path(prepared)):
        with pytest.raises(ValueError, match="another name"):
            inspect_command(str(prepared), json=str(out))
    with pytest.raises(ValueError, match="samples must be at least 0"):
        inspect_command(str(prepared), samples=-1)
    assert prepared.read_bytes() == before


def write_log(path: Path, *conversations: list[str]) -> Path:
    """Texts, the user's first, as WildChat logs them; users take turns with the conversations."""
    rows = []
    for i, texts in enumerate(conversations):
        turns = [(("user", "assistant")[turn % 2], text) for turn, text in enumerate(texts)]
        rows.append(logs.wildchat_1m(f"c{i}", turns) | {"hashed_ip": f"u{i % 2}"})
    return logs.write(path, "wildchat-1m", rows)


LOG = [
    ["hi", "hello", "longer please", "hello my friend", "write to a@example.org"],
    ["what is a fox?", "a red animal", "thanks"],
    ["what is a fox?", "a red animal", "thanks"],
    ["nobody replies", "indeed"],
]


@pytest.mark.parametrize("out", ["x.jsonl", "x.parquet"])
def test_what_prepare_writes_is_understood(tmp_path, out):
    log, out = write_log(tmp_path / "log.parquet", *LOG), tmp_path / out
    prepare(PrepareConfig(inputs=(str(log),), out=str(out), preset="all-turns", workers=1))
    found = inspect(out)
    assert (found.interactions, found.conversations, found.users) == (3, 2, 2)
    assert found.preparation.drops == {"duplicate": 1} and found.preparation.examined == 4
    copies = found.origins.duplicates["duplicate"]
    assert (copies.conversation_id, copies.duplicate_of) == ("c2", f"{tmp_path}/log.parquet:1")
    assert sum(found.preparation.pii.values()) == 1
    assert found.origins.languages == {"English": 3}
    assert found.turns["messages per conversation"].max == 5
    assert found.notes == []


def test_a_log_is_shown_through_prepare(tmp_path):
    found = inspect(write_log(tmp_path / "log.parquet", *LOG))
    assert found.file == str(tmp_path / "log.parquet")
    assert "(wildchat)" in found.notes[0] and "all-turns" in found.notes[0]
    assert (found.interactions, found.conversations, found.preparation.examined) == (3, 2, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["log.parquet"]
    Page(to_html(found))


def test_a_log_without_interactions_says_why(tmp_path):
    log = write_log(tmp_path / "log.parquet", ["hi", "hello"], ["so", "what"])
    with pytest.raises(DataError, match=r"log\.parquet: no interactions, of 2 conversations"):
        inspect(log)


def test_a_file_that_lost_all_interactions_says_why(tmp_path):
    path = write_lines(tmp_path / "x.jsonl")
    write_report(path, counts={**COUNTS, "interactions": 0, "conversations_kept": 0})
    with pytest.raises(DataError, match=r"of 6 conversations \(dropped: 2 near-duplicate, 1 too"):
        inspect(path)


def test_the_rules_limits_are_marked(prepared):
    found = inspect(prepared)
    limits = found.preparation.limits
    assert limits == {"answer y": 150}
    with_limits, without = (inspect_page._histograms(found.characters, x) for x in (limits, {}))
    assert with_limits.count("stroke-dasharray") == without.count("stroke-dasharray") + 1
