"""The learning rate over a run, what is decayed, and the average of the weights."""

import math

import pytest
import torch

from dlm_ray.config.recipe import Optimizer
from dlm_ray.training.ema import Ema
from dlm_ray.training.optimizer import build, learning_rate


def rates(num_steps=100, **fields):
    recipe = Optimizer(learning_rate=1.0, **fields)
    return [learning_rate(recipe, step, num_steps) for step in range(num_steps)]


def test_warm_up_is_linear_and_reaches_the_rate():
    assert rates(warmup_steps=10, lr_schedule="constant")[:11] == pytest.approx(
        [0.1 * (i + 1) for i in range(10)] + [1.0]
    )


def test_cosine_falls_to_the_final_ratio():
    values = rates(warmup_steps=10, lr_schedule="cosine", min_lr_ratio=0.1)
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert values[-1] == pytest.approx(0.1, abs=1e-3)


def test_warmup_stable_decay_is_flat_and_then_linear():
    values = rates(warmup_steps=10, lr_schedule="warmup_stable_decay", decay_steps=20)
    assert values[10:80] == [1.0] * 70 and values[80] == 1.0
    assert values[90] == pytest.approx(0.5) and values[99] == pytest.approx(0.05)


def test_linear_falls_from_the_warm_up_to_the_final_ratio():
    values = rates(warmup_share=0.1, lr_schedule="linear", min_lr_ratio=0.1)
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert values[10] == 1.0 and values[55] == pytest.approx(0.1 + 0.9 * 45 / 90)
    assert values[99] == pytest.approx(0.1 + 0.9 / 90)


@pytest.mark.parametrize("num_steps", [40, 100])
def test_lengths_given_as_shares_are_the_same_lengths_in_steps(num_steps):
    shares = rates(num_steps, warmup_share=0.1, lr_schedule="warmup_stable_decay", decay_share=0.2)
    steps = {"warmup_steps": num_steps // 10, "decay_steps": num_steps // 5}
    assert shares == rates(num_steps, lr_schedule="warmup_stable_decay", **steps)


def test_only_matrices_are_decayed():
    network = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    decayed, rest = build(Optimizer(weight_decay=0.3), network).param_groups
    assert decayed["weight_decay"] == 0.3 and [p is network[1].weight for p in decayed["params"]] == [True]
    assert rest["weight_decay"] == 0.0 and len(rest["params"]) == 4


def test_the_average_follows_its_recursion_with_warm_up_and_swaps_back():
    layer = torch.nn.Linear(1, 1, bias=False)
    ema, expected = Ema(layer, 0.5), layer.weight.item()
    for n in range(12):
        with torch.no_grad():
            layer.weight.fill_(float(n))
        ema.update(n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert ema.averages["weight"].item() == pytest.approx(expected, rel=1e-6)
    with ema.swapped_in():
        assert layer.weight.item() == pytest.approx(expected, rel=1e-6)
    assert layer.weight.item() == 11.0
