"""The weights of a dlm_ray checkpoint, for evaluation, sampling, and a run that starts from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from dlm_ray.checkpoint import commit, listing
from dlm_ray.checkpoint.manifest import read_manifest
from dlm_ray.checkpoint.model_files import fill_with_extra_row
from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import check_url


def load_weights(
    checkpoint: str,
    tensors: Mapping[str, Tensor],
    *,
    weights: str | None = None,
    extra_rows: Collection[str] = (),
    seed: int = 0,
) -> dict[str, float]:
    """Fill tensors with Hugging Face names from a dlm_ray checkpoint; tensors in `extra_rows` have one additional row.

    Args:
        checkpoint: a step directory.
        tensors: the tensors by Hugging Face name.
        weights: `ema`, `raw`, or None: the average if the run kept one.
        extra_rows: names of vocabulary tensors with one row more than the checkpoint.
        seed: the seed of the new rows.

    Returns:
        The norms of the new rows, by name.
    """
    manifest = read_manifest(checkpoint)
    prefix = weight_prefix(manifest.arrays, weights, checkpoint)
    commit.load(checkpoint, {f"{prefix}.{name}": tensor for name, tensor in tensors.items() if name not in extra_rows})
    return {
        name: fill_with_extra_row(tensors[name], commit.read_tensor(checkpoint, f"{prefix}.{name}"), name, seed)
        for name in sorted(extra_rows)
    }


def load_objective(checkpoint: str, parameters: Mapping[str, Tensor], weights: str | None = None) -> None:
    """Fill the parameters of an objective by name, from the average or the raw ones, as `load_weights` does."""
    if parameters:
        prefix = weight_prefix(read_manifest(checkpoint).arrays, weights, checkpoint)
        stored = "ema.objective" if prefix == "ema" else "objective"
        commit.load(checkpoint, {f"{stored}.{name}": tensor for name, tensor in parameters.items()})


def weight_prefix(arrays: Collection[str], weights: str | None, checkpoint: str) -> str:
    """Return `ema` or `model`, the prefix of the requested weights in the checkpoint.

    Raises:
        UserError: if the average is requested and the run kept none.
    """
    has_ema = any(name.startswith("ema.") for name in arrays)
    if weights == "ema" and not has_ema:
        raise UserError(
            f"{checkpoint} holds no averaged weights, because its recipe has no `ema`; omit `weights` or "
            "set weights=raw"
        )
    return "ema" if has_ema and weights != "raw" else "model"


def our_checkpoint(path: str) -> str | None:
    """Return the step directory of a dlm_ray checkpoint or of a run directory's last one; None for anything else."""
    check_url(path, "CHECKPOINT")
    if listing.is_committed(path):
        return path
    return listing.latest(path)
