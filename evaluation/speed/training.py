"""The speed of training steps of every objective, as ratios in one run.

All objectives train the same network with the same head, optimizer and data; the autoregressive (AR) network attends
causally without a mask. `train` compares masked and block diffusion with AR, and block diffusion with BD3-LM's
implementation (`reference.py`); `objectives` compares the other objectives with the masked one. The ratio to AR is
also divided by the ratio of FLOPs, and the rate by the machine's own matrix-product rate, so that the cost of the
arithmetic and of the implementation show apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from dlm_ray.evaluation.speed.networks import (
    BLOCK_TOKENS,
    CLIP_BETA,
    CLIP_OMEGA,
    Shape,
    build_root,
    network_of,
    single_process_group,
    training_recipe,
)
from dlm_ray.evaluation.speed.reference import ReferenceBlock
from dlm_ray.evaluation.speed.timing import interleaved, paired_ratios, timed

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.data.reading import DataSequence
from dlm_ray.training import optimizer as optimization
from dlm_ray.training import setup
from dlm_ray.training.metrics import flops_per_token
from dlm_ray.training.step import micro_batches, train_step

COMPARED = {
    "train": ("autoregressive", "masked", "block", "block, two passes", "block, reference"),
    "objectives": ("masked", "sedd", "genmd4", "d3pm", "tauldr", "ssd_lm"),
}
_MATRIX_PRODUCT = "matrix product"


def measure(what: str, shape: Shape, repetitions: int, device: torch.device) -> JsonObject:
    """Measure training steps of the objectives of COMPARED[what], interleaved, in tokens/s and as ratios.

    A step covers everything between sequences and updated weights: draws, forward, backward, clipping and AdamW, in
    one FSDP2 process.
    """
    with single_process_group(device):
        steps = {name: training_step(shape, name, device) for name in COMPARED[what]}
        cases: dict[str, Callable[[int], float]] = {_MATRIX_PRODUCT: lambda number: _matrix_product_seconds(device)}
        for name, step in steps.items():
            cases[name] = lambda number, step=step: timed(lambda: step(number), device)  # type: ignore[misc]
        seconds = interleaved(cases, repetitions)
    peak_flops = _matrix_product_flops(device) / min(seconds.pop(_MATRIX_PRODUCT))
    tokens = shape.batch_size * shape.sequence_length
    rates = {name: round(tokens / statistics.median(times), 1) for name, times in seconds.items()}
    ratios = _ratios_to_ar(shape, rates, peak_flops) if what == "train" else _ratios_to_masked(seconds)
    return {
        "repetitions": repetitions,
        "tokens_per_second": rates,
        "seconds": {name: [round(value, 4) for value in times] for name, times in seconds.items()},
        **ratios,
    }


def training_step(shape: Shape, name: str, device: torch.device) -> Callable[[int], None]:
    """Return a function that runs the training step of a given number on random tokens.

    Args:
        shape: the network and its batch.
        name: the objective, or one of the variants of `block` in COMPARED.
        device: where it trains.
    """
    recipe = training_recipe(shape, name.partition(",")[0])
    network = network_of(recipe, shape.vocab_size)
    objective = _variant(name, setup.build_objective(recipe, network, shape.sequence_length))
    root = build_root(recipe, network, objective, device)
    optimizer = optimization.build(recipe.optimizer, root)
    random = np.random.default_rng(0)
    zeros = np.zeros(shape.sequence_length, dtype=np.int32)  # one document per sequence
    sequences = [
        DataSequence(random.integers(0, shape.vocab_size, shape.sequence_length), zeros, zeros, source=0, chunk=0)
        for _ in range(shape.batch_size)
    ]

    def step(number: int) -> None:
        batches = micro_batches(recipe, objective, sequences, number, 0, 1, device)
        train_step(root, objective, optimizer, batches, 1.0, None)

    return step


def _variant(name: str, objective: Any) -> Any:
    """Return the objective, or the variant of block diffusion that the name says."""
    if name == "block, two passes":
        objective.passes = "two"
    if name == "block, reference":
        return ReferenceBlock(objective.process, block_tokens=objective.block_tokens)
    return objective


def _matrix_product_shape(device: torch.device) -> tuple[int, torch.dtype]:
    """Return size and precision of the square matrices whose product shows the machine's peak rate."""
    return (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)


def _matrix_product_flops(device: torch.device) -> int:
    """Return the floating-point operations of one matrix product."""
    size, _ = _matrix_product_shape(device)
    return 2 * size**3


def _matrix_product_seconds(device: torch.device) -> float:
    """Return the seconds of a large matrix product in the precision of the training steps, the best of three."""
    size, dtype = _matrix_product_shape(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return min(timed(lambda: a @ b, device) for _ in range(3))


def _training_flops(shape: Shape) -> dict[str, float]:
    """Return the FLOPs per token that each objective needs at least."""
    gated = -(-8 * shape.width // 3 // 64) * 64  # width of the feed-forward layer
    sizes = {
        "body_parameters": shape.num_layers * (4 * shape.width**2 + 3 * shape.width * gated),
        "width": shape.width,
        "num_layers": shape.num_layers,
        "num_positions": shape.sequence_length,
        "vocab_size": shape.vocab_size,
    }
    scored = (shape.sequence_length - 1) / shape.sequence_length  # the start token is not scored
    two_halves = {**sizes, "body_parameters": 2 * sizes["body_parameters"]}  # x_t and x_0
    return {
        "autoregressive": flops_per_token(**sizes, scored_share=scored, visible_share=0.5),
        "masked": flops_per_token(**sizes, scored_share=scored / 2, visible_share=1.0),
        "block": flops_per_token(
            **two_halves,
            scored_share=scored * (CLIP_BETA + CLIP_OMEGA) / 2,
            visible_share=1 + BLOCK_TOKENS / shape.sequence_length,
        ),
    }


def _ratios_to_ar(shape: Shape, rates: Mapping[str, float], peak_flops: float) -> JsonObject:
    """Return each rate over AR's, the ratio that the FLOPs allow, and the share of the machine's peak rate."""
    flops = _training_flops(shape)
    ratios = {name: rate / rates["autoregressive"] for name, rate in rates.items()}
    allowed = {name: flops["autoregressive"] / value for name, value in flops.items()}
    return {
        "ratio_to_ar": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "ratio_that_flops_allow": {name: round(ratio, 3) for name, ratio in allowed.items()},
        "share_of_the_allowed_ratio": {name: round(ratios[name] / ratio, 3) for name, ratio in allowed.items()},
        "block_over_reference": round(rates["block"] / rates["block, reference"], 3),
        "block_over_two_passes": round(rates["block"] / rates["block, two passes"], 3),
        "matrix_product_gflops": round(peak_flops / 1e9, 1),
        "fraction_of_matrix_product_peak": {
            name: round(rates[name] * value / peak_flops, 3) for name, value in flops.items()
        },
    }


def _ratios_to_masked(seconds: Mapping[str, Sequence[float]]) -> JsonObject:
    """Return the median and the quartiles, over rounds, of each step time relative to the masked objective's."""
    ratios = {name: paired_ratios(times, seconds["masked"]) for name, times in seconds.items()}
    return {
        "step_time_relative_to_masked": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "quartiles": {
            name: [round(edge, 3) for edge in statistics.quantiles(values, n=4)] for name, values in ratios.items()
        },
    }
