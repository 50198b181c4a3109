"""The walk "Follow one batch" of dlm_ray/README.md in this process: from a recipe to text, one stop after another."""

import numpy as np
import torch
from helpers.recipes import tiny_recipe

from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import open_sources
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.generation.loading import load
from dlm_ray.training import loop
from dlm_ray.training.step import micro_batches


def test_one_batch_from_the_shard_to_the_sample(data_folder, tmp_path):
    recipe = tiny_recipe(data_folder, curriculum__annealing={"pattern": "bernoulli", "steps": 4})

    # Shard -> row: the order says which, the stream reads them.
    [index] = open_sources(recipe.data.sources)
    order = Order([index], [1.0], recipe.seed, recipe.data.window_shards)
    share = {"global_batch_size": recipe.training.global_batch_size, "rank": 0, "world_size": 1, "num_steps": 1}
    [(rows, cursor)] = loop.local_stream(recipe.data.sources, order, Cursor.start(1), **share)
    assert cursor.num_sequences == len(rows) == 12 and rows[0].input_ids.shape == (32,)

    # Row -> mask: t and masks of the step, and who sees whom while attention is annealed.
    batches = micro_batches(recipe, Masked(), rows, 0, 0, 1, torch.device("cpu"))
    assert len(batches) == 2 and batches[0].x_0.shape == (6, 32)
    assert not batches[0].draw.is_masked[:, 0].any() and batches[0].draw.is_masked.any()
    visible = batches[0].visibility.dense(32, torch.device("cpu"))
    future = np.triu(np.ones((32, 32), dtype=bool), 1)
    assert 0 < visible[0, 0].numpy()[future].mean() < 0.5

    # Mask -> loss -> checkpoint: the whole run.
    result = loop.fit(recipe, tmp_path / "run")
    assert result["step"] == 8

    # Checkpoint -> bound -> sample.
    model = load(result["checkpoint"])
    assert model.bits_per_byte(data_folder, max_sequences=8, draws_per_sequence=2)["is_bound"]
    assert len(model.sample("the model", num_samples=2, length_tokens=8, steps=4)) == 2
