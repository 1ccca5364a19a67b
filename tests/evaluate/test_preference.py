"""`sdpo evaluate preference` on real checkpoints, with judges behind real servers."""

import json
import shutil

import pytest

from helpers import online
from helpers.openai_server import Answer, serving
from sdpo.cli import main
from sdpo.errors import SdpoError
from sdpo.evaluate.models import find_model, find_models
from sdpo.online.sampler import InProcessSampler

SHORT = ["--talk.max-new-tokens", "12"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return online.make_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt", 6)


def evaluate(pair, prompts, out, *options, personas=("no_punctuation", "concise")):
    argv = ["evaluate", "preference", *pair, "--prompts", prompts, "--out", str(out)]
    main([*argv, "--personas", *personas, *SHORT, *options])
    return json.loads((out / "preference.json").read_text())


def rows(out):
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


def test_rules_decide_and_the_books_know_the_answers(pair, prompts, tmp_path, monkeypatch, capsys):
    report = evaluate(pair, prompts, tmp_path)
    assert [row["by"] for row in report["compared"]] == ["rule", "rule"]
    pairs = rows(tmp_path)
    assert len(pairs) == 12 and pairs[0]["answers"].keys() == {"base", "after"}
    for row in report["compared"]:
        outcomes = [p["outcomes"]["rule"] for p in pairs if p["persona"] == row["persona"]]
        assert row["wins"]["wins"] == outcomes.count("win")
        assert row["wins"]["losses"] == outcomes.count("loss")
    assert report["style"]["base"]["answers"] == 6
    assert "no_punctuation" in capsys.readouterr().out

    def forbidden(*args, **kwargs):
        raise AssertionError("a model was asked again")

    monkeypatch.setattr(InProcessSampler, "sample", forbidden)
    assert evaluate(pair, prompts, tmp_path) == report
    offline = evaluate(pair, prompts, tmp_path, "--offline")
    assert offline == report
    with pytest.raises(AssertionError, match="asked again"):  # other sampling is another answer
        evaluate(pair, prompts, tmp_path, "--talk.max-new-tokens", "11")


def test_offline_says_what_is_missing(pair, prompts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(pair, prompts, tmp_path, "--offline")
    assert "6 of 6 answers of base are not in it" in capsys.readouterr().err
    assert not (tmp_path / "preference.json").exists()


def test_a_killed_command_asks_only_what_is_left(pair, prompts, tmp_path, monkeypatch):
    asked, sample = [], InProcessSampler.sample

    def dies_after_two(self, prompts, *args, **kwargs):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return sample(self, prompts, *args, **kwargs)

    monkeypatch.setattr(InProcessSampler, "sample", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pair, prompts, tmp_path, "--talk.batch", "2")
    asked.clear()
    monkeypatch.setattr(
        InProcessSampler,
        "sample",
        lambda self, prompts, *a, **k: (asked.append(len(prompts)), sample(self, prompts, *a, **k))[
            1
        ],
    )
    report = evaluate(pair, prompts, tmp_path, "--talk.batch", "2")
    assert sum(asked) == 2 + 6  # what was left of the first model, and the second
    assert (
        evaluate(pair, prompts, tmp_path / "at-once", "--talk.batch", "2")["compared"]
        == (report["compared"])
    )


def test_two_judges_and_the_oracle(pair, prompts, tmp_path):
    def longer(number, body):
        text = body["messages"][-1]["content"]
        a, b = (text.partition(f"<answer_{x}>")[2].partition(f"</answer_{x}>")[0] for x in "ab")
        return Answer(text="A" if len(a) > len(b) else "B")

    with serving(longer) as one, serving(Answer(text="Both are fine.")) as other:
        judges = [f"longer={one.url}#m", f"unsure={other.url}#m"]
        report = evaluate(pair, prompts, tmp_path, "--judges", *judges, "--oracle")
    by = {(r["persona"], r["by"], r["first"]): r for r in report["compared"]}
    assert len(by) == 2 * 3 * 2
    pairs = rows(tmp_path)
    for persona in ("no_punctuation", "concise"):
        told = f"after told {persona}"
        assert by[persona, "longer", told]["second"] == "after"
        unsure = by[persona, "unsure", "base"]
        assert unsure["unread"] == 1 and unsure["wins"]["coverage"] == 0
        sure = by[persona, "longer", "base"]
        assert sure["unread"] == 0 and sure["wins"]["coverage"] > 0.5
        for pair_ in (p for p in pairs if p["persona"] == persona and "base" in p["answers"]):
            lengths = [len(pair_["answers"][name]["text"]) for name in ("base", "after")]
            if abs(lengths[0] - lengths[1]) > 30:  # a cut answer has a remark
                won = "win" if lengths[0] > lengths[1] else "loss"
                assert pair_["outcomes"]["longer"] == won
    assert {tuple(row["between"]) for row in report["agreement"]} == {
        ("rule", "longer"), ("rule", "unsure"), ("longer", "unsure"),
    }  # fmt: skip
    assert all(judge["spent"]["calls"] > 0 for judge in report["judges"])


def test_a_judge_that_fails_spoils_nothing_else(pair, prompts, tmp_path, capsys):
    with serving(Answer(status=401)) as broken, serving(Answer(text="A")) as works:
        judges = [f"broken={broken.url}#m", f"works={works.url}#m"]
        with pytest.raises(SystemExit) as stopped:
            evaluate(pair, prompts, tmp_path, "--judges", *judges)
    assert stopped.value.code == 2
    report = json.loads((tmp_path / "preference.json").read_text())
    assert {row["by"] for row in report["compared"]} == {"rule", "works"}
    assert len(report["problems"]) == 1 and "judge broken" in report["problems"][0]
    assert "All else is in" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.partial"))


def test_a_judges_budget_holds(pair, prompts, tmp_path):
    with serving(Answer(text="A")) as server:
        judge = f"judge={server.url}#m"
        limit = ["--judges", judge, "--judging.budget.calls", "5"]
        with pytest.raises(SystemExit):
            evaluate(pair, prompts, tmp_path, *limit)
        assert len(server.requests) == 5


def test_a_persona_without_a_rule_needs_a_judge(pair, prompts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(pair, prompts, tmp_path, personas=("poetic",))
    assert "persona poetic has no rule" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_named(pair, prompts, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(pair[0], bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        evaluate([str(bare), pair[1]], prompts, tmp_path / "out")
    assert "chat template" in capsys.readouterr().err


def test_runs_and_their_snapshots(models, prompts, tmp_path):
    run = tmp_path / "run"
    online.online(models("qwen3"), prompts, run, phases=("no_lists:1", "no_emojis:1"))
    newest, snapshot = find_models([str(run), f"second={run}@phase-2"], tmp_path)
    assert newest.name == "run-step-2" and snapshot.name == "second"
    assert newest.identity != snapshot.identity
    assert find_model(f"{run}@step-1", tmp_path).identity == snapshot.identity
    with pytest.raises(SdpoError, match="nothing is called 'phase-9'; there are: .*phase-2"):
        find_model(f"{run}@phase-9", tmp_path)
    shutil.rmtree(run / "checkpoints" / "step-1")
    with pytest.raises(SdpoError, match="the checkpoint of 'phase-2' is gone"):
        find_model(f"{run}@phase-2", tmp_path / "elsewhere")
    report = evaluate([str(run), models("qwen3")], prompts, tmp_path / "out")
    assert report["models"][0]["where"] == str(run)


def test_models_are_named_and_told_apart(pair, tmp_path):
    with pytest.raises(SdpoError, match="two models are called base"):
        find_models([pair[0], pair[0]], tmp_path)
    server = find_model("http://127.0.0.1:8000/v1#qwen", tmp_path)
    assert (server.url, server.model, server.name) == ("http://127.0.0.1:8000/v1", "qwen", "qwen")
    with pytest.raises(SdpoError, match="URL#MODEL"):
        find_model("http://127.0.0.1:8000/v1", tmp_path)
    with pytest.raises(SdpoError, match="no such model folder"):
        find_model("nowhere", tmp_path)
