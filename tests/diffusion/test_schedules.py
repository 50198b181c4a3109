"""Every schedule: end points, the derivative, and a weight that stays finite and right near both ends in float32."""

import math

import pytest
import torch

from dlm_ray.diffusion.schedules import (
    NAMES,
    Cosine,
    Geometric,
    Polynomial,
    Shifted,
    build,
    prior_nats,
    reconstruction_nats,
)

SCHEDULES = [build(name, 3.0 if name == "polynomial" else None) for name in NAMES]
SHIFTED = [Shifted(schedule, 1e-4, 1e-3) for schedule in SCHEDULES]


ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_clean_at_0_and_all_masked_at_1(schedule):
    expected = [math.exp(-1e-5), math.exp(-20)] if isinstance(schedule, Geometric) else [1.0, 0.0]
    assert torch.allclose(schedule.alpha(ENDS), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("schedule", SHIFTED, ids=str)
def test_shifted_ends_are_where_they_are_asked_for(schedule):
    inner = schedule.schedule.alpha(ENDS)
    expected = torch.stack([inner[0] - 1e-4 * inner[0] - 1e-3 * inner[0] + 1e-3, 1e-3 + (1 - 1.1e-3) * inner[1]])
    assert torch.allclose(schedule.alpha(ENDS), expected, atol=1e-15)
    assert schedule.mask_probability(ENDS)[0].item() == pytest.approx(1 - schedule.alpha(ENDS)[0].item(), abs=1e-15)


def test_what_the_ends_cost_is_a_share_of_ln_v():
    schedule = Shifted(Polynomial(), 1e-4, 1e-3)
    assert reconstruction_nats(schedule, 27) == pytest.approx(1e-4 * math.log(27))
    assert prior_nats(schedule, 27) == pytest.approx(1e-3 * math.log(27))
    assert reconstruction_nats(Polynomial(), 27) == prior_nats(Polynomial(), 27) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES + SHIFTED, ids=str)
def test_alpha_prime_is_the_derivative(schedule):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    numerical = (schedule.alpha(t + 1e-5) - schedule.alpha(t - 1e-5)) / 2e-5
    assert torch.allclose(schedule.alpha_prime(t), numerical, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES + SHIFTED, ids=str)
@pytest.mark.parametrize("t", [1e-6, 0.3, 1 - 1e-6])
def test_weight_in_float32_is_the_ratio_in_float64(schedule, t):
    single = torch.tensor(t, dtype=torch.float32)
    exact = single.double()  # near 1 the rounding of t itself is not small beside 1 - t
    ratio = -schedule.alpha_prime(exact) / schedule.mask_probability(exact)
    weight = schedule.weight(single)
    assert torch.isfinite(weight) and weight >= 0
    assert weight.item() == pytest.approx(ratio.item(), rel=1e-4, abs=1e-12)
    assert schedule.alpha(single).item() == pytest.approx(schedule.alpha(exact).item(), rel=1e-4)
    assert schedule.mask_probability(exact).item() == pytest.approx(1 - schedule.alpha(exact).item(), abs=1e-12)


def test_cosine_is_the_papers_formula():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(Cosine().alpha(t), 1 - torch.cos(math.pi / 2 * (1 - t)))


def test_an_unknown_name_says_what_is_allowed():
    with pytest.raises(ValueError, match="linear, polynomial, cosine"):
        build("geometrc")
