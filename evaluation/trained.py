"""What measurements need of a trained model: its sequences as arrays, its attention mask, its training objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dlm_ray.checkpoint.manifest import read_manifest
from dlm_ray.config.recipe import Recipe
from dlm_ray.data.reading import DataSequence
from dlm_ray.diffusion.denoiser import Objective
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.generation.text_model import TextModel
from dlm_ray.training import setup


def stack(sequences: Sequence[DataSequence]) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids [N, L] int64 and the document ids [N, L] int32 of packed sequences."""
    x_0 = np.stack([sequence.input_ids for sequence in sequences]).astype(np.int64)
    document_ids = np.stack([sequence.document_ids for sequence in sequences]).astype(np.int32)
    return x_0, document_ids


def visibility_of(model: TextModel) -> Callable[[np.ndarray], Visibility]:
    """Return the function from document ids [B, L] to the attention mask under which the model was trained."""
    return lambda document_ids: Visibility(
        model.pattern, document_ids=documents_apart(document_ids, model.document_mask, model.device)
    )


def trained_objective(checkpoint: str, model: TextModel) -> Objective:
    """Return the objective that a checkpoint was trained with, frozen, with its learned parameters.

    It may differ from `model.objective`, which scores: training may clip the masked share or weight the loss otherwise.

    Args:
        checkpoint: a step directory.
        model: the model loaded from it.
    """
    manifest = read_manifest(checkpoint)
    network = setup.Network.from_manifest(manifest.model)
    objective: Any = setup.build_objective(Recipe.model_validate(manifest.recipe), network, model.sequence_length)
    objective.load_state_dict(model.objective.state_dict())
    frozen: Objective = objective.to(model.device).requires_grad_(False)
    return frozen
