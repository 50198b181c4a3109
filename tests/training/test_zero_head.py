"""A network that says nothing gives ln V nats a token: from validation in training, from `eval` and from `/v1/score`
alike.

Its head is zeros, so that every token has the same probability whatever the input is. V counts the tokens that can be
predicted: the mask token's
own row has no logit, and a mask token that is one of the vocabulary leaves V - 1.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.recipes import tiny_recipe

from dlm_ray.config.server import Server
from dlm_ray.data.reading import read_split
from dlm_ray.generation.loading import load
from dlm_ray.serving.processor import RequestProcessor
from dlm_ray.training import loop

pytestmark = pytest.mark.long

ROWS, DRAWS = 24, 4
SHIFTED = {"epsilon_0": 0.2, "epsilon_1": 0.3}


def _schedule(name, **fields):
    return {"objective__schedule": {"name": name, **fields}}


def _block(size, **fields):
    return {"objective": {"name": "block", "block_tokens": size, **fields}}


CASES = {
    "autoregressive": {"objective__name": "autoregressive"},
    "masked": {},
    "masked, no shift": {"objective__shift": False},
    **{
        f"masked, {name}": _schedule(name)
        for name in ("cosine", "cosine_alpha", "geometric", "log", "square", "square_root")
    },
    "masked, polynomial": _schedule("polynomial", exponent=3.0),
    "masked, shifted ends": _schedule("linear", **SHIFTED),
    "masked, geometric with shifted ends": _schedule("geometric", **SHIFTED),
    "masked, T = 1": {"objective__num_timesteps": 1},
    "masked, T = 5, shifted ends": {"objective__num_timesteps": 5, **_schedule("cosine", **SHIFTED)},
    "masked, count": {"objective__mask_sampler": "count"},
    "masked, clip": {"objective__clip": {"beta": 0.3, "omega": 0.8}},
    "masked, flat weights, divided by masked tokens": {
        "objective__weight": "flat",
        "objective__normalize_by": "global_masked",
    },
    "masked, pairs": {"objective__complementary": True, "objective__draws_per_sequence": 2},
    "masked, context weights": {"objective__context_weights": 0.3},
    "masked, an existing id is the mask": {"model__mask_token": "unused"},
    "block, K = 1": _block(1),
    "block, K = 8, shifted ends": _block(8, schedule=SHIFTED),
    "block, K = 8, clip": _block(8, clip={"beta": 0.3, "omega": 0.8, "weight": "paper", "enforce": "counts"}),
    "block, K = L": _block(32, schedule={"name": "square"}),
    "genmd4": {"objective__name": "genmd4"},
    "genmd4, scalar": {"objective": {"name": "genmd4", "exponents": "scalar"}},
    "sedd, shifted ends": {"objective": {"name": "sedd", "schedule": SHIFTED}},
    "d3pm, T = 7, shifted ends": {"objective": {"name": "d3pm", "num_timesteps": 7, "schedule": SHIFTED}},
    "tauldr, one token, shifted ends": {"objective": {"name": "tauldr", "schedule": SHIFTED}},
    "tauldr, all masked, geometric": {
        "objective": {"name": "tauldr", "estimator": "all_masked", "schedule": {"name": "geometric"}}
    },
}
ARCHITECTURE = {
    "family": "llama",
    "width": 8,
    "num_layers": 1,
    "num_heads": 2,
    "max_positions": 64,
    "tie_embeddings": False,
    "zero_head": True,
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_a_head_of_zeros_is_ln_v_nats_a_token_wherever_a_bound_is_reported(changes, data_folder, tmp_path):
    if "model__mask_token" in changes:
        present = {
            token
            for split in ("train", "held_out")
            for row in read_split(data_folder, split)
            for token in row.input_ids.tolist()
        }
        changes = {"model__mask_token": min(set(range(299)) - present)}
    own = {
        "model__architecture": ARCHITECTURE,
        "optimizer": {"learning_rate": 1e-30, "warmup_steps": 0},
        "ema": None,
        "training": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 4},
        "validation": {"every_steps": 1, "sequences": ROWS},
    }
    validated = loop.fit(tiny_recipe(data_folder, "zeros", **own, **changes), tmp_path)["validation"]["nats_per_token"]
    model = load(tmp_path)
    is_scalar = changes.get("objective", {}).get("exponents") == "scalar"
    if is_scalar:
        model.objective.theta.fill_(1.3)  # a scalar exponent changes the masks and not the bound
    mask_id, rows = model.denoiser.mask_id, model.denoiser.network.config.vocab_size
    nats = math.log(rows - (mask_id is not None))

    same = model.score(data_folder, max_sequences=ROWS, draws_per_sequence=DRAWS)
    if not is_scalar:
        assert validated == pytest.approx(same.nats.sum() / same.num_tokens, rel=1e-5)
    _assert_within(
        nats, model.score(data_folder, max_sequences=ROWS, draws_per_sequence=16).draw_totals / same.num_tokens
    )

    processor = RequestProcessor(
        model, SimpleNamespace(block_sizes=(None,)), Server(checkpoint=str(tmp_path), name="zeros")
    )
    scored = [processor.score(list(range(1, 33)), 31, 16, seed) for seed in range(6)]
    _assert_within(nats, np.array([one["nats"] / one["tokens"] for one in scored]))


def _assert_within(nats, values):
    """The mean is within three standard errors, or rounding, of `nats`, and the error is small enough to tell."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    assert error < 0.1 * nats
    assert values.mean() == pytest.approx(nats, rel=1e-4, abs=3 * error)
