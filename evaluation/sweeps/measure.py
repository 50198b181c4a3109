"""What every trial of a sweep is measured by when it has ended, at rows and draws that are the same for all: bound, variances, loss by t, speed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from dlm_ray.evaluation.studies.variance import over_draws

from dlm_ray.checkpoint import commit
from dlm_ray.checkpoint.weights import our_checkpoint
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.sweep import Measure
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import DrawKey, maskable_positions
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.generation.loading import load
from dlm_ray.generation.text_model import TextModel
from dlm_ray.training import setup

_SEED = 0
_BATCH_ROWS = 16


def measure(run_dir: str, asked: Measure, data: str) -> dict[str, Any]:
    """Measures the last checkpoint of a run.

    Args:
        run_dir: of the trial.
        asked: how many rows and draws.
        data: the folder whose held-out rows are scored.

    Returns:
        step; bits_per_byte (over all of t, whatever was trained) with ci95_documents and ci95_draws; nats and bytes by document, for pairs;
        nelbo_variance, the mean of `variances` [variance_draws], both None for an autoregressive model and for a single block of text;
        gradient_variance if it is asked for;
        nll_by_t and tokens_per_second from the run's own log.
    """
    checkpoint = our_checkpoint(run_dir)
    assert checkpoint is not None, f"{run_dir} holds a checkpoint: the trial had ended"
    manifest = commit.read_manifest(checkpoint)
    model = load(checkpoint)
    scored = model.score(data, max_sequences=asked.sequences, draws_per_sequence=asked.draws_per_sequence, seed=_SEED)
    logged = manifest.extra["metrics"]
    found: dict[str, Any] = {
        "step": manifest.step,
        "bits_per_byte": scored.bits_per_byte,
        "is_bound": scored.is_bound,
        "ci95_documents": likelihood.documents_interval(scored.nats, scored.num_bytes),
        "ci95_draws": likelihood.draws_interval(scored.draw_totals, float(scored.num_bytes.sum())),
        "nats": scored.nats.tolist(),
        "bytes": scored.num_bytes.tolist(),
        "nll_by_t": logged.get("validation", {}).get("nll_by_t"),
        "tokens_per_second": logged.get("tokens_per_second"),
        "nelbo_variance": None,
        "gradient_variance": None,
        "variances": None,
    }
    if model.is_causal:
        return found
    objective = _trained(Recipe.model_validate(manifest.recipe), manifest.model, model)
    variances = block_variances(
        model, objective, read_split(data, "held_out", asked.variance_sequences), asked.variance_draws
    )
    if variances is not None:
        found |= {"variances": variances, "nelbo_variance": float(np.mean(variances))}
    if asked.gradient_draws:
        rows = read_split(data, "train", asked.gradient_sequences)
        options = {
            "document_mask": model.document_mask,
            "num_losses": 2,
            "num_gradients": asked.gradient_draws,
            "seed": _SEED,
        }
        found["gradient_variance"] = over_draws(model.denoiser, objective, rows, **options)["gradient_variance"]
    return found


def block_variances(model: TextModel, objective: Any, rows: Any, num_draws: int) -> list[float] | None:
    """BD3-LM's statistic (arXiv 2503.09573, section 5): the variance over blocks of a block's mean weighted loss, once for each of `num_draws`.

    A row is one block where the objective has none. A row stands in a batch as often as in training, so that draws that belong in pairs are
    of one text. Trials with the same rows, and as many draws a row, see the same random numbers, so that their values pair up.

    Returns:
        [num_draws] in nats a token squared; None if there is but one block.
    """
    x_0 = np.stack([row.input_ids for row in rows]).astype(np.int64)
    document_ids = np.stack([row.document_ids for row in rows]).astype(np.int32)
    x_0, document_ids = likelihood.pad_to_blocks(objective, x_0, document_ids)
    x_0, document_ids = (array.repeat(objective.draws_per_sequence, axis=0) for array in (x_0, document_ids))
    size = getattr(objective, "block_tokens", x_0.shape[1])
    found = []
    for number in range(num_draws):
        losses = []
        for first in range(0, len(x_0), _BATCH_ROWS):
            part = slice(first, first + _BATCH_ROWS)
            maskable = maskable_positions(document_ids[part])
            key = DrawKey(_SEED, number, range(len(x_0))[part], len(x_0))
            draw = objective.draw(key, x_0[part], maskable).to(model.device)
            visible = Visibility(
                "bidirectional", document_ids=documents_apart(document_ids[part], model.document_mask, model.device)
            )
            with torch.no_grad():
                nats = objective.training_nats(
                    model.denoiser, Batch(torch.from_numpy(x_0[part]).to(model.device), draw, visible)
                )
            count = draw.num_scored
            weighted = nats.double().cpu().numpy()[:count]
            blocks = np.bincount(
                draw.scored[:count].cpu().numpy() // size, weights=weighted, minlength=maskable.size // size
            )
            losses.append(blocks[maskable.reshape(-1, size).any(1)] / size)
        of_blocks = np.concatenate(losses)
        if len(of_blocks) < 2:
            return None
        found.append(float(of_blocks.var(ddof=1)))
    assert all(math.isfinite(one) for one in found), "a committed checkpoint scores finitely"
    return found


def _trained(recipe: Recipe, network: dict[str, Any], model: TextModel) -> Any:
    """The objective that was trained. A clip's weight is the paper's 1/p for all, because a constant would change the variance by its square."""
    objective = setup.build_objective(recipe, setup.Network.from_manifest(network), model.sequence_length)
    objective.load_state_dict(model.objective.state_dict())
    process = getattr(objective, "process", None)
    if isinstance(process, Absorbing) and process.clip is not None:
        objective.process = replace(process, clip=replace(process.clip, weight="paper"))
    return objective.to(model.device).requires_grad_(False)
