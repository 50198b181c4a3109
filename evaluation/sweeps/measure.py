"""The measurement of a finished trial: bound, variances, loss by t and speed, on data and draws that all share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from dlm_ray.evaluation.studies.variance import draw_variances
from dlm_ray.evaluation.trained import stack, trained_objective, visibility_of

from dlm_ray.checkpoint.manifest import read_manifest
from dlm_ray.checkpoint.weights import our_checkpoint
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.sweep import Measure
from dlm_ray.data.reading import DataSequence, read_split
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import DrawKey, maskable_positions
from dlm_ray.generation.loading import load
from dlm_ray.generation.text_model import TextModel

_SEED = 0
_BATCH_SIZE = 16


def measure(run_dir: str, settings: Measure, data: str) -> JsonObject:
    """Measure the last checkpoint of a trial.

    Args:
        run_dir: the run directory of the trial.
        settings: how many sequences and draws to measure on.
        data: the data folder whose held-out split is scored.

    Returns:
        step: the step of the checkpoint.
        bits_per_byte: the bound over all of t, whatever was trained, with ci95_documents and ci95_draws; `nats` and
            `bytes` by document, to compare trials in pairs.
        nelbo_variance: the mean of `variances` [variance_draws]; both are None for an autoregressive model and for a
            single block.
        gradient_variance: None unless `settings` asks for it.
        nll_by_t, tokens_per_second: from the log of the run.
    """
    checkpoint = our_checkpoint(run_dir)
    assert checkpoint is not None, f"{run_dir} has a checkpoint, because the trial is finished"
    manifest = read_manifest(checkpoint)
    model = load(checkpoint)
    scored = model.score(
        data, max_sequences=settings.sequences, draws_per_sequence=settings.draws_per_sequence, seed=_SEED
    )
    logged = manifest.extra["metrics"]
    measured: JsonObject = {
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
    if not model.is_causal:
        measured |= _variances(checkpoint, model, settings, data)
    return measured


def _variances(checkpoint: str, model: TextModel, settings: Measure, data: str) -> JsonObject:
    """Return the variances of the training objective over draws: of its blocks' bounds, and of its gradient."""
    objective = _comparable(trained_objective(checkpoint, model))
    measured: JsonObject = {}
    held_out = read_split(data, "held_out", settings.variance_sequences)
    variances = block_variances(model, objective, held_out, settings.variance_draws)
    if variances is not None:
        measured |= {"variances": variances, "nelbo_variance": float(np.mean(variances))}
    if settings.gradient_draws:
        batch = read_split(data, "train", settings.gradient_sequences)
        num_gradients = settings.gradient_draws
        gradient = draw_variances(model, objective, batch, num_losses=2, num_gradients=num_gradients, seed=_SEED)
        measured["gradient_variance"] = gradient["gradient_variance"]
    return measured


def block_variances(
    model: TextModel, objective: Any, sequences: Sequence[DataSequence], num_draws: int
) -> list[float] | None:
    """Return, for each draw, the variance over blocks of a block's mean weighted loss (BD3-LM, 2503.09573, section 5).

    A sequence is one block if the objective has none. A batch holds each sequence as often as in training, so that
    paired draws are of one text. Trials with the same sequences and draws per sequence see the same random numbers,
    which pairs their values.

    Args:
        model: the trained network.
        objective: the objective as it was trained.
        sequences: the text.
        num_draws: the number of draws.

    Returns:
        [num_draws] in (nats per token)^2; None if there is only one block.
    """
    x_0, document_ids = likelihood.pad_to_blocks(objective, *stack(sequences))
    x_0, document_ids = (array.repeat(objective.draws_per_sequence, axis=0) for array in (x_0, document_ids))
    variances = []
    for number in range(num_draws):
        losses = np.concatenate(list(_block_losses(model, objective, x_0, document_ids, number)))
        if len(losses) < 2:
            return None
        variances.append(float(losses.var(ddof=1)))
    assert all(math.isfinite(variance) for variance in variances), "a committed checkpoint scores finitely"
    return variances


@torch.no_grad()
def _block_losses(
    model: TextModel, objective: Any, x_0: np.ndarray, document_ids: np.ndarray, number: int
) -> Iterator[np.ndarray]:
    """Yield the mean weighted losses of the blocks with text, batch by batch, for draw `number` of sequences [N, L]."""
    num_sequences, length = x_0.shape
    size: int = getattr(objective, "block_tokens", None) or length
    for first in range(0, num_sequences, _BATCH_SIZE):
        part = slice(first, first + _BATCH_SIZE)
        maskable = maskable_positions(document_ids[part])
        key = DrawKey(_SEED, number, range(num_sequences)[part], num_sequences)
        draw = objective.draw(key, x_0[part], maskable).to(model.device)
        visibility = visibility_of(model)(document_ids[part])
        batch = Batch(torch.from_numpy(x_0[part]).to(model.device), draw, visibility)
        nats = objective.training_nats(model.denoiser, batch).double().cpu().numpy()[: draw.num_scored]
        block_of = draw.scored[: draw.num_scored].cpu().numpy() // size
        sums = np.bincount(block_of, weights=nats, minlength=maskable.size // size)
        yield sums[maskable.reshape(-1, size).any(1)] / size


def _comparable(objective: Any) -> Any:
    """Return the objective with the paper's weight 1/p if it has a clip.

    A weight with another constant factor would change the variance by the square of that factor.
    """
    process = getattr(objective, "process", None)
    if isinstance(process, Absorbing) and process.clip is not None:
        objective.process = replace(process, clip=replace(process.clip, weight="paper"))
    return objective
