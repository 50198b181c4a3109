"""How much an objective's estimate, and its gradient, vary over draws of t and masks, given the rows and the network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import DrawKey, maskable_positions
from dlm_ray.diffusion.visibility import Visibility, documents_apart


def over_draws(
    denoiser: Any, objective: Any, rows: Any, *, document_mask: bool, num_losses: int, num_gradients: int, seed: int
) -> dict[str, float]:
    """Variances over training draws of one batch of `rows`, in nats a token squared.

    Args:
        denoiser, objective: of a trained run; the objective as it was trained with, not the one that scores.
        rows: of the data.
        document_mask: of the run.
        num_losses, num_gradients: draws for either.
        seed: of the draws.

    Returns:
        nelbo_variance: of the loss a token; gradient_variance: sum over parameters of the variance of each component of its gradient
        (MD4, Eq. 9), unbiased, of the network's own parameters.
    """
    copies = objective.draws_per_sequence
    x_0 = np.stack([row.input_ids for row in rows]).astype(np.int64).repeat(copies, axis=0)
    document_ids = np.stack([row.document_ids for row in rows]).astype(np.int32).repeat(copies, axis=0)
    x_0, document_ids = likelihood.pad_to_blocks(objective, x_0, document_ids)
    maskable = maskable_positions(document_ids)
    device = next(denoiser.parameters()).device
    pattern = "causal" if objective.is_causal else "bidirectional"
    visible = Visibility(pattern, document_ids=documents_apart(document_ids, document_mask, device))

    def loss(step: int) -> tuple[torch.Tensor, float]:
        """What is differentiated, and the estimate of the bound, a token."""
        draw = objective.draw(DrawKey(seed, step, range(len(x_0)), len(x_0)), x_0, maskable)
        result = objective(denoiser, Batch(torch.from_numpy(x_0).to(device), draw.to(device), visible))
        count = max(1, objective.count(draw))
        return result.total(count, draw.num_maskable) / count, float(
            result.by_token.get("bound", result.weighted_sum.detach())
        ) / count

    with torch.no_grad():
        losses = [loss(step)[1] for step in range(num_losses)]
    parameters = [parameter.requires_grad_() for parameter in denoiser.parameters()]
    total, squares = (([torch.zeros_like(parameter) for parameter in parameters]) for _ in range(2))
    for step in range(num_losses, num_losses + num_gradients):
        gradients = torch.autograd.grad(loss(step)[0], parameters, allow_unused=True)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                total[i] += gradient
                squares[i] += gradient**2
    variance = sum(
        float((square - whole**2 / num_gradients).sum()) for square, whole in zip(squares, total, strict=True)
    )
    for parameter in parameters:
        parameter.requires_grad_(False)
    return {"nelbo_variance": float(np.var(losses, ddof=1)), "gradient_variance": variance / (num_gradients - 1)}
