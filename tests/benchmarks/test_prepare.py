"""The generated log is what it says it is; the benchmark compares equals, and notices if not."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import logs, prepare, prepare_rival
from benchmarks.logs import LogConfig, make_pool, make_table, write_log
from benchmarks.prepare import Settings
from benchmarks.report import Output, read

N = 4000
MESSAGE = ("content", "role", "language", "toxic", "redacted", "turn_identifier", "country")


@pytest.fixture(scope="module")
def pool():
    return make_pool(0)


@pytest.fixture(scope="module")
def table(pool):
    return make_table(np.arange(N), 0, pool)


@pytest.fixture(scope="module")
def messages(table):
    return table["conversation"].combine_chunks().flatten()


def texts(table):
    """Each conversation's contents."""
    return [tuple(m["content"] for m in c) for c in table["conversation"].to_pylist()]


# ---- the log -------------------------------------------------------------------------------------
def test_the_schema_is_wildchats(table, messages):
    assert set(MESSAGE) <= {field.name for field in messages.type}
    for name in ("conversation_hash", "model", "language", "country", "state", "hashed_ip"):
        assert table.schema.field(name).type == pa.string()
    assert table.schema.field("timestamp").type == pa.timestamp("us", tz="UTC")
    moderation = table["openai_moderation"].combine_chunks()
    assert len(moderation.flatten()) == len(messages)
    fields = {field.name for field in moderation.type.value_type}
    assert fields == {"flagged", "categories", "category_scores"}
    assert "toxicity" in {field.name for field in table["detoxify_moderation"].type.value_type}
    table.validate(full=True)


def test_lengths_and_shares(table, messages):
    content = messages.field("content").to_pylist()
    roles = np.array(messages.field("role"))
    length = np.array([len(text) for text in content])
    turns = np.asarray(table["turn"])
    languages, users = (Counter(table[name].to_pylist()) for name in ("language", "hashed_ip"))
    personal = re.compile(r"@example\.com|\+1 415 555|My card is|The server is at|the key sk-")
    together = [[m["role"] for m in c] for c in table["conversation"].to_pylist()]
    repeats = sum(a == b for c in together for a, b in zip(c, c[1:], strict=False))
    assert turns.min() == 1 and turns.max() == 12
    assert max(users.values()) >= 5 and len(users) > N / 3
    for found, low, high in (
        (np.median(length[roles == "user"]), 45, 75),
        (np.median(length[roles == "assistant"]), 700, 1000),
        (np.mean(length > 4096), 0.001, 0.03),
        (turns.mean(), 2.3, 2.7),
        (messages.field("content").nbytes / N, 2000, 4500),
        (languages["English"] / N, 0.48, 0.56),
        (languages[None] / N, 0.01, 0.03),
        (np.mean(table["toxic"]), 0.03, 0.07),
        (np.mean(table["redacted"]), 0.005, 0.03),
        (content.count("") / len(content), 0.001, 0.006),
        (content.count(" \n ") / len(content), 0.0005, 0.005),
        (sum(personal.search(text) is not None for text in content) / N, 0.03, 0.07),
        (sum(text in logs.INJECTIONS for text in content) / len(content), 0, 0.005),
        (repeats / len(content), 0, 0.03),
        (np.mean(roles == "system"), 0, 0.01),
    ):
        assert low < found < high


def test_exact_and_near_duplicates_and_repeated_ids(table):
    found = texts(table)
    exact = N - len(set(found))
    heads = Counter(
        text[:-1] + (text[-1][:100],) for text in set(found) if len("".join(text)) > 300
    )
    near = sum(n - 1 for n in heads.values())
    assert 0.03 * N < exact < 0.07 * N and 0.03 * N < near < 0.07 * N
    ids = table["conversation_hash"].to_pylist()
    assert 0.003 * N < N - len(set(ids)) < 0.02 * N
    first = {}
    for id, text in zip(ids, found, strict=True):
        assert first.setdefault(id, text) == text  # an id is repeated along with what it names


def test_unlike_conversations_share_little(table):
    words = [
        set(zip(t, t[1:], t[2:], strict=False)) for t in (" ".join(x).split() for x in texts(table))
    ]
    rng, overlaps = np.random.default_rng(0), []
    for i, j in rng.integers(0, N, size=(2000, 2)):
        if i != j and words[i] and words[j]:
            overlaps.append(len(words[i] & words[j]) / len(words[i] | words[j]))
    assert np.mean(np.array(overlaps) > 0.3) < 0.01


def test_a_conversation_depends_on_seed_and_number_alone(table, pool):
    some = np.array([3, 700, 701, 3999])
    assert make_table(some, 0, pool).equals(table.take(pa.array(some)).combine_chunks())
    assert texts(make_table(some, 1, pool)) != texts(table.take(pa.array(some)))
    assert pool.equals(make_pool.__wrapped__(0)) and not pool.equals(make_pool(1))


def test_files_hold_the_same_log_however_it_is_cut(tmp_path, table):
    whole = LogConfig(conversations=900, files=1, row_group=1000)
    cut = replace(whole, files=3, row_group=70)
    one, three = write_log(tmp_path / "1", whole), write_log(tmp_path / "3", cut)
    assert write_log(tmp_path / "again", whole)[0].read_bytes() == one[0].read_bytes()
    assert [p.name for p in three] == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    found = pa.concat_tables(map(pq.read_table, three)).combine_chunks()
    assert found.equals(pq.read_table(one[0]).combine_chunks())
    assert found.equals(table.slice(0, 900).combine_chunks())
    assert pq.read_metadata(three[0]).num_row_groups == 5
    assert not list(tmp_path.rglob("*.part"))


def test_impossible_settings_are_refused():
    for wrong in (dict(conversations=0), dict(conversations=8, files=9), dict(row_group=0)):
        with pytest.raises(ValueError, match="use at least 1 of each, and no more files than"):
            LogConfig(**wrong)
    for wrong in (dict(workers=0), dict(rounds=0), dict(kill=-1), dict(levels=())):
        with pytest.raises(ValueError, match="least 1|name some"):
            Settings(**wrong)


# ---- the comparison ------------------------------------------------------------------------------
def row(id: str, answer: str = "b") -> dict:
    return {
        "id": id,
        "turn_id": 1,
        "prompt": [{"from": "human", "value": "a"}],
        "completion": {"from": "gpt", "value": answer},
        "user_response": {"from": "human", "value": "c"},
    }


def write(path, rows):
    Output(out=path).keep(rows)
    return path


def test_other_interactions_are_an_error(tmp_path):
    rows = [row("x_1"), row("x_3")]
    one = write(tmp_path / "one", rows)
    turned = [dict(reversed(r.items())) for r in rows]
    assert prepare.same_interactions(one, write(tmp_path / "same", turned)) == 2
    for name, others, where in (
        ("answer", [rows[0], row("x_3", "B")], "line 2, `completion`"),
        ("order", rows[::-1], "line 1, `id`"),
        ("less", rows[:1], "less ends before line 2"),
        ("more", [*rows, row("x_5")], "one ends before line 3"),
    ):
        with pytest.raises(ValueError, match=where):
            prepare.same_interactions(one, write(tmp_path / name, others))


def test_peak_memory_counts_children_and_failure_is_told(tmp_path):
    hold = "import time; x = bytearray(200 * 2**20); time.sleep(1.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    run = prepare.measured([prepare.sys.executable, "-c", parent], tmp_path / "notes")
    assert 200 * 2**20 < run.peak_bytes < 300 * 2**20 and run.seconds >= 1.5
    with pytest.raises(RuntimeError, match="no such luck"):
        prepare.measured([prepare.sys.executable, "-c", "exit('no such luck')"], tmp_path / "notes")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All sides at both levels, and ours killed once."""
    folder = tmp_path_factory.mktemp("prepare")
    settings = Settings(conversations=2000, workers=1, kill=1, scratch=folder, out=folder / "rows")
    prepare.main(settings)
    return settings, read(folder / "rows")


def test_all_sides_give_the_same_interactions_at_both_levels(measured):
    settings, rows = measured
    rows = rows[:-1]
    found = [(r["level"], r["contender"]) for r in rows]
    assert found == [(level, side) for level in settings.levels for side in prepare.SIDES]
    plain, guarded = rows[0]["interactions"], rows[-1]["interactions"]
    assert 0.5 * plain < guarded < 0.95 * plain
    for r in rows:
        assert r["verdict"] == "equal" and r["conversations"] == 2000
        assert r["seconds"] > 0 and r["peak_bytes"] > 50e6 and r["machine"]["versions"]["datasets"]
        assert r["output_bytes"] > 1000 * r["interactions"]
    slower = [f"{r['seconds'] / rows[0]['seconds']:.2f}x" for r in rows[1:3]]
    assert list(prepare.table(rows[:3]).columns[-1].cells) == ["", *slower]


def test_killed_it_ends_with_the_same_bytes(measured):
    settings, rows = measured
    assert rows[-1]["verdict"] == "same bytes" and len(rows[-1]["killed_after"]) == 1
    assert 0 < rows[-1]["killed_after"][0] < rows[-1]["seconds"]
    names = {path.name for path in (settings.scratch / "with-guardrails").glob("sdpo*")}
    names -= {"sdpo.log", "sdpo.killed.log"}
    assert names == {"sdpo.jsonl", "sdpo.manifest.parquet", "sdpo.report.json"}


def test_a_run_that_ends_otherwise_is_an_error(tmp_path):
    out = tmp_path / "x.jsonl"
    script = "import pathlib, sys, time; time.sleep(0.5); out = pathlib.Path(sys.argv[1])\n"
    script += "for s in ('.jsonl', '.manifest.parquet', '.report.json'):\n"
    script += "    out.with_suffix(s).write_text('two')"
    command = [prepare.sys.executable, "-c", script, str(out)]
    for path in prepare.written(out):
        path.write_text("two")
    found = prepare.killed(command, out, 1, 0.5, 0)
    assert len(found["killed_after"]) == 1 and found["last_seconds"] >= 0.5
    out.write_text("one")
    with pytest.raises(ValueError, match="another x.jsonl"):
        prepare.killed(command, out, 1, 0.5, 0)
    out.write_text("two")
    (moment,) = prepare.killed(command, out, 1, 20.0, 0)["killed_after"]
    assert moment < 20 * 0.9 * 0.3  # it had ended


# ---- the rival -----------------------------------------------------------------------------------
def said(*turns: str) -> list[dict]:
    names = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": names[turn[0]], "content": turn[1:]} for turn in turns]


def test_the_rivals_rules():
    assert prepare_rival.cleaned(said("ua", "sx", "a ", "s ", "a b\n", "uc"), " EN ") == said(
        "ua", "sx", "a", "ab", "uc"
    )
    for language in (None, "French"):
        assert not prepare_rival.cleaned(said("ua", "ab", "uc"), language)
    assert prepare_rival.cleaned(said("ua", "a" + 4096 * "b", "uc"), "English")
    assert not prepare_rival.cleaned(said("ua", "a" + 4097 * "b", "uc"), "English")
    assert not prepare_rival.cleaned(said("ua", "ab", "sc", "a"), "English")
    assert not prepare_rival.cleaned(said(*["u" + 4000 * "x"] * 26), "English")
    history = prepare_rival.history(said("ax", "u1", "u2", "s9", "a3", "a", "u4"))
    assert history == said("s9", "u1\n\n2", "a3", "u4")

    def rows(*turns: str) -> list[tuple[str, str]]:
        found = prepare_rival.of_conversation("x", said(*turns))
        return [(row["id"], "".join(m["value"] for m in row["prompt"])) for row in found]

    assert rows("u1", "a2", "a3", "u4") == rows("a1", "u2") == rows("u1", "a2", "u", "u3") == []
    assert rows("u1", "a", "u2", "s9", "a3", "sz", "u4") == [("x_2", "91\n\n2")]
    assert rows("u0", "a1", "u2", "a3", "u4", "a5", "u6")[-1] == ("x_5", "01234")


def test_the_rival_marks_repeated_ids():
    assert prepare_rival.unique(["a", "b", "a", "a~2", "a"]) == ["a", "b", "a~3", "a~2", "a~4"]
