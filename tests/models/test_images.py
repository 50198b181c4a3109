"""Nothing in `diffusion` knows text: masked diffusion of 8 x 8 images, as rows of 64 grey levels."""

import math

import numpy as np
import pytest
import torch

from dlm_ray.config.recipe import Architecture
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import DrawKey
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.diffusion.samplers.rules import Ancestral, Canvas
from dlm_ray.diffusion.samplers.whole_canvas import sample
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.models import families, parallel

pytestmark = pytest.mark.long

SIDE, LEVELS = 8, 4
FULL = Visibility("bidirectional")


def images(count, seed):
    """A bright square on a dark ground: its place, its size and both grey levels by chance."""
    random = np.random.default_rng(seed)
    made = np.empty((count, SIDE, SIDE), dtype=np.int64)
    for image in made:
        dark, bright = sorted(random.choice(LEVELS, 2, replace=False))
        size = random.integers(3, 6)
        x, y = random.integers(0, SIDE - size + 1, 2)
        image[:] = dark
        image[x : x + size, y : y + size] = bright
    return made.reshape(count, -1)


def test_masked_diffusion_learns_images_and_samples_them():
    config = families.scratch_config(
        Architecture(width=48, num_layers=2, num_heads=4, max_positions=64), LEVELS + 1, 0, 0
    )
    denoiser = parallel.build(config, LEVELS, shift=False)
    parallel.materialize(denoiser, torch.device("cpu"))
    parallel.initialize(denoiser, 0)
    objective, rows, maskable = Masked(), 24, np.ones((24, SIDE * SIDE), dtype=bool)  # every pixel, the first too
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=6e-3, betas=(0.9, 0.98))
    bounds = []
    for step in range(90):
        x_0 = images(rows, step)
        draw = objective.draw(DrawKey(0, step, range(rows), rows), x_0, maskable)
        loss = objective(denoiser, Batch(torch.from_numpy(x_0), draw, FULL)).weighted_sum / draw.num_maskable
        bounds.append(loss.item() / math.log(2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # 2 levels, a position and a size are 10.4 bits for 64 pixels; independent pixels are 2 bits each.
    assert 1.8 < bounds[0] < 3.0 and np.mean(bounds[-20:]) < 1.0
    num_samples = 32
    empty = Canvas(
        torch.zeros(num_samples, SIDE * SIDE, dtype=torch.long), torch.ones(num_samples, SIDE * SIDE, dtype=torch.bool)
    )
    drawn = sample(denoiser, empty, Ancestral(Polynomial()), FULL, num_steps=64, seed=0).ids
    levels = np.array([len(set(image.tolist())) for image in drawn])
    shuffled = np.array([len(set(image.tolist())) for image in torch.randint(0, LEVELS, drawn.shape)])
    assert levels.mean() < 3.2 < shuffled.mean()
