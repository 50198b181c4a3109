"""Every schedule: end points, the derivative, and a weight that stays finite and right near both ends in float32."""

import math

import pytest
import torch

from dlm_ray.diffusion.schedules import Cosine, Polynomial, build

SCHEDULES = [Polynomial(1.0), Polynomial(2.0), Polynomial(0.5), Cosine()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_clean_at_0_and_all_masked_at_1(schedule):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(schedule.alpha(ends), torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_alpha_prime_is_the_derivative(schedule):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    numerical = (schedule.alpha(t + 1e-6) - schedule.alpha(t - 1e-6)) / 2e-6
    assert torch.allclose(schedule.alpha_prime(t), numerical, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("t", [1e-6, 0.3, 1 - 1e-6])
def test_weight_in_float32_is_the_ratio_in_float64(schedule, t):
    exact = torch.tensor(t, dtype=torch.float64)
    ratio = -schedule.alpha_prime(exact) / (1 - schedule.alpha(exact))
    weight = schedule.weight(torch.tensor(t, dtype=torch.float32))
    assert torch.isfinite(weight)
    assert weight.item() == pytest.approx(ratio.item(), rel=1e-4, abs=2e-6)
    assert schedule.mask_probability(exact).item() == pytest.approx(1 - schedule.alpha(exact).item(), abs=1e-12)


def test_cosine_is_the_papers_formula():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(Cosine().alpha(t), 1 - torch.cos(math.pi / 2 * (1 - t)))


def test_an_unknown_name_says_what_is_allowed():
    with pytest.raises(ValueError, match="linear, polynomial, cosine"):
        build("geometrc")
