"""The checkpoints of a service, found before anything starts and held: every replica, whenever it starts, loads the same steps."""

from __future__ import annotations

from pathlib import Path

from dlm_ray.checkpoint import commit, weights
from dlm_ray.checkpoint.description import Description
from dlm_ray.checkpoint.pretrained import open_pretrained
from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Model, Server


def pinned(server: Server) -> Server:
    """The same with every run directory's last step in its place, every folder's whole path, every name, and the kind of weights.

    Raises:
        UserError: with every checkpoint that is not there, cannot be read or has not the weights that are asked for, by its key.
    """
    problems, models = [], []
    for place, model in enumerate(server.served):
        try:
            models.append(_pinned(model))
        except UserError as error:
            problems.append(f"{f'models.{place}.' if server.models else ''}checkpoint={model.checkpoint}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return (
        server.of(models[0]) if server.checkpoint is not None else server.model_copy(update={"models": tuple(models)})
    )


def _pinned(model: Model) -> Model:
    path, kind = weights.our_checkpoint(model.checkpoint), model.weights
    if path is not None:
        manifest = commit.read_manifest(path)
        Description.of(manifest).objective_settings(path)  # refuses a custom objective that cannot be imported
        prefix = weights.weight_prefix(manifest.arrays, kind, path)
        kind = "ema" if prefix == "ema" else "raw"
    else:
        path = model.checkpoint
        open_pretrained(path)
        if kind is not None:
            raise UserError(f"weights={kind} chooses between the weights of a checkpoint of ours, and this is none")
    if Path(path).exists():
        path = str(Path(path).absolute())  # a replica starts in another directory
    return Model(checkpoint=path, name=model.model_name, weights=kind)
