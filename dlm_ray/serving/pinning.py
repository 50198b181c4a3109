"""Resolve the checkpoints of a service before it starts, so that all replicas load the same steps at any time."""

from __future__ import annotations

from pathlib import Path

from dlm_ray.checkpoint import weights
from dlm_ray.checkpoint.description import Description
from dlm_ray.checkpoint.manifest import read_manifest
from dlm_ray.checkpoint.pretrained import open_pretrained
from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Model, Server


def pinned(server: Server) -> Server:
    """Return the settings with the last step of every run directory, absolute paths, model names and kinds of weights.

    Raises:
        UserError: with the key of every checkpoint that is missing, cannot be read or lacks the requested weights.
    """
    problems, models = [], []
    for index, model in enumerate(server.served):
        try:
            models.append(_pinned(model))
        except UserError as error:
            key = f"models.{index}.checkpoint" if server.models else "checkpoint"
            problems.append(f"{key}={model.checkpoint}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    if server.checkpoint is not None:
        return server.of(models[0])
    return server.model_copy(update={"models": tuple(models)})


def _pinned(model: Model) -> Model:
    path, kind = weights.our_checkpoint(model.checkpoint), model.weights
    if path is not None:
        manifest = read_manifest(path)
        Description.of(manifest).objective_settings(path)  # raises if a custom objective cannot be imported
        prefix = weights.weight_prefix(manifest.arrays, kind, path)
        kind = "ema" if prefix == "ema" else "raw"
    else:
        path = model.checkpoint
        open_pretrained(path)
        if kind is not None:
            raise UserError(
                f"weights={kind} chooses between the weights of a checkpoint of dlm_ray, and this is not one"
            )
    if Path(path).exists():
        path = str(Path(path).absolute())  # replicas start in another directory
    return Model(checkpoint=path, name=model.model_name, weights=kind)
