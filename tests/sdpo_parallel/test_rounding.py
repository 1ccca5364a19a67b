"""Stochastic rounding to bfloat16: right in the mean, and a function of the weight alone."""

import torch
from torch import Tensor

from sdpo_parallel.rounding import cast


def rounded(weight: Tensor) -> Tensor:
    return cast(weight, torch.bfloat16, "stochastic")


def test_what_bfloat16_holds_stays_as_it_is():
    held = torch.randn(10_000).bfloat16()
    assert torch.equal(rounded(held.float()), held)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.0, -3.0])
    assert torch.equal(rounded(special), special.bfloat16())
    assert rounded(torch.tensor([torch.nan])).isnan().all()


def test_each_weight_goes_to_one_of_its_two_neighbours():
    weight = torch.randn(50_000)
    out = rounded(weight).float()
    down = (weight.view(torch.int32) & ~0xFFFF).view(torch.float32)  # towards zero
    up = ((weight.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    assert ((out == down) | (out == up)).all() and (out != down).any() and (out != up).any()
    assert torch.equal(rounded(weight), rounded(weight.clone()))
    half = rounded(weight[::2])  # whatever else is in the tensor
    assert torch.equal(half, rounded(weight)[::2])


def test_an_update_below_the_last_digit_is_kept_in_the_mean_and_lost_to_the_nearest():
    base = torch.randn(200_000).bfloat16().float()
    update = base.abs() * 2.0**-11  # a sixteenth to an eighth of the last digit
    trained = base + update
    assert torch.equal(trained.bfloat16().float(), base)
    for sign in (1, -1):
        kept = (rounded(base + sign * update).float() - base).sum() / (sign * update.sum())
        assert abs(kept - 1) < 0.03, kept  # three deviations of 200,000 draws


def test_the_share_that_goes_up_is_the_place_between_neighbours():
    """Over mantissas, signs and exponents: 64 places, 4,000 weights each."""
    generator = torch.Generator().manual_seed(0)
    high = torch.randint(0x2000, 0x7000, (4000,), generator=generator, dtype=torch.int32) << 16
    sign = torch.randint(0, 2, (4000,), generator=generator, dtype=torch.int32) * -(2**31)
    for low in range(512, 0x10000, 1024):
        weight = ((high | low) | sign).view(torch.float32)
        up = (rounded(weight).view(torch.int16) != (weight.view(torch.int32) >> 16).short()).float()
        share, deviation = low / 2**16, (low / 2**16 * (1 - low / 2**16) / 4000) ** 0.5
        assert abs(up.mean() - share) < 5 * deviation, (low, up.mean())


def test_other_casts_are_to_the_nearest():
    weight = torch.randn(1000)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert torch.equal(cast(weight, dtype, "stochastic"), weight.to(dtype))
    assert torch.equal(cast(weight, torch.bfloat16, "nearest"), weight.bfloat16())
