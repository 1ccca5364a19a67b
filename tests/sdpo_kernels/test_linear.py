"""Every function on every impl against the float64 oracle, and its edges."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.cases import (
    FUNCTIONS,
    Problem,
    assert_matches_the_oracle,
    assert_statistics_match_the_oracle,
    evaluate,
    loss_of,
    oracle,
    problem,
    statistics,
)
from helpers.oracle import assert_as_good_as, rel_err
from sdpo_kernels import linear_jsd, linear_logprob, linear_reverse_kl, linear_sampled_token
from sdpo_kernels import reference as full
from sdpo_kernels._impl import tuning
from sdpo_kernels._impl.chunked import row_length

IMPLS = ("torch", "triton", "fused", "reference")
NUMBERS = [(torch.float32, 0.1), (torch.float32, 3.0), (torch.bfloat16, 0.1), (torch.float16, 0.1)]
"""Dtypes, and how far apart the streams are."""
V = 151
CHUNK = 2 * 9 * V * 4
"""Nine tokens of two streams."""
TRANSFORM = dict(temperature=0.8, softcap=6.0)
WITHOUT_SOFTMAX_TERM = {
    "logprob": lambda p, q, y: y,
    "reverse_kl": lambda p, q, y: p * (p.log() - q.log()),
    "forward_kl": lambda p, q, y: -q,
    "jsd": lambda p, q, y: 0.5 * p * (p.log() - (0.5 * q + 0.5 * p).log()),
    "jsd_0.9": lambda p, q, y: 0.1 * p * (p.log() - (0.9 * q + 0.1 * p).log()),
}
"""Gradients with respect to the logits that lack what the softmax's normaliser adds."""


def tokens(name: str, impl: str, dtype: torch.dtype) -> int:
    """Errors even out over many tokens; but the interpreter is slow."""
    rounded = dtype != torch.float32 or "sampled" in name
    return 32 if rounded or impl in ("torch", "reference") else 12


KEEP = 2**40
"""Enough memory to keep the gradients with respect to the logits of any test."""


def modes(impl: str, dtype: torch.dtype, distance: float = 0.1) -> list[dict]:
    """Weights known up front, or not; G kept, in blocks of two chunks, or in the logits' memory.
    The interpreter is too slow to do all for every case."""
    blocks = 2 * 9 * row_length(V) * dtype.itemsize
    kept, in_blocks, at_once = (dict(known=True, grad_bytes=r) for r in (KEEP, blocks, 0))
    if impl in ("triton", "fused") and (dtype, distance) != (torch.float32, 0.1):
        return [kept] if distance > 1 else [kept, at_once]
    return [kept, in_blocks, at_once, kept | dict(known=False), at_once | dict(known=False)]


FUSED = [name for name in FUNCTIONS if name == "logprob" or "sampled_token" in name]
ON_IMPLS = [(n, impl) for n in FUNCTIONS for impl in IMPLS if impl != "fused" or n in FUSED]
"""Where nothing is fused, that impl is the triton impl."""


def wrong_topk(p: Problem, k: int = 5) -> dict[str, list[Tensor]]:
    """The reverse KL over the teacher's k likeliest tokens; over the top k without a bucket for the
    others, whose gradient is also that with the bucket as a constant; over a renormalised top k."""
    wrong = {what: [t] for what, t in oracle("topk", p, k=k, support="teacher").items()}
    for renormalised in (False, True):
        h, w = (t.double().requires_grad_() for t in (p.hidden, p.weight))
        logp, logq = full.log_softmax(h, w), full.log_softmax(p.teacher.double(), w.detach())
        index = logp.topk(k).indices
        logp, logq = (t.gather(1, index) for t in (logp, logq))
        if renormalised:
            logp, logq = (t.log_softmax(-1) for t in (logp, logq))
        value = full.reverse_kl(logp, logq)
        grads = torch.autograd.grad((p.upstream.double() * value).sum(), (h, w))
        for what, t in zip(wrong, (value.detach(), *grads), strict=True):
            wrong[what].append(t)
    return wrong


def mutants(name: str, p: Problem) -> dict[str, list[Tensor]]:
    """Plausible wrong results: streams swapped, the softmax's term dropped."""
    wrong: dict[str, list[Tensor]] = {"value": [], "hidden": [], "weight": []}
    if name == "topk":
        wrong = wrong_topk(p)
    if name in ("reverse_kl", "forward_kl", "jsd_0.9", "topk", "topk, forward_kl"):
        swapped = oracle(name, p._replace(hidden=p.teacher, teacher=p.hidden))
        for k, t in wrong.items():
            t.append(swapped[k])
    if name in WITHOUT_SOFTMAX_TERM:
        h, w, g, y, upstream, _ = p.to(torch.float64)
        one_hot = torch.nn.functional.one_hot(y, w.shape[0]).double()
        at = ((h @ w.T).softmax(-1), (g @ w.T).softmax(-1), one_hot)
        grad_NV = upstream[:, None] * WITHOUT_SOFTMAX_TERM[name](*at)
        wrong["hidden"].append(grad_NV @ w)
        wrong["weight"].append(grad_NV.T @ h)
    return wrong


@pytest.mark.parametrize(("dtype", "distance"), NUMBERS, ids=str)
@pytest.mark.parametrize(("name", "impl"), ON_IMPLS)
def test_values_and_gradients_match_the_oracle(name, impl, dtype, distance):
    p = problem(tokens(name, impl, dtype), V, 48, distance, dtype)
    call = dict(impl=impl, chunk_bytes=CHUNK)
    found = [evaluate(name, p, **mode, **call) for mode in modes(impl, dtype, distance)]
    assert_matches_the_oracle(name, p, *found, mutants=mutants(name, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "impl"), ON_IMPLS)
def test_bias_softcap_and_temperature_are_part_of_the_definition(name, impl, dtype):
    p, bias = problem(tokens(name, impl, dtype), V, 48, 0.1, dtype), torch.randn(V, dtype=dtype)
    options = dict(bias=bias, **TRANSFORM)
    call = dict(impl=impl, chunk_bytes=CHUNK, **options)
    found = [evaluate(name, p, **mode, **call) for mode in modes(impl, dtype)]
    assert all(set(got) == {"value", "hidden", "weight", "bias"} for got in found)
    without = {k: [t] for k, t in oracle(name, p, bias=bias).items()}
    # the softcap's tanh has roundings of its own
    assert_matches_the_oracle(name, p, *found, k=2.5, mutants=without, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["reverse_kl", *[n for n in FUSED if "clip" not in n]])
def test_statistics_are_those_of_both_streams(name, impl):
    p, bias = problem(9, V, 16, 1.0), torch.randn(V)
    options = dict(bias=bias, **TRANSFORM)
    assert_statistics_match_the_oracle(name, p, impl=impl, chunk_bytes=CHUNK, **options)
    found = statistics(name, p.to(torch.float64), impl="reference", **options)
    logp = full.log_softmax(p.hidden.double(), p.weight.double(), bias.double(), **TRANSFORM)
    entropy = found["entropy" if name == "logprob" else "entropy_student"]
    assert rel_err(entropy, full.entropy(logp)) < 1e-9


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_divergence_of_nearly_equal_streams_keeps_its_digits_and_its_sign(impl):
    p = problem(64 if impl == "torch" else 4, 301, 48, 1e-3)
    for name in ("reverse_kl", "forward_kl", "jsd", "jsd_0.9", "topk"):
        value = evaluate(name, p, known=False, impl=impl)["value"]
        truth = oracle(name, p)["value"]
        assert (value >= 0).all(), name
        assert truth.max() < 1e-5 and rel_err(value, truth) < 5e-3, name
        naive = oracle(name, p, torch.float32)["value"]
        assert rel_err(naive, truth) > 5e-3, "the plain formula would do, so nothing was shown"


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float16_gradients_of_a_mean_over_many_tokens_do_not_underflow(name, impl):
    p = problem(13, 301, 48, 1.0, torch.float16)
    p = p._replace(upstream=p.upstream * 2.0**-24)
    scaled = p._replace(upstream=p.upstream * 2.0**24)  # as a gradient scaler does, afterwards
    leaves = dict(hidden=p.hidden.requires_grad_(), weight=p.weight.requires_grad_())
    loss = loss_of(name, p, known=True, impl=impl) * 2.0**24
    found = dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))
    assert_matches_the_oracle(name, scaled, found)


@pytest.mark.parametrize("grad_bytes", [0, KEEP])
@pytest.mark.parametrize("name", ["logprob", "reverse_kl", "jsd", "jsd_0.9"])
def test_float16_gradients_over_many_words_do_not_underflow(name, grad_bytes):
    """Most words' probabilities, times what they differ by, are below float16's numbers."""
    p = problem(64, 5003, 64, 0.1, torch.float16)
    found = evaluate(name, p, known=False, impl="torch", grad_bytes=grad_bytes)
    assert_matches_the_oracle(name, p, found)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if "sampled_token" not in n])
def test_gradcheck(name):
    """Not the sampled token's: its advantage, a function of the inputs, is a constant of the
    gradient. tests/test_objective.py has it with the advantage fixed."""
    p = problem(4, 7, 3, 1.0, torch.float64)
    # the teacher is a constant: its lm_head must not be the one that is perturbed
    head = p.weight.detach().clone()
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    hidden, weight = (t.requires_grad_() for t in (p.hidden, p.weight))
    own = {} if name == "logprob" else dict(teacher_lm_head_weight=head)
    options = dict(chunk_bytes=2 * 2 * 7 * 8, **TRANSFORM, **own)

    def value_or_loss(weights, h, w, b):
        out = FUNCTIONS[name](p._replace(hidden=h, weight=w), weights, bias=b, **options)
        return out[0] if weights is None else out.loss

    for weights in (None, p.upstream):
        assert torch.autograd.gradcheck(value_or_loss, (weights, hidden, weight, bias))


def drawn(
    name: str, n: int, v: int, d: int, k: int, dtype: torch.dtype, masked: bool, seed: int
) -> tuple[Problem, dict]:
    """A problem, and k and the mask among the options."""
    torch.manual_seed(seed)
    options: dict = dict(k=min(k, v)) if "topk" in name else {}
    if masked:
        options["mask"] = torch.rand(n) < 0.5
    return problem(n, v, d, 1.0, dtype), options


@settings(max_examples=60)
@given(
    n=st.integers(0, 9),
    v=st.integers(1, 40),
    d=st.integers(1, 9),
    k=st.integers(1, 40),
    chunk=st.integers(1, 9),
    temperature=st.floats(0.3, 3),
    softcap=st.none() | st.floats(1, 30),
    with_bias=st.booleans(),
    masked=st.booleans(),
    room=st.sampled_from([0, 500, 2000, KEEP]),
    name=st.sampled_from(sorted(FUNCTIONS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_chunk_mask_and_temperature(
    n, v, d, k, chunk, temperature, softcap, with_bias, masked, room, name, seed
):
    p, options = drawn(name, n, v, d, k, torch.float64, masked, seed)
    options |= dict(temperature=temperature, softcap=softcap, grad_bytes=room)
    if with_bias:
        options["bias"] = torch.randn(len(p.weight), dtype=torch.float64)
    truth = oracle(name, p, **options)
    for known in (False, True):
        got = evaluate(name, p, known=known, chunk_bytes=chunk * v * 8, **options)
        for k, ours in got.items():
            torch.testing.assert_close(ours, truth[k], rtol=1e-7, atol=1e-11)


@settings(max_examples=25)
@given(
    n=st.integers(0, 5),
    v=st.integers(1, 300),
    d=st.integers(1, 40),
    k=st.integers(1, 300),
    name=st.sampled_from(sorted(FUNCTIONS)),
    impl=st.sampled_from(["triton", "fused"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_the_kernels(n, v, d, k, name, impl, dtype, masked, seed):
    p, options = drawn(name, n, v, d, k, dtype, masked, seed)
    options |= TRANSFORM
    truth, baseline = oracle(name, p, **options), oracle(name, p, torch.float32, **options)
    got = evaluate(name, p, known=True, impl=impl, chunk_bytes=2 * 2 * v * 4, **options)
    for k, ours in got.items():
        # one token, or one word, may leave next to nothing to be relative to
        scale = truth[k].norm() + p.upstream.sum() * (1e-3 if k == "value" else 1e-2) + 1e-9
        both = (ours, baseline[k].to(ours.dtype))
        error, allowed = ((t.double() - truth[k]).norm() / scale for t in both)
        slack = 1e-5 if dtype == torch.float32 else 1e-2
        assert error <= 3 * allowed + slack, (k, error, allowed)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(("name", "impl"), ON_IMPLS)
def test_masking_a_row_is_deleting_it(name, impl):
    p = problem(12, 101, 16, 1.0)
    mask = torch.tensor([True, False, True] * 4)
    if "centred" in name:  # whose sequences are numbered by the row
        mask = torch.arange(12) < 8
    for t in (p.hidden, p.teacher):
        t[~mask] = torch.nan
    part = evaluate(name, p.rows(mask), known=False, impl=impl)
    silent = p._replace(upstream=torch.where(mask, p.upstream, torch.nan))
    whole = evaluate(name, silent, known=False, impl=impl, mask=mask)
    assert not whole["value"][~mask].any() and not whole["hidden"][~mask].any()
    for k in ("value", "hidden"):
        torch.testing.assert_close(whole[k][mask], part[k], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole["weight"], part["weight"], rtol=1e-5, atol=1e-6)
    found = statistics(name, p, impl=impl, mask=mask)
    assert all(not t[~mask].any() and torch.isfinite(t).all() for t in found.values())


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize(("name", "impl"), ON_IMPLS)
def test_no_rows_one_row_and_all_rows_masked(name, impl, n):
    p = problem(n, 33, 8, 1.0)
    for known in (False, True):
        got = evaluate(name, p, known=known, impl=impl, mask=torch.zeros(n, dtype=torch.bool))
        assert all(not t.any() for t in got.values())
        got = evaluate(name, p, known=known, impl=impl)
        assert all(torch.isfinite(t).all() for t in got.values())


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if "topk" not in n])
def test_a_vocabulary_of_one_word_leaves_nothing_to_learn(name, impl):
    p = problem(5, 1, 8, 1.0)
    for k, t in evaluate(name, p, known=True, impl=impl).items():
        assert t.abs().max() < 1e-5, k


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_topk_of_the_whole_vocabulary_is_the_divergence(impl):
    p = problem(5, 5, 8, 1.0)
    whole, topk = (evaluate(name, p, known=True, impl=impl) for name in ("reverse_kl", "topk"))
    for k in whole:
        torch.testing.assert_close(topk[k], whole[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("k", [1, 20, V - 1])
def test_topk_of_any_k_matches_the_oracle(k, impl):
    p = problem(12, V, 48, 1.0)
    found = [evaluate("topk", p, known=known, impl=impl, k=k) for known in (False, True)]
    truth, baseline = oracle("topk", p, k=k), oracle("topk", p, torch.float32, k=k)
    wrong = wrong_topk(p, k) if k < V - 1 else {what: [] for what in truth}
    for got in found:
        for what, ours in got.items():
            assert_as_good_as(ours, truth[what], baseline[what], mutants=wrong[what])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_a_nearly_certain_student_leaves_to_other_tokens_keeps_its_digits(impl):
    """1 - sum p over the top k, in float32, has few of them, or is 0."""
    gap = torch.linspace(12, 24, 9)[:, None]
    z, u = (torch.cat([torch.zeros(9, 1), torch.randn(9, 30) - by], 1) for by in (gap, gap - 1))
    p = Problem(z, torch.eye(31), u, torch.zeros(9, dtype=torch.long), torch.ones(9), z[:, 0])
    logp, logq = (t.double().log_softmax(-1) for t in (z, u))
    others_p, others_q = (t[:, 1:].exp().sum(-1) for t in (logp, logq))
    truth = logp[:, 0].exp() * (torch.log1p(-others_p) - torch.log1p(-others_q))
    truth += others_p * (others_p.log() - others_q.log())
    for known in (False, True):
        value = evaluate("topk", p, known=known, impl=impl, k=1)["value"]
        assert rel_err(value / truth, torch.ones(9)) < 1e-4
    rest = 1 - z.softmax(-1)[:, 0]
    assert rel_err(rest / others_p, torch.ones(9)) > 0.1, "the plain formula would do"


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(("name", "impl"), [at for at in ON_IMPLS if "PPO" not in at[0]])
def test_extreme_logits_stay_finite_and_right(name, impl):
    """Not the PPO clip's: ratios of 1e3 nats overflow in any dtype."""
    p = problem(4, 31, 8, 1.0)
    p = p._replace(hidden=p.hidden * 3000, teacher=p.teacher * 3000)
    assert (p.hidden @ p.weight.T).abs().max() > 1e4
    truth, baseline = oracle(name, p), oracle(name, p, torch.float32)
    for known in (False, True):
        got = evaluate(name, p, known=known, impl=impl)
        for k, ours in got.items():
            assert torch.isfinite(ours).all(), k
            error, allowed = ((t.double() - truth[k]).norm() for t in (ours, baseline[k]))
            assert error <= 2 * allowed + 1e-6 * (1e4 + truth[k].norm()), k


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "jsd_0.9"])
def test_words_that_only_the_teacher_would_say(name, impl):
    """p is flushed to zero, as on many machines, where q = e^84 p is not."""
    distance = torch.linspace(88, 96, 9)[:, None]
    z = torch.cat([torch.zeros(9, 1), -distance, torch.randn(9, 3)], 1)
    u = torch.cat([torch.zeros(9, 1), 84 - distance, torch.randn(9, 3)], 1)
    p = Problem(z, torch.eye(5), u, torch.zeros(9, dtype=torch.long), torch.ones(9), z[:, 0])
    truth = oracle(name, p)
    torch.set_flush_denormal(True)
    try:
        got = evaluate(name, p, known=True, impl=impl)
    finally:
        torch.set_flush_denormal(False)
    for k, ours in got.items():
        torch.testing.assert_close(ours.double(), truth[k], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(("name", "impl"), ON_IMPLS)
def test_one_hot_distributions(name, impl):
    hidden = torch.eye(6)[torch.tensor([0, 1, 2, 3])] * 100
    teacher = torch.eye(6)[torch.tensor([0, 1, 4, 5])] * 100
    p = Problem(hidden, torch.eye(6), teacher, torch.arange(4), torch.ones(4), -torch.ones(4))
    truth = oracle(name, p)
    for k, ours in evaluate(name, p, known=True, impl=impl).items():
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), truth[k], rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_word_that_is_missing_from_both_is_no_word(impl):
    """Missing vocabulary is -inf, never 0: a bias of -inf removes a row of the head."""
    bias = torch.zeros(40)
    bias[::4] = -torch.inf
    words = torch.isfinite(bias).nonzero()[:, 0]
    p = problem(3, 40, 8, 1.0)._replace(targets=words[:3])
    kept = p._replace(weight=p.weight[words], targets=torch.arange(3))
    for name in ("logprob", "reverse_kl", "forward_kl", "jsd"):
        whole = evaluate(name, p, known=True, impl=impl, bias=bias)
        part = evaluate(name, kept, known=True, impl=impl)
        for k in ("value", "hidden"):
            torch.testing.assert_close(whole[k], part[k], rtol=1e-4, atol=1e-5)
        assert not whole["weight"][::4].any()


def test_identical_streams_have_no_divergence_and_no_gradient():
    p = problem(6, 50, 8, 0.0)
    for name in ("reverse_kl", "forward_kl", "jsd", "jsd_0.9", "topk", "sampled_token"):
        got = evaluate(name, p, known=False)
        assert all(t.abs().max() < 1e-5 for t in got.values()), name


@pytest.mark.usefixtures("room")
def test_a_teacher_has_its_own_head_width_and_bias():
    p = problem(7, 53, 16, 1.0)
    wide, teacher, bias = torch.randn(7, 24), torch.randn(53, 24), torch.randn(53)
    logp = full.log_softmax(p.hidden.double(), p.weight.double())
    logq = full.log_softmax(wide.double(), teacher.double(), bias.double())
    for impl in ("torch", "triton"):
        got = linear_reverse_kl(p.hidden, p.weight, wide, teacher, teacher_bias=bias, impl=impl)
        assert rel_err(got.value, full.reverse_kl(logp, logq)) < 1e-5


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_autocast_does_not_round_the_logits(impl):
    p = problem(13 if impl == "torch" else 4, 151, 48, 0.1)
    plain = FUNCTIONS["reverse_kl"](p, None, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        cast = FUNCTIONS["reverse_kl"](p, None, impl=impl)
    assert torch.equal(plain.value, cast.value)
    assert torch.equal(plain.stats.logp_student, cast.stats.logp_student)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_frozen_head_or_frozen_hidden_states_get_no_gradient(name, known):
    p = problem(5, 20, 8, 1.0)
    both = evaluate(name, p, known=known)
    for trained, frozen in (("hidden", "weight"), ("weight", "hidden")):
        leaf = getattr(p, trained).clone().requires_grad_()
        loss_of(name, p._replace(**{trained: leaf}), known=known).backward()
        assert leaf.grad is not None and getattr(p, frozen).grad is None
        torch.testing.assert_close(leaf.grad, both[trained])


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_backward_gives_the_same_gradient_and_double_use_adds_up(name, known):
    p = problem(5, 20, 8, 1.0)
    hidden = p.hidden.requires_grad_()
    once, again, another = (loss_of(name, p, known=known) for _ in range(3))
    (first,) = torch.autograd.grad(once, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3 * once, hidden)
    torch.testing.assert_close(second, 3 * first)
    (twice,) = torch.autograd.grad(again + another, hidden)
    torch.testing.assert_close(twice, 2 * first)


def test_weights_without_a_gradient_still_give_the_loss():
    p = problem(5, 20, 8, 1.0)
    for context in (torch.no_grad(), contextlib.nullcontext()):
        with context:
            out = linear_reverse_kl(p.hidden, p.weight, p.teacher, token_weights=p.upstream)
        torch.testing.assert_close(out.loss, (out.value * p.upstream).sum())
        assert out.loss is not None and not out.loss.requires_grad


@pytest.mark.usefixtures("room")
def test_noncontiguous_inputs():
    p = problem(6, 31, 8, 1.0)
    spread = [torch.stack([t, t], -1).flatten(1)[:, ::2] for t in p[:3]]
    assert not any(t.is_contiguous() for t in spread)
    problems = (p, Problem(*spread, *p[3:]))
    for impl in IMPLS:
        whole, strided = (evaluate("sampled_token", q, known=True, impl=impl) for q in problems)
        for k in whole:
            torch.testing.assert_close(whole[k], strided[k])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student_hidden", torch.randn(2, 3, 4)),
        ("lm_head_weight", torch.randn(5, 3)),
        ("lm_head_weight", torch.randn(5, 4).half()),
        ("lm_head_weight", torch.randn(0, 4)),
        ("teacher_hidden", torch.randn(3, 4)),
        ("teacher_lm_head_weight", torch.randn(6, 4)),
        ("teacher_bias", torch.randn(5)),
        ("targets", torch.zeros(3, dtype=torch.long)),
        ("targets", torch.zeros(2)),
        ("bias", torch.zeros(4)),
        ("token_weights", torch.zeros(3)),
        ("token_weights", torch.zeros(2, requires_grad=True)),
        ("mask", torch.zeros(2)),
        ("temperature", 0.0),
        ("softcap", -1.0),
        ("softcap", 0.0),
        ("chunk_bytes", 0),
        ("impl", "cuda"),
    ],
)
def test_a_mistake_is_named_before_any_work(name, value):
    streams = dict(student_hidden=torch.randn(2, 4), teacher_hidden=torch.randn(2, 4))
    arguments = dict(lm_head_weight=torch.randn(5, 4), **streams)
    with pytest.raises(ValueError, match=name):
        linear_reverse_kl(**{**arguments, name: value})


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_the_limits_of_jsd_are_other_functions(beta):
    with pytest.raises(ValueError, match="linear_reverse_kl"):
        linear_jsd(torch.randn(2, 4), torch.randn(5, 4), torch.randn(2, 4), beta=beta)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        linear_logprob(torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2).long(), temprature=1.0)


def test_auto_chooses_by_device_dtype_and_tokens():
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    choose = tuning.choose_impl
    assert choose(cuda, torch.bfloat16, 4096, [2048], True) == "fused"
    assert choose(cuda, torch.bfloat16, 8, [2048], True) == "triton"
    assert choose(cuda, torch.float32, 4096, [2048], True) == "triton"
    assert choose(cuda, torch.bfloat16, 4096, [2048], False) == "triton"
    assert choose(cuda, torch.float64, 4096, [2048], True) == "torch"
    assert choose(cpu, torch.bfloat16, 4096, [2048], True) == "torch"


@pytest.mark.parametrize(
    ("widths", "impl"),
    [((4096,), "fused"), ((4088, 2048), "fused"), ((4090,), "triton"), ((4096, 250), "triton")],
)
def test_rows_that_no_wide_access_can_read_do_not_go_to_the_fused_kernel(widths, impl):
    cuda = torch.device("cuda", 0)
    assert tuning.choose_impl(cuda, torch.bfloat16, 4096, widths, True) == impl


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "topk"])
def test_a_difference_of_level_between_the_streams_costs_no_digits(name, impl):
    """softmax(z + constant) is softmax(z), whatever the constant and in either stream."""
    p = problem(16, 151, 48, 0.1)
    level = torch.cat([torch.full((8, 1), 128.0), torch.zeros(8, 1)])
    added = dict(hidden=level, teacher=level.flip(0), weight=torch.ones(151, 1))
    p = p._replace(**{k: torch.cat([getattr(p, k), t], 1) for k, t in added.items()})
    got = evaluate(name, p, known=True, impl=impl)
    assert_matches_the_oracle(name, p, {k: got[k] for k in ("value", "hidden")}, k=3.0)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
def test_a_weight_of_zero_silences_an_infinite_value(impl):
    p = problem(6, 31, 8, 1.0)
    weights = torch.tensor([0.0, 1, 1, 0, 1, 1])
    p = p._replace(upstream=weights)
    old = torch.where(weights == 0, -1e4, p.old_logp)
    got = evaluate("sampled_token, PPO clip", p._replace(old_logp=old), known=True, impl=impl)
    assert all(torch.isfinite(got[k]).all() for k in ("hidden", "weight"))
    part = evaluate("sampled_token, PPO clip", p.rows(weights > 0), known=True, impl=impl)
    torch.testing.assert_close(got["weight"], part["weight"], rtol=1e-5, atol=1e-5)


def test_masked_tokens_never_enter_a_sequence_mean():
    p, mask = problem(8, 31, 8, 1.0), torch.tensor([True, True, False, True] * 2)
    options = dict(targets=p.targets, centre=torch.arange(8) // 4, mask=mask)
    implied, explicit = (
        linear_sampled_token(p.hidden, p.weight, p.teacher, counted=counted, **options).value
        for counted in (None, torch.ones(8).bool())
    )
    torch.testing.assert_close(implied, explicit)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_target_of_minus_100_is_as_masked(name, impl, known):
    p, kept = problem(8, 31, 8, 1.0), torch.tensor([True, False, True, True] * 2)
    ignored = p._replace(targets=p.targets.masked_fill(~kept, -100))
    for mask in (None, torch.arange(8) > 0):
        masked = dict(impl=impl, mask=kept if mask is None else kept & mask)
        expected = evaluate(name, p, known=known, **masked)
        found = evaluate(name, ignored, known=known, impl=impl, mask=mask)
        assert (found["value"][kept] != 0).any()
        assert not found["value"][~kept].any() and not found["hidden"][~kept].any()
        torch.testing.assert_close(found, expected)
        found = statistics(name, ignored, impl=impl, mask=mask)
        torch.testing.assert_close(found, statistics(name, p, **masked))


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("name", "impl"), ON_IMPLS)
def test_rows_that_a_gpu_cannot_drop_do_no_harm(name, impl, known, monkeypatch):
    """Where the host would have to wait for their number they are computed, as in a compiled graph,
    whatever they hold."""
    p, kept = problem(12, 31, 8, 1.0), torch.arange(12) < 8
    for rows, rubbish in ((slice(8, 10), torch.nan), (slice(10, 12), torch.inf)):
        p.hidden[rows] = p.teacher[rows] = p.old_logp[rows] = p.upstream[rows] = rubbish
    ignored = p._replace(targets=p.targets.masked_fill(~kept, -100))
    cases = ((p, dict(mask=kept)), (ignored, {}))
    bias = torch.randn(31)

    def found(p: Problem, options: dict):
        gradients = evaluate(name, p, known=known, impl=impl, bias=bias, **options)
        return gradients, statistics(name, p, impl=impl, bias=bias, **options)

    expected = [found(*case) for case in cases]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for case, (gradients, stats) in zip(cases, expected, strict=True):
        assert all(t.isfinite().all() for t in (*gradients.values(), *stats.values()))
        torch.testing.assert_close(found(*case), (gradients, stats))
        if known:
            q, options = case
            assert loss_of(name, q, known=True, impl=impl, bias=bias, **options).isfinite()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_target_outside_the_vocabulary_is_refused_on_a_cpu(name, impl):
    p = problem(5, 31, 8, 1.0)
    for wrong in (-1, -101, 31, 2**40):
        p.targets[2:4] = wrong
        for known in (False, True):
            said = rf"targets\[2\] is {wrong}: .* from 0 to 30, or -100"
            with pytest.raises(ValueError, match=said):
                evaluate(name, p, known=known, impl=impl)
    mask = torch.tensor([True, True, False, False, True])
    assert evaluate(name, p, known=True, impl=impl, mask=mask)["value"].isfinite().all()
