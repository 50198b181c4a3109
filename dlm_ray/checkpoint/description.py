"""The description of a model that a checkpoint and its export share, so that both load as the same model.

An export has it as a key of config.json.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dlm_ray.checkpoint.manifest import Manifest
from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.manifest_fields import Capabilities, JsonObject, Stored, TokenizerFields
from dlm_ray.config.objective import resolve_settings
from dlm_ray.config.sampling import Sampling
from dlm_ray.config.trees import Tree

KEY = "dlm_ray"
"""The key of config.json; stock transformers keeps it and does not read it."""
OBJECTIVE_FILE = "dlm_ray_objective.safetensors"
"""The file of an export that holds the objective's own parameters, if it has any."""


class Description(BaseModel):
    """The objective, the tokenizer, the sampling defaults and the capabilities of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    objective: str
    """`objective.name` of the recipe; the import path of a custom class."""
    settings: Tree = {}
    """The recipe's `objective` section, from which the objective is restored."""
    is_causal: bool
    """Whether the attention of the network is causal."""
    capabilities: Stored[Capabilities]
    """Capabilities of the manifest."""
    sampling: Sampling
    """Sampling defaults of the recipe."""
    tokenizer: Stored[TokenizerFields]
    """Fields of a `TokenizerIdentity`."""

    @model_validator(mode="before")
    @classmethod
    def _with_settings(cls, fields: object) -> object:
        """Convert the fields of earlier exports, which had three settings of the objective only."""
        if not isinstance(fields, dict) or "settings" in fields:
            return fields
        fields = dict(fields)
        settings = {key: fields.pop(key) for key in ("exponents", "simplex") if key in fields}
        if fields.get("objective") == "block":
            settings["block_tokens"] = fields.get("capabilities", {}).get("block_tokens")
        return {**fields, "settings": settings}

    @classmethod
    def of(cls, manifest: Manifest) -> Description:
        """Return the description of a checkpoint."""
        return cls(
            objective=manifest.model["objective"],
            settings=manifest.recipe.get("objective", {}),
            is_causal=manifest.model["is_causal"],
            capabilities=manifest.capabilities,
            sampling=Sampling(**manifest.recipe.get("sampling", {})),
            tokenizer=manifest.tokenizer,
        )

    @classmethod
    def of_config(cls, fields: JsonObject, where: str) -> Description | None:
        """Return the description in the config.json of an export; None for a folder from another source.

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

    def objective_settings(self, where: str) -> Tree:
        """Return the settings for `objectives.restore`, with custom classes imported.

        Args:
            where: the checkpoint or export, for the message.

        Raises:
            UserError: if a custom class cannot be imported or does not meet its protocol.
        """
        try:
            return resolve_settings({**self.settings, "name": self.objective})
        except UserError as error:
            raise UserError(f"{where} cannot be restored: {error}") from error
