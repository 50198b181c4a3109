"""What has to be known of a model beside its weights, so that a checkpoint and its export are loaded as the same: in an export a key of config.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dlm_ray.checkpoint.commit import Manifest
from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.objective import NAMES, Sampling

KEY = "dlm_ray"
"""Of config.json; stock transformers keeps it and does not look at it."""
OBJECTIVE_FILE = "dlm_ray_objective.safetensors"
"""In an export: what the objective has learned beside the network, if anything."""


class Description(BaseModel):
    """What a model is: its objective, its tokenizer, how its text is sampled, and what can be asked of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    objective: str
    """`objective.name` of the recipe."""
    is_causal: bool
    exponents: Literal["per_token", "scalar"] = "per_token"
    """Of genmd4."""
    simplex: dict[str, Any] | None = None
    """Of ssd_lm."""
    capabilities: dict[str, Any]
    """Of the manifest."""
    sampling: Sampling
    tokenizer: dict[str, Any]
    """A TokenizerIdentity."""

    @classmethod
    def of(cls, manifest: Manifest) -> Description:
        """The description of a checkpoint."""
        objective = manifest.recipe.get("objective", {})
        return cls(
            objective=manifest.model["objective"],
            is_causal=manifest.model["is_causal"],
            exponents=objective.get("exponents", "per_token"),
            simplex=objective.get("simplex"),
            capabilities=manifest.capabilities,
            sampling=Sampling(**manifest.recipe.get("sampling", {})),
            tokenizer=manifest.tokenizer,
        )

    @classmethod
    def of_config(cls, fields: dict[str, Any], where: str) -> Description | None:
        """The description in the config.json of an export; None if the folder is none of ours.

        Raises:
            DamageError: if it cannot be read.
        """
        if KEY not in fields:
            return None
        try:
            return cls.model_validate(fields[KEY])
        except ValidationError as error:
            raise DamageError(
                f"{where}: {KEY} in config.json cannot be read: {error}; export the checkpoint again with this version"
            ) from error


def check_restorable(name: str, where: str) -> None:
    """Raises UserError for an objective of somebody's own, which nothing but training can build yet."""
    if name not in NAMES:
        raise UserError(
            f"{where} was trained with objective.name={name}, which this version restores for training alone: loaded, it would be sampled and scored "
            f"as another objective; sample, eval, export, serve and sweep need one of {', '.join(NAMES)}"
        )
