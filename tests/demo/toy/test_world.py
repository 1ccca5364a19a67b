"""The toy world, its users and its report; `sdpo demo --world toy` runs the whole."""

import json
import random

import pyarrow.parquet as pq
import pytest

from sdpo.data.prepare.prepare import PrepareConfig, prepare
from sdpo.data.read.formats import read_conversations
from sdpo.demo import targets
from sdpo.demo.toy import report as reports
from sdpo.demo.toy import world
from sdpo.demo.toy.main import hindsight
from sdpo.demo.toy.pretrain import Pretraining, draw_lesson, pretrain
from sdpo.demo.toy.users import simulate_logs
from sdpo.interactions import read_interactions
from sdpo_parallel.huggingface import load_tokenizer


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A model of the world after two steps: it says anything."""
    folder = tmp_path_factory.mktemp("world") / "model"
    return pretrain(folder, seed=0, hindsight=hindsight, recipe=Pretraining(steps=2, batch_size=2))


def test_every_text_of_the_world_round_trips_in_few_tokens(untrained):
    tokenizer = load_tokenizer(str(untrained))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    rng = random.Random(0)
    for _ in range(300):
        lesson = draw_lesson(rng, hindsight, short=False)
        for message in lesson.messages:
            ids = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == message["content"]
            assert len(ids) <= 2 * len(message["content"].split()) + 12


def test_questions_of_the_logs_are_not_those_of_the_evaluation():
    logs = {q.text for q in world.LOG_QUESTIONS}
    held_out = {q.text for q in world.HELD_OUT_QUESTIONS}
    assert len(held_out) >= 200 and not logs & held_out


def test_answers_are_read_back_by_style_and_thing():
    question = world.LOG_QUESTIONS[0]
    for style in world.STYLES:
        for answer in world.right_answers(question, style):
            assert world.answers_in(style, question, answer)
            assert not world.answers_in(style, question, answer + " oops")
            other = next(s for s in world.STYLES if s != style)
            assert not world.answers_in(other, question, answer)


def test_users_write_a_wildchat_log_that_prepare_reads(untrained, tmp_path):
    settings = {"preference": "terse", "n_conversations": 40, "seed": 1}
    log = simulate_logs(untrained, tmp_path / "log.parquet", **settings)
    columns = set(pq.read_schema(log).names)
    assert {"conversation_hash", "conversation", "language", "toxic", "redacted"} <= columns
    conversations = list(read_conversations(log))
    assert len(conversations) == 40 and all(len(c.messages) >= 3 for c in conversations)
    out = str(tmp_path / "x.jsonl")
    report = prepare(PrepareConfig(inputs=(str(log),), out=out, preset="paper-wildchat"))
    assert report.counts["conversations_kept"] > 0
    assert len(read_interactions(out)) == report.counts["interactions"] > 0
    # the same users, model and seed say the same
    again = simulate_logs(untrained, tmp_path / "again.parquet", **settings)
    assert pq.read_table(log).equals(pq.read_table(again))


def a_report(**changes) -> dict:
    report = {
        "seed": 0,
        "objective": "reverse-kl",
        "preference": "terse",
        "preference_rate": {"before": 0.5, "after": 0.97, "after_change_of_mind": 0.03},
        "signal": {"relevant": 1.0, "irrelevant": 0.02, "irrelevant_over_relevant": 0.02},
        "retention": {"hindsight_following_drop": 0.01, "other_tasks_drop": 0.0},
        "collapsed": False,
        "seconds": {"training": 1.0, "total": 1.0},
        "samples": [{"question": "<b>?", "before": "a", "after": "b", "after_change_of_mind": "c"}],
    }
    return {**report, **changes}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preference_rate.before", 0.29),
        ("preference_rate.after", 0.89),
        ("preference_rate.after_change_of_mind", 0.21),
        ("signal.irrelevant_over_relevant", 0.051),
        ("retention.hindsight_following_drop", 0.06),
        ("retention.other_tasks_drop", 0.06),
    ],
)
def test_each_target_can_be_missed(name, value):
    report = a_report()
    assert reports.all_met(report)
    section, key = name.split(".")
    report[section] = {**report[section], key: value}
    claim = reports.TARGETS[name].claim
    missed = [row.claim for row in targets.check(report, reports.TARGETS) if not row.met]
    assert missed == [claim] and not reports.all_met(report)


def test_the_page_stands_alone_and_shows_a_collapse(tmp_path):
    row = dict(tokens=["<ok>", "no"], advantage=[1.0, -3.0])
    trajectory = [
        {"step": s, "loss": 1.0, "advantage/mean_abs": 1.0, "entropy/policy": 1.0} for s in (1, 2)
    ]
    for collapsed in (False, True):
        report = a_report(collapsed=collapsed)
        reports.write(tmp_path, report, {"likes terse": trajectory}, {"relevant": [("o!", row)]})  # pyright: ignore
        page = (tmp_path / "report.html").read_text()
        assert ("collapsed" in page) == collapsed
        assert "<svg" in page and "o!" in page and "&lt;ok&gt;" in page and "&lt;b&gt;?" in page
        assert "http" not in page
        assert json.loads((tmp_path / "report.json").read_text()) == report
