"""Every combination of the settings that decide what is masked.

Refused before a run begins, or trained as each setting promises.
"""

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from helpers.recipes import tiny_recipe

from dlm_ray.config.objective import NAMES, Objective
from dlm_ray.config.recipe import Curriculum
from dlm_ray.data.identity import TokenizerIdentity
from dlm_ray.data.reading import DataSequence
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.models import families, parallel
from dlm_ray.training import clip_search, curriculum, optimizer, run, setup
from dlm_ray.training.step import TrainModule, micro_batches, train_step

pytestmark = pytest.mark.long

LENGTH, ROWS, VOCAB, K = 8, 3, 11, 4  # an odd number of rows; none of what is asked for divides it
CPU = torch.device("cpu")


class OwnObjective(Masked):
    """A custom class."""


CURRICULA = {
    "none": {},
    "annealed": {"annealing": {"pattern": "window", "steps": 2}},
    "staged": {"block_sizes": [{"block_tokens": 1, "steps": 1}]},
    "searched": {"clip_search": {"every_steps": 1, "sequences": 3, "draws": 1}},
    "all": {
        "annealing": {"pattern": "bernoulli", "steps": 2},
        "block_sizes": [{"block_tokens": 2, "steps": 1}],
        "clip_search": {"every_steps": 1, "sequences": 3, "draws": 1},
    },
}
GRID = {
    "name": (*NAMES, f"{__name__}:OwnObjective"),
    "mask_sampler": ("bernoulli", "count"),
    "num_timesteps": (None, 5),
    "clip": (None, {"beta": 0.3, "omega": 0.8}, {"beta": 0.45, "omega": 0.95, "weight": "paper", "enforce": "counts"}),
    "weight": ("elbo", "flat", "time"),
    "complementary": (False, True),
    "draws_per_sequence": (1, 2),
    "times": ("stratified", "antithetic", "independent", "paper"),
    "curriculum": tuple(CURRICULA),
}
# These take turns, or the grid would be thirty times as large.
TURNS = {
    "schedule": ({"name": "linear"}, {"name": "cosine", "epsilon_0": 1e-4, "epsilon_1": 1e-4}, {"name": "geometric"}),
    "context_weights": (None, 0.3),
    "normalize_by": ("all_tokens", "global_masked"),
    "context": ("clean", "noisy"),
    "shift": (True, False),
    "confidence_weight": (0.0, 0.5),
}


def settings():
    """Every point of the grid; one that takes turns is left out where the objective has no use for it."""
    turns = [dict(zip(TURNS, values, strict=True)) for values in itertools.product(*TURNS.values())]
    random.Random(0).shuffle(turns)
    for number, values in enumerate(itertools.product(*GRID.values())):
        yield dict(zip(GRID, values, strict=True)), turns[number % len(turns)]


def recipe_of(chosen, turn):
    """The recipe, and what is wrong with it."""
    keys = {key: value for key, value in chosen.items() if key != "curriculum"}
    for key, value in turn.items():
        kind = keys["name"] if keys["name"] in NAMES else OwnObjective.kind
        objective = Objective(**{"name": kind, "block_tokens": K if kind == "block" else None, key: value})
        if not objective.contradictions(False):
            keys[key] = value
    if keys["mask_sampler"] == "count":
        keys.pop("schedule", None)
    if keys["name"] == "block":
        keys["block_tokens"] = K
    if keys["name"] == "ssd_lm":
        keys |= {"simplex": {"block_tokens": 3, "num_timesteps": 20}}
    parts = {"objective": Objective(**keys), "curriculum": Curriculum(**CURRICULA[chosen["curriculum"]])}
    recipe = base_recipe().model_copy(update=parts)
    errors = recipe.contradictions()
    if keys["name"] not in NAMES:
        errors += recipe.objective.errors_of(OwnObjective.kind)
    return recipe, errors


@functools.cache
def base_recipe():
    return tiny_recipe(
        "nowhere",
        model__architecture={"width": 8, "num_layers": 1, "num_heads": 1, "max_positions": LENGTH},
        training={"steps": 3, "global_batch_size": ROWS, "micro_batch_size": 4},
        optimizer={"warmup_steps": 0},
    )


@functools.cache
def rows():
    """Two documents in a row, one in a row, and one that is padded: its last block has nothing to mask."""
    generator = np.random.default_rng(0)
    documents = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [1] * LENGTH, [1, 1, 2, 2, -1, -1, -1, -1]], dtype=np.int32)
    return [
        DataSequence(generator.integers(VOCAB, size=LENGTH, dtype=np.int32), ids, np.ones(LENGTH, np.int32), 0, 0)
        for ids in documents
    ]


@functools.cache
def networks(is_causal, shift):
    tokenizer = TokenizerIdentity(name="t", sha256="0", vocab_size=VOCAB, start_id=0, end_id=1)
    recipe = base_recipe().model_copy(update={"objective": Objective(shift=shift)})
    return setup.resolve(recipe, is_causal, tokenizer)


class InOneProcess(TrainModule):
    """The root without FSDP2."""

    def set_requires_gradient_sync(self, is_last):
        pass


def run_two_steps(recipe):
    """Trains two steps, with a search between them if the recipe has one; the draws of each, and the losses."""
    network = networks(setup.is_causal(recipe), recipe.objective.shift)
    objective = setup.build_objective(recipe, network, LENGTH)
    denoiser = parallel.build(families.read_config(network.config), network.mask_id, network.shift)
    parallel.materialize(denoiser, CPU)
    parallel.initialize(denoiser, 0)
    root = InOneProcess(denoiser, objective)
    adamw = optimizer.build(recipe.optimizer, root)
    draws, losses = [], []
    for step in range(2):
        if clip_search.is_due(recipe, step) and step:
            found = clip_search.search(recipe, root, objective, rows(), 0, 1, CPU)
            clip_search.apply(recipe, objective, (found[0].beta, found[0].omega))
        batches = micro_batches(recipe, objective, rows(), step, 0, 1, CPU)
        losses.append(train_step(root, objective, adamw, batches, 1.0, None).metrics())
        draws.append((step, [batch.draw for batch in batches], getattr(objective, "process", None)))
    assert all(math.isfinite(value) for metrics in losses for value in metrics.values()), losses
    assert all(bool(torch.isfinite(parameter).all()) for parameter in root.parameters())
    return draws


def assert_promises(recipe, step, parts, process):
    """The masked shares, pairs, times and weights of one step are those that the settings promise."""
    asked = recipe.objective
    copies = 2 if asked.name == "genmd4" else asked.draws_per_sequence
    size = (curriculum.block_tokens(recipe, step) if asked.name == "block" else None) or LENGTH
    is_masked = torch.cat([part.is_masked for part in parts]).numpy()
    maskable = torch.cat([part.maskable for part in parts]).numpy()
    t = torch.cat([part.t.reshape(len(part.maskable), -1) for part in parts]).numpy()
    weight = torch.cat([part.weight[: part.num_scored] for part in parts])
    assert len(is_masked) == ROWS * copies and bool(torch.isfinite(weight).all()) and bool((weight >= 0).all())
    if asked.name in ("autoregressive", "ssd_lm"):
        return
    assert not (is_masked & ~maskable).any()
    assert t.shape[1] == LENGTH // size
    if asked.name == "genmd4":
        assert (t[::2] == t[1::2]).all()
    blocks, can = is_masked.reshape(-1, size), maskable.reshape(-1, size)
    if asked.complementary:
        assert (is_masked[::2] ^ is_masked[1::2] == maskable[::2]).all() and (maskable[::2] == maskable[1::2]).all()
    if asked.mask_sampler == "count":
        assert (blocks.sum(1) >= can.any(1)).all()
    if process.clip is not None:
        beta, omega = process.clip.beta, process.clip.omega
        assert asked.clip is not None or recipe.curriculum.clip_search is not None
        assert (t >= beta - 1e-6).all() and (t <= omega + 1e-6).all()
        if process.clip.enforce == "counts":
            full = can.all(1)  # in others a whole number may not fit
            share = blocks.sum(1)[full] / size
            assert full.any() or size > 2
            assert (share >= (beta if beta > 1e-3 else 0) - 1e-6).all() and (share <= omega + 1e-6).all()
    assert process.clip is not None or asked.clip is None
    if process.num_timesteps is not None:
        assert np.allclose(t * process.num_timesteps, np.rint(t * process.num_timesteps), atol=1e-3) and (t > 0).all()
    elif asked.times != "independent" and process.clip is None and asked.name != "genmd4":
        own = t[::2] if asked.complementary else t  # one of every pair
        cells = np.floor(own.ravel().astype(np.float64) * own.size - 1e-5)
        if asked.times == "antithetic":  # a grid that begins anywhere
            gaps = np.diff(np.sort(own.ravel()))
            assert np.allclose(gaps, 1 / own.size, atol=1e-5)
        else:
            assert sorted(cells.clip(0)) == list(range(own.size))
    if asked.weight == "flat" and process.context_weights is None and asked.name in ("masked", "block"):
        assert (weight == 1).all()


def train_and_check(accepted):
    with run.process_group(base_recipe()):
        for recipe in accepted:
            try:
                for step, parts, process in run_two_steps(recipe):
                    assert_promises(recipe, step, parts, process)
            except Exception as error:
                named = (
                    recipe.objective.model_dump(exclude_defaults=True),
                    recipe.curriculum.model_dump(exclude_defaults=True),
                )
                raise AssertionError(f"accepted, and wrong: {named}: {error}") from error


def test_what_is_accepted_trains_as_it_promises_and_the_rest_is_refused_before_it_begins():
    """Every 41st point of the grid; the slow test takes them all."""
    recipes = [recipe_of(*point) for point in itertools.islice(settings(), 0, None, 41)]
    accepted = [recipe for recipe, mistakes in recipes if not mistakes]
    assert len(accepted) >= 15
    train_and_check(accepted)


@pytest.mark.slow
def test_all_that_is_accepted_trains_as_it_promises_and_the_rest_is_refused_before_it_begins():
    recipes = [recipe_of(*point) for point in settings()]
    accepted = [recipe for recipe, mistakes in recipes if not mistakes]
    kinds = {
        (recipe.objective.name, recipe.objective.complementary, recipe.curriculum.clip_search is None)
        for recipe in accepted
    }
    assert {name for name, *_ in kinds} == set(GRID["name"])  # and none is refused in every setting
    assert {("block", True, True), ("block", False, False)} <= kinds and ("block", True, False) not in kinds
    train_and_check(accepted)
