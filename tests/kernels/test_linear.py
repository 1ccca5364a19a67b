"""linear_logprob, linear_reverse_kl, linear_forward_kl, linear_jsd against the float64 oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracle import assert_as_good_as, rel_err
from sdpo_kernels import (
    linear_forward_kl,
    linear_jsd,
    linear_logprob,
    linear_reverse_kl,
    reference,
)

DIVERGENCES = {
    "reverse_kl": (linear_reverse_kl, reference.reverse_kl),
    "forward_kl": (linear_forward_kl, reference.forward_kl),
    "jsd": (linear_jsd, lambda p, q: reference.jsd(p, q, 0.5)),
    "jsd_0.9": (
        lambda *a, **k: linear_jsd(*a, beta=0.9, **k),
        lambda p, q: reference.jsd(p, q, 0.9),
    ),
}
WITHOUT_SOFTMAX_TERM = {
    "reverse_kl": lambda logp, logq: logp.exp() * (logp - logq),
    "forward_kl": lambda logp, logq: -logq.exp(),
    "jsd": lambda logp, logq: _jsd_first_term(logp, logq, 0.5),
    "jsd_0.9": lambda logp, logq: _jsd_first_term(logp, logq, 0.9),
}
"""Gradients with respect to the logits that lack what the softmax's normaliser adds."""
ROWS_PER_CHUNK = 5


def _jsd_first_term(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    m = beta * logq.exp() + (1 - beta) * logp.exp()
    return (1 - beta) * logp.exp() * (logp - m.log())


def streams(n: int, v: int, d: int, distance: float, dtype=torch.float32):
    """Logits of std 3; hindsight = policy + noise of ``distance`` in the logits."""
    weight = torch.randn(v, d) * 3 / d**0.5
    hidden = torch.randn(n, d)
    hindsight = hidden + torch.randn(n, d) * distance / 3
    targets = torch.randint(v, (n,))
    return hidden.to(dtype), weight.to(dtype), hindsight.to(dtype), targets


def run(fn, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """(value, d hidden, d weight) of ``fn(hidden, weight)`` under per-token upstream gradients."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in tensors)
    value = fn(hidden, weight)
    value.backward(upstream.to(value.dtype))
    assert hidden.grad is not None and weight.grad is not None
    return [value.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["sum", "mean over many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distance", [0.1, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_and_gradients_match_the_oracle(name, distance, dtype, scale):
    function, definition = DIVERGENCES[name]
    hidden, weight, hindsight, _ = streams(13, 301, 48, distance, dtype)
    upstream = (torch.rand(13) + 0.5) * scale
    chunk_bytes = ROWS_PER_CHUNK * 301 * 4

    def plain(to, formula=definition):
        logq = reference.log_softmax(hindsight.to(to), weight.to(to))
        return run(
            lambda h, w: formula(reference.log_softmax(h, w), logq),
            [hidden.to(to), weight.to(to)],
            upstream,
        )

    out = run(
        lambda h, w: function(h, w, hindsight, chunk_bytes=chunk_bytes).value,
        [hidden, weight],
        upstream,
    )
    oracles, baselines = plain(torch.float64), plain(torch.float32)
    swapped = plain(torch.float64, lambda logp, logq: definition(logq, logp))
    h, w = hidden.double(), weight.double()
    logp, logq = reference.log_softmax(h, w), reference.log_softmax(hindsight.double(), w)
    dropped_NV = upstream[:, None] * WITHOUT_SOFTMAX_TERM[name](logp, logq)
    dropped = [None, dropped_NV @ w, dropped_NV.T @ h]
    for i, ours in enumerate(out):
        mutants = [m for m in (dropped[i],) if m is not None]
        if name != "jsd":  # which is symmetric
            mutants.append(swapped[i])
        assert_as_good_as(ours, oracles[i], baselines[i], mutants=mutants)


def test_a_divergence_of_nearly_equal_streams_keeps_its_digits_and_its_sign():
    hidden, weight, hindsight, _ = streams(64, 301, 48, 1e-3)
    for name, (function, definition) in DIVERGENCES.items():
        value = function(hidden, weight, hindsight).value
        oracle = definition(
            reference.log_softmax(hidden.double(), weight.double()),
            reference.log_softmax(hindsight.double(), weight.double()),
        )
        assert (value >= 0).all(), name
        assert oracle.max() < 1e-5 and rel_err(value, oracle) < 5e-3, name
        naive = definition(
            reference.log_softmax(hidden, weight), reference.log_softmax(hindsight, weight)
        )
        assert rel_err(naive, oracle) > 5e-3, "the plain formula would do, so nothing was shown"


def test_autocast_does_not_round_the_logits():
    hidden, weight, hindsight, targets = streams(13, 301, 48, 0.1)
    plain = linear_reverse_kl(hidden, weight, hindsight, targets=targets)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_reverse_kl(hidden, weight, hindsight, targets=targets)
        logp = linear_logprob(hidden, weight, targets).logp
    assert torch.equal(plain.value, cast.value)
    assert torch.equal(plain.stats.logp_policy, logp)


def test_logprob_and_entropy_match_the_oracle():
    hidden, weight, _, targets = streams(13, 301, 48, 0.1)
    upstream = torch.randn(13)

    def plain(to):
        return run(
            lambda h, w: reference.logprob(reference.log_softmax(h, w), targets),
            [hidden.to(to), weight.to(to)],
            upstream,
        )

    nbytes = ROWS_PER_CHUNK * 301 * 4
    out = run(
        lambda h, w: linear_logprob(h, w, targets, chunk_bytes=nbytes).logp,
        [hidden, weight],
        upstream,
    )
    for ours, oracle, baseline in zip(out, plain(torch.float64), plain(torch.float32), strict=True):
        assert_as_good_as(ours, oracle, baseline)
    logp64 = reference.log_softmax(hidden.double(), weight.double())
    logp32 = reference.log_softmax(hidden, weight)
    entropy = linear_logprob(hidden, weight, targets, chunk_bytes=nbytes).entropy
    assert_as_good_as(entropy, reference.entropy(logp64), reference.entropy(logp32))


def test_statistics_are_those_of_both_streams():
    hidden, weight, hindsight, targets = streams(9, 97, 16, 1.0)
    stats = linear_reverse_kl(hidden, weight, hindsight, targets=targets).stats
    for stream, logp, entropy in (
        (hidden, stats.logp_policy, stats.entropy_policy),
        (hindsight, stats.logp_hindsight, stats.entropy_hindsight),
    ):
        oracle = reference.log_softmax(stream.double(), weight.double())
        single = reference.log_softmax(stream, weight)
        assert_as_good_as(
            logp, reference.logprob(oracle, targets), reference.logprob(single, targets)
        )
        assert_as_good_as(entropy, reference.entropy(oracle), reference.entropy(single))
        assert not logp.requires_grad and not entropy.requires_grad


def test_a_teacher_has_its_own_head_and_width():
    hidden, weight, _, _ = streams(7, 53, 16, 1.0)
    wide, teacher = torch.randn(7, 24), torch.randn(53, 24)
    got = linear_reverse_kl(hidden, weight, wide, teacher).value
    oracle = reference.reverse_kl(
        reference.log_softmax(hidden.double(), weight.double()),
        reference.log_softmax(wide.double(), teacher.double()),
    )
    assert rel_err(got, oracle) < 1e-5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name):
    ours, _ = DIVERGENCES[name]
    hidden, weight, hindsight, _ = streams(4, 7, 3, 1.0, torch.float64)
    hidden.requires_grad_(), weight.requires_grad_()
    # the hindsight stream is a constant: its head must not be the one that is perturbed
    head = weight.detach().clone()
    assert torch.autograd.gradcheck(
        lambda h, w: ours(h, w, hindsight, head, chunk_bytes=2 * 7 * 8).value, (hidden, weight)
    )


def test_gradcheck_of_logprob():
    hidden, weight, _, targets = streams(4, 7, 3, 1.0, torch.float64)
    hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, targets, chunk_bytes=2 * 7 * 8).logp, (hidden, weight)
    )


@given(
    n=st.integers(0, 9),
    v=st.integers(1, 40),
    d=st.integers(1, 9),
    rows=st.integers(1, 9),
    name=st.sampled_from(sorted(DIVERGENCES)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_any_chunk(n, v, d, rows, name, seed):
    torch.manual_seed(seed)
    ours, definition = DIVERGENCES[name]
    hidden, weight, hindsight, targets = streams(n, v, d, 1.0, torch.float64)
    upstream = torch.randn(n, dtype=torch.float64)
    logq = reference.log_softmax(hindsight, weight)
    chunked = run(
        lambda h, w: ours(h, w, hindsight, targets=targets, chunk_bytes=rows * v * 8).value,
        [hidden, weight],
        upstream,
    )
    plain = run(
        lambda h, w: definition(reference.log_softmax(h, w), logq), [hidden, weight], upstream
    )
    for a, b in zip(chunked, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_identical_streams_have_no_divergence_and_no_gradient():
    hidden, weight, _, _ = streams(6, 50, 8, 0.0)
    for ours, _ in DIVERGENCES.values():
        value, dh, dw = run(
            lambda h, w, f=ours: f(h, w, hidden).value, [hidden, weight], torch.ones(6)
        )
        assert value.abs().max() < 1e-6 and dh.abs().max() < 1e-5 and dw.abs().max() < 1e-5


def test_extreme_logits_stay_finite():
    hidden, weight, hindsight, targets = streams(4, 31, 8, 1.0)
    hidden, hindsight = hidden * 3000, hindsight * 3000
    for ours, _ in DIVERGENCES.values():
        for t in run(
            lambda h, w, f=ours: f(h, w, hindsight, targets=targets).value,
            [hidden, weight],
            torch.ones(4),
        ):
            assert torch.isfinite(t).all()


def test_a_frozen_head_or_frozen_hidden_states_get_no_gradient():
    hidden, weight, hindsight, _ = streams(5, 20, 8, 1.0)
    h = hidden.clone().requires_grad_()
    linear_reverse_kl(h, weight, hindsight).value.sum().backward()
    assert h.grad is not None and weight.grad is None
    w = weight.clone().requires_grad_()
    linear_reverse_kl(hidden, w, hindsight).value.sum().backward()
    assert w.grad is not None and hidden.grad is None


def test_a_second_backward_gives_the_same_gradient():
    hidden, weight, hindsight, _ = streams(5, 20, 8, 1.0)
    hidden.requires_grad_()
    value = linear_reverse_kl(hidden, weight, hindsight).value
    (first,) = torch.autograd.grad(value.sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(value.sum(), hidden)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (dict(hidden=torch.randn(2, 3, 4)), "hidden"),
        (dict(weight=torch.randn(5, 3)), "weight"),
        (dict(weight=torch.randn(5, 4).half()), "weight"),
        (dict(hindsight_hidden=torch.randn(3, 4)), "hindsight_hidden"),
        (dict(hindsight_weight=torch.randn(6, 4)), "hindsight_weight"),
        (dict(targets=torch.zeros(3, dtype=torch.long)), "targets"),
        (dict(targets=torch.zeros(2)), "targets"),
    ],
)
def test_a_mistake_is_named_before_any_work(change, names):
    arguments = dict(
        hidden=torch.randn(2, 4), weight=torch.randn(5, 4), hindsight_hidden=torch.randn(2, 4)
    )
    with pytest.raises(ValueError, match=names):
        linear_reverse_kl(**{**arguments, **change})


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_the_limits_of_jsd_are_other_functions(beta):
    with pytest.raises(ValueError, match="linear_reverse_kl"):
        linear_jsd(torch.randn(2, 4), torch.randn(5, 4), torch.randn(2, 4), beta=beta)
