"""Teachers on plain modules: what reads the hindsight prompt, how it moves, what is saved."""

import contextlib

import pytest
import torch

from sdpo_parallel.config import EMA, Frozen, Live, TrustRegion
from sdpo_parallel.model import LMHead
from sdpo_parallel.rows import Rows
from sdpo_parallel.teacher import AdaptersOff, Mixture, TeacherState, lerp


class Model:
    """A model of the two passes with two matrices."""

    def __init__(self, value: float):
        self.module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 6))
        for p in self.module.parameters():
            torch.nn.init.constant_(p, value)

    reads_tries = True

    def hidden_states(self, rows, *, keep=None, behind=None):
        return self.module[0](torch.ones(len(rows.index_N), 4))

    def lm_head(self):
        return LMHead(self.module[1].weight)  # pyright: ignore[reportArgumentType]

    def own_responses(self, lengths):
        return None


def first(model) -> float:
    return next(iter(model.module.parameters())).flatten()[0].item()


def state(teacher, policy: Model, adapters_off=None) -> TeacherState:
    return TeacherState(teacher, policy, lambda: Model(-7.0), adapters_off)


def test_a_live_teacher_is_the_policy_and_nothing_is_saved():
    made = state(Live(), Model(1.0))
    made.start()
    made.update()
    assert made.model is None and made.copy is None and made.state_dict() == {}
    made.load_state_dict({})


def test_an_average_follows_the_policy_and_is_restored():
    policy = Model(1.0)
    made = state(EMA(decay=0.75), policy)
    made.start()
    assert first(made.copy) == 1.0 and not any(
        p.requires_grad for p in made.copy.module.parameters()
    )
    lerp(policy.module, Model(3.0).module, 1.0)
    made.update()
    assert first(made.copy) == 0.75 * 1.0 + 0.25 * 3.0 and first(policy) == 3.0
    again = state(EMA(decay=0.75), policy)
    again.load_state_dict(made.state_dict())
    assert first(again.copy) == 1.5


@pytest.mark.parametrize("teacher", [Frozen(), TrustRegion(mix=0.25)])
def test_a_frozen_teacher_stays_where_the_policy_started(teacher):
    policy = Model(1.0)
    made = state(teacher, policy)
    made.start()
    lerp(policy.module, Model(3.0).module, 1.0)
    made.update()
    assert first(made.copy) == 1.0
    assert isinstance(made.model, Mixture) == isinstance(teacher, TrustRegion)


def test_another_folders_teacher_keeps_its_own_weights():
    made = state(Frozen(folder="another"), Model(1.0))
    made.start()
    assert first(made.copy) == -7.0


@pytest.mark.parametrize("teacher", [Frozen(), TrustRegion()])
def test_with_adapters_the_start_is_the_policy_with_them_off(teacher):
    seen = []

    @contextlib.contextmanager
    def off():
        seen.append("off")
        yield
        seen.append("on")

    made = state(teacher, Model(1.0), off)
    made.start()
    assert made.copy is None and made.state_dict() == {}, "no second model"
    other = made.model.frozen if isinstance(made.model, Mixture) else made.model
    assert isinstance(other, AdaptersOff)
    nothing = torch.zeros(1, 3, dtype=torch.long)
    other.hidden_states(Rows.of(nothing, nothing, torch.arange(2)))
    assert seen == ["off", "on"] and other.own_responses([1]) is None


def test_a_mixtures_logits_are_the_mixed_logits():
    live, frozen = Model(0.5), Model(-0.25)
    for model in (live, frozen):
        for p in model.module.parameters():
            torch.nn.init.normal_(p)
    mixed = Mixture(live, frozen, 0.3)
    nothing = torch.zeros(1, 3, dtype=torch.long)
    rows = Rows.of(nothing, nothing, torch.arange(3))
    u, v = (m.hidden_states(rows) @ m.lm_head().weight.T for m in (live, frozen))
    got = mixed.hidden_states(rows) @ mixed.lm_head().weight.T
    torch.testing.assert_close(got, 0.7 * u + 0.3 * v)
