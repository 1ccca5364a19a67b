"""`sdpo evaluate benchmarks`: the harness on tiny checkpoints, and what is made of its numbers."""

import json

import pytest

from helpers import tiny
from sdpo.cli import main
from sdpo.evaluate import models
from sdpo.evaluate.benchmarks import Scores, compare, scores_of, verdict
from sdpo.evaluate.intervals import Estimate, mean


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return tiny.make_questions(tmp_path_factory.mktemp("data") / "questions.jsonl", 12)


def evaluate(pair, questions, out, *options):
    argv = ["evaluate", "benchmarks", *pair, "--tasks", "commonsense_qa", "--out", str(out)]
    main([*argv, "--data", f"commonsense_qa={questions}", *options])
    return json.loads((out / "benchmarks.json").read_text())


def test_models_are_compared_prompt_by_prompt(pair, questions, tmp_path, monkeypatch):
    hashed, fingerprints = [], models.fingerprints
    monkeypatch.setattr(models, "fingerprints", lambda f: [hashed.append(f), fingerprints(f)][1])
    report = evaluate(pair, questions, tmp_path)
    assert hashed == pair, "a model's files are hashed once"
    base, after = report["rows"]
    assert (base["model"], after["model"]) == ("base", "after") and base["prompts"] == 12
    kept = [
        json.loads((tmp_path / "benchmarks" / name / "commonsense_qa.json").read_text())
        for name in ("base", "after")
    ]
    values = [one["scores"]["commonsense_qa"]["metrics"]["acc"] for one in kept]
    assert base["score"]["value"] == sum(values[0]) / 12
    assert after["change"]["value"] == pytest.approx((sum(values[1]) - sum(values[0])) / 12)
    assert base["change"] is None and after["verdict"] in ("regressed", "unchanged", "improved")

    import lm_eval

    def forbidden(*args, **kwargs):
        raise AssertionError("a task was run again")

    monkeypatch.setattr(lm_eval, "simple_evaluate", forbidden)
    assert evaluate(pair, questions, tmp_path) == report


def test_a_killed_command_keeps_the_models_that_are_done(pair, questions, tmp_path, monkeypatch):
    import lm_eval

    whole, asked = lm_eval.simple_evaluate, []

    def dies_at_the_second(*args, **kwargs):
        asked.append(kwargs["model_args"]["pretrained"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(lm_eval, "simple_evaluate", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pair, questions, tmp_path)
    assert not (tmp_path / "benchmarks.json").exists()
    evaluate(pair, questions, tmp_path)
    assert asked == [pair[0], pair[1], pair[1]]


def test_scores_of_other_settings_are_not_taken_for_these(pair, questions, tmp_path, capsys):
    evaluate(pair[:1], questions, tmp_path)
    with pytest.raises(SystemExit):
        evaluate(pair[:1], questions, tmp_path, "--fewshot", "1", "--no-chat-template")
    assert "holds scores of another settings" in capsys.readouterr().err
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert not report["rows"] and len(report["problems"]) == 1


def test_a_task_that_is_missing_and_data_that_cannot_be_had(pair, questions, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "benchmarks", pair[0], "--tasks", "helaswag", "--out", str(tmp_path)])
    assert "no task helaswag; it has hellaswag" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(pair[:1], questions, tmp_path, "--tasks", "hellaswag", "commonsense_qa")
    said = capsys.readouterr().err
    assert "--data hellaswag=FILE" in said
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [row["task"] for row in report["rows"]] == ["commonsense_qa"]
    with pytest.raises(SystemExit):
        evaluate(pair[:1], tmp_path / "gone.jsonl", tmp_path)
    assert "gone.jsonl: no such file" in capsys.readouterr().err


def test_a_model_that_is_gone_spoils_nothing_else(pair, questions, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate([*pair, str(tmp_path / "gone")], questions, tmp_path / "out")
    assert "gone: no such model folder" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["base", "after"]
    with pytest.raises(SystemExit):
        evaluate([str(tmp_path / "gone"), *pair], questions, tmp_path / "none")
    assert not (tmp_path / "none" / "benchmarks.json").exists()


def test_a_chat_server_cannot_compare_choices(questions, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(["http://127.0.0.1:9/v1#m"], questions, tmp_path)
    assert "give the model's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "low, high, higher, said",
    [
        (0.01, 0.1, True, "improved"), (-0.1, -0.01, True, "regressed"),
        (-0.1, 0.1, True, "unchanged"), (0.0, 0.1, True, "unchanged"),
        (0.01, 0.1, False, "regressed"), (-0.1, -0.01, False, "improved"),
    ],
)  # fmt: skip
def test_a_verdict_is_what_the_interval_says(low, high, higher, said):
    change = Estimate(value=(low + high) / 2, low=low, high=high)
    assert verdict(change, higher_is_better=higher) == said


def test_pairs_show_what_means_alone_do_not():
    """Both models waver over the same prompts; the difference does not."""
    base = [1.0, 0.0] * 50
    after = [1.0, 0.0] * 45 + [1.0, 1.0] * 5
    scores = {
        name: {"t": Scores(metrics={"acc": values}, higher_is_better={"acc": True})}
        for name, values in (("base", base), ("after", after))
    }
    _, row = compare(scores)
    assert row.verdict == "improved" and row.change is not None
    assert row.change.value == pytest.approx(0.05)
    alone = mean(after).high - mean(after).low
    assert row.change.high - row.change.low < alone / 2


def test_what_is_read_of_the_harness():
    """A mean, hits of chances as IFEval has them, a filter, and a metric that is no mean."""
    samples = [
        {"doc_id": 1, "filter": "none", "strict": False, "inst": [True, False], "f1": 0.5},
        {"doc_id": 0, "filter": "none", "strict": True, "inst": [True], "f1": 0.0},
        {"doc_id": 0, "filter": "other", "strict": False, "inst": [False], "f1": 0.0},
    ]
    results = {
        "samples": {"t": samples},
        "results": {"t": {"alias": "t", "strict,none": 0.5, "inst,none": 2 / 3, "f1,none": 0.9}},
        "higher_is_better": {"t": {"strict": True, "inst": True, "f1": True}},
    }
    found = scores_of(results)["t"]
    assert found.metrics == {"strict": [1.0, 0.0], "inst": [[1.0, 1.0], [1.0, 2.0]]}
    assert found.estimate("inst").value == pytest.approx(2 / 3)
