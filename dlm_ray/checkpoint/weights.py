"""The weights of a checkpoint of ours, as the evaluation, the samplers and a run that starts from it want them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from dlm_ray.checkpoint import commit, listing
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
    """Fills Hugging Face-named tensors from a checkpoint of ours; names in `extra_rows` get a row more than the checkpoint has.

    Args:
        checkpoint: a step directory.
        tensors: by Hugging Face name.
        weights: `ema`, `raw`, or None: the average if the run kept one.
        extra_rows: names of the vocabulary's tensors that are extended.
        seed: of the new rows.

    Returns:
        The norms of the new rows, by name.
    """
    manifest = commit.read_manifest(checkpoint)
    prefix = weight_prefix(manifest.arrays, weights, checkpoint)
    commit.load(checkpoint, {f"{prefix}.{name}": tensor for name, tensor in tensors.items() if name not in extra_rows})
    return {
        name: fill_with_extra_row(tensors[name], commit.read_tensor(checkpoint, f"{prefix}.{name}"), name, seed)
        for name in sorted(extra_rows)
    }


def load_objective(checkpoint: str, parameters: Mapping[str, Tensor], weights: str | None = None) -> None:
    """Fills an objective's own parameters by their names, from the average or the raw ones as `load_weights` does."""
    if parameters:
        prefix = weight_prefix(commit.read_manifest(checkpoint).arrays, weights, checkpoint)
        stored = "ema.objective" if prefix == "ema" else "objective"
        commit.load(checkpoint, {f"{stored}.{name}": tensor for name, tensor in parameters.items()})


def weight_prefix(arrays: Collection[str], weights: str | None, checkpoint: str) -> str:
    """`ema` or `model`: under which names the checkpoint holds the weights that are asked for.

    Raises:
        UserError: if the average is asked for and the run kept none.
    """
    has_ema = any(name.startswith("ema.") for name in arrays)
    if weights == "ema" and not has_ema:
        raise UserError(
            f"{checkpoint} holds no averaged weights, because its recipe has no `ema`; leave --weights out or say --weights raw"
        )
    return "ema" if has_ema and weights != "raw" else "model"


def our_checkpoint(path: str) -> str | None:
    """The step directory that `path` means, if it is a checkpoint of ours or a run directory with one; None for anything else."""
    check_url(path, "CHECKPOINT")
    if listing.is_committed(path):
        return path
    return listing.latest(path)
