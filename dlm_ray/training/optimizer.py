"""AdamW, its parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from dlm_ray.config.recipe import Optimizer


def learning_rate(recipe: Optimizer, step: int, num_steps: int) -> float:
    """Return the learning rate of `step` (counted from 0) in a run of `num_steps`: warm-up, then the schedule."""
    floor = recipe.learning_rate * recipe.min_lr_ratio
    warmup = recipe.num_warmup_steps(num_steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.lr_schedule == "constant":
        return recipe.learning_rate
    if recipe.lr_schedule in ("linear", "warmup_stable_decay"):
        remaining = (num_steps - step) / recipe.num_decay_steps(num_steps)
        return floor + (recipe.learning_rate - floor) * min(1.0, remaining)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return floor + (recipe.learning_rate - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def build(recipe: Optimizer, root: nn.Module) -> torch.optim.AdamW:
    """Return AdamW over every parameter of `root`, with its state allocated for a checkpoint to fill.

    Weight decay applies to matrices, but not to embeddings, norms, biases and the parameters of the objective.
    """
    embeddings = {id(module.weight) for module in root.modules() if isinstance(module, nn.Embedding)}
    decayed, undecayed, of_objective = [], [], []
    for name, parameter in root.named_parameters():
        if name.startswith("objective."):
            of_objective.append(parameter)
        elif parameter.ndim > 1 and id(parameter) not in embeddings:
            decayed.append(parameter)
        else:
            undecayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
        {"params": of_objective, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.epsilon,
        foreach=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of updates taken, which AdamW's bias correction needs after a resume."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
