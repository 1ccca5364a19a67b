"""Triton's operations on rows of logits against ``rows_torch`` in float64, where logits are at an
edge that hidden states seldom reach."""

import pytest
import torch
from torch import Tensor

from helpers.oracle import rel_err
from sdpo_kernels._impl import partials, rows_torch
from sdpo_kernels._impl.options import Spec

rows_triton = pytest.importorskip("sdpo_kernels._impl.rows_triton")

KINDS = [("reverse_kl", ()), ("forward_kl", ()), ("jsd", (0.5,)), ("jsd", (0.01,))]
V = 2100
"""More than the statistics kernel takes in at a time, and no multiple of anything."""


def evaluate(rows, kind: str, parameters, z: Tensor, u: Tensor, weights: Tensor):
    """(values, gradient) of ``rows_torch.Rows`` or ``rows_triton``."""
    spec = Spec(kind, parameters=list(parameters))
    norm, centre, _ = partials.finish(rows.stats(spec, z.clone(), u.clone(), None))
    grad = torch.empty_like(z)
    if kind not in rows_torch.TWO_PASSES:
        return rows.divergence(spec, z, u, norm, centre, weights, grad)[0], grad
    sums = rows.divergence(spec, z, u, norm, None)
    rows.divergence(spec, z, u, norm, sums[1], weights, grad)
    return sums[0], grad


def both(kind: str, parameters, z: Tensor, u: Tensor, weights: Tensor):
    truth = evaluate(rows_torch.Rows(), kind, parameters, z.double(), u.double(), weights.double())
    return evaluate(rows_triton, kind, parameters, z, u, weights), truth


@pytest.mark.parametrize(("kind", "parameters"), KINDS)
def test_equal_distant_and_missing_logits(kind, parameters):
    z = 3 * torch.randn(5, V)
    u = z + 0.1 * torch.randn(5, V)
    u[1] = z[1]
    z[2, ::3] = u[2, ::3] = -torch.inf
    z[2, 1024] = u[2, 1024] = 12.0
    z[3, :1000] -= 80.0
    u[3, 1000:] -= 80.0
    z[4] += 1000.0
    (value, grad), (true_value, true_grad) = both(kind, parameters, z, u, torch.rand(5) + 0.5)
    assert value[1] == 0 and (value >= 0).all()
    assert grad[1].abs().max() < 1e-6
    for row, most in ((0, 1e-5), (2, 1e-5), (3, 1e-3), (4, 1e-3)):  # few digits are left of gaps
        assert rel_err(value[row], true_value[row]) < most, row
        # a JSD of distributions that share no word has no gradient
        error = (grad[row].double() - true_grad[row]).norm()
        assert error < most * true_grad[row].norm() + 1e-6, row


@pytest.mark.parametrize(("kind", "parameters"), KINDS)
def test_a_weight_of_zero_silences_what_is_infinite(kind, parameters):
    z, u = torch.randn(2, 3, V)
    u[0, 7] = -torch.inf  # the reverse KL is infinite
    z[1, 8] = -torch.inf  # and the forward KL
    (value, grad), (true_value, true_grad) = both(kind, parameters, z, u, torch.tensor([0.0, 0, 1]))
    torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=1e-6)
    assert value.isinf().sum() == {"reverse_kl": 1, "forward_kl": 1, "jsd": 0}[kind]
    assert not grad[:2].any()
    assert rel_err(grad[2], true_grad[2]) < 1e-5


def test_a_logit_without_probability_may_be_missing_from_the_teacher():
    """Also where it was the largest of what had been read of its lane."""
    z, u = torch.full((2, 1, V), -300.0)
    z[0, 2048], u[0, 0] = 0.0, -torch.inf
    (value, grad), _ = both("reverse_kl", (), z, u, torch.ones(1))
    assert value.isfinite().all() and grad.isfinite().all()
    assert abs(value - torch.tensor(V - 1.0).log()) < 1e-4


@pytest.mark.parametrize(("kind", "parameters"), KINDS)
@pytest.mark.parametrize("of_teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("where", [7, slice(None)], ids=["one", "all"])
def test_a_logit_that_is_no_number_makes_its_row_none(kind, parameters, of_teacher, where):
    """A weight of 0 silences the gradient, too."""
    z, u = torch.randn(2, 3, V)
    (u if of_teacher else z)[1, where] = torch.nan
    spec, weights = Spec(kind, parameters=list(parameters)), torch.tensor([1.0, 0.0, 1.0])
    stats = rows_triton.stats(spec, z.clone(), u.clone(), None)
    assert not stats[5 if of_teacher else 1, 1].isfinite()
    value, grad = evaluate(rows_triton, kind, parameters, z, u, weights)
    assert value.isfinite().tolist() == [True, False, True]
    assert not grad[1].any() and grad[::2].isfinite().all()
