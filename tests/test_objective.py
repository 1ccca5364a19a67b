"""Objectives against plain autograd of the paper's formulas in float64."""

import math

import pytest
import torch

from helpers.oracle import assert_as_good_as
from sdpo.errors import SdpoError
from sdpo.objective import (
    DPO,
    JSD,
    SFT,
    ForwardKL,
    Layout,
    ReverseKL,
    SampledToken,
    Streams,
    TopKReverseKL,
    token_weights,
    total_loss,
)
from sdpo_kernels.reference import policy_gradient
from sdpo_kernels.sampled_token import centred

LENGTHS = [4, 1, 6, 2]
WEIGHTS = [0.5, 0.125, 0.25, 0.125]
N, V, D = sum(LENGTHS), 37, 9


def setup(dtype=torch.float64):
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, D, dtype=dtype) * 1.5).requires_grad_()
    hindsight = hidden.detach() + 0.3 * torch.randn(N, D, dtype=dtype)
    targets = torch.randint(V, (N,))
    streams = Streams(hidden, weight, hindsight, None, targets)
    layout = Layout(
        sequence_N=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        offset_N=torch.cat([torch.arange(n) for n in LENGTHS]),
        weight_S=torch.tensor(WEIGHTS, dtype=dtype),
        old_logp_N=-3 * torch.rand(N, dtype=dtype),
    )
    return streams, layout


def logps(streams, temperature=1.0):
    logp = torch.log_softmax(streams.hidden @ streams.lm_head_weight.T, -1)
    logits = streams.hindsight_hidden @ streams.lm_head_weight.detach().T
    return logp, torch.log_softmax(logits / temperature, -1)


def paper(streams, ignore_first=0, centre=False):
    """Weighted mean over sequences of mean over tokens of -sg(log q - log p) log p, as loops."""
    logp, logq = logps(streams)
    total, start = 0.0, 0
    for length, weight in zip(LENGTHS, WEIGHTS, strict=True):
        rows = slice(start, start + length)
        y = streams.targets[rows]
        p, q = (lp[rows].gather(1, y[:, None])[:, 0][ignore_first:] for lp in (logp, logq))
        advantage = (q - p).detach()
        if centre and len(advantage):
            advantage = advantage - advantage.mean()
        if len(p):
            total = total + weight * (-advantage * p).mean()
        start += length
    return total


def kl_mean(streams, per_token, temperature=1.0):
    logp, logq = logps(streams, temperature)
    values = per_token(logp, logq).split(LENGTHS)
    return sum(w * v.mean() for w, v in zip(WEIGHTS, values, strict=True))


def mixture_jsd(logp, logq, beta):
    m = beta * logq.exp() + (1 - beta) * logp.exp()
    to_q = (logq.exp() * (logq - m.log())).sum(-1)
    to_p = (logp.exp() * (logp - m.log())).sum(-1)
    return beta * to_q + (1 - beta) * to_p


def topk(logp, logq, k):
    """Over the k likeliest tokens under p, and one bucket for what they leave."""
    index = logp.topk(k).indices
    logp, logq = logp.gather(-1, index), logq.gather(-1, index)
    p_rest, q_rest = (1 - t.exp().sum(-1) for t in (logp, logq))
    apart = (logp.exp() * (logp - logq)).sum(-1)
    return apart + p_rest * (p_rest.log() - q_rest.log())


def log_ratios(streams, ignore_first=0):
    """Of each sequence, log p - log q of its tokens, summed."""
    at_y = (lp.gather(1, streams.targets[:, None])[:, 0] for lp in logps(streams))
    p, q = (lp.split(LENGTHS) for lp in at_y)
    return [(a[ignore_first:] - b[ignore_first:]).sum() for a, b in zip(p, q, strict=True)]


def dpo(streams, beta=0.1, smoothing=0.0, ignore_first=0):
    """Sequences 0 and 2 are preferred to 1 and 3."""
    ratio, total = log_ratios(streams, ignore_first), 0.0
    for i in (0, 2):
        p = torch.sigmoid(beta * (ratio[i] - ratio[i + 1]))
        total = total - WEIGHTS[i] * ((1 - smoothing) * p.log() + smoothing * (1 - p).log())
    return total


def sft(streams, ignore_first=0):
    logp = logps(streams)[0].gather(1, streams.targets[:, None])[:, 0].split(LENGTHS)
    means = [lp[ignore_first:].mean() if len(lp) > ignore_first else 0.0 for lp in logp]
    return -sum(w * m for w, m in zip(WEIGHTS, means, strict=True))


CASES = {
    "sampled": (SampledToken(), paper),
    "ignore first": (SampledToken(ignore_first=2), lambda s: paper(s, ignore_first=2)),
    "centred": (SampledToken(centre=True), lambda s: paper(s, centre=True)),
    "centred, ignore first": (
        SampledToken(centre=True, ignore_first=1),
        lambda s: paper(s, ignore_first=1, centre=True),
    ),
    "reverse": (ReverseKL(), lambda s: kl_mean(s, lambda p, q: (p.exp() * (p - q)).sum(-1))),
    "reverse, sharper hindsight": (
        ReverseKL(hindsight_temperature=0.7),
        lambda s: kl_mean(s, lambda p, q: (p.exp() * (p - q)).sum(-1), 0.7),
    ),
    "forward": (ForwardKL(), lambda s: kl_mean(s, lambda p, q: (q.exp() * (q - p)).sum(-1))),
    "jsd": (JSD(beta=0.3), lambda s: kl_mean(s, lambda p, q: mixture_jsd(p, q, 0.3))),
    "top k": (TopKReverseKL(k=5), lambda s: kl_mean(s, lambda p, q: topk(p, q, 5))),
    "top 20": (TopKReverseKL(), lambda s: kl_mean(s, lambda p, q: topk(p, q, 20))),
    "top 1": (TopKReverseKL(k=1), lambda s: kl_mean(s, lambda p, q: topk(p, q, 1))),
    "sft": (SFT(), sft),
    "sft, ignore first": (SFT(ignore_first=2), lambda s: sft(s, ignore_first=2)),
    "dpo": (DPO(), dpo),
    "dpo, smoothed": (
        DPO(beta=0.4, label_smoothing=0.2),
        lambda s: dpo(s, beta=0.4, smoothing=0.2),
    ),
    "dpo, ignore first": (DPO(ignore_first=1), lambda s: dpo(s, ignore_first=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_plain_autograd(name):
    objective, formula = CASES[name]
    streams, layout = setup()
    ours, _ = total_loss(objective, streams, layout)
    theirs = formula(streams)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    wrt = (streams.hidden, streams.lm_head_weight)
    for a, b in zip(torch.autograd.grad(ours, wrt), torch.autograd.grad(theirs, wrt), strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def other_mean(streams):
    """As the mean over all tokens would have it."""
    of_y = logps(streams)[0].gather(1, streams.targets[:, None])
    return -of_y.mean()


def without_reference(streams):
    return dpo(streams._replace(hindsight_hidden=torch.zeros_like(streams.hidden)))


MUTANTS = {
    "sft": (other_mean, lambda s: sft(s, ignore_first=1)),
    "dpo": (
        without_reference,
        lambda s: dpo(s, beta=-0.1),  # the wrong one preferred
        lambda s: dpo(s, beta=0.1001),
        lambda s: dpo(s, smoothing=0.01),
        lambda s: dpo(s, ignore_first=1),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_float32_is_as_good_as_plain_torch_and_mutants_are_not(name):
    objective, formula = CASES[name]
    exact, layout = setup()
    single = [t.detach().float() for t in exact[:3]]
    streams = exact._replace(hidden=single[0], lm_head_weight=single[1], hindsight_hidden=single[2])
    streams[0].requires_grad_(), streams[1].requires_grad_()
    exact = streams._replace(
        **{
            n: getattr(streams, n).detach().double().requires_grad_(n != "hindsight_hidden")
            for n in ("hidden", "lm_head_weight", "hindsight_hidden")
        }
    )
    layout = layout._replace(weight_S=layout.weight_S.float())

    def gradients(loss, at):
        return torch.autograd.grad(loss, at[:2])

    ours = gradients(total_loss(objective, streams, layout)[0], streams)
    plain = gradients(formula(streams), streams)
    truth = gradients(formula(exact), exact)
    wrong = [gradients(mutant(exact), exact) for mutant in MUTANTS[name]]
    for i, out in enumerate(ours):
        mutants = [each[i] for each in wrong]
        assert_as_good_as(out, truth[i], plain[i], k=3, mutants=mutants)


def test_the_policys_own_likelihood_is_all_that_sft_reads():
    streams, layout = setup()
    other = streams._replace(hindsight_hidden=torch.full_like(streams.hidden, float("nan")))
    a, b = (total_loss(SFT(), s, layout)[0] for s in (streams, other))
    assert torch.equal(a, b)


def test_at_the_reference_itself_each_pair_costs_log_2():
    streams, layout = setup()
    alike = streams._replace(hindsight_hidden=streams.hidden.detach())
    loss, _ = total_loss(DPO(), alike, layout)
    assert loss.item() == pytest.approx((WEIGHTS[0] + WEIGHTS[2]) * math.log(2), abs=1e-12)
    assert DPO().margins(torch.zeros(N, dtype=torch.float64), layout).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: DPO(beta=0.0), "beta must be positive, got 0.0"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing must lie in"),
        (lambda: DPO(hindsight_temperature=0.9), "DPO reads no hindsight"),
        (lambda: SFT(hindsight_temperature=0.9), "SFT reads no hindsight"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, told):
    with pytest.raises(SdpoError, match=told):
        make()


@pytest.mark.parametrize("name", ["reverse", "forward", "jsd", "top k", "sft", "dpo"])
def test_gradcheck(name):
    objective, _ = CASES[name]
    streams, layout = setup()
    head = streams.lm_head_weight.detach().clone()  # gradcheck perturbs the weight in place
    assert torch.autograd.gradcheck(
        lambda h, w: total_loss(
            objective,
            streams._replace(hidden=h, lm_head_weight=w, hindsight_lm_head_weight=head),
            layout,
        )[0],
        (streams.hidden, streams.lm_head_weight),
    )


@pytest.mark.parametrize("k", [V, V + 1, 10**6])
def test_the_top_k_of_the_whole_vocabulary_is_the_reverse_kl(k):
    streams, layout = setup()
    losses = [total_loss(o, streams, layout)[0] for o in (TopKReverseKL(k=k), ReverseKL())]
    ours, theirs = ([t, *torch.autograd.grad(t, streams[:2])] for t in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    fewer = [total_loss(TopKReverseKL(k=k), streams, layout)[0] for k in (1, 5, V - 2)]
    assert fewer == sorted(fewer) and fewer[-1] < theirs[0]


def test_the_top_k_objective_reads_the_statistics_of_the_whole_vocabulary():
    streams, layout = setup()
    of_k, of_all = (total_loss(o, streams, layout)[1] for o in (TopKReverseKL(k=2), ReverseKL()))
    torch.testing.assert_close(of_k, of_all)


def test_a_top_k_of_no_token_is_refused():
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            TopKReverseKL(k=k)


def test_gradcheck_of_the_sampled_token_loss_at_fixed_advantages():
    logp = (-torch.rand(N, dtype=torch.float64) - 0.1).requires_grad_()
    advantage, old = torch.randn(N, dtype=torch.float64), logp.detach() + 0.3
    for options in ({}, {"ppo_clip": 0.2}):
        assert torch.autograd.gradcheck(
            lambda x, o=options: policy_gradient(x, advantage, old, **o), logp
        )


def test_ppo_clip_is_the_clipped_surrogate():
    logp = torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    losses = policy_gradient(logp, advantage, torch.zeros(5, dtype=torch.float64), ppo_clip=0.2)
    ratio = logp.detach().exp()
    expected = [-1.0, -1.2, -ratio[2].item(), ratio[3].item(), 0.8]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(losses.sum(), logp)
    assert (gradient != 0).tolist() == [True, False, True, True, False]


def test_importance_clip_weights_by_a_constant_ratio():
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.5, -4.0])
    losses = policy_gradient(logp, torch.tensor([2.0, 2.0]), old, importance_clip=2.0)
    (gradient,) = torch.autograd.grad(losses.sum(), logp)
    torch.testing.assert_close(gradient, -2 * torch.tensor([0.5, 3.0]).exp().clamp(max=2.0))


def test_clips_without_old_logprobs_are_refused():
    streams, layout = setup()
    with pytest.raises(ValueError, match="completion_logprobs"):
        total_loss(SampledToken(ppo_clip=0.2), streams, layout._replace(old_logp_N=None))
    with pytest.raises(ValueError, match="set one of them"):
        SampledToken(ppo_clip=0.2, importance_clip=2.0)


def test_token_weights_are_a_mean_over_tokens_then_sequences():
    _, layout = setup()
    weights = token_weights(layout, ignore_first=2).split(LENGTHS)
    expected = [0, 0, 1 / 4, 1 / 4], [0], [0, 0, *[1 / 16] * 4], [0, 0]
    assert [w.tolist() for w in weights] == list(expected)


def test_centred_advantages_have_no_mean():
    _, layout = setup()
    counted = torch.ones(N, dtype=torch.bool)
    out = centred(torch.randn(N, dtype=torch.float64), layout.sequence_N, counted)
    assert all(abs(part.mean()) < 1e-12 for part in out.split(LENGTHS))


def test_an_empty_share_has_no_loss_and_zero_gradients():
    streams, layout = setup(torch.float32)
    of_tokens = ("hidden", "hindsight_hidden", "targets")
    empty = streams._replace(**{name: getattr(streams, name)[:0] for name in of_tokens})
    nothing = Layout(layout.sequence_N[:0], layout.offset_N[:0], layout.weight_S[:0])
    for objective, _ in CASES.values():
        loss, _ = total_loss(objective, empty, nothing)
        (gradient,) = torch.autograd.grad(loss, streams.lm_head_weight)
        assert loss == 0 and not gradient.any()


def test_hindsight_s_temperature_is_refused_under_a_softcap_and_at_zero():
    streams, layout = setup()
    with pytest.raises(SdpoError, match="capped"):
        total_loss(ReverseKL(hindsight_temperature=0.8), streams._replace(softcap=30.0), layout)
    with pytest.raises(SdpoError, match="positive"):
        ReverseKL(hindsight_temperature=0.0)
