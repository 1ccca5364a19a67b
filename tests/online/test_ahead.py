"""Answers that are under way while the learner trains: at most so old, each once, none lost."""

import signal
import threading

import pytest

from helpers import online, runs
from sdpo.errors import SdpoError
from sdpo.online import run as run_module
from sdpo.online.sampler import InProcessSampler, RemoteSampler


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return online.make_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt", 40)


class Elsewhere(InProcessSampler):
    """Answers in any thread, with weights that do not change meanwhile."""

    staleness = 0

    def __init__(self, *args):
        super().__init__(*args)
        self.alone, self.threads = threading.Lock(), set()

    def update(self, engine, version):
        with self.alone:
            super().update(engine, version)

    def answers(self, prompts, seeds, *, greedy=False):
        self.threads.add(threading.current_thread())
        with self.alone:
            return super().sample(prompts, seeds, greedy=greedy)

    def sample(self, prompts, seeds, *, greedy=False):
        with self.alone:
            return super().sample(prompts, seeds, greedy=greedy)


@pytest.fixture
def elsewhere(monkeypatch):
    """Lets runs sample elsewhere, so many updates behind; what they sample from."""
    made: list[Elsewhere] = []

    def use(staleness, kind=Elsewhere):
        def build(config, engine, chat):
            parts = config.sampling, engine, config.model, chat, config.parallel
            made.append(kind(*parts))
            made[-1].staleness = staleness
            assert isinstance(made[-1], RemoteSampler)
            return made[-1]

        monkeypatch.setattr(run_module, "build_sampler", build)
        return made

    return use


def went(model, prompts, out, *options, phases=("no_lists:3", "no_emojis:3")):
    common = ["--engine", "transformers", "--checkpoint.interval", "1"]
    return online.online(model, prompts, out, *common, *options, phases=phases)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_answers_are_as_old_as_the_bound_and_no_older(k, models, prompts, tmp_path, elsewhere):
    made = elsewhere(k)
    rows = went(models("qwen3"), prompts, tmp_path / "r")
    # the k-th update and those before it have no older weights to come from
    assert [r["rollouts/staleness"] for r in rows] == [min(i, k) for i in range(6)]
    records = online.records(tmp_path / "r")
    assert len({r.id for r in records}) == len({r.prompt_id for r in records}) == 24
    assert [r.update for r in records] == [u for u in range(1, 7) for _ in range(4)]
    assert all(set(r.versions) == {r.update - 1 - min(r.update - 1, k)} for r in records)
    assert {r["phase"] for r in rows[:3]} == {1} and {r["phase"] for r in rows[3:]} == {2}
    assert all(r["seconds/learner_idle"] >= 0 and r["seconds/sampler_idle"] >= 0 for r in rows)
    assert (threading.main_thread() not in made[0].threads) and made[0].threads


def test_with_no_bound_a_run_is_what_it_is_in_process(models, prompts, tmp_path, elsewhere):
    plain = went(models("qwen3"), prompts, tmp_path / "plain")
    elsewhere(0)
    rows = went(models("qwen3"), prompts, tmp_path / "r")
    runs.assert_same_trajectory(rows, plain, tolerance=1e-6)


def test_a_run_that_stops_trains_on_what_was_said_ahead(models, prompts, tmp_path, elsewhere):
    class Signals(Elsewhere):
        def update(self, engine, version):
            super().update(engine, version)
            if version == 2:
                signal.raise_signal(signal.SIGTERM)

    elsewhere(2, Signals)
    out = tmp_path / "r"
    assert len(went(models("qwen3"), prompts, out)) == 3
    ahead = [r for r in online.records(out) if r.update > 3]
    assert ahead and {r.update for r in ahead} <= {4, 5}
    elsewhere(2)
    rows = went(models("qwen3"), prompts, out, "--resume")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    records = online.records(out)
    assert records[12 : 12 + len(ahead)] == ahead, "asked again"
    assert len({r.prompt_id for r in records}) == 24
    assert max(r["rollouts/staleness"] for r in rows) <= 2


def test_a_brake_leaves_nothing_of_what_was_said_ahead(
    models, prompts, tmp_path, elsewhere, capsys
):
    elsewhere(2)
    options = ["--brakes.max-words", "0.5", "--evaluate.every", "2", "--engine", "transformers"]
    argv = online.arguments(models("qwen3"), prompts, tmp_path / "r", *options)
    with runs.as_alone():
        told = runs.refused(capsys, "online", *argv)
    assert "back at update 0" in told
    assert not list((tmp_path / "r" / "rollouts").iterdir())
    assert len(list((tmp_path / "r" / "undone-1" / "rollouts").iterdir())) >= 2


def test_what_fails_in_the_background_ends_the_run(models, prompts, tmp_path, elsewhere, capsys):
    class Fails(Elsewhere):
        def answers(self, prompts, seeds, *, greedy=False):
            if self.version == 1:
                raise SdpoError("no server has answered")
            return super().answers(prompts, seeds, greedy=greedy)

    elsewhere(1, Fails)
    argv = online.arguments(models("qwen3"), prompts, tmp_path / "r", "--engine", "transformers")
    with runs.as_alone():
        assert "no server has answered" in runs.refused(capsys, "online", *argv)
    assert len(runs.read_metrics(tmp_path / "r")) == 2
