"""A user who tries to take over what the model learns from."""

import math

import pytest

from helpers import hostile, online, runs
from sdpo.chat import chat_format
from sdpo.cli import main
from sdpo.data.filters.injections import injection
from sdpo.hindsight import HindsightConfig, hindsight_ids
from sdpo.online.users.base import Reply
from sdpo_parallel.huggingface import load_tokenizer

ODD = ("", "  \n\t ", "\ud800 Shorter.", "\udc00\ud83d\ude00", "a\x00b\ufeff\u202e c", "👩‍👩‍👧")
MESSAGES = (*hostile.MESSAGES, *ODD, None)
INJECTIONS = sum(injection(m) is not None for m in MESSAGES if m and len(m) <= 4000)
UPDATES, EACH = 4, 4
SILENT = 3
"""Nothing, blanks, and silence."""


class Hostile(hostile.HostileUser):
    """Says all that the other one says, and what JSON can bring in beside."""

    def reply(self, exchanges, *, seed):
        return [Reply(text=MESSAGES[number(e)], source="hostile") for e in exchanges]


def number(exchange):
    """Of an exchange in its run."""
    update, slot = exchange.id.split(".")
    return (int(update) - 1) * EACH + int(slot)


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """Options -> folder of a run with that user."""
    folder = tmp_path_factory.mktemp("hostile")
    prompts = online.make_prompts(folder / "prompts.txt")
    assert len(MESSAGES) == UPDATES * EACH

    def run(name, *options):
        out = folder / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sdpo.online.run.build_user", lambda _, persona, **__: Hostile(persona))
            more = ["--evaluate.prompts", "0", "--engine", "transformers", *options]
            online.online(models("qwen3"), prompts, out, *more, phases=(f"concise:{UPDATES}",))
        return out

    return run


@pytest.fixture(scope="module")
def guarded(made):
    return made("guarded")


@pytest.fixture(scope="module")
def unguarded(made):
    return made("unguarded", "--guard.injections", "keep", "--guard.max-followup-chars", "0")


def count(out, metric):
    return round(sum(EACH * r[metric] for r in runs.read_metrics(out)))


def test_the_guard_counts_what_it_drops_and_the_run_goes_on(guarded):
    records = online.records(guarded)
    reasons = [(r.dropped or "").partition(":")[0] for r in records]
    assert len(hostile.INJECTIONS) + len(hostile.CONTROL_TOKENS) == INJECTIONS
    assert reasons[:INJECTIONS] == ["injection"] * INJECTIONS
    assert reasons[INJECTIONS:][:2] == ["long follow-up"] * 2
    assert reasons[-SILENT - 4 :] == ["silence"] * 2 + [""] * 4 + ["silence"]
    assert count(guarded, "user/injections") == INJECTIONS
    assert count(guarded, "user/silent") == SILENT
    assert count(guarded, "user/dropped") == 2
    trained_on = sum(r["response/tokens"] for r in runs.read_metrics(guarded))
    assert trained_on == sum(len(r.token_ids) for r in records if r.dropped is None) > 0
    for row in runs.read_metrics(guarded):
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def test_what_was_said_stays_in_the_records(guarded):
    said = [r.followup for r in online.records(guarded)]
    assert said[: len(hostile.MESSAGES)] == list(hostile.MESSAGES)
    repaired = ("", "  \n\t ", "� Shorter.", "�😀", *ODD[4:], None)
    assert tuple(said[len(hostile.MESSAGES) :]) == repaired


def test_without_a_guard_it_is_trained_on_as_plain_text(unguarded, models):
    records = online.records(unguarded)
    assert [r.dropped for r in records].count(None) == len(MESSAGES) - SILENT
    assert count(unguarded, "user/injections") == count(unguarded, "user/dropped") == 0
    assert all(math.isfinite(r["loss"]) for r in runs.read_metrics(unguarded))
    chat, config = chat_format(load_tokenizer(models("qwen3"))), HindsightConfig()
    ends = len(chat._control_ids & set(range(448)))
    assert ends >= 5

    def control(followup):
        ids = hindsight_ids(chat, records[0].prompt, followup, config).ids
        return [i for i in ids if i in chat._control_ids]

    for text in hostile.CONTROL_TOKENS + hostile.INJECTIONS:
        assert control(text) == control("Shorter, please."), text


def test_the_records_are_what_data_commands_and_training_read(guarded, models, tmp_path, capsys):
    model, out = models("qwen3"), tmp_path / "i.jsonl"
    main(["data", "prepare", str(guarded / "rollouts"), "--preset", "all-turns", "--out", str(out)])
    assert out.read_text().count("\n") > 0
    parts = sorted((guarded / "interactions").iterdir())
    assert len(parts) == UPDATES
    trained_on = [p for p in parts if any(r.dropped is None for r in _of(guarded, p))]
    assert 0 < len(trained_on) < UPDATES, "some updates have nothing"
    with runs.as_alone():
        main(["data", "validate", str(trained_on[0]), "--model", model])
    capsys.readouterr()
    options = ["--engine", "transformers"]
    (row,) = runs.train("reverse-kl", model, str(trained_on[0]), tmp_path / "t", *options)
    assert row["response/tokens"] == sum(
        len(r.token_ids) for r in _of(guarded, trained_on[0]) if r.dropped is None
    )


def _of(out, path):
    update = int(path.stem[len("update-") :])
    return [r for r in online.records(out) if r.update == update]
