"""The variance of an objective's loss, and of its gradient, over draws of t and masks, on one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from dlm_ray.evaluation.trained import stack, visibility_of
from torch import Tensor, nn

from dlm_ray.data.reading import DataSequence
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.denoiser import Batch, Objective
from dlm_ray.diffusion.draws import DrawKey, maskable_positions
from dlm_ray.generation.text_model import TextModel


def draw_variances(
    model: TextModel,
    objective: Objective,
    sequences: Sequence[DataSequence],
    *,
    num_losses: int,
    num_gradients: int,
    seed: int,
) -> dict[str, float]:
    """Return unbiased variances over training draws of one batch, in (nats per token)^2.

    Args:
        model: the trained network.
        objective: the objective as it was trained, which may differ from the one that scores.
        sequences: the batch.
        num_losses, num_gradients: the number of draws for either variance, at least 2.
        seed: seed of the draws.

    Returns:
        nelbo_variance: the variance of the loss per token. gradient_variance: the sum over the network's parameters
            of the
        variance of each component of the gradient (MD4, Eq. 9).
    """
    copies = objective.draws_per_sequence
    x_0, document_ids = (array.repeat(copies, axis=0) for array in stack(sequences))
    x_0, document_ids = likelihood.pad_to_blocks(objective, x_0, document_ids)
    maskable, visibility = maskable_positions(document_ids), visibility_of(model)(document_ids)

    def losses(step: int) -> tuple[Tensor, float]:
        """Return the loss to differentiate and the estimate of the bound, both per token."""
        draw = objective.draw(DrawKey(seed, step, range(len(x_0)), len(x_0)), x_0, maskable)
        batch = Batch(torch.from_numpy(x_0).to(model.device), draw.to(model.device), visibility)
        result, count = objective(model.denoiser, batch), max(1, objective.count(draw))
        bound = float(result.by_token.get("bound", result.weighted_sum.detach()))
        return result.total(count, draw.num_maskable) / count, bound / count

    with torch.no_grad():
        bounds = [losses(step)[1] for step in range(num_losses)]
    steps = range(num_losses, num_losses + num_gradients)
    return {
        "nelbo_variance": float(np.var(bounds, ddof=1)),
        "gradient_variance": _gradient_variance(model.denoiser, lambda step: losses(step)[0], steps),
    }


def _gradient_variance(denoiser: nn.Module, loss: Callable[[int], Tensor], steps: range) -> float:
    """Return the sum over the parameters of the variance of the gradient of `loss(step)` over steps."""
    parameters = [parameter.requires_grad_() for parameter in denoiser.parameters()]
    sums, squares = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    for step in steps:
        gradients = torch.autograd.grad(loss(step), parameters, allow_unused=True)
        for total, square, gradient in zip(sums, squares, gradients, strict=True):
            if gradient is not None:
                total += gradient
                square += gradient**2
    for parameter in parameters:
        parameter.requires_grad_(False)
    centred = (square - total**2 / len(steps) for total, square in zip(sums, squares, strict=True))
    return sum(float(part.sum()) for part in centred) / (len(steps) - 1)
